"""Runs an optimizer inside a low-rank subspace of the gradients.

A wrapper, because `optax.chain` cannot project before and back after a link.
Every low-rank method of this package is this wrapper with other parts: what a
basis is (`Projection`), when it is refitted (`refresh`), what runs in the
subspace (`inner`), and how the update leaves it (`Recovery`).

Shape suffixes in this file:
  IO    a kernel's input and output axes, the last two of its array
  MN    the same two axes, turned so that the basis lives on N
  R     rank of the subspace
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.parts.checks import check_choice, check_int
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.optim.parts.split import Look, split
from gnlorp_jax.optim.projections.base import Projection
from gnlorp_jax.optim.subspace.error_feedback import (
  check_error_bits,
  decode_error,
  encode_error,
  zero_errors,
)
from gnlorp_jax.optim.subspace.lazy import (
  LazyRefresh,
  LazyState,
  check_lazy,
)
from gnlorp_jax.optim.subspace.moments import (
  MomentRule,
)
from gnlorp_jax.optim.subspace.quantized_basis import quantize_basis
from gnlorp_jax.optim.subspace.refresh import refresh_due, refresh_offsets
from gnlorp_jax.optim.subspace.sides import (
  Side,
  Subspace,
  compressed_axes,
  project,
  project_back,
  toward,
)

_logger = logging.getLogger(__name__)


class Recovery(NamedTuple):
  """How a full-size update is made of what happened in the subspace.

  Attributes:
    init: ``init(shape) -> state`` for gradients of `shape` ``[*, m, n]``; every
      array of the state has the leading axes.
    apply: ``apply(grad_MN, low_MR, direction_MR, back, state) -> (update_MN,
      state)``: `low` are the gradient's coordinates, `direction` what `inner`
      made of them, and ``back(x_MR) -> x_MN`` expands coordinates.
  """

  init: Callable[[tuple[int, ...]], Any]
  apply: Callable[
    [jax.Array, jax.Array, jax.Array, Callable[[jax.Array], jax.Array], Any],
    tuple[jax.Array, Any],
  ]


class LowRankState(NamedTuple):
  """State of `with_low_rank_projection`."""

  # int32 [], updates so far; optax's name for it is also a tuple's method.
  count: jax.Array  # type: ignore[assignment]
  subspace: optax.Params  # a Subspace for each parameter
  inner_state: optax.OptState  # inner's, over the projected gradients
  recovery: Any = None  # a state of the Recovery for each parameter, or None
  error: Any = None  # for each parameter what projecting lost so far, or None


def with_low_rank_projection(
  inner: optax.GradientTransformation,
  rank: int,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  *,
  projection: str | Projection = 'svd',
  side: Side = 'short',
  spread_refreshes: bool = True,
  basis_bits: int = 32,
  lazy_refresh: LazyRefresh | None = None,
  on_refresh: MomentRule | None = None,
  error_bits: int | None = None,
  recovery: Recovery | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Runs `inner` on projected gradients and expands its updates.

  For each matrix :math:`G` of a leaf ``[*, in, out]``, with bases :math:`P, Q`
  of the compressed axes (the other one is the identity),

  .. math:: R = P^T G Q, \qquad U = \alpha P \, \mathrm{inner}(R) \, Q^T.

  Every `update_proj_gap` steps a basis is refitted to the gradient at hand.
  Gradients of rank below `rank` and zero gradients are safe. A gradient that is
  not finite never reaches a basis; to keep it from `inner` too, wrap the whole
  optimizer in `skip_nonfinite`, as the aliases do.

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
    basis_bits: 32, 16, 8 or 4 bits for every element of a basis, see
      `quantize_basis`.
    lazy_refresh: Lets the intervals of subspaces at rest grow; None keeps them.
    on_refresh: What a refresh does to the moments of `inner`, such as
      `adam.rotate_moments`; it needs one `adam.scale_by_adam` with
      ``count_per_matrix`` in `inner`. None keeps the moments as they are.
    error_bits: Adds to every gradient what projecting lost of the ones before,
      a full-size buffer of 32, 8 or 4 bits an element; None forgets it.
    recovery: Makes the full-size update; None expands `inner`'s. `scale`
      multiplies its result too.

  Returns:
    A transformation whose updates are float32, shaped like the gradients.

  Raises:
    ValueError: If `rank` or `update_proj_gap` is below 1 or no integer, if
      `side` or `projection` is unknown, if `recovery` meets ``side='both'`` or
      `error_bits`, or, at `init`, if a leaf has fewer than two axes.

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
  check_lazy(lazy_refresh)
  if recovery is not None and side == 'both':
    raise ValueError(
      "side='both' leaves no whole axis, along which this method's recovery "
      "compares gradient and coordinates: use 'short', 'long', 'in' or 'out'."
    )
  check_error_bits(error_bits)
  if recovery is not None and error_bits is not None:
    raise ValueError(
      f'error_bits={error_bits} would feed back what this method already takes '
      'from outside the subspace: use error_bits=None.'
    )
  method = quantize_basis(_as_projection(projection), basis_bits)
  inner_tx = optax.with_extra_args_support(inner)

  def init_subspace(
    path: Any, param: jax.Array, seed: int, offset: np.ndarray
  ) -> Subspace:
    stack = param.shape[:-2]
    effective = effective_rank(rank, path_name(path), param.shape)
    lazy = None
    if lazy_refresh is not None:
      lazy = LazyState(
        gap=jnp.full(stack, update_proj_gap, jnp.int32),
        similarity=jnp.zeros((*stack, lazy_refresh.queue), jnp.float32),
        saved=jnp.zeros(stack, jnp.int32),
      )
    axes = compressed_axes(param.shape, side)
    return Subspace(
      basis={
        axis: method.init(
          turned_shape(param.shape, axis), effective, 2 * seed + k
        )
        for k, axis in enumerate(axes)
      },
      refresh_count=jnp.zeros(stack, jnp.int32),
      overlap=jnp.zeros(stack, jnp.float32),
      energy=jnp.zeros(stack, jnp.float32),
      offset=jnp.asarray(offset),
      lazy=lazy,
    )

  def init_recovery(param: jax.Array) -> Any:
    assert recovery is not None
    (axis,) = compressed_axes(param.shape, side)
    return recovery.init(turned_shape(param.shape, axis))

  def init_fn(params: optax.Params) -> LowRankState:
    treedef = jax.tree.structure(params)
    num_leaves: int = treedef.num_leaves  # type: ignore[attr-defined]
    positions = jax.tree.unflatten(treedef, range(num_leaves))
    offsets = refresh_offsets(
      [param.shape[:-2] for param in jax.tree.leaves(params)],
      update_proj_gap,
      spread_refreshes,
    )
    subspace = jax.tree_util.tree_map_with_path(
      init_subspace, params, positions, jax.tree.unflatten(treedef, offsets)
    )

    def zero_low(param: jax.Array, subspace: Subspace) -> jax.Array:
      low = jax.eval_shape(
        lambda g, b: project(g, b, method), param, subspace.basis
      )
      return jnp.zeros(low.shape, low.dtype)

    inner_state = inner_tx.init(jax.tree.map(zero_low, params, subspace))
    state = LowRankState(
      count=jnp.zeros([], jnp.int32),
      subspace=subspace,
      inner_state=inner_state,
      recovery=recovery and jax.tree.map(init_recovery, params),
      error=zero_errors(params, error_bits),
    )
    if on_refresh is not None:
      _moments(inner_state)
      # What the projection cannot move is an error now, not inside a step.
      jax.eval_shape(lambda: project_fn(params, state, None, Look()))
    return state

  def refresh(
    grads: list[jax.Array], state: LowRankState, treedef: Any, look: Look
  ) -> tuple[list[Subspace], optax.OptState]:
    """The subspaces of this step, and inner's state with moments in them."""
    moments: list[Any] = [None] * len(grads)
    if on_refresh is not None:
      moments = _split_moments(_moments(state.inner_state), treedef)
    refreshed = [
      refresh_due(
        *(grad, mine, state.count, update_proj_gap, method, look),
        *(lazy_refresh, moment, on_refresh),
      )
      for grad, mine, moment in zip(
        grads, treedef.flatten_up_to(state.subspace), moments, strict=True
      )
    ]
    inner_state = state.inner_state
    if on_refresh is not None:
      moved = [moment for _, moment in refreshed]
      inner_state = _with_moments(inner_state, moved, treedef)
    return [subspace for subspace, _ in refreshed], inner_state

  def recover(
    grad_IO: jax.Array,
    low_MR: jax.Array,
    direction_MR: jax.Array,
    subspace: Subspace,
    state: Any,
  ) -> tuple[jax.Array, Any]:
    """The update of a leaf, and the state of its recovery."""
    assert recovery is not None
    ((axis, basis),) = subspace.basis.items()
    update_MN, state = recovery.apply(
      toward(grad_IO, axis),
      low_MR,
      direction_MR,
      lambda x_MR: method.project_back(x_MR, basis),
      state,
    )
    return scale * toward(update_MN, axis), state

  def project_fn(
    grads: optax.Updates, state: LowRankState, params: Any, look: Look
  ) -> tuple[Any, LowRankState]:
    del params
    # Lists of leaves: some of the trees hold a record for each of them.
    treedef: Any = jax.tree.structure(grads)
    leaves = jax.tree.leaves(grads)
    subspaces, inner_state = refresh(leaves, state, treedef, look)
    lows = [
      project(grad, subspace.basis, method)
      for grad, subspace in zip(leaves, subspaces, strict=True)
    ]
    return treedef.unflatten(lows), state._replace(
      subspace=treedef.unflatten(subspaces), inner_state=inner_state
    )

  def direct(
    lows: Any, state: LowRankState, **extra_args: Any
  ) -> tuple[Any, LowRankState]:
    """What `inner` makes of coordinates."""
    directions, inner_state = inner_tx.update(
      lows, state.inner_state, None, **extra_args
    )
    return directions, state._replace(
      count=optax.safe_increment(state.count), inner_state=inner_state
    )

  def apply_fn(
    lows: Any, state: LowRankState, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, LowRankState]:
    del params
    directions, state = direct(lows, state, **extra_args)
    updates = jax.tree.map(
      lambda d, mine: scale * project_back(d, mine.basis, method),
      directions,
      state.subspace,
    )
    return updates, state

  if recovery is None and error_bits is None:
    return split(init_fn, project_fn, apply_fn)

  def update_fn(
    updates: optax.Updates,
    state: LowRankState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, LowRankState]:
    """The step of methods that need the gradient itself to the end."""
    del params
    treedef: Any = jax.tree.structure(updates)
    grads = updates
    if error_bits is not None:
      errors = map(decode_error, treedef.flatten_up_to(state.error))
      grads = treedef.unflatten(map(jnp.add, jax.tree.leaves(updates), errors))
    lows, state = project_fn(grads, state, None, Look())
    subspaces = treedef.flatten_up_to(state.subspace)
    if error_bits is not None:
      error = treedef.unflatten(
        encode_error(grad - project_back(low, mine.basis, method), error_bits)
        for grad, low, mine in zip(
          jax.tree.leaves(grads), jax.tree.leaves(lows), subspaces, strict=True
        )
      )
      updates, state = apply_fn(lows, state, **extra_args)
      return updates, state._replace(error=error)
    directions, state = direct(lows, state, **extra_args)
    recovered = list(
      map(
        recover,
        jax.tree.leaves(grads),
        jax.tree.leaves(lows),
        treedef.flatten_up_to(directions),
        subspaces,
        treedef.flatten_up_to(state.recovery),
      )
    )
    return treedef.unflatten([update for update, _ in recovered]), (
      state._replace(
        recovery=treedef.unflatten([mine for _, mine in recovered])
      )
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_adam(node: Any) -> bool:
  return isinstance(node, optax.ScaleByAdamState)


def _moments(inner_state: optax.OptState) -> optax.ScaleByAdamState:
  """The moments in a state, which has a count for every matrix."""
  nodes = jax.tree.leaves(inner_state, is_leaf=_is_adam)
  found = [node for node in nodes if _is_adam(node)]
  kinds: list[Any] = [
    jax.tree.structure(tree) for node in found for tree in (node.count, node.mu)
  ]
  if len(found) != 1 or kinds[0] != kinds[1]:
    raise ValueError(
      'on_refresh moves the moments of one scale_by_adam(..., '
      f'count_per_matrix=True), but inner holds {len(found)} states of Adam, '
      'or one with a common count. Use that as inner, or on_refresh=None.'
    )
  return found[0]


def _split_moments(
  state: optax.ScaleByAdamState, treedef: Any
) -> list[optax.ScaleByAdamState]:
  """The moments of each leaf by itself."""
  trees = map(treedef.flatten_up_to, state)
  return [optax.ScaleByAdamState(*leaf) for leaf in zip(*trees, strict=True)]


def _with_moments(
  inner_state: optax.OptState,
  moments: list[optax.ScaleByAdamState],
  treedef: Any,
) -> optax.OptState:
  """The state with the moments of all leaves replaced."""
  # Field by field: there may be no leaf, as optax.tree.map_params asks.
  new = optax.ScaleByAdamState(
    *(
      treedef.unflatten([getattr(leaf, field) for leaf in moments])
      for field in optax.ScaleByAdamState._fields
    )
  )
  return jax.tree.map(
    lambda node: new if _is_adam(node) else node, inner_state, is_leaf=_is_adam
  )


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


def turned_shape(shape: tuple[int, ...], axis: str) -> tuple[int, ...]:
  """The shape of ``toward(x, axis)`` for x of `shape`."""
  *stack, n_in, n_out = shape
  return (*stack, n_in, n_out) if axis == 'out' else (*stack, n_out, n_in)


def effective_rank(rank: int, name: str, shape: tuple[int, ...]) -> int:
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
