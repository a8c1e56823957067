"""When which basis is refitted to the gradient, and the refit itself.

Shape suffixes in this file:
  IO    a kernel's input and output axes, the last two of its array
  RN    rank of the subspace, and the axis its basis lives on
Leading axes of a kernel stack matrices; inside they are flattened to one, [s].
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnlorp_jax.optim.parts.split import RefreshContext
from gnlorp_jax.optim.projections import base
from gnlorp_jax.optim.projections.base import Basis, Projection
from gnlorp_jax.optim.subspace.lazy import (
  LazyRefresh,
  lengthen,
  matrix_norm,
  similarity,
)
from gnlorp_jax.optim.subspace.moments import MomentRule, Transport
from gnlorp_jax.optim.subspace.sides import Subspace, project, toward


class RefreshRules(NamedTuple):
  """How and when bases are refitted, and what else a refresh does."""

  projection: Projection
  gap: int  # updates between two refreshes of a matrix
  lazy: LazyRefresh | None = None  # how intervals grow; None keeps them
  # What a refresh does to the moments in the subspace; None leaves them.
  on_refresh: MomentRule | None = None


class Refreshed(NamedTuple):
  """What a refresh changes of a leaf; all arrays have its leading axes."""

  subspace: Subspace
  moments: Any  # pytree of arrays in the subspace; None where they stay


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


def _refit_bases(
  grad_IO: jax.Array, old: Subspace, count: jax.Array, rules: RefreshRules
) -> Subspace:
  """Refits the bases of a stack ``[s, in, out]``; bad gradients keep the old.

  A gradient that is zero or not finite fits no basis. The others are scaled to
  a largest entry of 1, so that no square under- or overflows, but for a
  projection that remembers others.
  """
  finite = jnp.all(jnp.isfinite(grad_IO), axis=(-2, -1))
  largest = jnp.max(jnp.abs(grad_IO), axis=(-2, -1))
  usable = finite & (largest > 0)
  is_scaled = usable & (rules.projection.remember is None)
  scale = jnp.where(is_scaled, largest, 1).astype(jnp.float32)[:, None, None]
  grad_IO = jnp.where(
    usable[:, None, None], grad_IO.astype(jnp.float32) / scale, 0
  )
  projection = rules.projection
  basis = {
    axis: projection.refresh(toward(grad_IO, axis), b, count)
    for axis, b in old.basis.items()
  }
  low = project(grad_IO, basis, projection)
  rank = low.shape[-1]
  # Of entries of 1 at most.
  size = jnp.where(usable & ~is_scaled, largest, 1)[:, None, None]
  found, whole = matrix_norm(low / size), matrix_norm(grad_IO / size)
  energy = (found / jnp.maximum(whole, 1e-30)) ** 2
  overlap = _overlap(old.basis, basis, projection, rank)
  fitted = old._replace(
    basis=basis,
    refresh_count=old.refresh_count + 1,
    overlap=overlap,
    energy=energy,
  )
  if rules.lazy is not None:
    assert old.lazy is not None
    similarity_s = similarity(
      old.basis,
      basis,
      projection,
      rules.lazy,
      rank=rank,
      sizes=[toward(grad_IO, axis).shape[-1] for axis in basis],
      overlap_s=overlap,
    )
    fitted = fitted._replace(
      lazy=lengthen(old.lazy, fitted.refresh_count, similarity_s, rules.lazy)
    )
  # A factorisation that failed shows in the energy.
  return _where(usable & jnp.isfinite(energy), fitted, old)


def _where(condition_s: jax.Array, x: Any, y: Any) -> Any:
  """Per matrix of the stack: `x` where the condition holds, else `y`."""

  def select(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(condition_s.reshape(-1, *[1] * (a.ndim - 1)), a, b)

  return jax.tree.map(select, x, y)


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


def _move_moments(
  moments: Any, old: Subspace, new: Subspace, rules: RefreshRules
) -> Any:
  """The moments of a stack in its new bases."""
  if rules.on_refresh is None:
    return moments
  transport = _transport(old.basis, new.basis, rules.projection)
  moved = rules.on_refresh(moments, transport)
  # Neither a first basis nor a failed refit has moments to move.
  stays = new.refresh_count == old.refresh_count
  return _where(stays | (old.refresh_count == 0), moments, moved)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_derivative(
  function: Callable[[Any, Any], Any], value: Any, x: Any, constants: Any
) -> Any:
  """`value`, whose derivative is that of ``function(x, constants)`` in `x`."""
  return value


@_with_derivative.defjvp
def _with_derivative_jvp(
  function: Callable[[Any, Any], Any], primals: Any, tangents: Any
) -> tuple[Any, Any]:
  value, x, constants = primals
  _, tangent = jax.jvp(lambda x: function(x, constants), (x,), (tangents[1],))
  return value, tangent


def _find_due(
  grad_sIO: jax.Array,
  subspace: Subspace,
  count: jax.Array,
  gap: int,
  context: RefreshContext,
) -> tuple[jax.Array, Subspace]:
  """Which matrices of a stack are due, bool ``[s]``.

  Also the subspace, in which those are counted that laziness leaves out.
  """
  assert subspace.offset is not None
  due_s = _due(count, subspace.offset, gap)
  if subspace.lazy is not None:
    planned_s, due_s = due_s, _due(count, subspace.offset, subspace.lazy.gap)
    saved = subspace.lazy.saved + (planned_s & ~due_s & context.due)
    subspace = subspace._replace(lazy=subspace.lazy._replace(saved=saved))
  unset_s = subspace.refresh_count == 0

  def or_unset() -> jax.Array:
    nonzero_s = jnp.any(grad_sIO != 0, axis=(-2, -1)).astype(jnp.int32)
    return due_s | (unset_s & (context.total(nonzero_s) > 0))

  due_s = jax.lax.cond(jnp.any(unset_s), or_unset, lambda: due_s)
  return due_s & context.due, subspace


def refresh_due(
  grad_IO: jax.Array,
  old: Refreshed,
  count: jax.Array,
  rules: RefreshRules,
  context: RefreshContext,
) -> Refreshed:
  """Refits what is due of a leaf, and moves its moments along.

  A matrix whose first basis is still missing (its gradient was zero until now)
  gets it at its first usable gradient.

  The matrices are refitted one after the other in a loop of as many rounds as
  needed, mostly none. A loop updates its carry in place, where the branches of
  a `lax.cond` around the whole stack would each return a copy of it (and under
  a vmap would be computed at every step).

  Args:
    grad_IO: Gradient of the leaf, ``[*, in, out]``.
    old: Its subspace, and its moments in it.
    count: Updates before this one, int32.
    rules: How and when bases are refitted.
    context: Whether to refresh at all, and how to sum over devices.

  Returns:
    The subspace to use in this step, and the moments in it.

  Note:
    To derivatives through a step bases are constants: that of a subspace does
    not exist where singular values meet, and a loop of unknown length has none.
    Moments keep theirs, and move as they did.
  """
  stack = grad_IO.shape[:-2]

  def flatten(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[len(stack) :])

  def restore(x: jax.Array) -> jax.Array:
    return x.reshape(*stack, *x.shape[1:])

  grad_IO, old = jax.tree.map(flatten, (grad_IO, old))
  grad_sIO, before = jax.lax.stop_gradient((grad_IO, old))
  due_s, subspace = _find_due(
    grad_sIO, before.subspace, count, rules.gap, context
  )
  order_s = jnp.argsort(~due_s)  # Stable: those that are due come first.

  def refit(k: jax.Array, carry: Refreshed) -> Refreshed:
    def part(x: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(x, order_s[k], 1)

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
      return jax.lax.dynamic_update_slice_in_dim(x, new, order_s[k], 0)

    one = jax.tree.map(part, carry)
    total_IO = context.total(part(grad_sIO))
    subspace = _refit_bases(total_IO, one.subspace, count, rules)
    moments = _move_moments(one.moments, one.subspace, subspace, rules)
    return jax.tree.map(put, carry, Refreshed(subspace, moments))

  carry = Refreshed(subspace, before.moments)
  if due_s.size == 1:
    # XLA would take all that depends on the gradient alone out of the loop,
    # and sum it over devices and scale it at every step.
    carry = jax.lax.cond(
      due_s[0], lambda x: refit(jnp.int32(0), x), lambda x: x, carry
    )
  else:
    carry = jax.lax.fori_loop(0, jnp.sum(due_s), refit, carry)
  if rules.on_refresh is not None:
    moments = _with_derivative(
      lambda x, bases: _move_moments(x, bases[0], bases[1], rules),
      carry.moments,
      old.moments,
      (before.subspace, carry.subspace),
    )
    carry = carry._replace(moments=moments)
  return jax.tree.map(restore, carry)
