"""Text to token ids and back.

A thin layer over the `tokenizers` library that settles what a language-model
run must know: where documents end, how far ids reach, and that no text can
produce a control token.
"""

import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers

from gnlorp_jax.data import cache, sources

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
_BPE_CHARACTERS = 2**25


class Tokenizer:
  """A tokenizer with its end-of-sequence and padding tokens settled.

  Attributes:
    backend: The `tokenizers.Tokenizer`, truncation and padding switched off.
    eos_id: Id that ends every document.
    pad_id: Id that fills up short rows; `eos_id` if the tokenizer has none.
    bos_id: Id that may start a sequence, or None. Never added by this class.
    mask_id: Id that stands for a token to be guessed, or None. Never added by
      this class.
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
  ):
    """Wraps a tokenizer; tokens not given are looked for by usual names.

    Raises:
      ValueError: If there is no end-of-sequence token.
    """
    backend.no_truncation()
    backend.no_padding()
    # '</s>' in a web page is five characters, not the end of the document.
    backend.encode_special_tokens = True
    self.backend = backend
    eos_id = _find(backend, eos_token, _EOS_TOKENS)
    if eos_id is None:
      raise ValueError(
        f'Tokenizer has no end-of-sequence token: eos_token={eos_token!r} and '
        f'none of {_EOS_TOKENS} is in its vocabulary. Name it as "eos_token" '
        'in a tokenizer_config.json beside the tokenizer.json.'
      )
    pad_id = _find(backend, pad_token, _PAD_TOKENS)
    self.eos_id = eos_id
    self.pad_id = eos_id if pad_id is None else pad_id
    self.bos_id = _find(backend, bos_token, _BOS_TOKENS)
    self.mask_id = _find(backend, None, _MASK_TOKENS)

    ids = set(backend.get_vocab(with_added_tokens=True).values())
    added = backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    control = {self.eos_id, self.pad_id, self.bos_id, self.mask_id} - {None}
    unknown = {_find(backend, None, _UNKNOWN_TOKENS)} - {None}
    self.vocab_size = max((ids - special) | control | unknown) + 1
    # A unigram model has control tokens among its pieces and may choose one for
    # text that spells it, whatever `encode_special_tokens` says.
    self._from_text = np.ones(max(ids) + 1, bool)
    self._from_text[sorted((special | control) - unknown)] = False
    self.text_ids = np.array(sorted(ids - special - control - unknown))

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

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of everything that decides how text becomes ids."""
    content = [self.backend.to_str(), self.eos_id, self.pad_id, self.bos_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes what `load` and `transformers.AutoTokenizer` read.

    Args:
      folder: Receives `tokenizer.json` and `tokenizer_config.json`; made if
        need be.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self.backend.save(str(folder / 'tokenizer.json'))
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'eos_token': self.backend.id_to_token(self.eos_id),
      'pad_token': self.backend.id_to_token(self.pad_id),
      'clean_up_tokenization_spaces': False,
    }
    if self.bos_id is not None:
      config['bos_token'] = self.backend.id_to_token(self.bos_id)
    if self.mask_id is not None:
      # What a tokenizer of masked text calls these tokens.
      config['cls_token'] = config.get('bos_token', config['eos_token'])
      config['sep_token'] = config['eos_token']
      config['mask_token'] = self.backend.id_to_token(self.mask_id)
    (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2))


def load(
  spec: str,
  *,
  source: str | None = None,
  vocab_size: int = 8192,
  cache_dir: str | pathlib.Path | None = None,
  masked: bool = False,
) -> Tokenizer:
  """Loads a tokenizer, or trains one.

  Args:
    spec: `'bpe'`, a `tokenizer.json`, a folder with one (its
      `tokenizer_config.json` is read too), or the name of a model on the
      Hugging Face hub. Only the last uses the network.
    source: For `'bpe'`, the data source to train on (`sources.documents`). The
      first 32 million characters are used.
    vocab_size: For `'bpe'`, the most entries it may have; a small source gives
      fewer. Other tokenizers bring their own.
    cache_dir: For `'bpe'`, where the trained tokenizer is kept, by the
      fingerprint of the source and by `vocab_size`.
    masked: For `'bpe'`, whether it gets the special tokens of RoBERTa, and puts
      them around single sentences and pairs as RoBERTa does.

  Returns:
    The tokenizer.

  Raises:
    ValueError: If there is no such tokenizer, it is not one, it has no
      end-of-sequence token, or what `'bpe'` needs is missing.
  """
  if spec == 'bpe':
    return _load_bpe(source, vocab_size, cache_dir, masked)
  path = pathlib.Path(spec).expanduser()
  if path.is_dir():
    return _load_file(path / 'tokenizer.json')
  if path.exists() or path.suffix == '.json':
    return _load_file(path)
  return _load_from_hub(spec)


def _load_file(path: pathlib.Path) -> Tokenizer:
  if not path.is_file():
    raise ValueError(
      f'No tokenizer at {path}; expected a tokenizer.json, or a folder with '
      'one, such as save_pretrained of transformers writes.'
    )
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The library raises nothing more specific.
    raise ValueError(
      f'{path} is not a tokenizer; expected a tokenizer.json as the tokenizers '
      f'library writes it. It says: {error}'
    ) from error
  config_path = path.with_name('tokenizer_config.json')
  config = {}
  if config_path.is_file():
    config = json.loads(config_path.read_text(encoding='utf-8'))
  tokens = {}
  for name in ('eos_token', 'pad_token', 'bos_token'):
    token = config.get(name)
    # Older configurations hold the token with its properties.
    tokens[name] = token['content'] if isinstance(token, dict) else token
  return Tokenizer(backend, **tokens)


def _load_from_hub(name: str) -> Tokenizer:
  # Imported here: it takes seconds and only this kind of tokenizer needs it.
  import transformers

  try:
    pretrained = transformers.AutoTokenizer.from_pretrained(name)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"Unknown tokenizer {name!r}: not 'bpe', no such file or folder, and not "
      'found on the Hugging Face hub (or the hub was not reached). Expected '
      "'bpe', the path of a tokenizer.json or its folder, or a model name."
    ) from error
  return Tokenizer(
    pretrained.backend_tokenizer,
    eos_token=pretrained.eos_token,
    pad_token=pretrained.pad_token,
    bos_token=pretrained.bos_token,
  )


def _load_bpe(
  source: str | None,
  vocab_size: int,
  cache_dir: str | pathlib.Path | None,
  masked: bool,
) -> Tokenizer:
  if source is None or cache_dir is None:
    raise ValueError(
      "Tokenizer 'bpe' is trained on the data: got "
      f'source={source!r}, cache_dir={cache_dir!r}; both must be given.'
    )
  special = _ROBERTA_TOKENS if masked else (_BPE_PAD, _BPE_EOS)
  smallest = 256 + len(special)
  if vocab_size < smallest:
    raise ValueError(
      f"Tokenizer 'bpe' cannot have vocab_size={vocab_size}: it needs an entry "
      f'for each of the 256 bytes and for {", ".join(special)}. Use at least '
      f'{smallest}.'
    )
  key = f'{sources.fingerprint(source)} {vocab_size}' + ' masked' * masked
  digest = hashlib.sha256(key.encode()).hexdigest()[:16]

  def train(folder: pathlib.Path) -> None:
    logger.info('Training a BPE tokenizer of %d on %s.', vocab_size, source)
    texts = _first(sources.documents(source), _BPE_CHARACTERS)
    backend = _train_bpe(texts, vocab_size, special)
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


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
  for text in texts:
    yield text[:characters]
    characters -= len(text)
    if characters <= 0:
      return


def _train_bpe(
  texts: Iterator[str], vocab_size: int, special: Sequence[str]
) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE tokenizer (the same for the same texts)."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.train_from_iterator(
    texts,
    tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size,
      min_frequency=2,
      special_tokens=list(special),
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return backend


def _find(
  backend: tokenizers.Tokenizer, token: str | None, usual: Sequence[str]
) -> int | None:
  for candidate in usual if token is None else (token,):
    if (token_id := backend.token_to_id(candidate)) is not None:
      return token_id
  return None
