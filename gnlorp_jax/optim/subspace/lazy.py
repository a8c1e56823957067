"""Refreshes that come less often where a subspace rests.

Shape suffixes in this file:
  R     rank of the subspace
  K     length of the queue of similarities
Leading axes stack matrices; in `similarity` and `lengthen` they are flattened
to one, [s].
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from gnlorp_jax.optim.parts.checks import (
  check_choice,
  check_int,
  check_interval,
)
from gnlorp_jax.optim.projections.base import Basis, Projection

Similarity = Literal['overlap', 'abs_cosine', 'cosine']


class LazyRefresh(NamedTuple):
  """Layer-adaptive refreshes: a matrix whose subspace rests waits longer.

  Each matrix has an interval of its own, at first `update_proj_gap`. At every
  refresh the similarity of the old and the new subspace enters a queue; when
  the queue is full and its mean reaches `threshold`, the interval is multiplied
  by `factor`.

  Attributes:
    threshold: Mean similarity from which the interval grows, in [-1, 1].
    factor: Growth of the interval, an integer of at least 2.
    queue: Length of the queue, at least 1.
    similarity: ``overlap``: ``o = |Q_old^T Q_new|^2 / r`` beyond what
      chance alone gives, ``(o - r/n) / (1 - r/n)``, at most 1;
      ``abs_cosine``: that of the two first basis vectors; ``cosine``: the same
      with its sign, the published rule.

  References:
    Zhang et al., `Q-GaLore`, 2024, arXiv:2407.08296, section 3.2.

  Note:
    The published code compares first singular vectors, sign included, although
    a subspace that rests may come back with the sign flipped. It keeps the old
    vector in full precision; here it is read from the stored basis. As there,
    the queue is not emptied when the interval grows, and an interval counts
    from step 1, so that the first one after a growth may be shorter. Where
    refreshes are spread, the first similarity is that of two bases less than an
    interval apart.
  """

  threshold: float = 0.4
  factor: int = 2
  queue: int = 5
  similarity: Similarity = 'overlap'


class LazyState(NamedTuple):
  """How the refreshes of one leaf have slowed down, see `LazyRefresh`."""

  gap: jax.Array  # int32 [*], steps between two refreshes of each matrix now
  similarity: jax.Array  # float32 [*, queue], of its last subspaces
  saved: jax.Array  # int32 [*], refreshes left out so far


def check_lazy(lazy: LazyRefresh | None) -> None:
  """Raises a `ValueError` if a field of `lazy` is out of its interval."""
  if lazy is None:
    return
  if not isinstance(lazy, LazyRefresh):
    raise ValueError(
      f'lazy_refresh must be a LazyRefresh or None, got {lazy!r}. Use '
      'LazyRefresh(similarity=...).'
    )
  check_interval('LazyRefresh.threshold', lazy.threshold, '[-1, 1]')
  check_int('LazyRefresh.factor', lazy.factor)
  if lazy.factor < 2:
    raise ValueError(
      f'LazyRefresh.factor must be at least 2, got {lazy.factor}. Use '
      'lazy_refresh=None to keep the intervals.'
    )
  check_int('LazyRefresh.queue', lazy.queue)
  check_choice('LazyRefresh.similarity', lazy.similarity, get_args(Similarity))


def matrix_norm(x: jax.Array) -> jax.Array:
  """Frobenius norm of each matrix of a stack, float32 ``[*]``."""
  return jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1))


def _first_cosine(
  old: dict[str, Basis],
  new: dict[str, Basis],
  projection: Projection,
  rank: int,
) -> jax.Array:
  """Cosine of the first old and the first new basis vector; mean of sides."""
  first_RN = jnp.eye(rank, dtype=jnp.float32)[None, :1]
  cosines = []
  for axis in new:
    if projection.turn is not None:
      cosines.append(projection.turn(old[axis], new[axis])[..., 0, 0])
      continue
    a = projection.project_back(first_RN, old[axis])
    b = projection.project_back(first_RN, new[axis])
    length = matrix_norm(a) * matrix_norm(b)
    cosines.append(jnp.sum(a * b, axis=(-2, -1)) / jnp.maximum(length, 1e-30))
  return jnp.mean(jnp.stack(cosines), axis=0)


def similarity(
  old: dict[str, Basis],
  new: dict[str, Basis],
  projection: Projection,
  lazy: LazyRefresh,
  *,
  rank: int,
  sizes: list[int],
  overlap_s: jax.Array,
) -> jax.Array:
  """How alike two subspaces are, by the rule of `lazy`, float32 ``[s]``.

  Args:
    old: The bases by their compressed axis.
    new: The bases fitted after them.
    projection: The projection of both.
    lazy: Which similarity.
    rank: Rank of the subspaces.
    sizes: Length of each compressed axis.
    overlap_s: Share of the old subspaces that lies in the new ones.
  """
  if lazy.similarity != 'overlap':
    cosine_s = _first_cosine(old, new, projection, rank)
    return jnp.abs(cosine_s) if lazy.similarity == 'abs_cosine' else cosine_s
  # Subspaces without anything in common overlap by r / n, too.
  chance = sum(rank / n for n in sizes) / len(sizes)
  if chance < 1:
    return jnp.clip((overlap_s - chance) / (1 - chance), -1, 1)
  # The whole space rests, whatever its basis.
  return jnp.ones_like(overlap_s)


def lengthen(
  state: LazyState,
  refresh_count: jax.Array,
  similarity_s: jax.Array,
  lazy: LazyRefresh,
) -> LazyState:
  """Queues a similarity and lengthens the intervals of subspaces at rest.

  Args:
    state: The intervals before this refresh.
    refresh_count: Refreshes of each matrix, this one counted, int32 ``[s]``.
    similarity_s: Of the bases before and after it.
    lazy: When intervals grow.
  """
  # The first basis replaces a random start: nothing to compare yet.
  pushed = refresh_count - 1
  queue_sK = jnp.concatenate(
    [state.similarity[..., 1:], similarity_s[..., None]], axis=-1
  )
  queue_sK = jnp.where(pushed[..., None] > 0, queue_sK, state.similarity)
  rests = (pushed >= lazy.queue) & (jnp.mean(queue_sK, -1) >= lazy.threshold)
  longest = (2**31 - 1) // lazy.factor
  longer = jnp.where(state.gap <= longest, state.gap * lazy.factor, state.gap)
  return LazyState(
    gap=jnp.where(rests, longer, state.gap),
    similarity=queue_sK,
    saved=state.saved,
  )
