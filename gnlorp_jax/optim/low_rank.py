"""Runs an optimizer inside a low-rank subspace of the gradients.

A wrapper, because `optax.chain` cannot project before and back after a link.
What a basis is, a `Projection` knows; when it is refitted, `refresh`.
"""

import logging
import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.checks import check_choice, check_int
from gnlorp_jax.optim.labels import path_name
from gnlorp_jax.optim.projections.base import Projection
from gnlorp_jax.optim.refresh import refresh_due, refresh_schedule
from gnlorp_jax.optim.subspace import (
  Side,
  Subspace,
  compressed_axes,
  project,
  project_back,
)

_logger = logging.getLogger(__name__)


class LowRankState(NamedTuple):
  """State of `with_low_rank_projection`."""

  # int32 [], updates so far; optax's name for it is also a tuple's method.
  count: jax.Array  # type: ignore[assignment]
  subspace: optax.Params  # a Subspace for each parameter
  inner_state: optax.OptState  # inner's, over the projected gradients


def with_low_rank_projection(
  inner: optax.GradientTransformation,
  rank: int,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  *,
  projection: str | Projection = 'svd',
  side: Side = 'short',
  spread_refreshes: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""Runs `inner` on projected gradients and expands its updates.

  For each matrix :math:`G` of a leaf ``[*, in, out]``, with orthonormal bases
  :math:`P, Q` of the compressed axes (the other one is the identity),

  .. math:: R = P^T G Q, \qquad U = \alpha P \, \mathrm{inner}(R) \, Q^T.

  Every `update_proj_gap` steps a basis is refitted to the gradient at hand;
  inner's moments stay as they are. Gradients of rank below `rank` and zero
  gradients are safe. A gradient that is not finite never reaches a basis; to
  keep it from `inner` too, wrap the whole optimizer in `skip_nonfinite`, as the
  aliases do.

  Args:
    inner: Transformation of the projected gradients; it sees no parameters.
    rank: :math:`r`, at least 1; clipped to a matrix's shorter axis, with a
      warning in the log.
    update_proj_gap: :math:`T`, steps between two refreshes of a basis, >= 1.
    scale: :math:`\alpha`, multiplies the expanded update.
    projection: Name of a module of `projections`, or a `Projection`.
    side: Axis to compress, see `compressed_axes`.
    spread_refreshes: Refresh one matrix at a time, spread over the interval, so
      that no step stalls (the first step fits all of them). False refreshes all
      at steps 1, T + 1, 2T + 1, ..., as published code does.

  Returns:
    A transformation whose updates are float32, shaped like the gradients.

  Raises:
    ValueError: If `rank` or `update_proj_gap` is below 1 or no integer, if
      `side` or `projection` is unknown, or, at `init`, if a leaf has fewer than
      two axes.

  Examples:
    >>> tx = with_low_rank_projection(optax.scale_by_adam(), rank=2)
    >>> params = {'kernel': jnp.ones((12, 8, 4))}
    >>> tx.init(params).inner_state.mu['kernel'].shape
    (12, 8, 2)

  References:
    Zhao et al., `GaLore`, 2024, arXiv:2403.03507, algorithm 2; Huang et al.,
    `GradNormLoRP`, 2024, arXiv:2412.19616 (``side='both'``).

  Note:
    GaLore refreshes every matrix in the same step; here that is
    ``spread_refreshes=False``. `optax.contrib.galore` compresses the longer
    axis (``side='long'``) and skips leaves of more than two axes.
  """
  check_int('rank', rank)
  check_int('update_proj_gap', update_proj_gap)
  check_choice('side', side, get_args(Side))
  method = _as_projection(projection)
  inner_tx = optax.with_extra_args_support(inner)

  def init_subspace(path: Any, param: jax.Array) -> Subspace:
    stack = param.shape[:-2]
    effective = _effective_rank(rank, path_name(path), param.shape)
    return Subspace(
      basis={
        axis: method.init(_turned_shape(param.shape, axis), effective)
        for axis in compressed_axes(param.shape, side)
      },
      refresh_count=jnp.zeros(stack, jnp.int32),
      overlap=jnp.zeros(stack, jnp.float32),
      energy=jnp.zeros(stack, jnp.float32),
    )

  def init_fn(params: optax.Params) -> LowRankState:
    subspace = jax.tree_util.tree_map_with_path(init_subspace, params)

    def zero_low(param: jax.Array, subspace: Subspace) -> jax.Array:
      low = jax.eval_shape(
        lambda g, b: project(g, b, method), param, subspace.basis
      )
      return jnp.zeros(low.shape, low.dtype)

    return LowRankState(
      count=jnp.zeros([], jnp.int32),
      subspace=subspace,
      inner_state=inner_tx.init(jax.tree.map(zero_low, params, subspace)),
    )

  def update_fn(
    updates: optax.Updates,
    state: LowRankState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, LowRankState]:
    del params
    treedef = jax.tree.structure(updates)
    num_leaves: int = treedef.num_leaves  # type: ignore[attr-defined]

    def refresh(grad: jax.Array, subspace: Subspace, index: int) -> Subspace:
      stack = math.prod(grad.shape[:-2])
      schedule = refresh_schedule(
        stack, index, num_leaves, update_proj_gap, spread_refreshes
      )
      return refresh_due(grad, subspace, state.count, schedule, method)

    indices = jax.tree.unflatten(treedef, range(num_leaves))
    subspace = jax.tree.map(refresh, updates, state.subspace, indices)
    low = jax.tree.map(
      lambda g, s: project(g, s.basis, method), updates, subspace
    )
    low, inner_state = inner_tx.update(
      low, state.inner_state, None, **extra_args
    )
    updates = jax.tree.map(
      lambda u, s: scale * project_back(u, s.basis, method), low, subspace
    )
    count = optax.safe_increment(state.count)
    return updates, LowRankState(count, subspace, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _as_projection(projection: str | Projection) -> Projection:
  """`projection`, looked up if it is a name."""
  if isinstance(projection, str):
    return projections.get(projection)
  if not isinstance(projection, Projection):
    raise ValueError(
      f'projection must be a Projection or one of {projections.names()}, got '
      f'{projection!r}.'
    )
  return projection


def _turned_shape(shape: tuple[int, ...], axis: str) -> tuple[int, ...]:
  """The shape of ``toward(x, axis)`` for x of `shape`."""
  *stack, n_in, n_out = shape
  return (*stack, n_in, n_out) if axis == 'out' else (*stack, n_out, n_in)


def _effective_rank(rank: int, name: str, shape: tuple[int, ...]) -> int:
  """`rank`, clipped (and logged) to the shorter axis of a parameter."""
  if len(shape) < 2:
    raise ValueError(
      f'Parameter {name!r} of shape {list(shape)} cannot be projected: a '
      "kernel has at least two axes, [*, in, out]. Label it 'full'."
    )
  shorter = min(shape[-2:])
  if rank > shorter:
    _logger.warning(
      'rank %d exceeds the shorter axis of %r %s: clipped to %d, which '
      'compresses nothing on that axis. If it has several axes in or out, give '
      'kernel_axes.',
      rank,
      name,
      list(shape),
      shorter,
    )
  return min(rank, shorter)
