"""Steps over gradients that are not finite, and counts them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SkipNonfiniteState(NamedTuple):
  """State of `skip_nonfinite`."""

  skipped: jax.Array  # int32 [], steps left out so far
  inner_state: optax.OptState


def skip_nonfinite(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Leaves out the steps whose gradients hold a NaN or an infinity.

  Such a step has zero updates and changes nothing in the state of `inner`,
  not even its counts.

  The updates pass through a `lax.cond` and so exist in full before
  they are added to the parameters. A training step that puts one `lax.cond`
  around update and addition together, as `gnlorp_jax.training.step` does, does
  not need that memory.

  Args:
    inner: The optimizer to protect, learning rate and all.

  Returns:
    The protected optimizer.

  Examples:
    >>> tx = skip_nonfinite(optax.sgd(0.1))
    >>> params = jnp.ones(2)
    >>> updates, state = tx.update(params * jnp.nan, tx.init(params), params)
    >>> updates, int(state.skipped)
    (Array([0., 0.], dtype=float32), 1)

  Note:
    `optax.apply_if_finite` gives up after a number of bad steps and needs
    updates of the gradients' own dtype; this one does neither.
  """
  inner = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> SkipNonfiniteState:
    return SkipNonfiniteState(jnp.zeros([], jnp.int32), inner.init(params))

  def update_fn(
    updates: optax.Updates,
    state: SkipNonfiniteState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, SkipNonfiniteState]:
    finite = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(updates)]
    all_finite = jnp.all(jnp.array(finite))

    # Jitted so that both branches share one trace, which takes most of the time
    # before XLA; inlined, the program is the same.
    @functools.partial(jax.jit, inline=True)
    def step() -> tuple[optax.Updates, optax.OptState]:
      return inner.update(updates, state.inner_state, params, **extra_args)

    def skip() -> tuple[optax.Updates, optax.OptState]:
      like, _ = jax.eval_shape(step)
      return optax.tree.zeros_like(like), state.inner_state

    updates, inner_state = jax.lax.cond(all_finite, step, skip)
    skipped = jnp.where(
      all_finite, state.skipped, optax.safe_increment(state.skipped)
    )
    return updates, SkipNonfiniteState(skipped, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
