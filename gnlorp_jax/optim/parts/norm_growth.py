"""The norm-growth limiter of Fira and APOLLO: no update outgrows the last.

Shape suffixes in this file:
  MN    the last two axes of a matrix
Leading axes `[*]` stack matrices; each has its own norm.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlorp_jax.optim.parts.checks import check_interval

# Stands in for the norm before the first. Nothing outgrows it; 0 would not do,
# as it is a norm that an update can have.
NO_NORM = math.inf

_EPS = 1e-8  # Lets an update grow again after one that was zero.


def initial_norm(x_MN: jax.Array) -> jax.Array:
  """The ``last_norm`` of the first call, `NO_NORM`, float32 ``[*]``."""
  return jnp.full(x_MN.shape[:-2], NO_NORM, jnp.float32)


def limit_norm_growth(
  x_MN: jax.Array, last_norm: jax.Array, limit: float = 1.01
) -> tuple[jax.Array, jax.Array]:
  r"""Shrinks each matrix whose norm grew by more than a factor.

  With ``b = gamma (n_{t-1} + 1e-8)``, where ``|x| > b``,

  .. math:: x \leftarrow x \, b / |x|, \qquad n_t = b,

  and elsewhere x stays and ``n_t = |x|``.

  Args:
    x_MN: Updates, ``[*, m, n]``, any floating dtype.
    last_norm: ``n_{t-1}``, what the last call returned, float32 ``[*]``;
      `initial_norm` before the first, which limits nothing.
    limit: ``gamma``, at least 1.

  Returns:
    x limited, float32 ``[*, m, n]``, and its Frobenius norms, float32 ``[*]``.

  Examples:
    >>> x = jnp.ones((2, 2))
    >>> x, norm = limit_norm_growth(x, initial_norm(x))
    >>> float(norm)
    2.0
    >>> x, norm = limit_norm_growth(5 * x, norm, limit=1.5)
    >>> float(norm), float(x[0, 0])
    (3.0, 1.5)

  References:
    Chen et al., `Fira`, 2024, arXiv:2410.01623, the norm-growth limiter; Zhu et
    al., `APOLLO`, 2024, arXiv:2412.05270, which takes it over.

  Note:
    The ``1e-8`` is that of both public codes; Fira's formula has none.
    With it a matrix that was zero once restarts from ``gamma 1e-8``
    and grows by the factor ``gamma`` per step from there, as it does in
    those codes.
  """
  x_MN = x_MN.astype(jnp.float32)
  norm = jnp.linalg.norm(x_MN, axis=(-2, -1))
  bound = limit * (last_norm + _EPS)
  is_over = norm > bound
  # Not the bound, which is infinite at first: the derivative would be 0 / 0.
  new_norm = jnp.where(is_over, bound, norm)
  factor = jnp.where(is_over, new_norm / norm, 1)
  return x_MN * factor[..., None, None], new_norm


class Limiter(NamedTuple):
  """The limiter as a part of a `Recovery`, or nothing in its place."""

  init: Callable[[tuple[int, ...]], Any]  # A state for updates of a shape.
  apply: Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def limiter(limit: float | None) -> Limiter:
  """The limiter with its state, the last norm; or none.

  Args:
    limit: ``gamma``, at least 1; None limits nothing and keeps no state.

  Returns:
    ``init(shape) -> state`` for updates of `shape` ``[*, m, n]`` and
    ``apply(update_MN, state) -> (update_MN, state)``.

  Raises:
    ValueError: If `limit` is below 1 or not finite.

  Note:
    An update that is zero is not recorded. In public code it is, so that a
    matrix without a gradient in one step (an expert without tokens, a layer
    below one that starts at zero) stands still: at 1 % a step it takes 1850 of
    them from 1e-8 to 1.
  """
  if limit is None:
    return Limiter(lambda shape: (), lambda x_MN, state: (x_MN, state))
  check_interval('norm_growth_limit', limit, '[1, inf)')

  def init(shape: tuple[int, ...]) -> jax.Array:
    return jnp.full(shape[:-2], NO_NORM, jnp.float32)

  def apply(x_MN: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MN, norm = limit_norm_growth(x_MN, last, limit)
    return x_MN, jnp.where(norm > 0, norm, last)

  return Limiter(init, apply)
