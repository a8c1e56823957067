"""The norm-growth limiter of Fira and APOLLO: no update outgrows the last.

Shape suffixes in this file:
  MN    the last two axes of a matrix
Leading axes `[*]` stack matrices; each has its own norm.
"""

import math

import jax
import jax.numpy as jnp

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

  With :math:`b = \gamma (n_{t-1} + 10^{-8})`, where :math:`|x| > b`,

  .. math:: x \leftarrow x \, b / |x|, \qquad n_t = b,

  and elsewhere x stays and :math:`n_t = |x|`.

  Args:
    x_MN: Updates, ``[*, m, n]``, any floating dtype.
    last_norm: :math:`n_{t-1}`, what the last call returned, float32 ``[*]``;
      `initial_norm` before the first, which limits nothing.
    limit: :math:`\gamma`, at least 1.

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
    The :math:`10^{-8}` is that of both public codes; Fira's formula has none.
    With it a matrix that was zero once restarts from :math:`\gamma 10^{-8}`
    and grows by the factor :math:`\gamma` per step from there, as it does in
    those codes.
  """
  x_MN = x_MN.astype(jnp.float32)
  norm = jnp.linalg.norm(x_MN, axis=(-2, -1))
  bound = limit * (last_norm + _EPS)
  is_over = norm > bound
  factor = jnp.where(is_over, bound / norm, 1)
  return x_MN * factor[..., None, None], jnp.where(is_over, bound, norm)
