"""The subspace of one kernel: which axes are compressed, there and back.

Shape suffixes in this file:
  IO    a kernel's input and output axes, the last two of its array
  MN    the same two axes, turned so that the basis lives on N
  R     rank of the subspace
Leading axes `[*]` stack matrices (layers of a scan); each has its own basis.
"""

from typing import Literal, NamedTuple, get_args

import jax

from gnlorp_jax.optim.parts.checks import check_choice
from gnlorp_jax.optim.projections.base import Basis, Projection
from gnlorp_jax.optim.subspace.lazy import LazyState

Side = Literal['short', 'long', 'in', 'out', 'both']


class Subspace(NamedTuple):
  """The subspace of one leaf, and what its last refresh found."""

  # Compressed axis, 'in' or 'out' or both, to the projection's own basis
  # of that axis ([*, n, r] for svd).
  basis: dict[str, Basis]
  refresh_count: jax.Array  # int32 [*], refreshes of each matrix so far
  # In [0, 1] for orthonormal bases; of few bits or random, a little above too.
  overlap: jax.Array  # float32 [*], of the last two subspaces
  energy: jax.Array  # float32 [*], share captured at the refresh
  # int32 [*], step of the interval in which each matrix is due; None where all
  # are at every step.
  offset: jax.Array | None = None
  lazy: LazyState | None = None  # None where the interval is fixed


def compressed_axes(shape: tuple[int, ...], side: Side) -> tuple[str, ...]:
  """Axes of a kernel ``[*, in, out]`` that get a basis.

  Args:
    shape: The kernel's shape.
    side: ``short`` compresses the shorter axis (GaLore's ``std``), ``long`` the
      longer one (``reverse_std``), ``in``/``out`` that axis, ``both`` both.

  Returns:
    ``('in',)``, ``('out',)`` or ``('in', 'out')``.

  Note:
    A square kernel is compressed on ``in`` by ``short`` and on ``out`` by
    ``long``. That is GaLore's rule for PyTorch's transposed weights; applying
    its formula to shape[0] and shape[1] of a Flax kernel would swap the two.
  """
  check_choice('side', side, get_args(Side))
  n_in, n_out = shape[-2:]
  if side == 'both':
    return ('in', 'out')
  if side == 'short':
    return ('in',) if n_in <= n_out else ('out',)
  if side == 'long':
    return ('out',) if n_in <= n_out else ('in',)
  return (side,)


def toward(x: jax.Array, axis: str) -> jax.Array:
  """Turns the last two axes so that `axis` of a kernel is the last one."""
  return x if axis == 'out' else x.mT


def turned_shape(shape: tuple[int, ...], axis: str) -> tuple[int, ...]:
  """The shape of ``toward(x, axis)`` for x of `shape`."""
  *stack, n_in, n_out = shape
  return (*stack, n_in, n_out) if axis == 'out' else (*stack, n_out, n_in)


def project(
  grad_IO: jax.Array, basis: dict[str, Basis], projection: Projection
) -> jax.Array:
  """Coordinates of a gradient, float32.

  Returns:
    ``[*, out, r]`` when ``in`` is compressed, ``[*, in, r]`` when ``out`` is,
    ``[*, r_in, r_out]`` when both are.
  """
  if len(basis) == 1:
    ((axis, b),) = basis.items()
    return projection.project(toward(grad_IO, axis), b)
  low_IR = projection.project(grad_IO, basis['out'])
  return projection.project(low_IR.mT, basis['in']).mT


def project_back(
  low: jax.Array, basis: dict[str, Basis], projection: Projection
) -> jax.Array:
  """The full-size update ``[*, in, out]`` of coordinates, float32."""
  if len(basis) == 1:
    ((axis, b),) = basis.items()
    return toward(projection.project_back(low, b), axis)
  low_IR = projection.project_back(low.mT, basis['in']).mT
  return projection.project_back(low_IR, basis['out'])
