"""How many examples of each source a batch gets, in integers.

Shape suffixes in this file:
  S  sources
"""

from collections.abc import Sequence

import numpy as np


def small_sources(sizes: Sequence[int]) -> tuple[int, ...]:
  """Sources of fewer examples than the mean source of the data set has.

  Args:
    sizes: Examples of each source in the whole data set.

  Returns:
    Numbers of the small sources, ascending.

  Examples:
    >>> small_sources([300, 20, 900, 60])
    (0, 1, 3)

  References:
    CoLM, section 4.1: small is what has less than ``|V| / c`` examples. The
    list that the released script keeps of MathInstruct follows from it.
  """
  total, count = sum(sizes), len(sizes)
  return tuple(i for i, size in enumerate(sizes) if size * count < total)


def quotas(counts_S: np.ndarray, total: int) -> np.ndarray:
  """Shares out `total` picks in proportion to what a pool holds.

  ``floor(total count_s / sum count)``, and what is then left goes one by one to
  the smallest of these numbers, the lowest source first among equals.

  Args:
    counts_S: Examples of each source in the pool, integers of at least 0.
    total: Picks, from 0 to the sum of the counts.

  Returns:
    int64 ``[S]`` with the sum `total`, nowhere more than `counts_S`.

  Raises:
    ValueError: If there are fewer examples than picks.

  Examples:
    >>> quotas(np.array([10, 3, 0]), 6)
    array([4, 2, 0])

  Note:
    As the release, which rounds up the smallest shares, not the largest
    remainders; among equals its sort is unstable. A source that the pool lacks
    has no share.
  """
  counts_S = np.asarray(counts_S, np.int64)
  number = int(counts_S.sum())
  if not 0 <= total <= number:
    raise ValueError(
      f'{total} examples cannot be picked among {number}. Ask for 0 to '
      f'{number}.'
    )
  if not number:
    return np.zeros_like(counts_S)
  quotas_S = counts_S * total // number
  present = np.flatnonzero(counts_S)
  smallest_first = present[np.argsort(quotas_S[present], kind='stable')]
  quotas_S[smallest_first[: total - int(quotas_S.sum())]] += 1
  return quotas_S
