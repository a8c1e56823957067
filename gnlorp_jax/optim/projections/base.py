"""What a projection method is: a few pure functions on one orientation.

Shape suffixes in this package:
  M, N  the two axes of a gradient, turned so that the basis lives on N
  R     rank of the subspace, R <= min(M, N)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Any pytree whose leaves all carry the leading (stacking) axes of the
# gradient: orthonormal columns, indices, packed integers, a seed.
Basis = Any


class Tracked(NamedTuple):
  """A basis that remembers the coordinates of gradients."""

  columns_NR: Any  # orthonormal columns [*, n, r], float32 or codes
  moment_RR: jax.Array  # float32 [*, r, r], an average of L^T L


class Projection(NamedTuple):
  """A family of subspaces of the gradients of one matrix.

  Every function takes any number of leading axes and treats each matrix of the
  stack by itself. `project` is linear in the gradient and `project_back` linear
  in the coordinates, so gradients may be summed after projecting.

  Attributes:
    init: ``init(shape, rank, seed) -> basis``: a valid basis for gradients of
      `shape` ``[*, m, n]`` before any gradient was seen. `seed`, an int, tells
      one parameter from another; a basis that is not random ignores it.
    refresh: ``refresh(grad_MN, basis, count) -> basis``: the basis fitted to a
      gradient, starting from the last one; `count` is the number of updates
      before this one, int32. The gradient comes in float32, finite, scaled to a
      largest entry of 1; it may have any rank, or be zero.
    project: ``project(grad_MN, basis) -> low_MR``: coordinates, float32.
    project_back: ``project_back(low_MR, basis) -> update_MN``: the way back,
      float32.
    transport: ``transport(low_MR, old, new, power) -> low_MR``: see `transport`
      below, which is used where this is None.
    turn: ``turn(old, new) -> turn_RR``: see `turn` below, which is used where
      this is None; for bases that do not take single rows there and back.
    remember: ``remember(low_MR, basis) -> basis``: what the coordinates of a
      step change of a basis, a `Tracked`, beside its columns; None changes
      nothing. The gradients of such a projection's `refresh` are not scaled, as
      it may compare them with what it remembers.
    is_orthonormal: Whether columns of a basis are orthonormal, up to roundings.
      What the way there and back leaves out is then a part of the gradient; of
      other bases, such as random ones, it is mostly noise and may be longer.
  """

  init: Callable[[tuple[int, ...], int, int], Basis]
  refresh: Callable[[jax.Array, Basis, jax.Array], Basis]
  project: Callable[[jax.Array, Basis], jax.Array]
  project_back: Callable[[jax.Array, Basis], jax.Array]
  transport: Callable[[jax.Array, Basis, Basis, int], jax.Array] | None = None
  turn: Callable[[Basis, Basis], jax.Array] | None = None
  remember: Callable[[jax.Array, Basis], Basis] | None = None
  is_orthonormal: bool = True


def turn(
  projection: Projection, rank: int, old: Basis, new: Basis
) -> jax.Array:
  """Old basis vectors in new coordinates, ``Q_old^T Q_new``, ``[*, r, r]``."""
  if projection.turn is not None:
    return projection.turn(old, new)
  return transport(projection, jnp.eye(rank, dtype=jnp.float32)[None], old, new)


def transport(
  projection: Projection,
  low_MR: jax.Array,
  old: Basis,
  new: Basis,
  power: int = 1,
) -> jax.Array:
  """Moves coordinates from one basis to another.

  Args:
    projection: The projection of both bases.
    low_MR: Coordinates in the old basis, ``[*, m, r]``.
    old: The basis they belong to.
    new: The basis they shall belong to.
    power: 1 moves vectors, ``L X`` with ``X = Q_old^T Q_new``; 2 moves
      variances of independent coordinates, whose weights are squares:
      ``L (X * X)``.

  Returns:
    Coordinates in the new basis, ``[*, m, r]``, float32.
  """
  if projection.transport is not None:
    return projection.transport(low_MR, old, new, power)
  eye_RR = jnp.eye(low_MR.shape[-1], dtype=jnp.float32)
  back_RN = projection.project_back(eye_RR[None], old)
  turn_RR = projection.project(back_RN, new)
  return low_MR @ turn_RR**power
