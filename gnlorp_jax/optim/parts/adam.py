"""Adam's direction and the step that follows it, in both public conventions.

Public code disagrees on two details that a parity run can see: where ``eps``
stands relative to the bias correction, and whether decoupled weight decay acts
before or after the step. Both are arguments here, and nowhere else.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.checks import (
  check_choice,
  check_interval,
  check_params,
)

EpsMode = Literal['standard', 'hf']
DecayOrder = Literal['before', 'after']


def scale_by_adam(
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  eps_mode: EpsMode = 'standard',
  bias_correction: bool = True,
  count_per_matrix: bool = False,
) -> optax.GradientTransformation:
  """Adam's direction, with float32 moments whatever the gradients' dtype.

  With ``m, v`` the moving averages of the gradient and of its square and
  ``c_i = 1 - b_i^t``, the direction is

  * ``standard``: ``(m / c_1) / (sqrt(v / c_2) + eps)``
  * ``hf``: ``(sqrt(c_2) / c_1) m / (sqrt(v) + eps)``

  which differ through ``eps`` alone; at the first step ``hf`` acts like an
  ``eps`` some thirty times larger.

  Args:
    b1: Decay of the first moment, in [0, 1).
    b2: Decay of the second moment, in [0, 1).
    eps: Added to the root of the second moment, at least 0.
    eps_mode: ``standard`` (Optax, ``torch.optim``) or ``hf`` (the AdamW of
      older transformers releases, from which GaLore and GradNormLoRP descend).
    bias_correction: False leaves out the corrections, ``c_i = 1``; a method
      that compares lengths puts `scale_by_bias_correction` behind them.
    count_per_matrix: Counts the steps of every matrix ``[*, m, n]`` by itself,
      so that the moments of one can start again or move to another basis.

  Returns:
    A transformation whose state is an `optax.ScaleByAdamState`; its `count` is
    int32 ``[]``, or with `count_per_matrix` a tree of int32 ``[*]``.

  Raises:
    ValueError: If `eps_mode` is unknown or a number out of its interval.

  References:
    Kingma & Ba, `Adam`, 2014, arXiv:1412.6980, algorithm 1.

  Note:
    `optax.scale_by_adam` keeps the second moment in the gradient's dtype; in
    bfloat16 an update by a factor of 0.001 is then lost. Here both moments are
    always float32.
  """
  check_choice('eps_mode', eps_mode, get_args(EpsMode))
  check_interval('b1', b1, '[0, 1)')
  check_interval('b2', b2, '[0, 1)')
  check_interval('eps', eps, '[0, inf)')

  def zeros(params: optax.Params) -> optax.Params:
    return optax.tree.zeros_like(params, dtype=jnp.float32)

  def init_fn(params: optax.Params) -> optax.ScaleByAdamState:
    count = jnp.zeros([], jnp.int32)
    if count_per_matrix:
      count = jax.tree.map(lambda p: jnp.zeros(p.shape[:-2], jnp.int32), params)
    # Two calls: one shared buffer could not be donated twice.
    return optax.ScaleByAdamState(
      count=count, mu=zeros(params), nu=zeros(params)
    )

  def direction(m: jax.Array, v: jax.Array, count: jax.Array) -> jax.Array:
    if not bias_correction:
      return m / (jnp.sqrt(v) + eps)
    c1, c2 = bias_corrections(b1, b2, count)
    if eps_mode == 'standard':
      return (m / c1) / (jnp.sqrt(v / c2) + eps)
    return (jnp.sqrt(c2) / c1) * m / (jnp.sqrt(v) + eps)

  def update_fn(
    updates: optax.Updates,
    state: optax.ScaleByAdamState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
    del params
    updates = optax.tree.cast(updates, jnp.float32)
    count = jax.tree.map(optax.safe_increment, state.count)
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment(updates, state.nu, b2, 2)
    if count_per_matrix:
      updates = jax.tree.map(
        lambda m, v, t: direction(m, v, t[..., None, None]), mu, nu, count
      )
    else:
      updates = jax.tree.map(lambda m, v: direction(m, v, count), mu, nu)
    return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(init_fn, update_fn)


def bias_corrections(
  b1: float, b2: float, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The bias corrections c_1 and c_2 after `count` steps, float32.

  Args:
    b1: Decay of the first moment, in [0, 1).
    b2: Decay of the second moment, in [0, 1).
    count: Steps, at least one, int32 of any shape, which is the result's.
  """

  def correction(decay: jax.typing.ArrayLike) -> jax.Array:
    # In float32 the difference 1 - b**t keeps four digits of c_2 at first.
    return -jnp.expm1(count * jnp.log(jnp.asarray(decay, jnp.float32)))

  return correction(b1), correction(b2)


class BiasCorrectionState(NamedTuple):
  """State of `scale_by_bias_correction`."""

  count: jax.Array  # type: ignore[assignment]  # int32 [], updates so far


def scale_by_bias_correction(
  b1: float, b2: float
) -> optax.GradientTransformation:
  """Multiplies by ``sqrt(c_2) / c_1``, Adam's step size correction.

  For methods that compare the lengths of directions before the corrections, as
  APOLLO and Fira do; see `scale_by_adam` without `bias_correction`.

  Args:
    b1: Decay of the first moment, in [0, 1).
    b2: Decay of the second moment, in [0, 1).

  Returns:
    A link of a chain.
  """

  def init_fn(params: optax.Params) -> BiasCorrectionState:
    del params
    return BiasCorrectionState(jnp.zeros([], jnp.int32))

  def update_fn(
    updates: optax.Updates,
    state: BiasCorrectionState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, BiasCorrectionState]:
    del params
    count = optax.safe_increment(state.count)
    c1, c2 = bias_corrections(b1, b2, count)
    factor = jnp.sqrt(c2) / c1
    updates = jax.tree.map(lambda u: factor * u, updates)
    return updates, BiasCorrectionState(count)

  return optax.GradientTransformation(init_fn, update_fn)


def descend(
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float = 0.0,
  *,
  decay_order: DecayOrder = 'before',
) -> optax.GradientTransformationExtraArgs:
  """Turns a direction into a step: learning rate and decoupled weight decay.

  With direction ``d``, the weight becomes

  * ``before``: ``(1 - eta lambda) w - eta d`` (Optax, ``torch.optim``)
  * ``after``: ``(1 - eta lambda) (w - eta d)`` (GaLore and relatives)

  Its `update` takes a tree of booleans ``decay_mask``, whose False spares
  parameters; see `with_decay_mask`.

  Args:
    learning_rate: ``eta``, a number or an Optax schedule.
    weight_decay: ``lambda``, at least 0.
    decay_order: ``before`` or ``after``.

  Returns:
    The closing link of a chain; with decay its `update` needs `params`.

  Raises:
    ValueError: If `decay_order` is unknown; at `update`, if there is decay and
      `params` is missing.
  """
  check_choice('decay_order', decay_order, get_args(DecayOrder))
  step = optax.scale_by_learning_rate(learning_rate)
  if isinstance(weight_decay, int | float) and weight_decay == 0:
    return optax.with_extra_args_support(step)
  decay = _add_decayed_weights(weight_decay)
  if decay_order == 'before':
    return optax.chain(decay, step)
  # (1 - eta lambda)(w + u) - w = u - eta (lambda (w + u)): the step itself is
  # added to the weight before the decay looks at it.
  shrink = optax.chain(decay, step)

  def init_fn(params: optax.Params) -> tuple[optax.OptState, optax.OptState]:
    return step.init(params), shrink.init(params)

  def update_fn(
    updates: optax.Updates,
    state: tuple[optax.OptState, optax.OptState],
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, tuple[optax.OptState, optax.OptState]]:
    check_params(params)
    updates, step_state = step.update(updates, state[0], params)
    stepped = jax.tree.map(jnp.add, params, updates)
    decay, shrink_state = shrink.update(
      optax.tree.zeros_like(updates), state[1], stepped, **extra_args
    )
    updates = jax.tree.map(jnp.add, updates, decay)
    return updates, (step_state, shrink_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _add_decayed_weights(
  weight_decay: float,
) -> optax.GradientTransformationExtraArgs:
  """`optax.add_decayed_weights` that is given its mask at every update."""
  everywhere = optax.add_decayed_weights(weight_decay)

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    *,
    decay_mask: Any = True,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    del extra_args
    decayed, state = everywhere.update(updates, state, params)
    # A prefix: `updates` may have nothing in the place of a parameter.
    updates = jax.tree.map(
      lambda decays, new, old: new if decays else old,
      decay_mask,
      decayed,
      updates,
    )
    return updates, state

  return optax.GradientTransformationExtraArgs(everywhere.init, update_fn)
