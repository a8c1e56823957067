"""Parameters without elements, which no optimizer has to see."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.split import (
  RefreshContext,
  SplitTransformation,
  split,
)


def skip_empty(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Hides arrays without elements from `inner`; their updates are as empty.

  They have no largest element, no mean and no basis.

  Args:
    inner: A transformation whose updates are float32. If it is a
      `SplitTransformation`, its projected gradients must be a tree of arrays,
      one for each gradient.

  Returns:
    The wrapped transformation, split where `inner` is. Its state is that of
    `inner`, with an `optax.MaskedNode` in the place of what is hidden.

  Examples:
    >>> tx = skip_empty(optax.scale_by_adam())
    >>> params = {'a': jnp.ones((2, 3)), 'b': jnp.ones((0, 3))}
    >>> state = tx.init(params)
    >>> state.mu['b'], tx.update(params, state)[0]['b'].shape
    (MaskedNode(), (0, 3))
  """
  inner_tx = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> optax.OptState:
    return inner_tx.init(_without_empty(params))

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    grads = updates
    updates, state = inner_tx.update(
      _without_empty(grads), state, _without_empty(params), **extra_args
    )
    return _with_empty(updates, grads), state

  if not isinstance(inner, SplitTransformation):
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  def project_fn(
    grads: optax.Updates, state: Any, params: Any, context: RefreshContext
  ) -> tuple[Any, optax.OptState]:
    projected, state = inner.project_fn(
      _without_empty(grads), state, _without_empty(params), context
    )
    return _with_empty(projected, grads), state

  def apply_fn(
    projected: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, state = inner.apply(
      _without_empty(projected), state, _without_empty(params), **extra_args
    )
    return _with_empty(updates, projected), state

  return split(init_fn, project_fn, apply_fn)


def _without_empty(tree: Any) -> Any:
  """The tree with nothing in the place of arrays without elements."""
  return jax.tree.map(lambda x: x if x.size else optax.MaskedNode(), tree)


def _with_empty(tree: Any, like: Any) -> Any:
  """The inverse: float32 arrays where those of `like` have no elements."""
  return jax.tree.map(
    lambda x, node: node if x.size else jnp.zeros(x.shape, jnp.float32),
    like,
    tree,
  )
