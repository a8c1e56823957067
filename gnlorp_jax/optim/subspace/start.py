"""The subspaces of parameters before their first gradient."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnlorp_jax.optim.parts.checks import check_matrix
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.optim.projections.base import Basis, Projection
from gnlorp_jax.optim.subspace.lazy import LazyState
from gnlorp_jax.optim.subspace.refresh import RefreshRules, refresh_offsets
from gnlorp_jax.optim.subspace.sides import (
  Side,
  Subspace,
  compressed_axes,
  project,
  turned_shape,
)

_logger = logging.getLogger(__name__)

State = TypeVar('State')


def effective_rank(rank: int, name: str, shape: tuple[int, ...]) -> int:
  """`rank`, clipped to the shorter axis of a parameter.

  Raises:
    ValueError: If the parameter has fewer than two axes.
  """
  check_matrix(name, shape)
  return min(rank, *shape[-2:])


def warn_of_clipped_ranks(rank: int, params: optax.Params) -> None:
  """Logs a warning for each parameter whose shorter axis `rank` exceeds."""
  for path, param in jax.tree_util.tree_leaves_with_path(params):
    clipped = effective_rank(rank, path_name(path), param.shape)
    if clipped == rank:
      continue
    several = ' If it has several axes in or out, give kernel_axes.'
    _logger.warning(
      'rank %d exceeds the shorter axis of %r %s: clipped to %d, which '
      'compresses nothing on that axis.%s',
      rank,
      path_name(path),
      list(param.shape),
      clipped,
      several if len(param.shape) > 2 else '',
    )


def warning_of_ranks(
  rank: int, start: Callable[[optax.Params], State]
) -> Callable[[optax.Params], State]:
  """`start`, which makes a state, with a warning of clipped ranks."""

  def init(params: optax.Params) -> State:
    warn_of_clipped_ranks(rank, params)
    return start(params)

  return init


def unfitted_subspace(
  basis: dict[str, Basis], stack: tuple[int, ...]
) -> Subspace:
  """A subspace whose bases were never refitted; `stack` are the leading axes.

  Its arrays are no views of each other: a shared buffer could not be donated
  twice.
  """
  return Subspace(
    basis=basis,
    refresh_count=jnp.zeros(stack, jnp.int32),
    overlap=jnp.zeros(stack, jnp.float32),
    energy=jnp.zeros(stack, jnp.float32),
  )


def init_subspaces(
  params: optax.Params,
  rank: int,
  side: Side,
  rules: RefreshRules,
  *,
  spread_refreshes: bool,
) -> optax.Params:
  """A `Subspace` for each parameter, with the time of its refreshes.

  Args:
    params: Kernels ``[*, in, out]``.
    rank: Clipped to the shorter axis of each.
    side: Which axes are compressed.
    rules: How and when bases are refitted.
    spread_refreshes: Whether refreshes are spread over the interval.

  Raises:
    ValueError: If a parameter has fewer than two axes, or its shape is none for
      the projection.
  """
  leaves, treedef = jax.tree.flatten(params)
  # The two numbers that tell one parameter's bases from another's.
  seeds = jax.tree.unflatten(treedef, range(0, 2 * len(leaves), 2))
  offsets = refresh_offsets(
    [param.shape[:-2] for param in leaves], rules.gap, spread_refreshes
  )

  def init(
    path: Any, param: jax.Array, seed: int, offset: np.ndarray
  ) -> Subspace:
    clipped = effective_rank(rank, path_name(path), param.shape)
    basis = {
      axis: rules.projection.init(
        turned_shape(param.shape, axis), clipped, seed + k
      )
      for k, axis in enumerate(compressed_axes(param.shape, side))
    }
    subspace = unfitted_subspace(basis, param.shape[:-2])
    return subspace._replace(
      offset=jnp.asarray(offset), lazy=_init_lazy(rules, param.shape[:-2])
    )

  return jax.tree_util.tree_map_with_path(
    init, params, seeds, jax.tree.unflatten(treedef, offsets)
  )


def _init_lazy(rules: RefreshRules, stack: tuple[int, ...]) -> LazyState | None:
  """The intervals of a leaf's matrices, of equal length at first."""
  if rules.lazy is None:
    return None
  return LazyState(
    gap=jnp.full(stack, rules.gap, jnp.int32),
    similarity=jnp.zeros((*stack, rules.lazy.queue), jnp.float32),
    saved=jnp.zeros(stack, jnp.int32),
  )


def zero_coordinates(
  param: jax.Array, subspace: Subspace, projection: Projection
) -> jax.Array:
  """Zeros shaped like the projected gradient of a parameter, float32."""
  low = jax.eval_shape(
    lambda grad, basis: project(grad, basis, projection), param, subspace.basis
  )
  return jnp.zeros(low.shape, low.dtype)
