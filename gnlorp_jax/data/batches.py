"""A file of token ids to batches for training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gnlorp_jax.data import ordering
from gnlorp_jax.data.masking import Masking
from gnlorp_jax.data.mixture import Mixture
from gnlorp_jax.data.text import TokenFile

if TYPE_CHECKING:
  import grain


def batches(
  token_file: TokenFile | Mixture,
  *,
  batch_size: int,
  seq_len: int,
  seed: int = 0,
  shuffle: bool = True,
  repeat: bool = True,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 2,
  masking: Masking | None = None,
  with_seeds: bool = False,
  document_mask: bool = False,
) -> Batches:
  """Iterates over batches, reproducibly and resumably.

  Each element is a dict with, B being `batch_size / process_count`,

  * `inputs`: int32 ``[B, T]``, ids;
  * `targets`: int32 ``[B, T]``, the id that follows each input;
  * `weights`: float32 ``[B, T]``, 1 where the target counts. Packed, that is
    everywhere. Padded, it is 0 where the target is padding and at the last
    position, which has no target.

  With `document_mask` there are

  * `segments`: int32 ``[B, T]``, 1 for the first document of a row, 2 for the
    next, and so on. The end-of-sequence token belongs to the document it ends.

  Documents are then to be as if each stood alone, so the first token of one,
  which nothing before it tells, does not count as a target: its weight is 0.

  Packed sequence i holds the tokens i T to i T + T, the last only as a target.

  Of a mixture there are

  * `source`: int32 ``[B]``, the number of each sequence's source. An epoch
    visits all sequences of all sources in one random order.

  With `masking` the elements are batches of what it makes of a sequence, newly
  drawn in every epoch; packed sequence i then holds T - 2 tokens of text.

  The iterator's `get_state()` returns a small dict fit for JSON: the number of
  sequences taken. `set_state(state)` on an iterator made with the same
  arguments (`batch_size`, `prefetch` and the processes may differ) goes on with
  the next sequence.

  Args:
    token_file: Tokens, from `prepare` or `split`, or those of several sources.
    batch_size: Sequences per batch over all processes.
    seq_len: T, tokens per sequence; for a padded file its own length.
    seed: Decides the order, together with the number of the epoch.
    shuffle: Whether to visit the sequences in a new random order every epoch.
    repeat: Whether to go on for ever; batches then reach over the end of an
      epoch. Otherwise each sequence comes once, and sequences of weight 0 are
      added to fill the last batch: an evaluation leaves nothing out.
    process_index: Which process this is; it reads only its rows of each batch.
    process_count: Number of processes. Their rows, joined in order, are the
      batch a single process would get.
    prefetch: Number of batches prepared ahead by a background thread.
    masking: Makes the tokens to be guessed; None has the next token guessed.
      The file must be packed.
    with_seeds: Adds `seeds`, uint32 ``[B]``, newly drawn in every epoch, for
      dropout. What `masking` makes of a sequence has them already.
    document_mask: Adds `segments`. The file must be packed, and `masking` None.

  Returns:
    The iterator. `close()` ends its thread.

  Raises:
    ValueError: If a size is out of range or the file is too small.
  """
  # A program can be built and compiled without it.
  import grain

  if min(batch_size, seq_len, process_count) < 1 or prefetch < 0:
    raise ValueError(
      f'batch_size={batch_size}, seq_len={seq_len} and process_count='
      f'{process_count} must be at least 1, and prefetch={prefetch} at least 0.'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index={process_index} must be in [0, process_count='
      f'{process_count}).'
    )
  is_mixture = isinstance(token_file, Mixture)
  files = token_file.files if is_mixture else (token_file,)
  for file in files:
    _check_mode(file, seq_len, masking, document_mask)
  if masking is not None:
    seq_len -= 2  # The rest are the tokens around the text.
  if is_mixture:
    _check_sources(token_file, seq_len)
  _check_size(files, batch_size if repeat else 1, seq_len)

  multiple_of = 1 if repeat else batch_size
  parts = [_Sequences(f, seq_len, document_mask=document_mask) for f in files]
  dataset = grain.MapDataset.source(_Rows(parts, multiple_of, is_mixture))
  if shuffle:
    dataset = dataset.shuffle(seed=seed)
  if repeat:
    dataset = dataset.repeat()
  if masking is not None:
    # After the repetition: every epoch guesses other tokens.
    dataset = dataset.random_map(
      lambda row, rng: (
        masking(row['inputs'], rng, bool(row['weights'].any()))
        | {name: row[name] for name in row if name == 'source'}
      ),
      seed=seed,
    )
  elif with_seeds:
    dataset = dataset.random_map(
      lambda row, rng: {**row, 'seeds': rng.integers(2**32, dtype=np.uint32)},
      seed=seed,
    )
  return Batches(dataset, batch_size, (process_index, process_count), prefetch)


class Batches:
  """Batches of a sequence of rows, from any row on.

  `close()` ends its thread.

  Args:
    rows: All of them, those of one epoch after the other.
    batch_size: Rows of a batch over all processes.
    process: Which process this is, and of how many.
    prefetch: As in `batches`.
  """

  def __init__(
    self,
    rows: grain.MapDataset,
    batch_size: int,
    process: tuple[int, int],
    prefetch: int,
  ):
    self._rows, self._batch_size = rows, batch_size
    self._process, self._prefetch = process, prefetch
    self._start_at(0)

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self._iterator)
    self._taken += self._batch_size
    return batch

  def get_state(self) -> dict[str, int]:
    """The position: the number of rows taken, fit for JSON."""
    return {'sequences': self._taken}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on behind a position.

    Args:
      state: What `get_state` returned.
    """
    self.close()
    self._start_at(state['sequences'])

  def close(self) -> None:
    """Ends the thread that prepares batches."""
    self._iterator.close()

  def _start_at(self, taken: int) -> None:
    import grain

    index, count = self._process
    rows = self._rows[taken:]
    local = ordering.rows_per_process(self._batch_size, count)
    dataset = rows.batch(local, drop_remainder=True)
    # Consecutive local batches make up a global one.
    dataset = dataset[index::count]
    options = grain.ReadOptions(
      num_threads=min(self._prefetch, 1), prefetch_buffer_size=self._prefetch
    )
    self._iterator = iter(dataset.to_iter_dataset(options))
    self._taken = taken


def _check_mode(
  token_file: TokenFile,
  seq_len: int,
  masking: Masking | None,
  document_mask: bool,
) -> None:
  if token_file.seq_len not in (None, seq_len):
    raise ValueError(
      f'seq_len={seq_len} differs from the padded token file, whose rows have '
      f'{token_file.seq_len} tokens. Use that length or prepare it anew.'
    )
  if masking is not None and (token_file.mode != 'packed' or seq_len < 3):
    raise ValueError(
      f'Masking needs a packed token file and a seq_len of at least 3; got '
      f'mode={token_file.mode!r}, seq_len={seq_len}.'
    )
  if document_mask and (token_file.mode != 'packed' or masking is not None):
    raise ValueError(
      'document_mask=True needs a packed token file and no tokens to be '
      f'guessed within it; got mode={token_file.mode!r}, '
      f'{"no " if masking is None else ""}masking. A padded row is one '
      'document already.'
    )


def _check_sources(mixture: Mixture, seq_len: int) -> None:
  sizes = zip(mixture.names, mixture.sizes(seq_len), strict=True)
  empty = [name for name, size in sizes if not size]
  if empty:
    raise ValueError(
      f'The source {empty[0]!r} has not one row of seq_len={seq_len} tokens. '
      'Give it more text, use a smaller seq_len, or leave it out.'
    )


def _check_size(
  files: Sequence[TokenFile], sequences: int, seq_len: int
) -> None:
  if sum(file.num_sequences(seq_len) for file in files) >= sequences:
    return
  size = sum(file.stop - file.start for file in files)
  if files[0].mode == 'packed':
    has, needs = f'{size} tokens', f'{sequences} x {seq_len} + 1'
    other = ' or seq_len'
  else:
    has, needs = f'{size} documents', f'{sequences}'
    other = ", or mode 'packed'"
  raise ValueError(
    f'The data has {has}, which is less than one batch: it needs {needs}. Use '
    f'more text, or a smaller batch_size{other}.'
  )


class _Rows:
  """Random access to the sequences of one source after the other."""

  def __init__(
    self, parts: list[_Sequences], multiple_of: int, with_source: bool
  ):
    self._parts = parts
    self._ends = np.cumsum([len(part) for part in parts])
    self._length = math.ceil(self._ends[-1] / multiple_of) * multiple_of
    self._with_source = with_source

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    source = int(np.searchsorted(self._ends, index, side='right'))
    if source == len(self._parts):  # Fills the last batch.
      source, index = 0, len(self._parts[0])
    elif source:
      index -= int(self._ends[source - 1])
    row = self._parts[source][index]
    return row | {'source': np.int32(source)} if self._with_source else row


class _Sequences:
  """Random access to sequences; behind the last one there are empty ones."""

  def __init__(
    self, token_file: TokenFile, seq_len: int, *, document_mask: bool
  ):
    self._items = token_file.items()
    self._packed = token_file.mode == 'packed'
    self._eos_id = token_file.eos_id
    self._pad_id = token_file.pad_id
    self._seq_len = seq_len
    self._document_mask = document_mask
    self._length = token_file.num_sequences(seq_len)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    length = self._seq_len
    if index >= self._length:
      window = np.full(length + 1, self._pad_id, np.int32)
      counted = 0
    elif self._packed:
      start = index * length
      window = self._items[start : start + length + 1].astype(np.int32)
      counted = length
    else:
      row = self._items[index].astype(np.int32)
      window = np.append(row, np.int32(self._pad_id))
      # The first end-of-sequence token is the last target of the document.
      counted = int(np.argmax(row == self._eos_id))
    row = {
      'inputs': window[:-1],
      'targets': window[1:],
      'weights': (np.arange(length) < counted).astype(np.float32),
    }
    if self._document_mask:
      is_end = row['inputs'] == self._eos_id
      row['segments'] = (1 + np.cumsum(is_end) - is_end).astype(np.int32)
      row['weights'][is_end] = 0
    return row
