"""The size above which the largest entries lie, of more than memory holds.

Float32 numbers that are not negative are in the order of their bits. So one
pass counts them by their upper 16 bits, which tells the bucket of the entry
that is looked for, and another one counts those of this bucket by their lower
15: the threshold is exact, and no flat copy of a model exists.

Shape suffixes in this file: N experts, K buckets.
"""

from collections.abc import Sequence

import numpy as np

_LOW = 15  # Bits; the sign is none of them.
_BUCKETS = 2**16
_CHUNK = 2**20  # Values that are counted at once.


class Histogram:
  """Counts of the sizes of entries, of every expert apart."""

  def __init__(self, num_experts: int, buckets: Sequence[int] | None = None):
    """Starts at zero.

    Args:
      num_experts: Number of experts.
      buckets: By expert the bucket to look into, as of `find`; None counts all
        entries, by buckets.
    """
    self._buckets = buckets
    self._counts_NK = np.zeros((num_experts, _BUCKETS), np.int64)

  def add(self, tau_N: np.ndarray) -> None:
    """Counts the entries of one tensor.

    Args:
      tau_N: Task vectors, ``[n, *]``, float32, finite.
    """
    for expert, tau in enumerate(tau_N):
      values = tau.reshape(-1)
      for start in range(0, values.size, _CHUNK):
        bits = np.abs(values[start : start + _CHUNK]).view(np.uint32)
        high = bits >> _LOW
        if self._buckets is not None:
          inside = bits[high == self._buckets[expert]]
          high = inside & (2**_LOW - 1)
        self._counts_NK[expert] += np.bincount(high, minlength=_BUCKETS)

  def find(self, ranks: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where an entry is, by expert.

    Args:
      ranks: Its place from the smallest, from 0.

    Returns:
      The bucket, and its place in the bucket.
    """
    places = []
    for counts, rank in zip(self._counts_NK, ranks, strict=True):
      ends = np.cumsum(counts)
      bucket = int(np.searchsorted(ends, rank, side='right'))
      places.append((bucket, int(rank - (ends[bucket] - counts[bucket]))))
    buckets, inside = zip(*places, strict=True)
    return list(buckets), list(inside)


def value(bucket: int, low: int) -> np.float32:
  """The number with these upper and lower bits."""
  return np.uint32((bucket << _LOW) | low).view(np.float32)


def rank(size: int, keep: float) -> int | None:
  """The place of the smallest entry that is kept, from the smallest, from 0.

  Args:
    size: Number of entries.
    keep: How many percent are kept, in (0, 100].

  Returns:
    The place; None where all entries are kept.

  Note:
    As in the releases of TIES and DOGE, ``int(size * keep / 100) + 1`` entries
    are kept, more where several have the size of the smallest. Both fail at 100
    percent.
  """
  count = int(size * keep / 100)
  return None if count >= size else size - count - 1
