"""When which basis is refitted to the gradient, and the refit itself.

Shape suffixes in this file:
  IO    a kernel's input and output axes, the last two of its array
  RR    both axes of length rank
Leading axes of a kernel stack matrices; inside they are flattened to one, [s].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gnlorp_jax.optim.projections.base import Basis, Projection
from gnlorp_jax.optim.subspace import Subspace, project, toward


class Schedule(NamedTuple):
  """Which block of a stack of matrices is refreshed when.

  The `stack` matrices of a leaf are refreshed in blocks of `block`, one block
  a time, block e at the steps whose count is ``offset + e * gap // blocks``
  modulo `gap`.
  """

  stack: int
  block: int
  gap: int
  offset: int

  @property
  def blocks(self) -> int:
    """Number of blocks; no more than `gap`."""
    return -(-self.stack // self.block)

  def due(self, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether a block is due at `count`, and the first matrix of it."""
    phase = jnp.mod(count - self.offset, self.gap)
    e = -(-phase * self.blocks // self.gap)
    is_due = (e < self.blocks) & (e * self.gap // self.blocks == phase)
    start = jnp.clip(e * self.block, 0, self.stack - self.block)
    return is_due, start


def refresh_schedule(
  stack: int, leaf: int, num_leaves: int, gap: int, spread: bool
) -> Schedule:
  """The refreshes of one leaf, spread over the interval or all at once.

  Spread, a step refreshes one matrix where ``gap`` allows: the leaves take
  turns, and so do the matrices of each. Otherwise all are refreshed at steps
  1, T + 1, 2T + 1, ..., as published code does.
  """
  if not spread:
    return Schedule(stack, block=stack, gap=gap, offset=0)
  block = -(-stack // gap)
  blocks = -(-stack // block)
  return Schedule(stack, block, gap, leaf * gap // (num_leaves * blocks))


def _matrix_norm(x: jax.Array) -> jax.Array:
  return jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1))


def _overlap(
  old: dict[str, Basis],
  new: dict[str, Basis],
  projection: Projection,
  rank: int,
) -> jax.Array:
  """Share of the old subspace that lies in the new one: |Q_old^T Q_new|^2 / r.

  Written with the projection's own functions, so that it holds for every basis
  type; the mean of both sides where two are compressed.
  """
  shares = []
  for axis in new:
    back_RN = projection.project_back(jnp.eye(rank)[None], old[axis])
    turned_RR = projection.project(back_RN, new[axis])
    shares.append(_matrix_norm(turned_RR) ** 2 / rank)
  return jnp.mean(jnp.stack(shares), axis=0)


def _refit(
  grad_IO: jax.Array, old: Subspace, count: jax.Array, projection: Projection
) -> Subspace:
  """Refits the bases of a stack ``[s, in, out]``; bad gradients keep the old.

  A gradient that is zero or not finite fits no basis. The others are scaled to
  a largest entry of 1, so that no square under- or overflows.
  """
  finite = jnp.all(jnp.isfinite(grad_IO), axis=(-2, -1))
  largest = jnp.max(jnp.abs(grad_IO), axis=(-2, -1))
  usable = finite & (largest > 0)
  scale = jnp.where(usable, largest, 1).astype(jnp.float32)[:, None, None]
  grad_IO = jnp.where(
    usable[:, None, None], grad_IO.astype(jnp.float32) / scale, 0
  )
  basis = {
    axis: projection.refresh(toward(grad_IO, axis), b, count)
    for axis, b in old.basis.items()
  }
  low = project(grad_IO, basis, projection)
  energy = (_matrix_norm(low) / jnp.maximum(_matrix_norm(grad_IO), 1e-30)) ** 2
  fitted = Subspace(
    basis=basis,
    refresh_count=old.refresh_count + 1,
    overlap=_overlap(old.basis, basis, projection, low.shape[-1]),
    energy=energy,
  )
  # A factorisation that failed shows in the energy.
  return _where(usable & jnp.isfinite(energy), fitted, old)


def _where(condition_s: jax.Array, x: Subspace, y: Subspace) -> Subspace:
  """Per matrix of the stack: `x` where the condition holds, else `y`."""

  def select(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(condition_s.reshape(-1, *[1] * (a.ndim - 1)), a, b)

  return jax.tree.map(select, x, y)


def refresh_due(
  grad_IO: jax.Array,
  old: Subspace,
  count: jax.Array,
  schedule: Schedule,
  projection: Projection,
) -> Subspace:
  """Refits what is due of a leaf: nothing, one block, or the first bases.

  A matrix whose first basis is still missing (its gradient was zero until now)
  gets it at its first usable gradient.

  The matrices are refitted one after the other in a loop of as many rounds as
  needed, mostly none. A loop updates its carry in place, where the branches of
  a `lax.cond` around the whole stack would each return a copy of it (and under
  a vmap would be computed at every step).

  Args:
    grad_IO: Gradient of the leaf, ``[*, in, out]``.
    old: Its subspace, every array with the same leading axes.
    count: Updates before this one, int32.
    schedule: When which matrix is due.
    projection: How a basis is fitted.

  Returns:
    The subspace to use in this step.
  """
  stack = grad_IO.shape[:-2]

  def flatten(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[len(stack) :])

  def restore(x: jax.Array) -> jax.Array:
    return x.reshape(*stack, *x.shape[1:])

  grad_IO, old = flatten(grad_IO), jax.tree.map(flatten, old)
  is_due, start = schedule.due(count)
  end = start + jnp.where(is_due, schedule.block, 0)
  unset = old.refresh_count == 0
  pending = jax.lax.cond(
    jnp.any(unset),
    lambda: jnp.any(unset & jnp.any(grad_IO != 0, axis=(-2, -1))),
    lambda: False,
  )

  def refit(i: jax.Array, subspace: Subspace) -> Subspace:
    def part(x: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(x, i, 1)

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
      return jax.lax.dynamic_update_slice_in_dim(x, new, i, 0)

    mine = jax.tree.map(part, subspace)
    wanted = (mine.refresh_count == 0) | ((i >= start) & (i < end))
    new = _where(wanted, _refit(part(grad_IO), mine, count, projection), mine)
    return jax.tree.map(put, subspace, new)

  first = jnp.where(pending, 0, start)
  last = jnp.where(pending, schedule.stack, end)
  return jax.tree.map(restore, jax.lax.fori_loop(first, last, refit, old))
