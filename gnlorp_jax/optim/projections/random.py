"""Random projections, regenerated from a stored seed.

Shape suffixes in this file:
  M, N  the two axes of a gradient; the basis lives on N
  R     rank of the subspace
  A, B  the two axes of the reshaped gradient, [m c, n / c]; see `random`
"""

import dataclasses
import functools
import math
from typing import Literal, NoReturn, get_args

import jax
import jax.numpy as jnp

from gnlorp_jax.optim.parts.checks import check_choice
from gnlorp_jax.optim.parts.flax_serialization import FlaxSerializable
from gnlorp_jax.optim.projections.base import Projection

Distribution = Literal['normal', 'rademacher']


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['seed'],
  meta_fields=['size', 'rank', 'length'],
)
@dataclasses.dataclass(frozen=True)
class RandomBasis(FlaxSerializable):
  """What a random basis is made from again, wherever it is needed."""

  seed: jax.Array  # uint32 [*]
  size: int  # rows of the random matrix, n / c
  rank: int  # columns of the random matrix
  length: int  # n, the axis of the gradient that it lives on


def random(
  granularity: float | None = 1, distribution: Distribution = 'normal'
) -> Projection:
  r"""Projects on random directions that are stored as a seed alone.

  With ``P`` of independent entries of mean 0 and variance ``1 / r``,

  .. math:: R = \tilde G P, \qquad U = \mathrm{reshape}(R P^T),

  where ``G'`` is the gradient ``[m, n]`` reshaped to ``[m c, n / c]``
  by the granularity ``c``. As ``E[P P^T] = I``, the way there and back
  is unbiased. A refresh draws a new seed from the old one and the count.

  Coordinates are ``[*, m c, r]``. Seeds are uint32 ``[*]``, another one for
  every matrix of a stack and every parameter; the random matrix does not depend
  on how arrays lie on devices.

  Args:
    granularity: ``c``, an integer, which splits every row into that many
      contiguous pieces, or one over an integer, such as 1/4, which joins four
      consecutive rows. At the same number of coordinates, ``m c r``, a
      finer one was found to be better than a higher rank. None takes the
      largest power of two up to 64 that divides n and leaves pieces as long as
      the rank, for each matrix shape by itself.
    distribution: ``normal``, or ``rademacher`` for signs, of which 32 come from
      one random word: a tenth or less of the time, see the Note.

  Returns:
    The projection. Its bases are not orthonormal: a subspace's `energy` is the
    ratio of squared lengths, about 1, and its `overlap` about ``r c / n``.

  Raises:
    ValueError: If `granularity` is neither an integer nor one over an integer,
      or `distribution` is unknown; at `init`, if the granularity does not fit a
      matrix, if the rank exceeds ``n / c``, if both sides are compressed with a
      granularity other than 1, or if moments shall be rotated to a new basis.

  Examples:
    >>> method = random(granularity=4)
    >>> basis = method.init((6, 16), 2, 0)
    >>> method.project(jnp.ones((6, 16)), basis).shape
    (24, 2)

  References:
    Wang et al., `VLoRP`, 2025, arXiv:2505.01744 (granularity); Zhu
    et al., `APOLLO`, 2024, arXiv:2412.05270 (granularity 1).

  Note:
    Where the published VLoRP code compresses the rows of a gradient, its
    row-major reshape collects every c-th row into a piece (and for c < 1 joins
    distant columns); here pieces are contiguous on both sides, which is the
    same in distribution. It also draws a new seed at every micro-batch of a
    refresh step, so that accumulated coordinates belong to different matrices;
    here a seed is drawn once per update at most.

    There and back is no contraction, so that no errors are fed back
    (`error_bits`) and no sign is taken of what is left out (`frugal`).

    On a CPU, drawing normals takes from 15 % (4096 x 1024) to 90 % (512 x 128)
    of the time of the product with a square gradient, drawing signs 0.2 % to
    10 %; a step draws them once for the way there and back.
  """
  check_choice('distribution', distribution, get_args(Distribution))
  if granularity is not None:
    _pieces(granularity)
  draw = normal_matrix if distribution == 'normal' else sign_matrix

  def init(shape: tuple[int, ...], rank: int, seed: int) -> RandomBasis:
    *stack, m, n = shape
    pieces = _finest(n, rank) if granularity is None else granularity
    split, join = _pieces(pieces)
    if n % split or m % join:
      raise ValueError(
        f'granularity {pieces} cannot reshape a gradient [m, n] of '
        f'[{m}, {n}], compressed on n: n / granularity and m * granularity '
        'must be integers. Use a granularity that fits all projected kernels, '
        "or label this one 'full'."
      )
    size = n // split * join
    if rank > size:
      raise ValueError(
        f'rank {rank} exceeds n / granularity = {n} / {pieces} = {size}: '
        'the coordinates would be larger than the gradient. Lower rank or '
        'granularity.'
      )
    return RandomBasis(
      jax.random.bits(_key(seed), tuple(stack), jnp.uint32),
      size,
      rank,
      n,
    )

  def refresh(
    grad_MN: jax.Array, basis: RandomBasis, count: jax.Array
  ) -> RandomBasis:
    del grad_MN
    return dataclasses.replace(basis, seed=next_seed(basis.seed, count))

  def matrix(basis: RandomBasis) -> jax.Array:
    """The random matrix, of variance 1, ``[*, n / c, r]``, float32."""
    shape = (basis.size, basis.rank)
    matrix_sBR = jax.vmap(lambda seed: draw(seed, shape))(basis.seed.ravel())
    return matrix_sBR.reshape(*basis.seed.shape, *shape)

  def project(grad_MN: jax.Array, basis: RandomBasis) -> jax.Array:
    n = grad_MN.shape[-1]
    if n != basis.length:
      raise ValueError(
        f'A random basis for n = {basis.length} met a gradient '
        f"of n = {n}: with side='both' a granularity other than 1 "
        f"({granularity}) reshapes the other side's coordinates. Use another "
        'side or granularity=1.'
      )
    # The factor stays out of the product: signs are exact in any dtype.
    low_AR = jnp.matmul(
      grad_MN.reshape(*grad_MN.shape[:-2], -1, basis.size),
      matrix(basis).astype(grad_MN.dtype),
      preferred_element_type=jnp.float32,
    )
    return low_AR / math.sqrt(basis.rank)

  def project_back(low_AR: jax.Array, basis: RandomBasis) -> jax.Array:
    update_AB = (low_AR / math.sqrt(basis.rank)) @ matrix(basis).mT
    return update_AB.reshape(*update_AB.shape[:-2], -1, basis.length)

  def turn(old: RandomBasis, new: RandomBasis) -> jax.Array:
    # Columns of variance 1 are sqrt(n / c) long.
    return matrix(old).mT @ matrix(new) / old.size

  return Projection(
    init,
    refresh,
    project,
    project_back,
    no_transport,
    turn,
    is_orthonormal=False,
  )


def _finest(n: int, rank: int) -> int:
  """The largest power of two up to 64 that divides n in pieces of `rank`."""
  fitting = (
    2**power
    for power in range(6, -1, -1)
    if n % 2**power == 0 and n // 2**power >= rank
  )
  return next(fitting, 1)


def _pieces(granularity: float) -> tuple[int, int]:
  """Pieces that a row is split into, and rows that are joined."""
  if 0 < granularity < math.inf:
    split = max(round(granularity), 1)
    join = max(round(1 / granularity), 1)
    if math.isclose(split / join, granularity):
      return split, join
  raise ValueError(
    'granularity must be a positive integer or one over an integer, such as 4 '
    f'or 1/4, got {granularity}.'
  )


def _key(seed: jax.Array | int) -> jax.Array:
  """The generator; named, since others draw differently under a vmap."""
  return jax.random.key(seed, impl='threefry2x32')


def next_seed(seed: jax.Array, count: jax.Array) -> jax.Array:
  """The seed that follows `seed` after `count` updates, uint32 ``[*]``."""

  def follow(seed: jax.Array) -> jax.Array:
    key = jax.random.fold_in(_key(seed), count)
    return jax.random.bits(key, (), jnp.uint32)

  return jax.vmap(follow)(seed.ravel()).reshape(seed.shape)


def normal_matrix(seed: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Independent standard normal entries, float32."""
  return jax.random.normal(_key(seed), shape, jnp.float32)


def sign_matrix(seed: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Independent signs, float32, each from one bit of a random word."""
  size = math.prod(shape)
  words = jax.random.bits(_key(seed), (-(-size // 32),), jnp.uint32)
  bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
  return 2 * bits.ravel()[:size].reshape(shape).astype(jnp.float32) - 1


def no_transport(*_: object) -> NoReturn:
  """Coordinates do not move: two random bases have nothing in common."""
  raise ValueError(
    'Moments cannot be rotated from one random basis to the next: the two are '
    'independent, and the product of their matrices is no rotation. Use '
    "moments_on_refresh='keep', as published, or 'reset'."
  )
