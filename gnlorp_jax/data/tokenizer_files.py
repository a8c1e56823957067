"""What lies beside a tokenizer.json: names of tokens, and chat templates.

`tokenizer.json` says how text becomes ids. Which of the ids ends a document,
and what transformers makes of a conversation, stands in other files.
"""

import dataclasses
import json
import logging
import pathlib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

logger = logging.getLogger(__name__)

# What transformers calls them, and chat templates with it.
TOKEN_NAMES = (
  'bos_token',
  'eos_token',
  'unk_token',
  'sep_token',
  'pad_token',
  'cls_token',
  'mask_token',
)

CONFIG, GENERATION = 'tokenizer_config.json', 'generation_config.json'
_SPECIAL, _MODEL = 'special_tokens_map.json', 'config.json'
_TEMPLATE, _TEMPLATES = 'chat_template.jinja', 'additional_chat_templates'

# Of a tokenizer_config.json, what a copy of it must not say: which code makes
# the tokenizer, where it came from, and what is put around a text.
_NOT_KEPT = (
  'add_bos_token',
  'add_eos_token',
  'auto_map',
  'backend',
  'device_map',
  'from_slow',
  'init_inputs',
  'is_local',
  'local_files_only',
  'merges_file',
  'name_or_path',
  'processor_class',
  'slow_tokenizer_class',
  'special_tokens_map_file',
  'tokenizer_class',
  'tokenizer_file',
  'use_fast',
  'vocab_file',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
  """What the files beside a tokenizer.json say.

  Attributes:
    config: Contents of `tokenizer_config.json`; what it does not name, from the
      other files. A token that it holds as null is one that the tokenizer has
      not.
    eos_ids: Ids that these files let a generation end with.
    templates: Chat templates that are files of their own, by path.
  """

  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  eos_ids: tuple[int, ...] = ()
  templates: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def chat_template(self) -> str | None:
    """The template of a conversation, Jinja; None if there is none.

    Of several with names, the one called ``default``. Files count before
    `config`, as in transformers.
    """
    if self.templates:
      return self.templates.get(_TEMPLATE)
    found = self.config.get('chat_template')
    if isinstance(found, list):
      found = {entry['name']: entry['template'] for entry in found}
    return found.get('default') if isinstance(found, dict) else found

  def token(self, name: str) -> str | None:
    """A token that `config` names, such as `eos_token`; None if it does not."""
    return _plain(self.config.get(name))

  def lacks(self, name: str) -> bool:
    """Whether `config` says that there is no such token."""
    return name in self.config and self.config[name] is None

  def kept(self) -> dict[str, Any]:
    """What of `config` belongs into a copy of the tokenizer."""
    return {
      # Properties of a token stand in the tokenizer.json.
      key: _plain(value) if key.endswith('_token') else value
      for key, value in self.config.items()
      if key not in _NOT_KEPT
    }

  def with_chat_template(self, template: str) -> 'Beside':
    """The same with another template of a conversation."""
    config = {k: v for k, v in self.config.items() if k != 'chat_template'}
    templates = {**self.templates, _TEMPLATE: template}
    return dataclasses.replace(self, config=config, templates=templates)

  def write_templates(self, folder: pathlib.Path) -> None:
    """Writes the templates that are files."""
    for path, text in self.templates.items():
      (folder / path).parent.mkdir(exist_ok=True)
      (folder / path).write_text(text, encoding='utf-8')


def read(folder: pathlib.Path, backend: tokenizers.Tokenizer) -> Beside:
  """Reads what lies beside a tokenizer.json; every file may be absent.

  Where they contradict each other `tokenizer_config.json` counts first, then
  `special_tokens_map.json`, then `generation_config.json`. The latter's ids of
  the end of a sequence all end a generation. Where it is absent the ids of the
  model's `config.json` take its place, as in transformers.

  Args:
    folder: The folder.
    backend: The tokenizer, which knows the ids.

  Raises:
    ValueError: If a file is no JSON object, its ids are no integers, or its
      tokens or templates no texts.

  Note:
    transformers prefers `special_tokens_map.json` if `tokenizer_config.json`
    has no `added_tokens_decoder`. Where the two differ a warning says so.
  """
  config = read_object(folder / CONFIG)
  _check_shape(folder / CONFIG, config)
  special = read_object(folder / _SPECIAL)
  _check_shape(folder / _SPECIAL, special)
  for name, value in special.items():
    value = _plain(value)
    is_needed = name == 'eos_token' and config.get(name) is None
    if name not in config or is_needed:
      config[name] = value
    elif name.endswith('_token') and _plain(config[name]) != value:
      logger.warning(
        '%s: %s names %r as %s, %s names %r; the former counts.',
        folder,
        CONFIG,
        _plain(config[name]),
        name,
        _SPECIAL,
        value,
      )
  path = folder / GENERATION
  path = path if path.is_file() else folder / _MODEL
  generation = read_object(path)
  ids = {
    name: _ids(path, generation, f'{name}_id', backend)
    for name in ('eos_token', 'bos_token', 'pad_token')
  }
  for name, found in ids.items():
    is_needed = name == 'eos_token' and config.get(name) is None
    if found and (name not in config or is_needed):
      config[name] = backend.id_to_token(found[0])
  return Beside(
    config=config, eos_ids=ids['eos_token'], templates=_templates(folder)
  )


def _check_shape(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Raises ValueError for tokens and templates that are none."""
  for name in TOKEN_NAMES:
    value = _plain(config.get(name))
    if value is not None and not isinstance(value, str):
      raise ValueError(
        f'{path} has {name}={reprlib.repr(value)}; expected a text, null, or '
        'an object whose "content" is one.'
      )
  found = config.get('chat_template')
  named = found if isinstance(found, list) else []
  is_list = all(
    isinstance(entry, dict)
    and isinstance(entry.get('name'), str)
    and isinstance(entry.get('template'), str)
    for entry in named
  )
  is_object = isinstance(found, dict) and all(
    isinstance(template, str) for template in found.values()
  )
  is_text = found is None or isinstance(found, str)
  if not (is_text or is_object or (isinstance(found, list) and is_list)):
    raise ValueError(
      f'{path} has chat_template={reprlib.repr(found)}; expected a text, '
      'or a list of objects with "name" and "template".'
    )


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; an absent file is an empty one.

  Raises:
    ValueError: If the file holds something else.
  """
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f'Cannot read {path}: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(
      f'{path} must hold a JSON object, not {reprlib.repr(value)}.'
    )
  return value


def processors(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
  """The parts of what a tokenizer does to ids at last, as `tokenizers` has it.

  A part of type TemplateProcessing, RobertaProcessing or BertProcessing puts
  special tokens around a text.
  """
  if backend.post_processor is None:
    return []
  return _parts(json.loads(backend.post_processor.__getstate__()))


def adds_prefix_space(backend: tokenizers.Tokenizer) -> bool | None:
  """Whether a space is put before a text; None for tokenizers of other kinds.

  Some versions of transformers set it anew, to what `tokenizer_config.json`
  says or to False.
  """
  if backend.pre_tokenizer is None:
    return None
  state = json.loads(backend.pre_tokenizer.__getstate__())
  return state.get('add_prefix_space')


def begins_with(parts: Sequence[Mapping[str, Any]], token_id: int) -> bool:
  """Whether one of `processors` puts a token at the beginning of a text."""
  for part in parts:
    if 'cls' in part and part['cls'][1] == token_id:
      return True
    first = next(iter(part.get('single', ())), {}).get('SpecialToken')
    if first and part['special_tokens'][first['id']]['ids'] == [token_id]:
      return True
  return False


def with_bos_alone(
  backend: tokenizers.Tokenizer, bos_id: int | None
) -> tokenizers.Tokenizer:
  """A copy that puts one token before a text, or none, and nothing after it.

  Args:
    backend: The tokenizer; left as it is.
    bos_id: The token; None for none.
  """
  bos = None if bos_id is None else backend.id_to_token(bos_id)

  def text(name: str, type_id: int) -> list[dict[str, Any]]:
    sequence = {'Sequence': {'id': name, 'type_id': type_id}}
    token = {'SpecialToken': {'id': bos, 'type_id': type_id}}
    return [sequence] if bos is None else [token, sequence]

  template = {
    'type': 'TemplateProcessing',
    'single': text('A', 0),
    'pair': text('A', 0) + text('B', 1),
    'special_tokens': {}
    if bos is None
    else {bos: {'id': bos, 'ids': [bos_id], 'tokens': [bos]}},
  }
  # These tell where in the text a token is, and add nothing.
  offsets = [p for p in processors(backend) if p['type'] == 'ByteLevel']
  state = json.loads(backend.to_str())
  state['post_processor'] = {
    'type': 'Sequence',
    'processors': [*offsets, template],
  }
  return tokenizers.Tokenizer.from_str(json.dumps(state))


def _parts(state: dict[str, Any]) -> list[dict[str, Any]]:
  if state['type'] != 'Sequence':
    return [state]
  return [part for inner in state['processors'] for part in _parts(inner)]


def _plain(value: Any) -> Any:
  """Tokens that are held with their properties, without them."""
  if isinstance(value, dict) and 'content' in value:
    return value['content']
  return [_plain(v) for v in value] if isinstance(value, list) else value


def _ids(
  path: pathlib.Path,
  generation: dict[str, Any],
  name: str,
  backend: tokenizers.Tokenizer,
) -> tuple[int, ...]:
  """The ids of a name that the tokenizer has tokens for."""
  value = generation.get(name)
  ids = value if isinstance(value, list) else [value] * (value is not None)
  if not all(type(i) is int for i in ids):
    raise ValueError(
      f'{path} has {name}={reprlib.repr(value)}; expected an integer or a list '
      'of integers.'
    )
  return tuple(i for i in ids if i >= 0 and backend.id_to_token(i) is not None)


def _templates(folder: pathlib.Path) -> dict[str, str]:
  paths = [folder / _TEMPLATE, *sorted((folder / _TEMPLATES).glob('*.jinja'))]
  return {
    path.relative_to(folder).as_posix(): path.read_text(encoding='utf-8')
    for path in paths
    if path.is_file()
  }
