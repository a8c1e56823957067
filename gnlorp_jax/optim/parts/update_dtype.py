"""The dtype in which updates leave an optimizer."""

from typing import Any

import jax
import optax

from gnlorp_jax.optim.parts.split import (
  SplitTransformation,
  split,
)


def with_update_dtype(
  inner: optax.GradientTransformation, dtype: jax.typing.DTypeLike | None
) -> optax.GradientTransformationExtraArgs:
  """Casts the updates of `inner`, by default to the dtypes of the parameters.

  Args:
    inner: Any transformation.
    dtype: Of all updates; None for that of each parameter or, where `update` is
      not given them, gradient.

  Returns:
    The wrapped transformation.

  Note:
    Optax's transformations keep the dtype of what they are given, and
    `optax.apply_if_finite` and Equinox's `apply_updates` rely on it. A bfloat16
    parameter is then rounded twice: its update, then the sum. With float32
    updates `optax.apply_updates` rounds the sum alone.
  """
  inner_tx = optax.with_extra_args_support(inner)

  def cast(updates: Any, like: Any) -> Any:
    return jax.tree.map(
      lambda u, x: u.astype(x.dtype if dtype is None else dtype), updates, like
    )

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    new, state = inner_tx.update(updates, state, params, **extra_args)
    return cast(new, updates if params is None else params), state

  if not isinstance(inner, SplitTransformation):
    return optax.GradientTransformationExtraArgs(inner.init, update_fn)

  def apply_fn(
    projected: Any, state: optax.OptState, params: Any, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, state = inner.apply(projected, state, params, **extra_args)
    return cast(updates, params), state

  return split(inner.init, inner.project_fn, apply_fn, update_fn)
