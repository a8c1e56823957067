"""Models, tokenizers and texts from the Hugging Face hub.

Only a name that begins with `hf:` is asked of the hub:

* `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`: a model or a tokenizer; the
  revision is a branch, a tag or a commit, by default the branch `main`;
* `hf:OWNER/NAME:CONFIG:SPLIT@REVISION[:N]`: the first N documents of a data
  set, and with `[:]` all of them. Configuration, split (by default `train`) and
  revision may be left out, as in `hf:allenai/c4:en[:1000000]`. A number must be
  given because such a set may hold hundreds of gigabytes.

Files go to the library's own cache (`HF_HOME`), where complete ones stay if a
download breaks off. A name stands for one commit as long as a process lives.
Where the hub cannot be reached, the commit that the cache holds is taken, with
a warning; `HF_HUB_OFFLINE=1` asks for that without one. Tokens are the
library's affair (`hf auth login`, or `HF_TOKEN` in the environment): this
module never sees them.
"""

import functools
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from gnlorp_jax.disk import extras

logger = logging.getLogger(__name__)

PREFIX = 'hf:'

_REPOSITORY = r'hf:(?P<repository>\w[\w.-]*/\w[\w.-]*)'
_REVISION = r'(?:@(?P<revision>[\w][\w./-]*))?'
_MODEL = re.compile(_REPOSITORY + _REVISION)
_TEXTS = re.compile(
  _REPOSITORY
  + r'(?::(?P<config>[^:@\[\]]*))?(?::(?P<split>[\w.-]+))?'
  + _REVISION
  + r'(?P<slice>\[:(?P<limit>\d*)\])?'
)
# The hub puts it in every repository: what is fetched to learn of a commit.
_ANCHOR = '.gitattributes'
_REASON_LENGTH = 300

_CONFIG_FILES = ('config.json', 'generation_config.json')
_TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'additional_chat_templates/*.jinja',
)
# By their full names: repositories hold the same weights in other layouts too.
_WEIGHT_FILES = (
  'model.safetensors',
  'model-*-of-*.safetensors',
  'model.safetensors.index.json',
  'grid_8bit.safetensors',
)
_FILES = {
  'config': _CONFIG_FILES,
  'tokenizer': _CONFIG_FILES + _TOKENIZER_FILES,
  'model': _CONFIG_FILES + _TOKENIZER_FILES + _WEIGHT_FILES,
}
# Of which one must be there.
_NEEDED = {
  'config': ('config.json',),
  'tokenizer': ('tokenizer.json',),
  'model': ('model.safetensors', 'model.safetensors.index.json'),
}
_REMEDY = {
  'config': 'Name the repository of a model.',
  'tokenizer': 'Save it in that form by AutoTokenizer.from_pretrained(...)'
  '.save_pretrained(FOLDER) of transformers, and name the folder.',
  'model': 'Save it in that form by AutoModel.from_pretrained(...)'
  '.save_pretrained(FOLDER) of transformers, and name the folder.',
}


class Texts(NamedTuple):
  """A data set of texts.

  Attributes:
    spec: The name it was given by.
    repository: Owner and name.
    config: Its configuration; None for the only one.
    split: Its split.
    commit: The commit, 40 hexadecimal digits.
    limit: Documents to read; None reads all.
    is_reached: Whether the hub was there to ask for the commit.
  """

  spec: str
  repository: str
  config: str | None
  split: str
  commit: str
  limit: int | None
  is_reached: bool

  def documents(self, column: str = 'text') -> Iterator[Any]:
    """Reads the text of each record as it arrives from the hub.

    Args:
      column: The field of the text.

    Raises:
      ValueError: If the library `datasets` is not installed, there is no such
        configuration or split, records have no such field, or the hub is not
        reached.
    """
    if not self.is_reached:
      raise ValueError(
        f'{self.spec!r} is read from the hub, which was not reached; without '
        'network there is only what an earlier run has tokenized. Repeat that '
        "run's data.tokenizer, data.mode, data.seq_len and data.cache_dir."
      )
    read = 0
    records = _records(self)
    while True:
      try:
        record = next(records, None)
      # Libraries below it raise whatever they meet, of many kinds.
      except Exception as error:
        remedy = 'Name an existing split, as hf:OWNER/NAME:CONFIG:SPLIT[:N].'
        if read:
          remedy = f'That was after {read} documents; a new run starts afresh.'
        raise ValueError(
          f'Cannot read {self.spec!r}: {_reason(error)}. {remedy}'
        ) from error
      if record is None:
        return
      if column not in record:
        raise ValueError(
          f'{self.spec!r} has no field "{column}"; its fields are '
          f'{sorted(record)}. Name that of the text, or a data set of texts.'
        )
      yield record[column]
      read += 1


def is_hub(spec: str | None) -> bool:
  """Whether a name is one of the hub's."""
  return spec is not None and spec.startswith(PREFIX)


def folder(
  spec: str, what: Literal['model', 'tokenizer', 'config']
) -> pathlib.Path:
  """The local folder of a repository, downloaded as far as it is not there.

  Args:
    spec: `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`.
    what: `'model'`: configuration, tokenizer and the weights in safetensors;
      `'tokenizer'`: the tokenizer and the configuration; or `'config'` alone.

  Returns:
    A folder as `save_pretrained` of transformers writes it. It may hold files
    of other calls too.

  Raises:
    ValueError: If the name is malformed, there is no such repository, revision
      or access to it, it lacks what is asked for, or the hub is not reached and
      the cache holds nothing.
  """
  import huggingface_hub

  match = _MODEL.fullmatch(spec)
  if match is None:
    raise ValueError(
      f'Malformed name {spec!r}; expected hf:OWNER/NAME or '
      "hf:OWNER/NAME@REVISION, such as 'hf:HuggingFaceTB/SmolLM2-135M@main'."
    )
  repository = match['repository']
  commit, is_reached = _commit(spec, repository, 'model', match['revision'])
  try:
    found = pathlib.Path(
      huggingface_hub.snapshot_download(
        repository,
        revision=commit,
        allow_patterns=list(_FILES[what]),
        local_files_only=not is_reached,
        endpoint=_endpoint(),
        tqdm_class=_progress_bar(),
      )
    )
  except _errors() as error:
    raise ValueError(_fault(spec, repository, 'model', error)) from error
  if not any((found / name).is_file() for name in _NEEDED[what]):
    raise ValueError(
      f'{spec!r} (commit {commit}) holds no {what} to read; expected '
      f'{" or ".join(_NEEDED[what])}. {_REMEDY[what]}'
    )
  return found


def texts(spec: str) -> Texts:
  """Finds a data set of texts and its commit; downloads nothing of it.

  Args:
    spec: `hf:OWNER/NAME:CONFIG:SPLIT@REVISION[:N]`; see the head of this
      module.

  Raises:
    ValueError: If the name is malformed or bounds nothing, there is no such
      repository, revision or access to it, or the hub is not reached and the
      cache does not know the commit.
  """
  match = _TEXTS.fullmatch(spec)
  if match is None or match['limit'] == '0':
    raise ValueError(
      f'Malformed name {spec!r}; expected '
      'hf:OWNER/NAME:CONFIG:SPLIT@REVISION[:N], of which CONFIG, SPLIT and '
      "@REVISION may be left out, such as 'hf:allenai/c4:en[:1000000]'."
    )
  if match['slice'] is None:
    raise ValueError(
      f'{spec!r} does not say how much to read, and data sets of the hub may '
      f"hold hundreds of gigabytes. Write '{spec}[:1000000]' for its first "
      f"million documents, or '{spec}[:]' for all."
    )
  repository = match['repository']
  commit, is_reached = _commit(spec, repository, 'dataset', match['revision'])
  return Texts(
    spec,
    repository,
    match['config'] or None,
    match['split'] or 'train',
    commit,
    int(match['limit']) if match['limit'] else None,
    is_reached,
  )


def _records(data: Texts) -> Iterator[dict[str, Any]]:
  """Streams the records; the hub is asked when the first is."""
  try:
    # Imported here: it takes a while, and is an extra.
    import datasets
  except ImportError as error:
    raise ValueError(
      f'{data.spec!r} is read by the library datasets, which is not '
      f'installed: {extras.install("hub")}.'
    ) from error

  def read() -> Iterator[dict[str, Any]]:
    streamed = datasets.load_dataset(
      data.repository,
      data.config,
      split=data.split,
      revision=data.commit,
      streaming=True,
    )
    yield from (streamed if data.limit is None else streamed.take(data.limit))

  return read()


@functools.cache
def _commit(
  spec: str,
  repository: str,
  kind: Literal['model', 'dataset'],
  revision: str | None,
) -> tuple[str, bool]:
  """The commit that a name stands for, and whether the hub was reached."""
  # Imported here: only these names need it.
  import huggingface_hub
  from huggingface_hub import errors

  named = {'repo_type': kind, 'revision': revision}
  commit = None
  try:
    api = huggingface_hub.HfApi(endpoint=_endpoint())
    commit = api.repo_info(repository, expand=['sha'], **named).sha
    # So that the cache knows without network what the revision stands for.
    anchor = huggingface_hub.hf_hub_download(
      repository, _ANCHOR, endpoint=_endpoint(), **named
    )
    commit = pathlib.Path(anchor).parent.name
  except errors.RemoteEntryNotFoundError:
    pass  # Without it all is well as long as there is network.
  except errors.RevisionNotFoundError as error:
    raise ValueError(_fault(spec, repository, kind, error)) from error
  except _errors() as error:
    try:
      found = huggingface_hub.snapshot_download(
        repository, allow_patterns=[_ANCHOR], local_files_only=True, **named
      )
    except OSError:
      raise ValueError(_fault(spec, repository, kind, error)) from error
    commit = pathlib.Path(found).name
    is_wanted = isinstance(error, errors.OfflineModeIsEnabled)
    logger.log(
      logging.INFO if is_wanted else logging.WARNING,
      '%s is read from the cache, at commit %s: %s.',
      *(spec, commit, _reason(error)),
    )
    return commit, False
  logger.info('%s is at commit %s.', spec, commit)
  return commit, True


def _fault(spec: str, repository: str, kind: str, error: Exception) -> str:
  """Says why there is no commit, and what to do."""
  from huggingface_hub import errors

  page = f'{_endpoint()}/{"datasets/" * (kind == "dataset")}{repository}'
  log_in = 'log in (hf auth login) or set HF_TOKEN'
  if isinstance(error, errors.RevisionNotFoundError):
    return (
      f'{spec!r}: the {kind} {repository} has no such revision; expected a '
      f'branch, a tag or a commit that {page} lists.'
    )
  if isinstance(error, errors.GatedRepoError):
    return (
      f'{spec!r} is open to those alone whom its owner admits. Ask for access '
      f'at {page}, then {log_in}.'
    )
  response = getattr(error, 'response', None)
  if response is not None and response.status_code in (401, 403, 404):
    is_sent = 'authorization' in response.request.headers
    token = 'the token that was sent' if is_sent else 'a request without token'
    return (
      f'{spec!r}: the hub shows no {kind} {repository} to {token} (HTTP '
      f'{response.status_code}): the name is wrong, or access is refused. '
      f'Check the name at {page}; if it is private, {log_in}.'
    )
  return (
    f'{spec!r} is neither in the cache nor to be had from {_endpoint()}: '
    f'{_reason(error)}. Try again with network (files that have arrived whole '
    'are kept), or give a local path.'
  )


def _reason(error: Exception) -> str:
  """What went wrong, in a few words and without addresses that are signed."""
  response = getattr(error, 'response', None)
  if response is not None:
    return f'HTTP {response.status_code}'
  if type(error).__name__ == 'OfflineModeIsEnabled':
    return 'HF_HUB_OFFLINE is set'
  if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
    return _reason(error.__cause__)  # The cache lacks it, and this is why.
  words = ' '.join(str(error).split())
  said = re.sub(r'(https?://[^\s?]+)[?]\S*', r'\1', words)[:_REASON_LENGTH]
  return f'{type(error).__name__}: {said.rstrip(".")}'


def _progress_bar() -> type:
  from huggingface_hub.utils import tqdm

  class Bar(tqdm):
    """A progress bar on terminals, and nothing in files."""

    def __init__(self, *args: Any, **kwargs: Any):
      super().__init__(*args, **({'disable': None} | kwargs))

  return Bar


def _endpoint() -> str:
  from huggingface_hub import constants

  return os.environ.get('HF_ENDPOINT', constants.ENDPOINT).rstrip('/')


def _errors() -> tuple[type[Exception], ...]:
  """What the library raises where the hub is not reached or refuses."""
  from huggingface_hub import errors

  # Of httpx or of httpx2, as the library's version has it.
  return errors.HTTPError, OSError
