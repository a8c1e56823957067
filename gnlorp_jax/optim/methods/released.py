"""The public PyTorch release of GradNormLoRP, quirks and all.

For golden tests and for comparison with published runs of that code; train
with `gradnormlorp` instead. What it computes differs from the paper:

* The magnitude is reset to |v| at every step, so it is never learned: its Adam
  step perturbs the norms for one step only.
* The gradient of v is that of W, without the tangent projection.
* A full copy of every weight is kept as v; the weights themselves are
  overwritten from it, whatever anybody else did to them.
* Every parameter is weight-normalised, biases and norm gains as one vector
  each; a parameter (or a row of one) that is zero becomes NaN.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.parts.adam import EpsMode, descend, scale_by_adam
from gnlorp_jax.optim.parts.checks import check_params
from gnlorp_jax.optim.parts.labels import ParamLabels, labels
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection
from gnlorp_jax.optim.subspace.sides import Side


class ReleasedState(NamedTuple):
  """State of `with_released_weight_norm`."""

  v: optax.Params  # like the parameters: the copy that really trains
  direction: optax.OptState  # over v
  magnitude: optax.OptState  # over |v|, one entry per unit


def norm_axis(path: tuple[Any, ...], param: jax.Array) -> int:
  """Axis a norm runs over: one value per output unit, token row or vector.

  PyTorch reduces (out, in) weights and (vocab, d) embeddings over dimension 1,
  vectors over everything. Flax kernels are (in, out), and vectors may be
  stacked: only kernels reduce over the axis before the last.
  """
  is_kernel = path_name(path).endswith('kernel') and param.ndim >= 2
  return -2 if is_kernel else -1


def _unit_norm(path: tuple[Any, ...], v: jax.Array) -> jax.Array:
  return jnp.linalg.norm(v, axis=norm_axis(path, v), keepdims=True)


def with_released_weight_norm(
  direction: optax.GradientTransformation,
  magnitude: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """The release's ``LowRankWeightNormAdamW`` around two inner optimizers.

  Each step computes ``g = |v|``, moves v by the raw gradient and g by its
  component along v, and sets the weight to ``g' v' / |v'|``.

  Args:
    direction: Optimizer of v, learning rate and decay included.
    magnitude: Optimizer of |v|, learning rate and decay included.

  Returns:
    A transformation whose updates are float32; its `update` needs `params`.

  Raises:
    ValueError: At `update`, if `params` is missing.

  References:
    The public PyTorch code of arXiv:2412.19616.
  """
  by_path = jax.tree_util.tree_map_with_path

  def init_fn(params: optax.Params) -> ReleasedState:
    # A copy: the parameters and v must not share a buffer to be donated.
    v = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
    return ReleasedState(
      v=v,
      direction=direction.init(params),
      magnitude=magnitude.init(by_path(_unit_norm, params)),
    )

  def update_fn(
    updates: optax.Updates,
    state: ReleasedState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, ReleasedState]:
    check_params(params)
    v = state.v
    norm = by_path(_unit_norm, v)
    dg = by_path(
      lambda path, d, v, n: jnp.sum(
        d * (v / n), axis=norm_axis(path, v), keepdims=True
      ),
      updates,
      v,
      norm,
    )
    v_step, direction_state = direction.update(updates, state.direction, v)
    g_step, magnitude_state = magnitude.update(dg, state.magnitude, norm)
    new_v = optax.apply_updates(v, v_step)
    new_g = jax.tree.map(jnp.add, norm, g_step)
    new_params = jax.tree.map(
      lambda g, v, n: g * (v / n), new_g, new_v, by_path(_unit_norm, new_v)
    )
    updates = jax.tree.map(
      lambda new, old: new - old.astype(jnp.float32), new_params, params
    )
    return updates, ReleasedState(new_v, direction_state, magnitude_state)

  return optax.GradientTransformation(init_fn, update_fn)


def released_gradnormlorp(
  learning_rate: optax.ScalarOrSchedule,
  rank: int,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  *,
  projection: Projection | None = None,
  side: Side = 'short',
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  eps_mode: EpsMode = 'hf',
  weight_decay: float = 0.0,
  param_labels: ParamLabels | None = None,
) -> optax.GradientTransformationExtraArgs:
  """The released optimizer on every parameter, for parity runs.

  Args:
    learning_rate: A number or an Optax schedule.
    rank: Rank for the parameters labelled ``low_rank``; those labelled ``full``
      take the same step without projection.
    update_proj_gap: Steps between two refreshes.
    scale: Multiplies the expanded update of v of projected parameters.
    projection: None for exact SVD. A test may inject recorded bases, since the
      signs of singular vectors are arbitrary.
    side: ``short`` (``std``), ``long`` (``reverse_std``), ``both`` (``full``).
    b1: Decay of the first moments.
    b2: Decay of the second moments.
    eps: Added to the root of the second moments.
    eps_mode: See `scale_by_adam`.
    weight_decay: Decay after the step, of v and of the magnitude.
    param_labels: As in `gradnormlorp`.

  Returns:
    A complete optimizer; its updates are float32.

  Raises:
    ValueError: As `with_low_rank_projection`, `scale_by_adam` and `descend`.

  Examples:
    >>> tx = released_gradnormlorp(1e-2, rank=2)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    The public PyTorch code of arXiv:2412.19616, ``LowRankWeightNormAdamW``.

  Note:
    It has none of the guards of `gradnormlorp`: zero units and non-finite
    gradients turn into NaN, as they do in the release. Its retry of a failed
    SVD changes nothing in float32 and is left out.
  """

  def adam() -> optax.GradientTransformation:
    return scale_by_adam(b1, b2, eps, eps_mode=eps_mode)

  step = descend(learning_rate, weight_decay, decay_order='after')
  projected = with_low_rank_projection(
    adam(),
    rank,
    update_proj_gap,
    scale,
    projection=projection or projections.get('svd', solver='exact'),
    side=side,
    spread_refreshes=False,
  )
  magnitude = optax.chain(adam(), step)
  transforms = {
    'low_rank': with_released_weight_norm(
      optax.chain(projected, step), magnitude
    ),
    'full': with_released_weight_norm(magnitude, magnitude),
    'frozen': optax.set_to_zero(),
  }
  return optax.partition(transforms, labels(param_labels))
