"""Which examples are picked: on the host, in float64, from small matrices.

Shape suffixes in this file:
  N  examples of a pool, or of a source in it
  S  sources
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from gnlorp_jax.training.selection.quotas import quotas

Selector = Literal['random', 'facility', 'herding']
Ties = Literal['lowest', 'released']

# Gains that differ by less, relatively, are the same number.
_TIE = 1e-12


class Frame(NamedTuple):
  """What is settled before anything is compared.

  Attributes:
    kept: Examples of small sources, in the order of the pool.
    quotas_S: How many are picked of every source; 0 of small ones.
    surplus: Examples of small sources for which there was no room.
  """

  kept: np.ndarray
  quotas_S: np.ndarray
  surplus: int


def frame(
  source_N: np.ndarray,
  can_N: np.ndarray,
  small: Sequence[int],
  budget: int,
  num_sources: int,
  rng: np.random.Generator,
) -> Frame:
  """Keeps small sources whole and shares out the rest of a batch.

  Args:
    source_N: Source of every example of the pool.
    can_N: Whether an example may be picked: padding may not.
    small: Sources that are kept.
    budget: Examples of the batch; fewer if the pool has fewer.
    num_sources: S.
    rng: Chooses among kept examples if the batch has no room for all.

  Note:
    The release takes the first ones of too many.
  """
  is_small_N = np.isin(source_N, list(small))
  kept = np.flatnonzero(can_N & is_small_N)
  surplus = max(len(kept) - budget, 0)
  if surplus:
    kept = np.sort(rng.choice(kept, budget, replace=False))
  counts_S = np.bincount(source_N[can_N & ~is_small_N], minlength=num_sources)
  left = min(budget - len(kept), int(counts_S.sum()))
  return Frame(kept, quotas(counts_S, left), surplus)


def by_source(
  found: Frame,
  source_N: np.ndarray,
  can_N: np.ndarray,
  choose: Callable[[np.ndarray, int], np.ndarray],
) -> np.ndarray:
  """Picks source by source with ``choose(members, quota)``.

  Returns:
    Examples in the order of their choice, without those that are kept.
  """
  chosen = [np.empty(0, np.int64)]
  for source in np.flatnonzero(found.quotas_S):
    members = np.flatnonzero(can_N & (source_N == source))
    quota = int(found.quotas_S[source])
    is_all = quota == len(members)
    chosen.append(members if is_all else choose(members, quota))
  return np.concatenate(chosen)


def facility(
  distance_NN: np.ndarray, count: int, ties: Ties = 'lowest'
) -> np.ndarray:
  """Greedy facility location: examples that all others are near to.

  Each pick adds most to ``sum_i max_{j picked} (C - d_ij)``, with C the largest
  distance, of which the picks do not depend.

  Args:
    distance_NN: Distances within one source.
    count: Picks, at most N.
    ties: Which of equal gains is taken: the lowest index, or the highest, as by
      the library that the release calls.

  Returns:
    int64 ``[count]``, in the order of the choice.

  References:
    CoLM, section 4.3; Mirzasoleiman et al., `CRAIG`, 2019, arXiv:1906.01827.
  """
  similarity_NN = np.float64(distance_NN.max()) - np.float64(distance_NN)
  best_N = np.zeros(len(similarity_NN))
  picked: list[int] = []
  for _ in range(count):
    gain_N = np.maximum(similarity_NN, best_N[:, None]).sum(0) - best_N.sum()
    gain_N[picked] = -np.inf
    largest = gain_N.max()
    equal = np.flatnonzero(gain_N >= largest - _TIE * max(1.0, abs(largest)))
    picked.append(int(equal[0 if ties == 'lowest' else -1]))
    best_N = np.maximum(best_N, similarity_NN[:, picked[-1]])
  return np.array(picked, np.int64)


def herding(
  gram_NN: np.ndarray,
  source_N: np.ndarray,
  can_N: np.ndarray,
  found: Frame,
) -> np.ndarray:
  """Picks that bring the mean of the batch to the mean of the pool.

  With K the inner products of features, t their means over the pool and A what
  is taken so far, kept examples first, the next one is that of the least ``(1'K
  1 + 2 (K 1)_j + K_jj) / (|A| + 1)^2 - 2 (sum_A t + t_j) / (|A| + 1)`` among
  sources with quota left: the squared distance of the two means but for a
  constant. The lowest index is taken among equals.

  Args:
    gram_NN: Inner products of all features of the pool.
    source_N: Source of every example.
    can_N: Whether an example may be picked; the others do not count in the
      pool's mean either.
    found: What is kept, and the quotas.

  Returns:
    int64, in the order of the choice, without those that are kept.

  References:
    Welling, `Herding Dynamical Weights to Learn`, 2009; Chen et al., 2010,
    arXiv:1203.3472.

  Note:
    Not in CoLM, whose facility location is meant to match the same mean.
  """
  gram_NN = np.float64(gram_NN)
  mean_N = gram_NN[:, can_N].mean(1) if can_N.any() else np.zeros(len(gram_NN))
  left_S = found.quotas_S.copy()
  taken = list(map(int, found.kept))
  sum_N = gram_NN[:, taken].sum(1)
  square, match = sum_N[taken].sum(), mean_N[taken].sum()
  is_open_N = can_N.copy()
  is_open_N[taken] = False
  picked: list[int] = []
  while left_S.any():
    size = len(taken) + 1
    excess_N = (square + 2 * sum_N + np.diag(gram_NN)) / size**2
    excess_N -= 2 * (match + mean_N) / size
    allowed_N = is_open_N & (left_S[source_N] > 0)
    j = int(np.argmin(np.where(allowed_N, excess_N, np.inf)))
    square += 2 * sum_N[j] + gram_NN[j, j]
    match += mean_N[j]
    sum_N += gram_NN[:, j]
    is_open_N[j] = False
    left_S[source_N[j]] -= 1
    taken.append(j)
    picked.append(j)
  return np.array(picked, np.int64)


def at_random(
  members: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
  """Any `count` of these examples, in their order."""
  return np.sort(rng.choice(members, count, replace=False))


def relative_error(
  gram_NN: np.ndarray, can_N: np.ndarray, taken: np.ndarray
) -> float:
  """How far the mean feature of a batch is from that of its pool.

  Args:
    gram_NN: Inner products of the features.
    can_N: The examples of the pool that count.
    taken: The batch.

  Returns:
    ``|mean of batch - mean of pool| / |mean of pool|``.
  """
  gram_NN, pool = np.float64(gram_NN), np.flatnonzero(can_N)
  if not len(pool) or not len(taken):
    return float('nan')
  both = gram_NN[np.ix_(taken, pool)].mean()
  of_pool = gram_NN[np.ix_(pool, pool)].mean()
  of_batch = gram_NN[np.ix_(taken, taken)].mean()
  square = max(of_batch - 2 * both + of_pool, 0.0)
  return float(np.sqrt(square / of_pool)) if of_pool > 0 else float('nan')
