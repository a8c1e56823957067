"""Text to a file of token ids.

Text is tokenised once; the file is then read by random access through a memory
map (see `batches`), so memory stays small whatever the size of the data.

Shape suffixes in this file:
  D  documents
  T  sequence length
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import rich.console
import rich.progress

from gnlorp_jax.data import cache, sources
from gnlorp_jax.data.files import TEXT_COLUMN
from gnlorp_jax.data.tokenizer import Tokenizer
from gnlorp_jax.disk import fingerprint

logger = logging.getLogger(__name__)

MODES = ('packed', 'padded')

# Enters the key of the cache: raise it when the layout of the files changes.
_FORMAT = 2
_PIECE_CHARACTERS = 2**19
_GROUP_CHARACTERS = 2**21


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFile:
  """Token ids on disk, or a contiguous part of them.

  Attributes:
    path: The file: ids without a header, in the machine's byte order.
    dtype: `'uint16'` or `'uint32'`.
    mode: `'packed'`, one array ``[N]`` in which every document ends with
      `eos_id`, which is nowhere else; or `'padded'`, an array ``[D, T]`` with a
      document per row, cut and ended with `eos_id`, then filled with `pad_id`.
    seq_len: T of a padded file; None for a packed one.
    vocab_size: All ids are below it.
    eos_id: Id that ends a document.
    pad_id: Id that fills a padded row.
    documents: Documents in the whole file.
    tokens: Tokens in the whole file, `eos_id` included, padding not.
    bad_records: Records of the source that were skipped.
    bad_bytes: Their bytes.
    damaged_files: Files of the source whose rest could not be read.
    start: First item of this part: a token if packed, a row if padded.
    stop: The item after the last one.
    fingerprint: Of the whole file's content.
  """

  path: pathlib.Path
  dtype: str
  mode: Literal['packed', 'padded']
  seq_len: int | None
  vocab_size: int
  eos_id: int
  pad_id: int
  documents: int
  tokens: int
  bad_records: int
  bad_bytes: int = 0
  damaged_files: int = 0
  start: int
  stop: int
  fingerprint: str

  def items(self) -> np.memmap:
    """Maps the ids into memory: ``[stop - start]`` or ``[stop - start, T]``."""
    row = () if self.seq_len is None else (self.seq_len,)
    shape = (self.stop, *row)
    return np.memmap(self.path, self.dtype, 'r', shape=shape)[self.start :]

  def num_sequences(self, seq_len: int) -> int:
    """Number of training sequences of `seq_len` tokens."""
    if self.mode == 'padded':
      return self.stop - self.start
    return max(self.stop - self.start - 1, 0) // seq_len


def prepare(
  source: str,
  tokenizer: Tokenizer,
  *,
  mode: Literal['packed', 'padded'] = 'packed',
  seq_len: int | None = None,
  cache_dir: str | pathlib.Path,
  progress: bool = True,
  add_bos: bool = False,
  column: str = TEXT_COLUMN,
) -> TokenFile:
  """Tokenises a source into a cached file, or finds it there.

  The file is kept under `cache_dir` by a hash of the source (paths, sizes and
  modification times), the tokenizer, the mode, `add_bos` and, if padded, the
  length. It appears only when it is complete; processes may race for it.

  Args:
    source: Name of a data source; see `sources`.
    tokenizer: Makes the ids.
    mode: `'packed'` wastes nothing: documents one after another, each ended by
      the end-of-sequence token. `'padded'` is the protocol of GaLore and its
      descendants: a document per row, what exceeds `seq_len` dropped, the last
      token always the end of sequence, the rest of the row padding.
    seq_len: Row length, for `'padded'` only.
    cache_dir: Folder of all cached files; made if need be.
    progress: Whether to show a progress bar where the terminal can.
    add_bos: Whether every document begins with the tokenizer's `bos_id`.
    column: The field or column of the text.

  Returns:
    The token file. Of what had to be left out a warning tells, every time.

  Raises:
    ValueError: If the mode is unknown, `seq_len` does not fit it, the tokenizer
      has no token to begin with, or the source is at fault (see
      `sources.documents`).

  Note:
    Packed documents of more than half a million characters are tokenised in
    pieces cut after a line end, to bound memory and use all cores. At a cut the
    ids may differ by a token or two from those of the document in one piece.
  """
  if mode not in MODES:
    raise ValueError(f'Unknown mode {mode!r}; expected one of {MODES}.')
  if mode == 'packed' and seq_len is not None:
    raise ValueError(
      f"mode='packed' got seq_len={seq_len}: a packed file has no rows and "
      'serves every length. Leave seq_len out here and give it to batches().'
    )
  if mode == 'padded' and (seq_len is None or seq_len < 2):
    raise ValueError(
      f"mode='padded' needs the row length, at least 2; got seq_len={seq_len}."
    )
  bos_id = tokenizer.check_bos() if add_bos else None
  key = [
    _FORMAT,
    sources.fingerprint(source, column),
    tokenizer.fingerprint,
    mode,
    seq_len,
  ]
  if add_bos:
    key.append('bos')
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
  folder = cache.cached_folder(
    pathlib.Path(cache_dir) / f'tokens-{digest}',
    lambda folder: _write(
      folder, source, column, tokenizer, mode, seq_len, bos_id, progress
    ),
  )
  found = _read_cached(folder)
  if found.bad_records or found.damaged_files:
    logger.warning(
      '%s: left out were %d bad records (%s bytes) and the rest of %d damaged '
      'files.',
      source,
      found.bad_records,
      f'{found.bad_bytes:,}',
      found.damaged_files,
    )
  return found


def _read_cached(folder: pathlib.Path) -> TokenFile:
  """A token file of the cache.

  Raises:
    ValueError: If it is damaged.
  """
  path, described = folder / 'tokens.bin', folder / 'metadata.json'
  try:
    metadata = json.loads(described.read_text('utf-8'))
    found = TokenFile(path=path, **metadata)
    row = found.seq_len or 1
    size = found.stop * row * np.dtype(found.dtype).itemsize
    there = found.path.stat().st_size
    if there != size:
      raise ValueError(f'{found.path} has {there:,} bytes, not {size:,}')
  except (OSError, ValueError, TypeError, RecursionError) as error:
    raise ValueError(
      f'The cached tokens in {folder} are damaged: {error}. Remove that '
      'folder: the next run makes it again.'
    ) from error
  return found


def split(
  token_file: TokenFile, fraction: float
) -> tuple[TokenFile, TokenFile]:
  """Holds out the last part of a file for validation.

  Args:
    token_file: File to divide.
    fraction: Part to hold out, in (0, 1): of the tokens if packed, of the rows
      if padded.

  Returns:
    The training part and the validation part, which share no token.

  Raises:
    ValueError: If `fraction` is not in (0, 1) or leaves one part empty.
  """
  if not 0 < fraction < 1:
    raise ValueError(f'fraction={fraction} must lie in (0, 1); try 0.05.')
  size = token_file.stop - token_file.start
  held_out = round(size * fraction)
  if not 0 < held_out < size:
    raise ValueError(
      f'fraction={fraction} of {size} items leaves one part empty; choose it '
      'nearer to 0.5 or take more text.'
    )
  boundary = token_file.stop - held_out
  return (
    dataclasses.replace(token_file, stop=boundary),
    dataclasses.replace(token_file, start=boundary),
  )


def check_vocab(tokenizer_vocab: int, model_vocab: int) -> None:
  """Checks that a model has an embedding for every id.

  Args:
    tokenizer_vocab: `Tokenizer.vocab_size` or `TokenFile.vocab_size`.
    model_vocab: Number of rows of the model's embedding.

  Raises:
    ValueError: If the tokenizer can produce an id the model does not have.
  """
  if tokenizer_vocab > model_vocab:
    raise ValueError(
      f'The tokenizer produces ids up to {tokenizer_vocab - 1}, but the model '
      f'has vocab_size={model_vocab}: every id must be below it. Give the '
      f'model a vocab_size of at least {tokenizer_vocab} or choose another '
      'tokenizer.'
    )


def check_known(
  tokenizer: Tokenizer, rows: Iterable[np.ndarray], what: str
) -> None:
  """Checks that a tokenizer is one of such text.

  Args:
    tokenizer: The tokenizer.
    rows: Token ids that it made of the text.
    what: What to call the text.

  Raises:
    ValueError: If more than half of them stand for unknown text.
  """
  rows = list(rows)
  count = sum(len(row) for row in rows)
  unknown = sum(np.count_nonzero(row == tokenizer.unknown_id) for row in rows)
  if 2 * unknown > count:
    raise ValueError(
      f'The tokenizer makes {unknown:,} of {count:,} tokens of {what} '
      f'{tokenizer.backend.id_to_token(tokenizer.unknown_id)!r}, which stands '
      'for text that it does not know: it is of another language or spelling. '
      'Name another tokenizer.'
    )


def _write(
  folder: pathlib.Path,
  source: str,
  column: str,
  tokenizer: Tokenizer,
  mode: str,
  seq_len: int | None,
  bos_id: int | None,
  progress: bool,
) -> None:
  """Fills a cache folder with `tokens.bin` and `metadata.json`."""
  dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
  begin = np.array([] if bos_id is None else [bos_id], np.int64)
  is_first = True  # The next piece, of its document.
  documents = tokens = items = 0
  tally = sources.Tally()
  texts = sources.documents(source, tally, column)
  with (
    open(folder / 'tokens.bin', 'wb') as file,
    _progress_bar(progress) as bar,
  ):
    task = bar.add_task('Tokenising', total=1.0, tokens=0)
    for group in _groups(_pieces(texts, whole=mode == 'padded')):
      encoded = tokenizer.encode_batch([text for text, _ in group])
      pieces = []
      for ids, (_, is_last) in zip(encoded, group, strict=True):
        ids = ids if is_last else ids[:-1]
        pieces.append(np.concatenate([begin, ids]) if is_first else ids)
        is_first = is_last
        documents += is_last
      check_known(tokenizer, pieces, source)
      if mode == 'padded':
        block, counted = _rows(pieces, seq_len, tokenizer)
      else:
        block = np.concatenate(pieces)
        counted = len(block)
      block.astype(dtype).tofile(file)
      items += len(block)
      tokens += counted
      bar.update(task, completed=tally.fraction, tokens=tokens)
  logger.info(
    'Tokenised %s: %d documents, %d tokens, %d bad records skipped.',
    source,
    documents,
    tokens,
    tally.bad,
  )
  metadata: dict[str, Any] = {
    'dtype': np.dtype(dtype).name,
    'mode': mode,
    'seq_len': seq_len,
    'vocab_size': tokenizer.vocab_size,
    'eos_id': tokenizer.eos_id,
    'pad_id': tokenizer.pad_id,
    'documents': documents,
    'tokens': tokens,
    'bad_records': tally.bad,
    'bad_bytes': tally.bad_bytes,
    'damaged_files': tally.damaged,
    'start': 0,
    'stop': items,
    'fingerprint': fingerprint.of_file(folder / 'tokens.bin'),
  }
  (folder / 'metadata.json').write_text(json.dumps(metadata, indent=2))


def _rows(
  encoded: list[np.ndarray], seq_len: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, int]:
  """Cuts and pads documents to ``[D, T]``; also returns the tokens kept."""
  rows_DT = np.full((len(encoded), seq_len), tokenizer.pad_id, np.int64)
  tokens = 0
  for row, ids in zip(rows_DT, encoded, strict=True):
    length = min(len(ids), seq_len)
    row[:length] = ids[:length]
    row[length - 1] = tokenizer.eos_id
    tokens += length
  return rows_DT, tokens


def _pieces(texts: Iterable[str], whole: bool) -> Iterator[tuple[str, bool]]:
  """Yields pieces of documents, and whether each is the last of its document.

  Args:
    texts: Documents.
    whole: Whether to leave out what exceeds one piece instead of cutting.
  """
  for text in texts:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS and not whole:
      limit = start + _PIECE_CHARACTERS
      after_line = text.rfind('\n', start, limit) + 1
      cut = after_line or limit
      yield text[start:cut], False
      start = cut
    yield text[start : start + _PIECE_CHARACTERS], True


def _groups(
  pieces: Iterable[tuple[str, bool]],
) -> Iterator[list[tuple[str, bool]]]:
  group, characters = [], 0
  for piece in pieces:
    group.append(piece)
    characters += len(piece[0])
    if characters >= _GROUP_CHARACTERS:
      yield group
      group, characters = [], 0
  if group:
    yield group


def _progress_bar(shown: bool) -> rich.progress.Progress:
  console = rich.console.Console(stderr=True)
  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.TaskProgressColumn(),
    rich.progress.TextColumn('{task.fields[tokens]:,} tokens'),
    rich.progress.TimeRemainingColumn(),
    console=console,
    disable=not (shown and console.is_terminal),
    transient=True,
  )
