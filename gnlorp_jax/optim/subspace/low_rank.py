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

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.parts.checks import check_choice, check_int
from gnlorp_jax.optim.parts.empty import skip_empty
from gnlorp_jax.optim.parts.restored import check_state
from gnlorp_jax.optim.parts.split import (
  RefreshContext,
  SplitTransformation,
  split,
)
from gnlorp_jax.optim.parts.trees import record_of_trees
from gnlorp_jax.optim.projections.base import Projection
from gnlorp_jax.optim.subspace.error_feedback import (
  check_error_feedback,
  decode_error,
  encode_error,
  zero_errors,
)
from gnlorp_jax.optim.subspace.lazy import LazyRefresh, check_lazy
from gnlorp_jax.optim.subspace.moments import (
  MomentRule,
  moments_of,
  with_moments,
)
from gnlorp_jax.optim.subspace.quantized_basis import quantize_basis
from gnlorp_jax.optim.subspace.refresh import (
  Refreshed,
  RefreshRules,
  refresh_due,
)
from gnlorp_jax.optim.subspace.sides import (
  Side,
  Subspace,
  compressed_axes,
  project,
  project_back,
  toward,
  turned_shape,
)
from gnlorp_jax.optim.subspace.start import (
  init_subspaces,
  warn_of_clipped_ranks,
  zero_coordinates,
)


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


# Share of a gradient's energy: what roundings, those of bfloat16 too, and a
# basis of more columns than the gradient's rank leave outside at most.
_NOISE = 1e-4


def rest(
  grad_MN: jax.Array,
  low_MR: jax.Array,
  back: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """What a subspace leaves out of a gradient, for recoveries that scale it up.

  Args:
    grad_MN: The gradient, ``[*, m, n]``.
    low_MR: Its coordinates, ``[*, m, r]``.
    back: Expands coordinates.

  Returns:
    The rest, float32 ``[*, m, n]``; zero where it has less than 1e-4 of the
    gradient's energy, which is what roundings leave of a gradient inside of the
    subspace.
  """
  grad_MN = grad_MN.astype(jnp.float32)
  # Entries of 1 at most, so that no square underflows.
  largest = jnp.max(jnp.abs(grad_MN), axis=(-2, -1), keepdims=True)
  largest = jnp.where(largest > 0, largest, 1)
  rest_MN = grad_MN - back(low_MR)
  is_rest = _energy(rest_MN / largest) > _NOISE * _energy(grad_MN / largest)
  return jnp.where(is_rest, rest_MN, 0)


def _energy(x_MN: jax.Array) -> jax.Array:
  """Squared norm of each matrix, ``[*, 1, 1]``."""
  return jnp.sum(jnp.square(x_MN), axis=(-2, -1), keepdims=True)


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

  For each matrix ``G`` of a leaf ``[*, in, out]``, with bases ``P, Q``
  of the compressed axes (the other one is the identity),

  .. math:: R = P^T G Q, \qquad U = \alpha P \, \mathrm{inner}(R) \, Q^T.

  Every `update_proj_gap` steps a basis is refitted to the gradient at hand.
  Gradients of rank below `rank` and zero gradients are safe. A gradient that is
  not finite never reaches a basis; to keep it from `inner` too, wrap the whole
  optimizer in `skip_nonfinite`, as the aliases do.

  Args:
    inner: Transformation of the projected gradients; it sees no parameters.
    rank: ``r``, at least 1; clipped to a matrix's shorter axis, with a
      warning in the log.
    update_proj_gap: ``T``, steps between two refreshes of a basis, >= 1.
    scale: ``alpha``, multiplies the expanded update.
    projection: Name of a module of `projections`, or a `Projection`.
    side: Axis to compress, see `compressed_axes`.
    spread_refreshes: Refresh one matrix at a time, spread over the interval, so
      that no step stalls (the first step fits all of them). False refreshes all
      at steps 1, T + 1, 2T + 1, ..., as published code does.
    basis_bits: 32, 16, 8 or 4 bits for every element of a basis, see
      `quantize_basis`.
    lazy_refresh: Lets the intervals of subspaces at rest grow; None keeps them.
    on_refresh: What a refresh does to the moments of `inner`, such as
      `moments.rotate_moments`; it needs one `adam.scale_by_adam` with
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
      `error_bits`, if these meet bases that are not orthonormal, or, at `init`,
      if a leaf has fewer than two axes; at `update`, if the state is of other
      options.

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

    To derivatives through `update`, as meta-learning takes them, bases are
    constants; gradients, moments and numbers such as a learning rate are not.
    What Adam makes of a coordinate that was always zero has no derivative.
  """
  check_int('rank', rank)
  check_int('update_proj_gap', update_proj_gap)
  check_choice('side', side, get_args(Side))
  check_lazy(lazy_refresh)
  _check_recovery(recovery, side, error_bits)
  method = quantize_basis(projections.as_projection(projection), basis_bits)
  check_error_feedback(error_bits, method)
  rules = RefreshRules(method, update_proj_gap, lazy_refresh, on_refresh)
  inner_tx = optax.with_extra_args_support(inner)

  def start(params: optax.Params) -> LowRankState:
    subspace = init_subspaces(
      params, rank, side, rules, spread_refreshes=spread_refreshes
    )
    coordinates = jax.tree.map(
      lambda p, s: zero_coordinates(p, s, method), params, subspace
    )
    return LowRankState(
      count=jnp.zeros([], jnp.int32),
      subspace=subspace,
      inner_state=inner_tx.init(coordinates),
      recovery=_init_recovery(recovery, params, side),
      error=zero_errors(params, error_bits),
    )

  def init_fn(params: optax.Params) -> LowRankState:
    warn_of_clipped_ranks(rank, params)
    state = start(params)
    if on_refresh is not None:
      # What the projection cannot move is an error now, not inside a step.
      jax.eval_shape(lambda: _refresh(params, state, rules, RefreshContext()))
    return state

  def project_fn(
    grads: optax.Updates, state: LowRankState, params: Any, context: Any
  ) -> tuple[Any, LowRankState]:
    del params
    check_state(state, jax.eval_shape(start, grads), f'rank={rank}')
    state = _refresh(grads, state, rules, context)
    projected = jax.tree.map(
      lambda grad, s: project(grad, s.basis, method), grads, state.subspace
    )
    return projected, state

  def direct_fn(
    projected: Any, state: LowRankState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, LowRankState]:
    del params
    directions, inner_state = inner_tx.update(
      projected, state.inner_state, None, **extra_args
    )
    return directions, state._replace(
      count=optax.safe_increment(state.count),
      subspace=_remembering(projected, state.subspace, method),
      inner_state=inner_state,
    )

  # Its updates are directions, still in the subspace: three ways lead out.
  inside = split(init_fn, project_fn, direct_fn)
  if recovery is not None:
    return skip_empty(_with_recovery(inside, recovery, method, scale))
  expanded = _expanded(inside, method, scale)
  if error_bits is not None:
    return skip_empty(_with_error_feedback(expanded, method, error_bits))
  return skip_empty(expanded)


def _check_recovery(
  recovery: Recovery | None, side: Side, error_bits: int | None
) -> None:
  """Raises a `ValueError` if a recovery meets what excludes it."""
  if recovery is not None and side == 'both':
    raise ValueError(
      "side='both' leaves no whole axis, along which this method's recovery "
      "compares gradient and coordinates: use 'short', 'long', 'in' or 'out'."
    )
  if recovery is not None and error_bits is not None:
    raise ValueError(
      f'error_bits={error_bits} would feed back what this method already takes '
      'from outside the subspace: use error_bits=None.'
    )


def _init_recovery(
  recovery: Recovery | None, params: optax.Params, side: Side
) -> Any:
  """A state of the recovery for each parameter, or None."""
  if recovery is None:
    return None

  def init(param: jax.Array) -> Any:
    (axis,) = compressed_axes(param.shape, side)
    return recovery.init(turned_shape(param.shape, axis))

  return jax.tree.map(init, params)


def _refresh(
  grads: optax.Updates,
  state: LowRankState,
  rules: RefreshRules,
  context: RefreshContext,
) -> LowRankState:
  """The state with the bases of this step, and with moments in them."""
  moments = ()
  if rules.on_refresh is not None:
    moments = moments_of(state.inner_state)

  def refresh(grad: jax.Array, subspace: Subspace, *moments: Any) -> Refreshed:
    old = optax.ScaleByAdamState(*moments) if moments else None
    return refresh_due(
      grad, Refreshed(subspace, old), state.count, rules, context
    )

  refreshed = record_of_trees(
    jax.tree.map(refresh, grads, state.subspace, *moments), Refreshed
  )
  state = state._replace(subspace=refreshed.subspace)
  if rules.on_refresh is None:
    return state
  moved = record_of_trees(refreshed.moments, optax.ScaleByAdamState)
  return state._replace(inner_state=with_moments(state.inner_state, moved))


def _remembering(projected: Any, subspaces: Any, projection: Projection) -> Any:
  """The subspaces, whose bases have seen the coordinates of a step."""
  remember = projection.remember
  if remember is None:
    return subspaces

  def after(low: jax.Array, subspace: Subspace) -> Subspace:
    # Of two sides the rows of `in` are the columns.
    is_both = len(subspace.basis) == 2
    basis = {
      axis: remember(low.mT if is_both and axis == 'in' else low, b)
      for axis, b in subspace.basis.items()
    }
    return subspace._replace(basis=jax.lax.stop_gradient(basis))

  return jax.tree.map(after, projected, subspaces)


def _expanded(
  inside: SplitTransformation, projection: Projection, scale: float
) -> SplitTransformation:
  """Updates are the directions, expanded; nothing else of the gradient acts."""

  def apply_fn(
    projected: Any, state: LowRankState, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, LowRankState]:
    directions, state = inside.apply(projected, state, params, **extra_args)
    updates = jax.tree.map(
      lambda d, s: scale * project_back(d, s.basis, projection),
      directions,
      state.subspace,
    )
    return updates, state

  return split(inside.init, inside.project_fn, apply_fn)


def _with_error_feedback(
  expanded: SplitTransformation, projection: Projection, error_bits: int
) -> optax.GradientTransformationExtraArgs:
  """What projecting loses of a gradient joins the next one."""

  def lost(grad: jax.Array, low: jax.Array, subspace: Subspace) -> Any:
    kept = project_back(low, subspace.basis, projection)
    return encode_error(grad - kept, error_bits)

  def update_fn(
    updates: optax.Updates,
    state: LowRankState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, LowRankState]:
    grads = jax.tree.map(
      lambda grad, error: grad + decode_error(error), updates, state.error
    )
    projected, state = expanded.project(grads, state, params)
    error = jax.tree.map(lost, grads, projected, state.subspace)
    updates, state = expanded.apply(projected, state, params, **extra_args)
    return updates, state._replace(error=error)

  return optax.GradientTransformationExtraArgs(expanded.init, update_fn)


class _Recovered(NamedTuple):
  """The update of a leaf, and the state of its recovery."""

  update: jax.Array  # float32 [*, in, out]
  state: Any


def _with_recovery(
  inside: SplitTransformation,
  recovery: Recovery,
  projection: Projection,
  scale: float,
) -> optax.GradientTransformationExtraArgs:
  """Updates are made of gradients, coordinates and directions."""

  def recover(
    grad_IO: jax.Array,
    low_MR: jax.Array,
    direction_MR: jax.Array,
    subspace: Subspace,
    state: Any,
  ) -> _Recovered:
    ((axis, basis),) = subspace.basis.items()
    update_MN, state = recovery.apply(
      toward(grad_IO, axis),
      low_MR,
      direction_MR,
      lambda x_MR: projection.project_back(x_MR, basis),
      state,
    )
    return _Recovered(scale * toward(update_MN, axis), state)

  def update_fn(
    updates: optax.Updates,
    state: LowRankState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, LowRankState]:
    grads = updates
    projected, state = inside.project(grads, state, params)
    directions, state = inside.apply(projected, state, params, **extra_args)
    recovered = record_of_trees(
      jax.tree.map(
        recover, grads, projected, directions, state.subspace, state.recovery
      ),
      _Recovered,
    )
    return recovered.update, state._replace(recovery=recovered.state)

  return optax.GradientTransformationExtraArgs(inside.init, update_fn)
