"""LDAdam: Adam in a subspace that turns a little at every step.

Shape suffixes in this file:
  IO    a kernel's input and output axes, the last two of its array
  MN    the same two axes, turned so that the basis lives on N
  R     rank of the subspace
Leading axes stack matrices, each with a subspace of its own.
"""

from typing import Any, NamedTuple, Unpack, get_args

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  OneSide,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.parts.checks import (
  check_choice,
  check_int,
  check_interval,
)
from gnlorp_jax.optim.parts.empty import skip_empty
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.optim.parts.restored import check_state
from gnlorp_jax.optim.parts.trees import record_of_trees
from gnlorp_jax.optim.projections import svd
from gnlorp_jax.optim.subspace.error_feedback import (
  check_error_bits,
  decode_error,
  encode_error,
  zero_errors,
)
from gnlorp_jax.optim.subspace.moments import rotate_moments
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
  effective_rank,
  unfitted_subspace,
  warn_of_clipped_ranks,
  zero_coordinates,
)
from gnlorp_jax.optim.subspace.turn import turn_basis, turn_between

# Iterations that fit a first basis, whose start is random; later ones start
# from the last basis and need one.
_FIRST_ITERATIONS = 8
# Goes into the subspace and back; the bases are fitted here.
_COLUMNS = svd.svd()


def _square(x: jax.Array) -> jax.Array:
  """Squared norm of each matrix of a stack."""
  return jnp.sum(x * x, axis=(-2, -1))


def _refit(
  grad_IO: jax.Array,
  mean_MR: jax.Array,
  old: Subspace,
  rho: float,
) -> tuple[Subspace, jax.Array]:
  """The next subspace of each matrix, and the gradient's coordinates in it.

  A matrix whose gradients were zero until now has no moments either, and still
  waits for its first basis. To derivatives the subspace is a constant.
  """
  ((axis, old_NR),) = old.basis.items()
  fixed_IO, mean_MR = jax.lax.stop_gradient((grad_IO, mean_MR))
  largest = jnp.max(jnp.abs(fixed_IO), axis=(-2, -1))
  zero = largest == 0
  unset = old.refresh_count == 0

  def turn(i: jax.Array, basis_NR: jax.Array) -> jax.Array:
    # Turned in here: a loop would be handed a turned copy.
    new_NR = turn_basis(toward(fixed_IO, axis), mean_MR, basis_NR, rho)
    return jnp.where((i == 0) | unset[..., None, None], new_NR, basis_NR)

  rounds = jnp.where(jnp.any(unset & ~zero), _FIRST_ITERATIONS, 1)
  basis_NR = jax.lax.fori_loop(0, rounds, turn, jax.lax.stop_gradient(old_NR))
  low_MR = project(grad_IO, {axis: basis_NR}, _COLUMNS)
  # Scaled, so that no square under- or overflows.
  scale = jnp.where(zero, 1, largest)[..., None, None]
  energy = _square(low_MR / scale) / jnp.where(
    zero, 1, _square(grad_IO / scale)
  )
  overlap = _square(turn_between(old_NR, basis_NR)) / basis_NR.shape[-1]
  fitted = jnp.isfinite(energy) & ~(zero & unset)
  subspace = old._replace(
    basis={axis: basis_NR},
    refresh_count=old.refresh_count + fitted,
    overlap=jnp.where(fitted, overlap, old.overlap),
    energy=jnp.where(fitted, energy, old.energy),
  )
  return jax.lax.stop_gradient(subspace), low_MR


class LDAdamState(NamedTuple):
  """State of `scale_by_ldadam`."""

  # int32 [], updates so far; optax's name for it is also a tuple's method.
  count: jax.Array  # type: ignore[assignment]
  subspace: optax.Params  # a Subspace for each parameter
  mu: optax.Updates  # float32 [*, m, r], in the subspace
  nu: optax.Updates  # float32 [*, m, r]
  # What the subspaces left out so far: float32 [*, in, out], or a
  # QuantizedArray of [*, out, in]; None without error feedback.
  error: Any


class _Leaf(NamedTuple):
  """What a step knows and changes of one parameter before Adam."""

  subspace: Subspace
  mu: jax.Array  # the moments in the basis of the subspace
  nu: jax.Array
  error: Any
  projected: Any = None  # float32 [*, m, r], gradient and error in this step


class _Decays(NamedTuple):
  """Weights of the past."""

  rho: float  # of the momentum in the blend
  b1: float
  b2: float


def _follow(
  grad_IO: jax.Array,
  old: _Leaf,
  count: jax.Array,
  decays: _Decays,
  error_bits: int | None,
) -> _Leaf:
  """Turns the subspace of a parameter and moves its moments along.

  Args:
    grad_IO: Its gradient, ``[*, in, out]``.
    old: Its subspace, moments and error after the last step.
    count: Updates before this one, int32.
    decays: Weights of the past.
    error_bits: Bits of the error; None keeps none.
  """
  grad_IO = grad_IO.astype(jnp.float32)
  if error_bits is not None:
    grad_IO = grad_IO + decode_error(old.error)
  # Before the first step the moments are zero, whatever divides them.
  b1 = jnp.asarray(decays.b1, jnp.float32)
  mean_MR = old.mu / (1 - b1 ** jnp.maximum(count, 1))
  subspace, low_MR = _refit(grad_IO, mean_MR, old.subspace, decays.rho)
  ((axis, old_NR),) = old.subspace.basis.items()
  turn_RR = turn_between(old_NR, subspace.basis[axis])
  moved = rotate_moments(decays.b1, decays.b2)(
    optax.ScaleByAdamState(
      jnp.broadcast_to(count, old.mu.shape[:-2]), old.mu, old.nu
    ),
    lambda x_MR, power: x_MR @ turn_RR**power,
  )
  new = _Leaf(subspace, moved.mu, moved.nu, None, low_MR)
  if error_bits is not None:
    error_IO = _left_out(grad_IO, old, new, decays.b1)
    new = new._replace(error=encode_error(error_IO, error_bits))
  return new


def _left_out(
  grad_IO: jax.Array, old: _Leaf, new: _Leaf, b1: float
) -> jax.Array:
  """What the new subspace leaves out of gradient and momentum."""
  ((axis, old_NR),) = old.subspace.basis.items()
  new_NR = new.subspace.basis[axis]
  # All steps to come give b1 / (1 - b1) of the momentum at hand; what of it the
  # turn loses is owed.
  owed = b1 / (1 - b1)
  # One product for both bases: each would fill an array of full size.
  error_MN = svd.project_back(
    jnp.concatenate([owed * old.mu, -(new.projected + owed * new.mu)], -1),
    jnp.concatenate([old_NR, new_NR], -1),
  )
  return grad_IO + toward(error_MN, axis)


def _init_subspace(
  path: Any, param: jax.Array, rank: int, side: Side
) -> Subspace:
  """The subspace of a parameter before its first gradient."""
  clipped = effective_rank(rank, path_name(path), param.shape)
  axis = _compressed_axis(param.shape, side)
  basis_NR = svd.random_basis(turned_shape(param.shape, axis), clipped)
  return unfitted_subspace({axis: basis_NR}, param.shape[:-2])


def scale_by_ldadam(
  rank: int = 16,
  *,
  rho: float = 0.908,
  error_bits: int | None = 32,
  side: Side = 'short',
  b1: float = 0.908,
  b2: float = 0.99,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  r"""LDAdam's direction for kernels.

  For each matrix, with ``A = G + e`` the gradient and the error kept so
  far, Q the last basis and m the first moment in it (in the layout where the
  basis acts on the columns),

  .. math::
    b &= \rho \, \hat m Q^T + (1 - \rho) A \\
    Q' &= \mathrm{orth}(b^T (b Q)), \qquad g = A Q', \qquad m' = m Q^T Q' \\
    e &\leftarrow A - g Q'^T
      + \tfrac{\beta_1}{1 - \beta_1} (m Q^T - m' Q'^T)

  Then both moments move to the new basis, see `rotate_moments`, and Adam
  takes its step with g there. Gradients of rank below `rank` and zero gradients
  are safe: what they leave open of a basis stays as it was. A gradient that is
  not finite spoils moments and error; wrap the optimizer in `skip_nonfinite`,
  as `ldadam` does.

  Args:
    rank: Rank of the subspaces, at least 1; clipped to a matrix's shorter axis,
      with a warning in the log.
    rho: Weight of the momentum in the blend, in [0, 1).
    error_bits: 32, 8 or 4 bits for every element of the error, see
      `encode_error`; None keeps none, e = 0.
    side: Axis that is compressed: ``short``, ``long``, ``in`` or ``out``. A
      square kernel is compressed on ``out`` by ``short`` and ``long``.
    b1: Decay of the first moment, in [0, 1).
    b2: Decay of the second moment, in [0, 1).
    eps: Added to the root of the second moment, at least 0.

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: If an argument is out of its interval or unknown; at `init`, if
      a leaf has fewer than two axes; at `update`, if the state is of other
      options.

  Examples:
    >>> tx = scale_by_ldadam(rank=2)
    >>> state = tx.init({'kernel': jnp.ones((12, 8, 4))})
    >>> state.mu['kernel'].shape, state.error['kernel'].shape
    ((12, 8, 2), (12, 8, 4))

  References:
    Robert et al., `LDAdam`, 2024, arXiv:2410.16103, algorithm 1.

  Note:
    The published code keeps the error in the gradient buffer, to which the next
    backward pass adds, so that clipping and logged norms see gradient plus
    error. Here it is part of the state, they see the gradient alone, and
    it may be quantised. Published code fits the first basis by an SVD; here
    power iterations do it, from a random start. It raises where `rank` exceeds
    the shorter axis. Its rule for square matrices, the left side of PyTorch's
    (out, in), is the default here too: ``out``, where `galore` has ``in``.

    To derivatives through `update` bases are constants, as in
    `with_low_rank_projection`.
  """
  check_int('rank', rank)
  check_interval('rho', rho, '[0, 1)')
  check_choice('side', side, get_args(Side))
  if side == 'both':
    raise ValueError(
      "side='both' is not defined for LDAdam, whose moments keep one axis "
      "whole: use 'short', 'long', 'in' or 'out'."
    )
  check_error_bits(error_bits)
  adam = scale_by_adam(b1, b2, eps)
  decays = _Decays(rho, b1, b2)

  def init_fn(params: optax.Params) -> LDAdamState:
    warn_of_clipped_ranks(rank, params)
    return start(params)

  def start(params: optax.Params) -> LDAdamState:
    subspace = jax.tree_util.tree_map_with_path(
      lambda path, param: _init_subspace(path, param, rank, side), params
    )

    def zeros() -> optax.Updates:
      return jax.tree.map(
        lambda p, s: zero_coordinates(p, s, _COLUMNS), params, subspace
      )

    return LDAdamState(
      count=jnp.zeros([], jnp.int32),
      subspace=subspace,
      mu=zeros(),
      nu=zeros(),
      error=zero_errors(params, error_bits),
    )

  def update_fn(
    updates: optax.Updates,
    state: LDAdamState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, LDAdamState]:
    del params
    check_state(state, jax.eval_shape(start, updates), f'rank={rank}')
    errors = state.error
    if error_bits is None:
      errors = jax.tree.map(lambda _: None, updates)
    leaves = jax.tree.map(
      lambda grad, *old: _follow(
        grad, _Leaf(*old), state.count, decays, error_bits
      ),
      updates,
      state.subspace,
      state.mu,
      state.nu,
      errors,
    )
    new = record_of_trees(leaves, _Leaf)
    direction, moments = adam.update(
      new.projected, optax.ScaleByAdamState(state.count, new.mu, new.nu)
    )
    updates = jax.tree.map(
      lambda d, s: project_back(d, s.basis, _COLUMNS), direction, new.subspace
    )
    return updates, LDAdamState(
      count=moments.count,
      subspace=new.subspace,
      mu=moments.mu,
      nu=moments.nu,
      error=None if error_bits is None else new.error,
    )

  return skip_empty(optax.GradientTransformation(init_fn, update_fn))


def _compressed_axis(shape: tuple[int, ...], side: Side) -> str:
  """`compressed_axes`, but for square matrices LDAdam's own rule."""
  if shape[-2] == shape[-1] and side in ('short', 'long'):
    return 'out'
  (axis,) = compressed_axes(shape, side)
  return axis


class LDAdamOptions(AdamOptions, WeightNormOptions, total=False):
  """The shared keywords of `ldadam`."""


@with_options(b1=0.908, b2=0.99)
def ldadam(
  learning_rate: optax.ScalarOrSchedule = 1e-3,
  rank: int = 16,
  *,
  rho: float = 0.908,
  error_bits: int | None = 32,
  side: OneSide = 'short',
  **options: Unpack[LDAdamOptions],
) -> optax.GradientTransformationExtraArgs:
  """LDAdam: Adam in a subspace that turns a little at every step.

  The subspace follows gradient and momentum by one block power iteration per
  step, the moments move along, and what the subspace leaves out of a gradient
  is added to the next one.

  Args:
    rho: Weight of the momentum in the blend that the subspace follows, in
      [0, 1).
    error_bits: 32, 8 or 4 bits for every element of what the subspaces left
      out, which is added to the next gradient; None forgets it. In float32 it
      takes as much memory as the gradients.
    side: ``short``, ``long``, ``in`` or ``out``, see `scale_by_ldadam`.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `scale_by_ldadam` and `gradnormlorp`.

  Examples:
    >>> tx = ldadam(1e-3, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Robert et al., `LDAdam`, 2024, arXiv:2410.16103.

  Note:
    See `scale_by_ldadam` for what differs from the published code: the error is
    part of the state, so that clipping before this optimizer acts on the plain
    gradient.
  """
  adam = pick(options, AdamOptions)
  return assemble(
    scale_by_ldadam(rank, rho=rho, error_bits=error_bits, side=side, **adam),
    scale_by_adam(**adam),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
