"""The top singular subspace of the gradient: exact, by eigh, or by iteration.

Shape suffixes in this file:
  M, N  the two axes of a gradient; the basis lives on N
  R     rank of the subspace, R <= min(M, N)
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from gnlorp_jax.optim.parts.checks import check_choice, check_int
from gnlorp_jax.optim.projections.base import Projection

Solver = Literal['power', 'eigh', 'exact']

# Weight of the old basis in a new one, see `orthonormalise`. Its square is
# what a direction that is kept that way changes of a captured energy: 1e-6.
FILL = 1e-3
EPS = 2.0**-23  # float32's


def svd(
  solver: Solver = 'power',
  *,
  iterations: int = 1,
  leading: int | None = None,
) -> Projection:
  """Projects on the leading right singular vectors of the gradient.

  Args:
    solver: How the vectors are found. ``exact``: a full SVD, the parity mode.
      ``eigh``: eigenvectors of the Gram matrix of the shorter side, the same
      subspace several times faster. ``power``: block power iteration started
      from the last basis; only matrix products and an R x R Cholesky factor,
      so it is fast and shards under GSPMD; from a random start one iteration
      already holds about 99 % of the best subspace's energy.
    iterations: Power iterations per refresh, at least 1; other solvers ignore
      it.
    leading: Columns of a basis that are leading singular vectors, at least 1;
      the others are drawn at every refresh, see `switch`. None draws none.

  Returns:
    The projection; its basis is ``[*, n, r]``, float32, with orthonormal
    columns.

  Raises:
    ValueError: If `solver` is unknown, or `iterations` or `leading` below 1.

  References:
    Zhao et al., `GaLore`, 2024, arXiv:2403.03507, definition 3.4;
    Bentbib & Kanber, `Block power method for SVD decomposition`, 2015.
  """
  check_choice('solver', solver, get_args(Solver))
  if iterations < 1:
    raise ValueError(f'iterations must be at least 1, got {iterations}.')
  solvers: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    'power': functools.partial(power_iteration, iterations=iterations),
    'eigh': top_eigenvectors,
    'exact': top_singular_vectors,
  }
  fit = solvers[solver]
  if leading is not None:
    check_int('leading', leading)

  def refresh(
    grad_MN: jax.Array, basis_NR: jax.Array, count: jax.Array
  ) -> jax.Array:
    grad_MN = grad_MN.astype(jnp.float32)
    new_NR = fit(grad_MN, basis_NR)
    if leading is None:
      return new_NR
    return switch(new_NR, grad_MN, leading, count)

  return Projection(random_basis, refresh, project, project_back)


def random_basis(shape: tuple[int, ...], rank: int, seed: int = 0) -> jax.Array:
  """Orthonormal columns in a fixed random direction, ``[*, n, r]``, float32.

  The start of a first power iteration. It ignores the seed: any basis that no
  gradient was made for serves, and equal runs must start alike.
  """
  del seed
  *stack, _, n = shape
  start_NR = jax.random.normal(jax.random.key(0), (n, rank), jnp.float32)
  basis_NR, _ = jnp.linalg.qr(start_NR)
  return jnp.broadcast_to(basis_NR, (*stack, n, rank))


def project(grad_MN: jax.Array, basis_NR: jax.Array) -> jax.Array:
  """Coordinates ``L = G Q`` of a gradient, ``[*, m, r]``, float32.

  The product is taken in the gradient's dtype with float32 accumulation, so
  that a bfloat16 gradient is never copied to float32.
  """
  return jnp.matmul(
    grad_MN,
    basis_NR.astype(grad_MN.dtype),
    preferred_element_type=jnp.float32,
  )


def project_back(low_MR: jax.Array, basis_NR: jax.Array) -> jax.Array:
  """The full-size update ``U = L Q^T``, ``[*, m, n]``, float32."""
  return low_MR @ basis_NR.astype(jnp.float32).mT


def top_singular_vectors(grad_MN: jax.Array, basis_NR: jax.Array) -> jax.Array:
  """Leading right singular vectors by a full SVD, signs normalised."""
  rank = basis_NR.shape[-1]
  _, _, vh_KN = jnp.linalg.svd(grad_MN, full_matrices=False)
  return normalise_signs(vh_KN[..., :rank, :].mT)


def top_eigenvectors(grad_MN: jax.Array, basis_NR: jax.Array) -> jax.Array:
  """The same subspace from the smaller of the two Gram matrices.

  Squaring the gradient halves the digits of small singular values: directions
  below 1e-3 of the largest one are not resolved, and do not matter here.
  """
  m, n = grad_MN.shape[-2:]
  rank = basis_NR.shape[-1]
  matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  if n <= m:
    _, vectors_NN = jnp.linalg.eigh(matmul(grad_MN.mT, grad_MN))
    return normalise_signs(vectors_NN[..., ::-1][..., :rank])
  _, vectors_MM = jnp.linalg.eigh(matmul(grad_MN, grad_MN.mT))
  left_MR = vectors_MM[..., ::-1][..., :rank]
  return normalise_signs(orthonormalise(grad_MN.mT @ left_MR, basis_NR))


def power_iteration(
  grad_MN: jax.Array, basis_NR: jax.Array, *, iterations: int
) -> jax.Array:
  """Block power iteration on ``G^T G`` from the last basis.

  Each iteration is ``Z = orth(G Q); Q = orth(G^T Z)``: the inner
  orthonormalisation keeps the outer one's condition number at that of G
  instead of its square. The Cholesky factor's positive diagonal ties each new
  column to the old one of the same index, so signs need no normalisation.

  Args:
    grad_MN: Gradient, ``[*, m, n]``, float32.
    basis_NR: Basis to start from, ``[*, n, r]``, orthonormal columns.
    iterations: Number of iterations, at least 1.

  Returns:
    The new basis, ``[*, n, r]``, float32; where the gradient has a rank below
    r, the columns it does not determine keep the old directions.
  """
  basis_NR = basis_NR.astype(jnp.float32)
  for _ in range(iterations):
    left_MR = cholesky_qr(unit_columns(grad_MN @ basis_NR), shifted=True)
    basis_NR = orthonormalise(grad_MN.mT @ left_MR, basis_NR)
  return basis_NR


def switch(
  basis_NR: jax.Array, grad_MN: jax.Array, leading: int, count: jax.Array
) -> jax.Array:
  """Keeps the leading columns of a basis and draws the others anew.

  Those drawn are orthonormal directions of the complement of the whole basis,
  so that what gradients left out for long gets its turn.

  Args:
    basis_NR: A basis fitted to a gradient, ``[*, n, r]``, float32.
    grad_MN: The gradient, ``[*, m, n]``, float32.
    leading: Columns to keep, of the largest singular values within the basis;
      more are kept where the complement has no room for the others.
    count: Updates so far, int32, from which the draw follows.

  Returns:
    The new basis, ``[*, n, r]``, float32: what is kept, in the order of the
    singular values, then what is drawn.

  References:
    Gong et al., `Alice`, 2025, arXiv:2502.07752, algorithm 2.

  Note:
    The paper draws columns of one full QR factorisation, ``[n, n]``; directions
    of the complement that are uniformly distributed need none. Matrices of one
    shape that are refreshed in one step start from the same random numbers,
    each in a complement of its own.
  """
  *stack, n, rank = basis_NR.shape
  drawn = min(max(rank - leading, 0), n - rank)
  sorted_NR = sort_columns(basis_NR, grad_MN)
  if drawn == 0:
    return sorted_NR
  key = jax.random.fold_in(
    jax.random.key(1, impl='threefry2x32'), jnp.asarray(count, jnp.int32)
  )
  noise = jax.random.normal(key, (n, drawn), jnp.float32)
  noise = jnp.broadcast_to(noise, (*stack, n, drawn))
  outside = noise - basis_NR @ (basis_NR.mT @ noise)
  new_NR = jnp.concatenate([sorted_NR[..., : rank - drawn], outside], axis=-1)
  # Twice, since what is left of the noise is a difference.
  for _ in range(2):
    new_NR = orthonormalise(new_NR, new_NR, fill=0.0)
  return new_NR


def sort_columns(basis_NR: jax.Array, grad_MN: jax.Array) -> jax.Array:
  """Turns a basis within its span, into the gradient's singular vectors there.

  They come in the order of their singular values, largest first, with the
  signs of `normalise_signs`.
  """
  low_MR = grad_MN @ basis_NR
  _, vectors_RR = jnp.linalg.eigh(low_MR.mT @ low_MR)
  return normalise_signs(basis_NR @ vectors_RR[..., ::-1])


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
