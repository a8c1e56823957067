"""When which basis is refitted to the gradient, and the refit itself.

Shape suffixes in this file:
  IO    a kernel's input and output axes, the last two of its array
  RN    rank of the subspace, and the axis its basis lives on
Leading axes of a kernel stack matrices; inside they are flattened to one, [s].
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnlorp_jax.optim.parts.split import Look
from gnlorp_jax.optim.projections import base
from gnlorp_jax.optim.projections.base import Basis, Projection
from gnlorp_jax.optim.subspace.lazy import (
  LazyRefresh,
  lengthen,
  matrix_norm,
  similarity,
)
from gnlorp_jax.optim.subspace.moments import (
  MomentRule,
  Transport,
)
from gnlorp_jax.optim.subspace.sides import Subspace, project, toward


def refresh_offsets(
  stacks: list[tuple[int, ...]], gap: int, spread: bool
) -> list[np.ndarray]:
  """When in its interval each matrix is due, int32 ``[*]`` in [0, gap).

  Spread, the matrices of a leaf are evenly spaced over the interval and the
  leaves take turns in between: where all leaves stack equally many and `gap`
  allows, a step refreshes one matrix, elsewhere a few. Otherwise all are due at
  steps 1, T + 1, 2T + 1, ..., as in published code.

  Args:
    stacks: The leading axes of each leaf.
    gap: The interval, T.
    spread: Whether to spread.

  Returns:
    The offsets of each leaf's matrices.
  """

  def offsets(leaf: int, stack: tuple[int, ...]) -> np.ndarray:
    count = math.prod(stack)
    turn = leaf * gap // (len(stacks) * count)
    offset_s = (turn + np.arange(count) * gap // count) * int(spread)
    return offset_s.astype(np.int32).reshape(stack)

  return [offsets(leaf, stack) for leaf, stack in enumerate(stacks)]


def _due(
  count: jax.Array, offset: jax.Array, gap: jax.Array | int
) -> jax.Array:
  """Which matrices are due after `count` updates, each in its interval."""
  return jnp.mod(count - offset, gap) == 0


def _overlap(
  old: dict[str, Basis],
  new: dict[str, Basis],
  projection: Projection,
  rank: int,
) -> jax.Array:
  """Share of the old subspace that lies in the new one: |Q_old^T Q_new|^2 / r.

  The mean of both sides where two are compressed.
  """
  shares = [
    matrix_norm(base.turn(projection, rank, old[axis], new[axis])) ** 2 / rank
    for axis in new
  ]
  return jnp.mean(jnp.stack(shares), axis=0)


def _refit(
  grad_IO: jax.Array,
  old: Subspace,
  count: jax.Array,
  projection: Projection,
  lazy: LazyRefresh | None,
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
  energy = (matrix_norm(low) / jnp.maximum(matrix_norm(grad_IO), 1e-30)) ** 2
  overlap = _overlap(old.basis, basis, projection, low.shape[-1])
  fitted = Subspace(
    basis=basis,
    refresh_count=old.refresh_count + 1,
    overlap=overlap,
    energy=energy,
    offset=old.offset,
    lazy=old.lazy,
  )
  if lazy is not None:
    assert old.lazy is not None
    sizes = [toward(grad_IO, axis).shape[-1] for axis in basis]
    alike = similarity(
      *(old.basis, basis, projection, low.shape[-1]), sizes, overlap, lazy
    )
    fitted = fitted._replace(
      lazy=lengthen(old.lazy, fitted.refresh_count, alike, lazy)
    )
  # A factorisation that failed shows in the energy.
  return _where(usable & jnp.isfinite(energy), fitted, old)


def _where(condition_s: jax.Array, x: Any, y: Any) -> Any:
  """Per matrix of the stack: `x` where the condition holds, else `y`."""

  def select(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(condition_s.reshape(-1, *[1] * (a.ndim - 1)), a, b)

  return jax.tree.map(select, x, y)


def refresh_due(
  grad_IO: jax.Array,
  old: Subspace,
  count: jax.Array,
  gap: int,
  projection: Projection,
  look: Look,
  lazy: LazyRefresh | None = None,
  moments: Any = None,
  rule: MomentRule | None = None,
) -> tuple[Subspace, Any]:
  """Refits what is due of a leaf, and moves its moments along.

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
    gap: Updates between two refreshes of a matrix.
    projection: How a basis is fitted.
    look: Whether to refresh at all, and how to sum gradients over devices.
    lazy: How intervals grow; None keeps them.
    moments: Pytree of arrays with the same leading axes that live in the
      subspace; None where there is no `rule`.
    rule: What a refresh does to the moments.

  Returns:
    The subspace to use in this step, and the moments in it.
  """
  stack = grad_IO.shape[:-2]

  def flatten(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[len(stack) :])

  def restore(x: jax.Array) -> jax.Array:
    return x.reshape(*stack, *x.shape[1:])

  grad_IO, old, moments = jax.tree.map(flatten, (grad_IO, old, moments))
  assert old.offset is not None
  due = _due(count, old.offset, gap)
  if old.lazy is not None:
    planned, due = due, _due(count, old.offset, old.lazy.gap)
    saved = old.lazy.saved + (planned & ~due & look.due)
    old = old._replace(lazy=old.lazy._replace(saved=saved))
  unset = old.refresh_count == 0

  def with_unset() -> jax.Array:
    nonzero = jnp.any(grad_IO != 0, axis=(-2, -1))
    return due | (unset & (look.total(nonzero.astype(jnp.int32)) > 0))

  due = jax.lax.cond(jnp.any(unset), with_unset, lambda: due) & look.due
  order = jnp.argsort(~due)  # Stable: those that are due come first.

  def refit(k: jax.Array, carry: tuple[Subspace, Any]) -> tuple[Subspace, Any]:
    def part(x: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(x, order[k], 1)

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
      return jax.lax.dynamic_update_slice_in_dim(x, new, order[k], 0)

    mine, moments = jax.tree.map(part, carry)
    mine_IO = look.total(part(grad_IO))
    new = _refit(mine_IO, mine, count, projection, lazy)
    if rule is not None:
      # Neither a first basis nor a failed refit has moments to move.
      moved = rule(moments, _transport(mine.basis, new.basis, projection))
      keep = (new.refresh_count == mine.refresh_count) | (
        mine.refresh_count == 0
      )
      moments = _where(keep, moments, moved)
    return jax.tree.map(put, carry, (new, moments))

  if due.size == 1:
    # XLA would take all that depends on the gradient alone out of the loop,
    # and sum it over devices and scale it at every step.
    subspace, moments = jax.lax.cond(
      due[0],
      lambda carry: refit(jnp.int32(0), carry),
      lambda carry: carry,
      (old, moments),
    )
  else:
    subspace, moments = jax.lax.fori_loop(
      0, jnp.sum(due), refit, (old, moments)
    )
  return jax.tree.map(restore, (subspace, moments))


def _transport(
  old: dict[str, Basis], new: dict[str, Basis], projection: Projection
) -> Transport:
  """`projections.base.transport` for coordinates of one side or of both."""

  def transport(low: jax.Array, power: int) -> jax.Array:
    if len(new) == 1:
      (axis,) = new
      return base.transport(projection, low, old[axis], new[axis], power)
    low = base.transport(projection, low, old['out'], new['out'], power)
    return base.transport(projection, low.mT, old['in'], new['in'], power).mT

  return transport
