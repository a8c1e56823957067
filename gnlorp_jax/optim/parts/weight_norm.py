"""Weight normalisation as an optimizer wrapper: W = g v / |v|.

Shape suffixes in this file:
  IO    a kernel's input and output axes, the last two of its array
  1O    one value per output unit, [*, 1, out]
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.checks import check_choice, check_params
from gnlorp_jax.optim.parts.split import (
  RefreshContext,
  SplitTransformation,
  as_split,
  split,
)
from gnlorp_jax.optim.parts.trees import record_of_trees

NormState = Literal['synced', 'tracked']


class WeightNormState(NamedTuple):
  """State of `with_weight_norm`."""

  v_norm: optax.Params | None  # float32 [*, 1, out] if tracked, else None
  direction: optax.OptState  # over v, shaped like the parameters
  magnitude: optax.OptState  # over g, [*, 1, out]


class ProjectedGrads(NamedTuple):
  """What is left of the gradients of kernels after the first half of a step."""

  dg: optax.Updates  # float32 [*, 1, out], of the magnitudes
  dv: Any  # what the direction's optimizer made of those of v


def column_norm(x_IO: jax.Array) -> jax.Array:
  """Length of the weights of each output unit, ``[*, 1, out]``, float32."""
  return jnp.linalg.norm(x_IO.astype(jnp.float32), axis=-2, keepdims=True)


def recompose(g_1O: jax.Array, v_IO: jax.Array) -> jax.Array:
  """The kernel ``W = g v / |v|``; where ``|v| = 0`` it is 0."""
  norm_1O = column_norm(v_IO)
  return v_IO * (g_1O / jnp.where(norm_1O > 0, norm_1O, 1))


class Parts(NamedTuple):
  """A kernel's g and v with their gradients, all float32."""

  g_1O: jax.Array  # [*, 1, out]
  v_IO: jax.Array  # [*, in, out]
  dg_1O: jax.Array  # [*, 1, out]
  dv_IO: jax.Array  # [*, in, out]


def pull_back(
  grad_IO: jax.Array, w_IO: jax.Array, v_norm_1O: jax.Array | None = None
) -> Parts:
  r"""Decomposes a kernel, and its gradient into those of g and v.

  With ``u = W / g``,

  .. math::
    \partial g = \langle \partial W, u \rangle, \qquad
    \partial v = \frac{g}{|v|} (\partial W - u \, \partial g)

  u is never formed: all but W and its gradient is one number per output unit.
  A zero column has no direction yet: its v receives the gradient of W itself.

  Args:
    grad_IO: ``dW``, ``[*, in, out]``, any floating dtype.
    w_IO: Kernel, ``[*, in, out]``, any floating dtype.
    v_norm_1O: ``|v|``, ``[*, 1, out]``; None where it equals g, so that
      v is W.

  Returns:
    g, v and their gradients.

  References:
    Salimans & Kingma, `Weight Normalization`, 2016, arXiv:1602.07868, eq. 3.
  """
  grad_IO, w_IO = grad_IO.astype(jnp.float32), w_IO.astype(jnp.float32)
  g_1O = column_norm(w_IO)
  inverse_1O = jnp.where(g_1O > 0, 1 / jnp.where(g_1O > 0, g_1O, 1), 0)
  # As a contraction: on CPUs XLA takes twenty times as long to sum the columns
  # of a product that is a stack of one matrix, [1, in, out].
  inner_O = jnp.einsum(
    '...io,...io->...o', grad_IO, w_IO, precision=jax.lax.Precision.HIGHEST
  )
  dg_1O = inner_O[..., None, :] * inverse_1O
  tangent_IO = grad_IO - w_IO * (dg_1O * inverse_1O)
  if v_norm_1O is None:
    return Parts(g_1O, w_IO, dg_1O, tangent_IO)
  # |v| on record is 0 for a column that was zero then; both may be zero now.
  v_norm_1O = jnp.where(v_norm_1O > 0, v_norm_1O, g_1O)
  ratio_1O = jnp.where(g_1O > 0, g_1O / jnp.where(g_1O > 0, v_norm_1O, 1), 1)
  v_IO = w_IO * (v_norm_1O * inverse_1O)
  return Parts(g_1O, v_IO, dg_1O, ratio_1O * tangent_IO)


def _parts(
  grads: optax.Updates, params: optax.Params, v_norm: optax.Params | None
) -> Parts:
  """The trees of g, v, dg and dv."""
  rest = () if v_norm is None else (v_norm,)
  return record_of_trees(jax.tree.map(pull_back, grads, params, *rest), Parts)


def _change(
  w_IO: jax.Array, g_1O: jax.Array, new_g_1O: jax.Array, new_v_IO: jax.Array
) -> jax.Array:
  """W' - W, float32; a zero column takes the plain step of v."""
  new_w_IO = jnp.where(g_1O > 0, recompose(new_g_1O, new_v_IO), new_v_IO)
  return new_w_IO - w_IO.astype(jnp.float32)


def with_weight_norm(
  direction: optax.GradientTransformation,
  magnitude: optax.GradientTransformation,
  *,
  norm_state: NormState = 'synced',
) -> optax.GradientTransformationExtraArgs:
  """Optimizes kernels as magnitude times direction, W = g v / |v|.

  Every step starts from the kernel itself: g is its length per output unit, v
  the kernel, so no second copy of it is stored. `direction` updates v and
  `magnitude` updates g by their exact gradients; the update returned is
  ``W' - W = g' v' / |v'| - W``. The two are whole optimizers, learning
  rate and sign included, since W' is not linear in their updates.

  A zero column (a fresh classifier, a LoRA factor) takes the plain step of
  `direction` until it has a direction.

  Args:
    direction: Optimizer of v, ``[*, in, out]``.
    magnitude: Optimizer of g, ``[*, 1, out]``.
    norm_state: ``synced`` sets |v| back to g after every step and needs no
      state. ``tracked`` keeps |v| as one scalar per output unit, as classical
      weight normalisation does: it only grows, and tempers later steps.

  Returns:
    A transformation whose updates are float32, so that adding them to bfloat16
    parameters rounds once. Its `update` needs `params`.

  Raises:
    ValueError: If `norm_state` is unknown; at `update`, if `params` is missing.

  Examples:
    >>> tx = with_weight_norm(optax.sgd(0.1), optax.sgd(0.1))
    >>> params = {'kernel': jnp.eye(2)}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(np.round(updates['kernel'], 3))
    [[-0.1  0. ]
     [ 0.  -0.1]]

  References:
    Huang et al., `GradNormLoRP`, 2024, arXiv:2412.19616, weight normalisation.

  Note:
    The public PyTorch optimizer passes the gradient of W to v unchanged and
    resets the magnitude every step; `released` does the same.
  """
  check_choice('norm_state', norm_state, get_args(NormState))
  direction_tx = as_split(direction)
  magnitude_tx = optax.with_extra_args_support(magnitude)

  def init_fn(params: optax.Params) -> WeightNormState:
    tracked = norm_state == 'tracked'
    return WeightNormState(
      v_norm=jax.tree.map(column_norm, params) if tracked else None,
      direction=direction_tx.init(params),
      magnitude=magnitude_tx.init(jax.tree.map(column_norm, params)),
    )

  def project_fn(
    grads: optax.Updates,
    state: WeightNormState,
    params: Any,
    context: RefreshContext,
  ) -> tuple[ProjectedGrads, WeightNormState]:
    check_params(params)
    parts = _parts(grads, params, state.v_norm)
    projected, direction_state = direction_tx.project_fn(
      parts.dv_IO, state.direction, parts.v_IO, context
    )
    return ProjectedGrads(parts.dg_1O, projected), state._replace(
      direction=direction_state
    )

  def apply_fn(
    projected: ProjectedGrads,
    state: WeightNormState,
    params: Any,
    **extra_args: Any,
  ) -> tuple[optax.Updates, WeightNormState]:
    # Any gradient gives the same g and v.
    g, v, _, _ = _parts(params, params, state.v_norm)
    v_step, direction_state = direction_tx.apply(
      projected.dv, state.direction, v, **extra_args
    )
    g_step, magnitude_state = magnitude_tx.update(
      projected.dg, state.magnitude, g, **extra_args
    )
    new_v = jax.tree.map(jnp.add, v, v_step)
    new_g = jax.tree.map(jnp.add, g, g_step)
    v_norm = None if state.v_norm is None else jax.tree.map(column_norm, new_v)
    return (
      jax.tree.map(_change, params, g, new_g, new_v),
      WeightNormState(v_norm, direction_state, magnitude_state),
    )

  tx = split(init_fn, project_fn, apply_fn)
  if isinstance(direction, SplitTransformation):
    return tx
  return optax.GradientTransformationExtraArgs(init_fn, tx.update)
