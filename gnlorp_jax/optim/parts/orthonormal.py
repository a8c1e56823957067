"""Columns made orthonormal, of matrices of any rank and scale.

Shape suffixes in this file:
  M, N  the axes of a matrix
  R     the number of columns, R <= N
Leading axes `[*]` stack matrices.
"""

import functools

import jax
import jax.numpy as jnp

# Weight of the old basis in a new one, see `orthonormalise`. An old direction
# that gets in by it changes the captured energy by its square, a millionth.
FILL = 1e-3
EPS = 2.0**-23  # float32's


def orthonormalise(
  wanted_NR: jax.Array, old_NR: jax.Array, fill: float = FILL
) -> jax.Array:
  """Orthonormal columns that span `wanted`, completed by those of `old`.

  A gradient of low rank leaves columns that are zero or copies of others; a
  bare Cholesky-QR then divides by zero. Adding a thousandth of the old column
  gives each of them a direction of its own and costs the others nothing.

  Args:
    wanted_NR: Columns to span, ``[*, n, r]``, float32, of any rank and scale.
    old_NR: Orthonormal columns, ``[*, n, r]``, float32.
    fill: Weight of the old columns; 0 leaves them out and gives the factor Q
      of a QR factorisation, or NaN where the rank is too low.

  Returns:
    Orthonormal columns, ``[*, n, r]``, float32.

  References:
    Fukaya et al., `Shifted Cholesky QR`, 2020, arXiv:1809.11085: a shifted
    factorisation conditions the columns, plain ones then orthonormalise them.
  """
  columns_NR = unit_columns(unit_columns(wanted_NR) + fill * old_NR)
  for shifted in (True, False, False):
    columns_NR = cholesky_qr(columns_NR, shifted=shifted)
  return columns_NR


def cholesky_qr(columns_NR: jax.Array, *, shifted: bool) -> jax.Array:
  """One Cholesky-QR pass over columns of length one.

  With `shifted` the Gram matrix's diagonal is raised by its worst rounding
  error (columns of length one make its norm R at most), so that the factor
  exists for columns of any rank; they come out better conditioned, not yet
  orthonormal.

  The R x R factor is inverted before it meets the columns: a triangular solve
  on them would force a column-major copy of the whole stack.
  """
  rank = columns_NR.shape[-1]
  shift = 4 * EPS * rank if shifted else 0.0
  eye_RR = jnp.eye(rank, dtype=columns_NR.dtype)
  # The default precision is TF32 or bfloat16 on some accelerators, far above
  # the shift; this product and the last one decide what orthonormal means.
  matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  gram_RR = matmul(columns_NR.mT, columns_NR)
  eye_RR = jnp.broadcast_to(eye_RR, gram_RR.shape)
  lower_RR = jnp.linalg.cholesky(gram_RR + shift * eye_RR)
  inverse_RR = jax.lax.linalg.triangular_solve(
    lower_RR,
    eye_RR,
    left_side=True,
    lower=True,
  )
  return matmul(columns_NR, inverse_RR.mT)


def unit_scale(x_MN: jax.Array) -> jax.Array:
  """Each matrix divided by its largest entry; squares cannot underflow."""
  largest = jnp.max(jnp.abs(x_MN), axis=(-2, -1), keepdims=True)
  return x_MN / jnp.where(largest > 0, largest, 1)


def unit_columns(x_NR: jax.Array) -> jax.Array:
  """Each column divided by its length; zero columns stay zero."""
  x_NR = unit_scale(x_NR)
  length = jnp.linalg.norm(x_NR, axis=-2, keepdims=True)
  return x_NR / jnp.where(length > 0, length, 1)


def normalise_signs(basis_NR: jax.Array) -> jax.Array:
  """Flips columns so that the entry of largest magnitude is positive.

  Singular vectors have arbitrary signs. Moments outlive a refresh, so two runs
  (or two shards, or a resumed run) must agree on them.
  """
  index = jnp.argmax(jnp.abs(basis_NR), axis=-2, keepdims=True)
  largest = jnp.take_along_axis(basis_NR, index, axis=-2)
  return jnp.where(largest < 0, -basis_NR, basis_NR)
