"""Hyper-parameters as numbers in an optimizer's state.

What is a number in the state is no constant of the compiled program: a search
over learning rates compiles nothing anew.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.split import (
  RefreshContext,
  SplitTransformation,
  split,
)


class HyperparamsState(NamedTuple):
  """State of `inject_hyperparams`."""

  hyperparams: dict[str, jax.Array]  # float32 [], by name.
  inner_state: optax.OptState


def inject_hyperparams(
  make: Callable[..., optax.GradientTransformation], **hyperparams: float
) -> optax.GradientTransformationExtraArgs:
  """`optax.inject_hyperparams` for numbers, that stays split where `make` does.

  Args:
    make: Makes a transformation from the hyper-parameters by their names. It is
      called whenever a step is traced.
    **hyperparams: The numbers that `init` puts into the state. Other ones are
      chosen with ``state._replace(hyperparams=...)``.

  Returns:
    A transformation with a `HyperparamsState`, a `SplitTransformation` if that
    is what `make` makes.

  Examples:
    >>> tx = inject_hyperparams(lambda rate: optax.sgd(rate), rate=1.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> state = state._replace(hyperparams={'rate': jnp.float32(0.5)})
    >>> tx.update(jnp.ones(2), state)[0].tolist()
    [-0.5, -0.5]
  """
  first = make(**hyperparams)

  def init_fn(params: optax.Params) -> HyperparamsState:
    numbers = {
      name: jnp.asarray(value, jnp.float32)
      for name, value in hyperparams.items()
    }
    return HyperparamsState(numbers, first.init(params))

  def update_fn(
    updates: optax.Updates,
    state: HyperparamsState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, HyperparamsState]:
    tx = optax.with_extra_args_support(make(**state.hyperparams))
    updates, inner = tx.update(updates, state.inner_state, params, **extra_args)
    return updates, state._replace(inner_state=inner)

  if not isinstance(first, SplitTransformation):
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  def project_fn(
    grads: optax.Updates,
    state: HyperparamsState,
    params: Any,
    context: RefreshContext,
  ) -> tuple[Any, HyperparamsState]:
    tx = make(**state.hyperparams)
    projected, inner = tx.project_fn(grads, state.inner_state, params, context)
    return projected, state._replace(inner_state=inner)

  def apply_fn(
    projected: Any,
    state: HyperparamsState,
    params: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, HyperparamsState]:
    tx = make(**state.hyperparams)
    updates, inner = tx.apply(
      projected, state.inner_state, params, **extra_args
    )
    return updates, state._replace(inner_state=inner)

  return split(init_fn, project_fn, apply_fn, update_fn)
