"""Directions that are a gradient, normalised, and need no memory of others.

Shape suffixes in this file:
  M, N  the input and output axes of a matrix, the last two axes of its array
Leading axes `[*]` stack matrices; each is normalised by itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.checks import check_interval, check_matrix
from gnlorp_jax.optim.parts.empty import skip_empty
from gnlorp_jax.optim.parts.plain import path_name

# From a gradient [*, m, n] to a direction, both float32.
Normalise = Callable[[jax.Array], jax.Array]

# Least root mean square that a vector is divided by.
_EPS = 1e-8


def unit_rms(x: jax.Array, axis: int) -> jax.Array:
  """Divides vectors by their root mean square, ``x / max(r, 1e-8)``.

  Args:
    x: Float32, of any shape.
    axis: The axis that the vectors lie along: -2 for the columns of a matrix.

  Returns:
    Vectors whose elements are of size 1, float32; zeros stay zeros.

  Examples:
    >>> unit_rms(jnp.array([[3.0, 0.0], [3.0, 0.0]]), axis=-2)
    Array([[1., 0.],
           [1., 0.]], dtype=float32)
  """
  # The root comes last: that of zero has no derivative.
  mean = jnp.mean(jnp.square(x), axis=axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(mean, _EPS**2))


class NormalizedState(NamedTuple):
  """State of `scale_by_normalized`."""

  # float32 [*, m, n]; None in the place of a parameter without momentum.
  mu: optax.Params


def scale_by_normalized(
  normalise: Normalise,
  b1: float = 0.9,
  has_momentum: Callable[[str], bool] = lambda name: False,
) -> optax.GradientTransformationExtraArgs:
  """Normalises gradients, or for some parameters their moving averages.

  Args:
    normalise: From a gradient ``[*, m, n]`` to a direction, both float32. What
      it makes of twice a gradient should be what it makes of the gradient: the
      averages have no bias correction.
    b1: Decay of the averages, in [0, 1).
    has_momentum: Tells by its ``/``-joined path whether a parameter's gradients
      are averaged.

  Returns:
    A transformation of matrices ``[*, m, n]``; its updates are float32.

  Raises:
    ValueError: If `b1` is out of its interval; at `init`, if a leaf has fewer
      than two axes.

  Examples:
    >>> tx = scale_by_normalized(lambda x: unit_rms(x, axis=-2))
    >>> tx.init({'kernel': jnp.ones((4, 2))}).mu
    {'kernel': None}
  """
  check_interval('b1', b1, '[0, 1)')

  def init_fn(params: optax.Params) -> NormalizedState:
    def momentum(path: Any, param: jax.Array) -> jax.Array | None:
      check_matrix(path_name(path), param.shape)
      if has_momentum(path_name(path)):
        return jnp.zeros(param.shape, jnp.float32)
      return None

    return NormalizedState(jax.tree_util.tree_map_with_path(momentum, params))

  def update_fn(
    updates: optax.Updates,
    state: NormalizedState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, NormalizedState]:
    del params
    updates = optax.tree.cast(updates, jnp.float32)

    def average(grad: jax.Array, old: jax.Array | None) -> jax.Array | None:
      return None if old is None else b1 * old + (1 - b1) * grad

    mu = jax.tree.map(average, updates, state.mu)
    updates = jax.tree.map(
      lambda grad, mean: normalise(grad if mean is None else mean), updates, mu
    )
    return updates, NormalizedState(mu)

  return skip_empty(optax.GradientTransformation(init_fn, update_fn))
