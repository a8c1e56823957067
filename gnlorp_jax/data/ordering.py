"""The random order of epochs, positions in it, seeds, and rows of processes.

Shape suffixes: N examples, B rows of a batch.
"""

import math
from typing import Any

import numpy as np

# Batches whose examples are sorted together. More would save little padding and
# make the order less random.
_WINDOW_BATCHES = 50


def shuffled(
  lengths_N: np.ndarray, batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
  """Draws the order of an epoch: rows of a batch are of similar length.

  The examples are drawn in random order, sorted by length within windows of 50
  batches, cut into batches, and the batches shuffled. What does not fill a
  batch is a random draw and comes last.

  Args:
    lengths_N: Tokens of each example, int ``[N]``.
    batch_size: B.
    rng: Decides the order.

  Returns:
    The examples of each batch, int64 ``[B]``, the last perhaps fewer.
  """
  order_N = rng.permutation(len(lengths_N))
  full = len(order_N) // batch_size * batch_size
  window = _WINDOW_BATCHES * batch_size
  plan = []
  for first in range(0, full, window):
    part = order_N[first : min(first + window, full)]
    part = part[np.argsort(lengths_N[part], kind='stable')]
    plan += list(part.reshape(-1, batch_size))
  plan = [plan[i] for i in rng.permutation(len(plan))]
  if full < len(order_N):
    plan.append(order_N[full:])
  return plan


def mix(offset: np.uint32, positions_B: np.ndarray) -> np.ndarray:
  """Hashes positions to seeds, one to one: the final mixer of MurmurHash3.

  Args:
    offset: What distinguishes epochs and runs.
    positions_B: Integers ``[B]`` in [0, 2**32).

  Returns:
    uint32 ``[B]``.
  """
  x_B = positions_B.astype(np.uint32) + offset
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x_B = (x_B ^ (x_B >> np.uint32(shift))) * np.uint32(factor)
  return x_B ^ (x_B >> np.uint32(16))


def rows_per_process(batch_size: int, process_count: int) -> int:
  """How many rows of every batch each process makes.

  Raises:
    ValueError: If processes cannot share a batch evenly.
  """
  if batch_size % process_count:
    raise ValueError(
      f'batch_size={batch_size} must be a multiple of process_count='
      f'{process_count}. Use a batch_size that the processes divide.'
    )
  return batch_size // process_count


def own_rows(batch_size: int, process_index: int, process_count: int) -> slice:
  """Which rows of every batch a process makes.

  Raises:
    ValueError: As `rows_per_process`.
  """
  count = rows_per_process(batch_size, process_count)
  return slice(process_index * count, (process_index + 1) * count)


class Epochs:
  """The rows of batches, epoch after epoch, from any position.

  Every epoch has each example once, in the order of `shuffled`; its last batch
  has fewer rows where the batch size does not divide their number.

  A position is a number of examples, so that batches of another size may go on
  from it. The order stays that which was drawn for the size of the first ones:
  no example comes twice in an epoch, and none is left out.

  Args:
    lengths_N: Tokens of each example, int ``[N]``.
    batch_size: B.
    seed: At least 0; with the number of the epoch it decides the order.

  Attributes:
    batches_per_epoch: Batches that hold every example once.
  """

  def __init__(self, lengths_N: np.ndarray, batch_size: int, seed: int):
    self._lengths_N = lengths_N
    self._batch_size = batch_size
    self._seed = seed
    self.batches_per_epoch = math.ceil(len(lengths_N) / batch_size)
    self.set_state({'sequences': 0, 'drawn_for': batch_size})

  def take(self) -> tuple[np.ndarray, np.uint32]:
    """The examples of the next batch, int64 ``[B]`` or fewer.

    Returns:
      And what tells this epoch and seed from others, for `mix`.
    """
    epoch, start = divmod(self._taken, len(self._lengths_N))
    if epoch != self._epoch:
      self._begin(epoch)
    index_B = self._order_N[start : start + self._batch_size]
    self._taken += len(index_B)
    return index_B, self._offset

  @property
  def batches_behind(self) -> int:
    """Batches behind the position: those of whole epochs, less those to come.

    They are as many as were taken, if all were of this size.
    """
    epoch, start = divmod(self._taken, len(self._lengths_N))
    to_come = math.ceil((len(self._lengths_N) - start) / self._batch_size)
    return (epoch + 1) * self.batches_per_epoch - to_come

  def get_state(self) -> dict[str, int]:
    """The position: the number of examples taken, fit for JSON."""
    return {'sequences': self._taken, 'drawn_for': self._drawn_for}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on behind a position.

    Args:
      state: What `get_state` returned.
    """
    self._taken = state['sequences']
    self._drawn_for = state['drawn_for']
    self._epoch = -1

  def _begin(self, epoch: int) -> None:
    self._epoch = epoch
    rng = np.random.default_rng([self._seed, epoch])
    plan = shuffled(self._lengths_N, self._drawn_for, rng)
    self._order_N = np.concatenate(plan)
    mixed = np.random.SeedSequence([self._seed, epoch])
    self._offset = mixed.generate_state(1)[0]
