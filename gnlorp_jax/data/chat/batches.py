"""Examples to batches, one a row or several.

Shape suffixes: R rows of an epoch, B rows of a batch, T positions, P positions
at which a token is learned.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gnlorp_jax.data import ordering
from gnlorp_jax.data.chat.packing import pack
from gnlorp_jax.data.chat.templates import Example

_SHORTEST = 32
_POSITIONS = 16  # P is a multiple of it, which suits matrix units.


class _Rows:
  """The rows of an epoch, in an order of their own."""

  def __init__(
    self,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int,
    packing: bool,
    pad_id: int,
    origins: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ):
    if min(batch_size, max_length) < 1:
      raise ValueError(
        f'batch_size={batch_size} and max_length={max_length} must be at least '
        '1.'
      )
    if not examples:
      raise ValueError('There are no examples, so there is no batch of them.')
    lengths = [len(example.ids) for example in examples]
    if not 1 <= min(lengths) <= max(lengths) <= max_length:
      raise ValueError(
        f'Examples have {min(lengths)} to {max(lengths)} tokens; expected 1 to '
        f'max_length={max_length}. Prepare them with that max_length.'
      )
    self._examples = examples
    self.own = ordering.own_rows(batch_size, process_index, process_count)
    self._count = self.own.stop - self.own.start
    self._max_length = max_length
    self.packing = packing
    self._pad_id = pad_id
    self._members = (
      _packed(lengths, max_length, origins)
      if packing
      else [[i] for i in range(len(examples))]
    )
    self.source_R = None
    if origins is not None:
      first = [origins[row[0]] for row in self._members]
      self.source_R = np.array(first, np.int32)
    self.lengths_R = np.array(
      [sum(lengths[i] for i in row) for row in self._members]
    )
    learned = [np.count_nonzero(example.weights[1:]) for example in examples]
    learned_R = np.array(
      [sum(learned[i] for i in row) for row in self._members]
    )
    # P by T: batches of one T have one shape, which is compiled once.
    self._positions = {
      length: _POSITIONS * max(1, math.ceil(most / _POSITIONS))
      for length in set(map(self._padded, self.lengths_R.tolist()))
      for most in [learned_R[self.lengths_R <= length].max()]
    }

  def __len__(self) -> int:
    return len(self._members)

  @property
  def least_length(self) -> int:
    """T of the batch of the shortest row."""
    return self._padded(int(self.lengths_R.min()))

  def batch(self, index: np.ndarray) -> dict[str, np.ndarray]:
    """This process's rows of a batch, of which there may be too few.

    It is filled up with rows that count nothing.
    """
    length = self._padded(int(self.lengths_R[index].max()))
    index, shape = index[self.own], (self._count, length)
    batch = {
      'inputs': np.full(shape, self._pad_id, np.int32),
      'targets': np.full(shape, self._pad_id, np.int32),
      'weights': np.zeros(shape, np.float32),
    }
    segments_BT = np.ones(shape, np.int32)
    for b, row in enumerate(index):
      start = 0
      for number, member in enumerate(self._members[row], 1):
        ids, weights = self._examples[member]
        end = start + len(ids)
        batch['inputs'][b, start:end] = ids
        # The last position of a document has nothing to guess.
        batch['targets'][b, start : end - 1] = ids[1:]
        batch['weights'][b, start : end - 1] = weights[1:]
        segments_BT[b, start:end] = number
        segments_BT[b, end:] = number + 1
        start = end
    if self.packing:
      batch['segments'] = segments_BT
    if self.source_R is not None:
      batch['source'] = np.zeros(self._count, np.int32)
      batch['source'][: len(index)] = self.source_R[index]
    number = self._positions[length]
    return batch if number >= length else _at_learned(batch, number)

  def _padded(self, longest: int) -> int:
    """T of a batch whose longest row has so many tokens."""
    if self.packing:
      return self._max_length
    length = _SHORTEST
    while length < longest:
      length *= 2
    return min(length, self._max_length)


def _packed(
  lengths: Sequence[int], capacity: int, origins: Sequence[int] | None
) -> list[list[int]]:
  """Examples that share a row, of one source where sources are given."""
  if origins is None:
    return pack(lengths, capacity)
  rows = []
  for source in sorted(set(origins)):
    members = [i for i, origin in enumerate(origins) if origin == source]
    of_source = pack([lengths[i] for i in members], capacity)
    rows += [[members[i] for i in row] for row in of_source]
  return rows


def _at_learned(
  batch: dict[str, np.ndarray], number: int
) -> dict[str, np.ndarray]:
  """The batch with `number` positions of each row, learned ones before others.

  Logits, the widest arrays of a model, are then computed where they count.
  """
  order_BT = np.argsort(batch['weights'] == 0, axis=1, kind='stable')
  positions_BP = order_BT[:, :number].astype(np.int32)
  chosen = {
    name: np.take_along_axis(batch[name], positions_BP, axis=1)
    for name in ('targets', 'weights')
  }
  return batch | chosen | {'positions': positions_BP}


class TrainingBatches:
  """Batches of shuffled examples, epoch after epoch, from any position.

  Each is a dict with

  * `inputs`: int32 ``[B, T]``, ids;
  * `positions`: int32 ``[B, P]``, the positions after which a token is learned,
    and others of weight 0 where a row has fewer; absent where P would be T. P
    is the same in all batches of one T;
  * `targets`: int32 ``[B, P]``, the id that follows in the same document, and
    `pad_id` where none does;
  * `weights`: float32 ``[B, P]``, how much the target counts: 0 at the last
    position of a document and in padding;
  * `segments`: int32 ``[B, T]``, if packed: 1 for the first document of a row,
    2 for the next, and so on, the padding behind them last;
  * `seeds`: uint32 ``[B]``, if asked for: a function of seed, epoch and row,
    distinct within an epoch, for dropout;
  * `source`: int32 ``[B]``, if sources are given: the row's. Then examples of
    different sources share no row.

  Packed, T is `max_length` and a row holds what `pack` puts into it, the same
  in every epoch. Otherwise a row is one example and T the smallest of 32, 64,
  128, ..., `max_length` that holds the longest of the batch; a batch holds
  examples of similar length (`ordering.shuffled`). The order of rows follows
  from seed and epoch alone. The last batch of an epoch is filled up with rows
  of weight 0.

  Attributes:
    batches_per_epoch: Batches that hold every example once.
  """

  def __init__(
    self,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int,
    packing: bool,
    pad_id: int,
    seed: int = 0,
    with_seeds: bool = False,
    origins: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Packs the examples.

    Args:
      examples: The examples.
      batch_size: B.
      max_length: Most tokens of an example, and of a row.
      packing: Whether rows hold several examples.
      pad_id: Fills up rows.
      seed: At least 0; decides the order.
      with_seeds: Whether batches have `seeds`.
      origins: Number of the source of every example; None tells none apart.
      process_index: Which process this is; it makes only its rows of each
        batch.
      process_count: Number of processes. Their rows, joined in order, are the
        batch a single process would get.

    Raises:
      ValueError: If there are no examples, one is too long, or processes cannot
        share a batch.
    """
    self._rows = _Rows(
      examples,
      batch_size=batch_size,
      max_length=max_length,
      packing=packing,
      pad_id=pad_id,
      origins=origins,
      process_index=process_index,
      process_count=process_count,
    )
    self._batch_size = batch_size
    self._with_seeds = with_seeds
    # Packed rows are all full, as far as computing goes.
    lengths_R = self._rows.lengths_R * (not packing)
    self._epochs = ordering.Epochs(lengths_R, batch_size, seed)
    self.batches_per_epoch = self._epochs.batches_per_epoch

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    index, offset = self._epochs.take()
    batch = self._rows.batch(index)
    if self._with_seeds:
      filled = np.arange(self._batch_size - len(index)) + len(self._rows)
      rows = np.concatenate([index, filled])[self._rows.own]
      batch['seeds'] = ordering.mix(offset, rows)
    return batch

  @property
  def least_length(self) -> int:
    """T of a batch at least, be it of the shortest rows."""
    return self._rows.least_length

  @property
  def batches_behind(self) -> int:
    """As of `ordering.Epochs`."""
    return self._epochs.batches_behind

  def rows_by_source(self, count: int) -> tuple[int, ...]:
    """Rows that each of `count` sources has."""
    if self._rows.source_R is None:
      raise ValueError('No sources were given (origins): none are told apart.')
    rows = np.bincount(self._rows.source_R, minlength=count)
    return tuple(map(int, rows))

  def get_state(self) -> dict[str, int]:
    """The position: the number of rows taken, fit for JSON."""
    return self._epochs.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on behind the position that `get_state` returned.

    The batches before may have had another size (`ordering.Epochs`).
    """
    self._epochs.set_state(state)

  def close(self) -> None:
    """Ends the iterator, which holds nothing open."""


def evaluation_batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  max_length: int,
  packing: bool,
  pad_id: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches that hold every example once, the longest first.

  Args:
    examples: As in `TrainingBatches`, as are the others.
    batch_size: B.
    max_length: Most tokens of an example, and of a row.
    packing: Whether rows hold several examples.
    pad_id: Fills up rows.
    process_index: As in `TrainingBatches`, as is the next.
    process_count: Number of processes.

  Returns:
    An iterator over batches like those of `TrainingBatches`.

  Raises:
    ValueError: If there are no examples or one is too long.
  """
  rows = _Rows(
    examples,
    batch_size=batch_size,
    max_length=max_length,
    packing=packing,
    pad_id=pad_id,
    process_index=process_index,
    process_count=process_count,
  )
  order_R = np.argsort(-rows.lengths_R, kind='stable')
  starts = range(0, len(rows), batch_size)
  return (rows.batch(order_R[i : i + batch_size]) for i in starts)
