"""The random order of an epoch, and seeds for dropout.

Shape suffixes: N examples, B rows of a batch.
"""

import numpy as np

# Batches whose examples are sorted together. More would save little padding and
# make the order less random.
_WINDOW_BATCHES = 50


def shuffled(
  lengths_N: np.ndarray,
  batch_size: int,
  rng: np.random.Generator,
  drop_remainder: bool,
) -> list[np.ndarray]:
  """Draws the order of an epoch: rows of a batch are of similar length.

  The examples are drawn in random order, sorted by length within windows of 50
  batches, cut into batches, and the batches shuffled. What does not fill a
  batch is a random draw and comes last.

  Args:
    lengths_N: Tokens of each example, int ``[N]``.
    batch_size: B.
    rng: Decides the order.
    drop_remainder: Whether to leave out the examples that fill no batch.

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
  if full < len(order_N) and not drop_remainder:
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
