"""A singular subspace of the gradient, found or followed in several ways.

Shape suffixes in this file:
  M, N  the two axes of a gradient; the basis lives on N
  R     rank of the subspace, R <= min(M, N)
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from gnlorp_jax.optim.parts.checks import (
  check_choice,
  check_int,
  check_interval,
)
from gnlorp_jax.optim.parts.orthonormal import (
  cholesky_qr,
  normalise_signs,
  orthonormalise,
  unit_columns,
)
from gnlorp_jax.optim.projections.base import Projection, Tracked

Solver = Literal['power', 'eigh', 'exact', 'sampled', 'grassmann']


def svd(
  solver: Solver = 'power',
  *,
  iterations: int | None = None,
  leading: int | None = None,
  step_size: float | None = None,
  tracking: float = 0.0,
) -> Projection:
  """Projects on right singular vectors of the gradient, mostly the leading.

  Args:
    solver: How the vectors are found. ``exact``: a full SVD, the parity mode.
      ``eigh``: eigenvectors of the Gram matrix of the shorter side, the same
      subspace several times faster. ``power``: block power iteration started
      from the last basis; only matrix products and an R x R Cholesky factor,
      so it is fast and shards under GSPMD; from a random start one iteration
      already holds about 99 % of the best subspace's energy. ``sampled``: not
      the leading ones but some drawn by their singular values, see
      `sampled_eigenvectors`. ``grassmann``: the leading ones at first, from
      then on a step from the last basis, see `follow_geodesic`.
    iterations: Power iterations per refresh, of ``power`` alone, at least 1.
      None takes 1.
    leading: Columns of a basis that are leading singular vectors, at least 1;
      the others are drawn at every refresh, see `switch`. None draws none.
    step_size: Largest angle of a step in radians, of ``grassmann`` alone,
      positive. None takes 1.
    tracking: Decay of what a basis remembers of earlier gradients in its
      subspace, in [0, 1), see `track`; 0 remembers none.

  Returns:
    The projection; its basis is ``[*, n, r]``, float32, with orthonormal
    columns, or with `tracking` a `Tracked`.

  Raises:
    ValueError: If `solver` is unknown, `iterations` or `leading` below 1,
      `step_size` not positive or `tracking` out of its interval, or if an
      option meets a solver that has no use for it: `iterations` and `step_size`
      others than their own, `leading` one whose basis does not begin with
      leading vectors, `tracking` one whose basis is not fitted.

  References:
    Zhao et al., `GaLore`, 2024, arXiv:2403.03507, definition 3.4;
    Bentbib & Kanber, `Block power method for SVD decomposition`, 2015.
  """
  check_choice('solver', solver, get_args(Solver))
  _check_own('iterations', iterations, 'power', solver)
  _check_own('step_size', step_size, 'grassmann', solver)
  iterations = 1 if iterations is None else iterations
  step_size = 1.0 if step_size is None else step_size
  check_int('iterations', iterations)
  check_interval('step_size', step_size, '(0, inf)')
  check_interval('tracking', tracking, '[0, 1)')
  # Those that draw take the number of updates too.
  solvers: dict[str, Callable[..., jax.Array]] = {
    'power': functools.partial(power_iteration, iterations=iterations),
    'eigh': top_eigenvectors,
    'exact': top_singular_vectors,
    'sampled': sampled_eigenvectors,
    'grassmann': functools.partial(follow_geodesic, step_size=step_size),
  }
  fit = solvers[solver]
  if leading is not None:
    check_int('leading', leading)
    if solver in ('sampled', 'grassmann'):
      raise ValueError(
        f'leading={leading} keeps leading singular vectors, which solver='
        f"{solver!r} does not look for: use 'power', 'eigh' or 'exact', or "
        'leading=None.'
      )

  def refresh(
    grad_MN: jax.Array, basis_NR: jax.Array, count: jax.Array
  ) -> jax.Array:
    grad_MN = grad_MN.astype(jnp.float32)
    if solver == 'sampled':
      return fit(grad_MN, basis_NR, count)
    new_NR = fit(grad_MN, basis_NR)
    if leading is None:
      return new_NR
    return switch(new_NR, grad_MN, leading, count)

  projection = Projection(random_basis, refresh, project, project_back)
  is_off = isinstance(tracking, int | float) and tracking == 0
  if solver == 'grassmann' and not is_off:
    raise ValueError(
      f'tracking={tracking} remembers earlier gradients for a basis that '
      "solver='grassmann' does not fit: use another solver, or tracking=0."
    )
  return projection if is_off else track(projection, tracking)


def _check_own(name: str, value: object, owner: str, solver: str) -> None:
  """Raises a `ValueError` if an option of one solver is given to another."""
  if value is not None and solver != owner:
    raise ValueError(
      f'{name}={value} is an option of solver={owner!r}, which solver='
      f'{solver!r} has no use for: use solver={owner!r}, or {name}=None.'
    )


def track(projection: Projection, decay: float) -> Projection:
  r"""Fits bases to a gradient and to what is remembered of those before.

  With coordinates L, every step

  .. math:: S \leftarrow \beta S + (1 - \beta) L^T L,

  and a refresh fits a basis to ``beta Q S Q^T + (1 - beta) G^T G`` in
  place of ``G^T G``.

  Args:
    projection: One whose bases are orthonormal columns ``[*, n, r]`` fitted to
      ``G^T G``.
    decay: ``beta``, in (0, 1).

  Returns:
    The projection; its basis is a `Tracked`.

  References:
    Gong et al., `Alice`, 2025, arXiv:2502.07752, section 5.1.

  Note:
    As in the paper, what is remembered stays as it is when a basis changes,
    though it is then that of other columns. It is of gradients as they are:
    squares of entries below about 1e-19 are lost.
  """

  def init(shape: tuple[int, ...], rank: int, seed: int) -> Tracked:
    columns_NR = projection.init(shape, rank, seed)
    moment_RR = jnp.zeros((*shape[:-2], rank, rank), jnp.float32)
    return Tracked(columns_NR, moment_RR)

  def refresh(grad_MN: jax.Array, basis: Tracked, count: jax.Array) -> Tracked:
    # Rows whose Gram matrix is that of what is remembered.
    squares_R, vectors_RR = jnp.linalg.eigh(basis.moment_RR)
    roots_RR = jnp.sqrt(jnp.maximum(squares_R, 0))[..., None] * vectors_RR.mT
    rows_RN = decay**0.5 * roots_RR @ basis.columns_NR.mT
    rows = jnp.concatenate([(1 - decay) ** 0.5 * grad_MN, rows_RN], axis=-2)
    new_NR = projection.refresh(rows, basis.columns_NR, count)
    return basis._replace(columns_NR=new_NR)

  def remember(low_MR: jax.Array, basis: Tracked) -> Tracked:
    moment_RR = decay * basis.moment_RR + (1 - decay) * (low_MR.mT @ low_MR)
    return basis._replace(moment_RR=moment_RR)

  return Projection(
    init,
    refresh,
    lambda grad_MN, basis: projection.project(grad_MN, basis.columns_NR),
    lambda low_MR, basis: projection.project_back(low_MR, basis.columns_NR),
    remember=remember,
    is_orthonormal=projection.is_orthonormal,
  )


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
  if n <= m:
    _, vectors_NN = jnp.linalg.eigh(_exactly(grad_MN.mT, grad_MN))
    return normalise_signs(vectors_NN[..., ::-1][..., :rank])
  _, vectors_MM = jnp.linalg.eigh(_exactly(grad_MN, grad_MN.mT))
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
  noise = jax.random.normal(_key(count), (n, drawn), jnp.float32)
  noise = jnp.broadcast_to(noise, (*stack, n, drawn))
  outside = noise - basis_NR @ (basis_NR.mT @ noise)
  new_NR = jnp.concatenate([sorted_NR[..., : rank - drawn], outside], axis=-1)
  # Twice, since what is left of the noise is a difference.
  for _ in range(2):
    new_NR = orthonormalise(new_NR, new_NR, fill=0.0)
  return new_NR


def _key(count: jax.Array) -> jax.Array:
  """A random key that follows from the number of updates alone."""
  # Named, since others draw differently under a vmap.
  key = jax.random.key(1, impl='threefry2x32')
  return jax.random.fold_in(key, jnp.asarray(count, jnp.int32))


def sampled_eigenvectors(
  grad_MN: jax.Array, basis_NR: jax.Array, count: jax.Array
) -> jax.Array:
  """Right singular vectors, drawn without replacement by their values.

  Of all of them r are drawn one after the other, each with a probability that
  is its singular value's share of those left.

  Args:
    grad_MN: Gradient, ``[*, m, n]``, float32.
    basis_NR: The last basis, ``[*, n, r]``, whose rank the new one has.
    count: Updates so far, int32, from which the draw follows.

  Returns:
    The new basis, ``[*, n, r]``, float32, in the order of the singular values.

  References:
    Zhang et al., `Importance Sampling for Low-Rank Optimization` (SARA), 2025,
    arXiv:2502.05790.

  Note:
    The paper draws from a full SVD; here from eigenvectors of the smaller Gram
    matrix, as in `top_eigenvectors`, several times faster. Matrices of one
    shape that are refreshed in one step share their random numbers.
  """
  m, n = grad_MN.shape[-2:]
  rank = basis_NR.shape[-1]
  turned = grad_MN if n <= m else grad_MN.mT
  squares_K, vectors_KK = jnp.linalg.eigh(_exactly(turned.mT, turned))
  # The largest of logarithms with Gumbel noise are such a draw.
  noise_K = jax.random.gumbel(_key(count), squares_K.shape[-1:], jnp.float32)
  score_K = 0.5 * jnp.log(jnp.maximum(squares_K, 0)) + jnp.broadcast_to(
    noise_K, squares_K.shape
  )
  _, index_R = jax.lax.top_k(score_K, rank)
  index_R = -jnp.sort(-index_R)  # The largest eigenvalue is the last.
  drawn_KR = jnp.take_along_axis(vectors_KK, index_R[..., None, :], axis=-1)
  if n > m:
    drawn_KR = orthonormalise(grad_MN.mT @ drawn_KR, basis_NR)
  return normalise_signs(drawn_KR)


def follow_geodesic(
  grad_MN: jax.Array, basis_NR: jax.Array, *, step_size: float
) -> jax.Array:
  r"""Turns a basis along a geodesic of subspaces, toward the gradient's.

  With coordinates ``L = G Q`` and ``sigma u v^T`` the leading part of
  ``T = 2 (G - L Q^T)^T L``, along which ``|G - L Q^T|^2`` falls
  fastest,

  .. math::
    Q \leftarrow Q + (Q v (\cos \theta - 1) + u \sin \theta) v^T, \qquad
    \theta = \eta \sigma / |G|^2.

  A basis that was never fitted becomes that of `top_eigenvectors`.

  Args:
    grad_MN: ``G``, ``[*, m, n]``, float32.
    basis_NR: ``Q``, ``[*, n, r]``, orthonormal columns.
    step_size: ``eta``, positive: as ``sigma <= |G|^2``, the largest
      angle, in radians.

  Returns:
    The new basis, ``[*, n, r]``, float32; of a gradient inside the subspace, or
    outside of all of it, the old one.

  References:
    Rajabi et al., `SubTrack++`, 2025, arXiv:2502.01586, theorem 3.6.

  Note:
    The paper's angle is ``eta sigma``: a gradient of half the size turns
    a basis by a quarter. Here it is relative to the gradient's length.
  """
  low_MR = grad_MN @ basis_NR
  rest_MN = grad_MN - low_MR @ basis_NR.mT
  tangent_NR = 2 * rest_MN.mT @ low_MR
  _, vectors_RR = jnp.linalg.eigh(_exactly(tangent_NR.mT, tangent_NR))
  right_R1 = vectors_RR[..., -1:]
  left_N1 = tangent_NR @ right_R1
  sigma = jnp.linalg.norm(left_N1, axis=-2, keepdims=True)
  left_N1 = left_N1 / jnp.where(sigma > 0, sigma, 1)
  square = jnp.sum(jnp.square(grad_MN), axis=(-2, -1), keepdims=True)
  angle = step_size * sigma / jnp.where(square > 0, square, 1)
  moved_N1 = (basis_NR @ right_R1) * (jnp.cos(angle) - 1)
  moved_N1 = moved_N1 + left_N1 * jnp.sin(angle)
  turned_NR = basis_NR + moved_N1 @ right_R1.mT
  # So that roundings of many turns do not add up.
  turned_NR = cholesky_qr(turned_NR, shifted=False)
  is_first = _is_unfitted(basis_NR)
  first_NR = jax.lax.cond(
    jnp.any(is_first),
    lambda: top_eigenvectors(grad_MN, basis_NR),
    lambda: turned_NR,
  )
  return jnp.where(is_first, first_NR, turned_NR)


def _is_unfitted(basis_NR: jax.Array) -> jax.Array:
  """Whether bases are still those of `random_basis`, bool ``[*, 1, 1]``."""
  *stack, n, rank = basis_NR.shape
  start_NR = random_basis((*stack, n, n), rank)
  # Bases of few bits are so up to some hundredths of the largest element.
  error = jnp.max(jnp.abs(basis_NR - start_NR), axis=(-2, -1), keepdims=True)
  return error < 0.1 * jnp.max(jnp.abs(start_NR))


def sort_columns(basis_NR: jax.Array, grad_MN: jax.Array) -> jax.Array:
  """Turns a basis within its span, into the gradient's singular vectors there.

  They come in the order of their singular values, largest first, with the
  signs of `normalise_signs`.
  """
  low_MR = grad_MN @ basis_NR
  _, vectors_RR = jnp.linalg.eigh(_exactly(low_MR.mT, low_MR))
  return normalise_signs(_exactly(basis_NR, vectors_RR[..., ::-1]))


# Where the result has to be orthonormal, or its eigenvectors: the default is
# TF32 or bfloat16 on some accelerators.
_exactly = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
