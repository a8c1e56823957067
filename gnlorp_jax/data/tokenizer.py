"""Text to token ids and back.

A thin layer over the `tokenizers` library that settles what a language-model
run must know: where documents end, how far ids reach, and that no text can
produce a control token.
"""

import copy
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from gnlorp_jax.data import bpe, cache, hub, sources, tokenizer_files
from gnlorp_jax.data.files import TEXT_COLUMN, check_file

logger = logging.getLogger(__name__)

# Looked for in this order where no configuration names the token.
_EOS_TOKENS = ('</s>', '<|endoftext|>', '<|end_of_text|>', '<eos>', '[SEP]')
_PAD_TOKENS = ('<pad>', '<|pad|>', '[PAD]')
_BOS_TOKENS = ('<s>', '<|begin_of_text|>', '<bos>', '[CLS]')

_MASK_TOKENS = ('<mask>', '[MASK]')
_UNKNOWN_TOKENS = ('<unk>', '[UNK]')

_BPE_PAD, _BPE_EOS = '<|pad|>', '<|endoftext|>'
# Those of RoBERTa, with the ids it gives to the first four.
_ROBERTA_TOKENS = ('<s>', '<pad>', '</s>', '<unk>', '<mask>')


class Tokenizer:
  """A tokenizer with its end-of-sequence and padding tokens settled.

  Attributes:
    backend: The `tokenizers.Tokenizer`, truncation and padding switched off.
    eos_id: Id that ends every document.
    eos_ids: Ids that end a generation, `eos_id` first.
    pad_id: Id that fills up short rows; `eos_id` if the tokenizer has none.
    bos_id: Id that may start a sequence, or None. Never added by this class.
    adds_bos: Whether the tokenizer itself puts `bos_id` before a text: models
      that were trained with it expect that.
    chat_template: Jinja template of a conversation, or None.
    mask_id: Id that stands for a token to be guessed, or None. Never added by
      this class.
    unknown_id: Id of text that no piece stands for, or None.
    text_ids: Ids of the pieces of text, ascending, ``[N]``: of all but the ids
      above, other special tokens and the unknown token.
    vocab_size: Largest id a text can produce, plus one: ordinary pieces and the
      ids above and the unknown token. The sentinels of T5 (ids 32000
      and up, of 32100) are special tokens, which no text produces: T5 has
      32000.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    bos_token: str | None = None,
    beside: tokenizer_files.Beside | None = None,
  ):
    """Wraps a tokenizer; tokens not given are looked for by usual names.

    Args:
      backend: The tokenizer, which this changes.
      eos_token: Ends documents; None takes what `beside` names.
      pad_token: Fills up rows; None likewise.
      bos_token: May start a sequence; None likewise.
      beside: What the files beside the tokenizer say; `save` writes it again.

    Raises:
      ValueError: If there is no end-of-sequence token.
    """
    backend.no_truncation()
    backend.no_padding()
    # '</s>' in a web page is five characters, not the end of the document.
    backend.encode_special_tokens = True
    self.backend = backend
    self._beside = beside or tokenizer_files.Beside()
    eos_token = eos_token or self._beside.token('eos_token')
    eos_id = _find(backend, eos_token, _EOS_TOKENS)
    if eos_id is None:
      raise ValueError(
        f'Tokenizer has no end-of-sequence token: eos_token={eos_token!r} and '
        f'none of {_EOS_TOKENS} is in its vocabulary. Name it as "eos_token" '
        'in a tokenizer_config.json beside the tokenizer.json.'
      )
    pad_id = self._id('pad_token', pad_token, _PAD_TOKENS)
    self.eos_id = eos_id
    self.eos_ids = tuple(dict.fromkeys((eos_id, *self._beside.eos_ids)))
    self.pad_id = eos_id if pad_id is None else pad_id
    self.bos_id = self._id('bos_token', bos_token, _BOS_TOKENS)
    self.mask_id = self._id('mask_token', None, _MASK_TOKENS)
    self.chat_template = self._beside.chat_template
    self.adds_bos = self.bos_id is not None and tokenizer_files.begins_with(
      tokenizer_files.processors(backend), self.bos_id
    )

    ids = set(backend.get_vocab(with_added_tokens=True).values())
    added = backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    control = {self.eos_id, self.pad_id, self.bos_id, self.mask_id} - {None}
    self.unknown_id = _find(backend, None, _UNKNOWN_TOKENS)
    unknown = {self.unknown_id} - {None}
    self.vocab_size = max((ids - special) | control | unknown) + 1
    # A unigram model has control tokens among its pieces and may choose one for
    # text that spells it, whatever `encode_special_tokens` says.
    self._from_text = np.ones(max(ids) + 1, bool)
    self._from_text[sorted((special | control) - unknown)] = False
    self.text_ids = np.array(sorted(ids - special - control - unknown))

  def _id(
    self, name: str, token: str | None, usual: Sequence[str]
  ) -> int | None:
    """Id of the token of a name; None where the files say there is none."""
    token = token or self._beside.token(name)
    if token is None and self._beside.lacks(name):
      return None
    return _find(self.backend, token, usual)

  def encode(self, text: str, add_special_tokens: bool = False) -> np.ndarray:
    """Encodes a text that something follows: a prompt.

    Args:
      text: The text. Special tokens spelled in it stay plain text.
      add_special_tokens: Whether to put around it what the tokenizer does.

    Returns:
      Ids, int64 ``[length]``. As `encode_batch` has them, without the end.
    """
    encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
    ids = np.asarray(encoding.ids, np.int64)
    put_around = np.asarray(encoding.special_tokens_mask, bool)
    return ids[self._from_text[ids] | put_around]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes documents, using all cores.

    Args:
      texts: Documents.

    Returns:
      Per document an int64 array ``[length]`` of ids in ``[0, vocab_size)``,
      with `eos_id` at its end and nowhere else.
    """
    encodings = self.backend.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    batch = []
    for encoding in encodings:
      ids = np.asarray(encoding.ids, np.int64)
      batch.append(np.append(ids[self._from_text[ids]], self.eos_id))
    return batch

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of token ids, control tokens left out."""
    return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

  @property
  def special_tokens(self) -> dict[str, str]:
    """Control tokens by the names that chat templates know them by."""
    config = self._config()
    return {
      name: config[name]
      for name in tokenizer_files.TOKEN_NAMES
      if isinstance(config.get(name), str)
    }

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of everything that decides how text becomes ids."""
    content = [self.backend.to_str(), self.eos_id, self.pad_id, self.bos_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

  def save(
    self, folder: str | pathlib.Path, *, add_bos: bool | None = None
  ) -> None:
    """Writes what `load` and `transformers.AutoTokenizer` read.

    What the files beside the tokenizer said is written again: chat templates,
    further special tokens, the longest text.

    Args:
      folder: Receives the files; made if need be.
      add_bos: None keeps what the tokenizer puts around a text: masked models
        and classifiers learn from that. Causal ones learn from plain text, so
        otherwise nothing is put around it but, if True, `bos_id` before it. A
        `generation_config.json` then tells their ids.

    Raises:
      ValueError: If `add_bos` is asked for and there is no such token.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backend, config = self.backend, self._config()
    if add_bos is not None:
      backend = self.beginning(add_bos).backend
      config |= {'add_bos_token': add_bos, 'add_eos_token': False}
      _write(folder / tokenizer_files.GENERATION, self._generation_config())
    # Its own `save` has no OSError where a disk is full.
    text = backend.to_str(pretty=True)
    (folder / 'tokenizer.json').write_text(text, encoding='utf-8')
    _write(folder / tokenizer_files.CONFIG, config)
    self._beside.write_templates(folder)

  def beginning(self, add_bos: bool) -> 'Tokenizer':
    """The tokenizer of a causal model that learned from plain text.

    Args:
      add_bos: Whether its documents began with `bos_id`.

    Returns:
      A copy that puts `bos_id` before a text, or nothing, and nothing after it.

    Raises:
      ValueError: If `add_bos` is asked for and there is no such token.
    """
    bos_id = self.check_bos() if add_bos else None
    other = copy.copy(self)
    other.__dict__.pop('fingerprint', None)
    other.backend = tokenizer_files.with_bos_alone(self.backend, bos_id)
    other.backend.encode_special_tokens = True  # Is in no file.
    other.adds_bos = add_bos
    return other

  def with_chat_template(
    self, template: str, stop_ids: Iterable[int] = ()
  ) -> 'Tokenizer':
    """A copy with another chat template.

    Args:
      template: Jinja template of a conversation.
      stop_ids: Ids with which it ends answers: they join `eos_ids`.
    """
    other = copy.copy(self)
    other._beside = self._beside.with_chat_template(template)
    other.chat_template = template
    other.eos_ids = tuple(dict.fromkeys((*self.eos_ids, *stop_ids)))
    return other

  def check_bos(self) -> int:
    """The id that documents begin with where `add_bos` is asked for.

    Raises:
      ValueError: If there is none, or it is the one that ends them.
    """
    if self.bos_id is None:
      raise ValueError(
        'add_bos=True needs a beginning-of-sequence token, and the tokenizer '
        'has none. Name one of its tokens as "bos_token" in a '
        'tokenizer_config.json beside the tokenizer.json, or leave add_bos out.'
      )
    if self.bos_id == self.eos_id:
      raise ValueError(
        f'add_bos=True cannot be used with this tokenizer: id {self.bos_id}, '
        f'{self.backend.id_to_token(self.bos_id)!r}, begins and ends a '
        'sequence, so nothing would tell where a document ends. Leave add_bos '
        'out: in packed text each follows the token that ends the one before.'
      )
    return self.bos_id

  def _config(self) -> dict[str, Any]:
    """Contents of `tokenizer_config.json`."""
    name_of = self.backend.id_to_token
    config = self._beside.kept() | {
      # Not what read it: other classes make the tokenizer anew, from its words.
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'eos_token': name_of(self.eos_id),
      'pad_token': name_of(self.pad_id),
      'clean_up_tokenization_spaces': False,
    }
    space = tokenizer_files.adds_prefix_space(self.backend)
    if space is not None:
      config['add_prefix_space'] = space
    if self.bos_id is not None:
      config['bos_token'] = name_of(self.bos_id)
    if self.mask_id is not None:
      # What a tokenizer of masked text calls these tokens.
      config.setdefault(
        'cls_token', config.get('bos_token', name_of(self.eos_id))
      )
      config.setdefault('sep_token', name_of(self.eos_id))
      config['mask_token'] = name_of(self.mask_id)
    return config

  def _generation_config(self) -> dict[str, Any]:
    """Contents of `generation_config.json`."""
    eos_ids = self.eos_ids
    ids = {
      'eos_token_id': eos_ids[0] if len(eos_ids) == 1 else list(eos_ids),
      'pad_token_id': self.pad_id,
    }
    return ids if self.bos_id is None else {'bos_token_id': self.bos_id} | ids


def load(
  spec: str,
  *,
  source: str | None = None,
  vocab_size: int = 8192,
  cache_dir: str | pathlib.Path | None = None,
  masked: bool = False,
  column: str = TEXT_COLUMN,
) -> Tokenizer:
  """Loads a tokenizer, or trains one.

  Args:
    spec: `'bpe'`, a `tokenizer.json`, a folder with one (what lies beside it
      is read too: `tokenizer_files.read`), or `hf:OWNER/NAME`, a repository of
      the Hugging Face hub (`hub.folder`). Only the last uses the network.
    source: For `'bpe'`, the data source to train on (`sources.documents`). The
      first 32 million characters are used.
    vocab_size: For `'bpe'`, the most entries it may have; a small source gives
      fewer. Other tokenizers bring their own.
    cache_dir: For `'bpe'`, where the trained tokenizer is kept, by the
      fingerprint of the source and by `vocab_size`.
    masked: For `'bpe'`, whether it gets the special tokens of RoBERTa, and puts
      them around single sentences and pairs as RoBERTa does.
    column: For `'bpe'`, the field or column of the text.

  Returns:
    The tokenizer.

  Raises:
    ValueError: If there is no such tokenizer, it is not one, it has no
      end-of-sequence token, the hub does not give it, or what `'bpe'` needs is
      missing.
  """
  if spec == 'bpe':
    return _load_bpe(source, vocab_size, cache_dir, masked, column)
  if hub.is_hub(spec):
    return _load_file(hub.folder(spec, 'tokenizer') / 'tokenizer.json')
  path = pathlib.Path(spec).expanduser()
  if path.is_dir():
    return _load_file(path / 'tokenizer.json')
  if path.exists() or path.suffix == '.json':
    return _load_file(path)
  hint = f" Did you mean 'hf:{spec}'?" if spec.count('/') == 1 else ''
  raise ValueError(
    f"Unknown tokenizer {spec!r}: not 'bpe', and no such file or folder. "
    "Expected 'bpe', the path of a tokenizer.json or its folder, or "
    f"'hf:OWNER/NAME' for one of the Hugging Face hub.{hint}"
  )


def _load_file(path: pathlib.Path) -> Tokenizer:
  if not path.is_file():
    raise ValueError(
      f'No tokenizer at {path}; expected a tokenizer.json, or a folder with '
      'one, such as save_pretrained of transformers writes.'
    )
  check_file(path)
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The library raises nothing more specific.
    raise ValueError(
      f'{path} is not a tokenizer; expected a tokenizer.json as the tokenizers '
      f'library writes it. It says: {error}'
    ) from error
  beside = tokenizer_files.read(path.parent, backend)
  tokenizer = Tokenizer(backend, beside=beside)
  if beside.token('eos_token') is None:
    logger.warning(
      'Nothing beside %s names the token that ends a document: %r is taken, '
      'because it is usual. If that is wrong, name it as "eos_token" in %s.',
      path,
      backend.id_to_token(tokenizer.eos_id),
      path.with_name(tokenizer_files.CONFIG),
    )
  return tokenizer


def _load_bpe(
  source: str | None,
  vocab_size: int,
  cache_dir: str | pathlib.Path | None,
  masked: bool,
  column: str,
) -> Tokenizer:
  if source is None or cache_dir is None:
    raise ValueError(
      "Tokenizer 'bpe' is trained on the data: got "
      f'source={source!r}, cache_dir={cache_dir!r}; both must be given.'
    )
  special = _ROBERTA_TOKENS if masked else (_BPE_PAD, _BPE_EOS)
  smallest = 256 + len(special)
  if not smallest <= vocab_size <= bpe.MOST_ENTRIES:
    raise ValueError(
      f"Tokenizer 'bpe' cannot have vocab_size={vocab_size}: it needs an entry "
      f'for each of the 256 bytes and for {", ".join(special)}. Use at least '
      f'{smallest}, and at most {bpe.MOST_ENTRIES}.'
    )
  key = f'{sources.fingerprint(source, column)} {vocab_size}'
  key += ' masked' * masked
  digest = hashlib.sha256(key.encode()).hexdigest()[:16]

  def train(folder: pathlib.Path) -> None:
    logger.info('Training a BPE tokenizer of %d on %s.', vocab_size, source)
    documents = sources.documents(source, column=column)
    backend = bpe.train(documents, vocab_size, special)
    if masked:
      backend.post_processor = tokenizers.processors.RobertaProcessing(
        ('</s>', 2), ('<s>', 0), add_prefix_space=False
      )
    Tokenizer(
      backend,
      eos_token='</s>' if masked else _BPE_EOS,
      pad_token='<pad>' if masked else _BPE_PAD,
    ).save(folder)

  folder = pathlib.Path(cache_dir) / f'bpe-{digest}'
  return _load_file(cache.cached_folder(folder, train) / 'tokenizer.json')


def _find(
  backend: tokenizers.Tokenizer, token: str | None, usual: Sequence[str]
) -> int | None:
  for candidate in usual if token is None else (token,):
    if (token_id := backend.token_to_id(candidate)) is not None:
      return token_id
  return None


def _write(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2), encoding='utf-8')
