"""Columns of the discrete cosine transform that align with the gradient.

With ``C_ij = sqrt(2/n) cos(pi i (2j + 1) / 2n)``, its row 0 divided by
``sqrt(2)``, C is orthogonal. The basis is a choice of r columns of C or of
its transpose, so that only their numbers are stored; the columns are computed
where they are needed, and a fast transform scores all n of them.

Shape suffixes in this file:
  M, N  the two axes of a gradient; the basis lives on N
  R     rank of the subspace, R <= min(M, N)
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from gnlorp_jax.optim.parts.checks import check_choice, check_static
from gnlorp_jax.optim.parts.flax_serialization import FlaxSerializable
from gnlorp_jax.optim.projections import svd
from gnlorp_jax.optim.projections.base import Projection

Transform = Literal['dct2', 'dct3']

# The angles are exact while i (2j + 1) < 2^32.
_LARGEST = 46340
# Up to this length a product is as good as a fast transform.
_SHORT = 256


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['indices_R'],
  meta_fields=['n'],
)
@dataclasses.dataclass(frozen=True)
class Columns(FlaxSerializable):
  """A choice of columns of an n x n transform."""

  indices_R: jax.Array  # int32 [*, r], ascending
  n: int


def dct(transform: Transform = 'dct2', *, norm: int = 1) -> Projection:
  """Projects on the columns of a cosine transform with the largest norms.

  No factorisation: the scores are the norms of the gradient's transform, in
  O(n log n) per row. With ``norm=2`` the choice is the best of its kind: no
  other r columns capture more of the gradient's energy.

  Args:
    transform: ``dct2``, whose coordinates are the DCT-II of the gradient's
      rows, or ``dct3``, the inverse transform's (published as ``makhoul`` and
      ``matmul``: they select from different bases).
    norm: 1 or 2: the norm over the rows by which columns are scored.

  Returns:
    The projection; its basis holds r column numbers, int32.

  Raises:
    ValueError: If an argument is unknown; at `init`, if the axis is longer than
      46340.

  References:
    Modoranu et al., `FFT-based Dynamic Subspace Selection`, 2025,
    arXiv:2505.17967, section 3.

  Note:
    Published code keeps the n x n matrix and leaves the chosen columns
    unsorted; here they ascend, and their r columns are computed on the fly.
  """
  check_choice('transform', transform, get_args(Transform))
  check_static('norm', norm)
  if norm not in (1, 2):
    raise ValueError(f'norm must be 1 or 2, got {norm!r}.')

  def init(shape: tuple[int, ...], rank: int, seed: int = 0) -> Columns:
    del seed
    *stack, _, n = shape
    if n > _LARGEST:
      raise ValueError(
        f'An axis of length {n} is too long for the exact angles of dct: at '
        f'most {_LARGEST}. Use another projection or side for it.'
      )
    # The lowest frequencies, until a gradient was seen.
    indices_R = jnp.arange(rank, dtype=jnp.int32)
    return Columns(jnp.broadcast_to(indices_R, (*stack, rank)), n)

  def refresh(grad_MN: jax.Array, basis: Columns, count: jax.Array) -> Columns:
    del count
    scores_N = jnp.sum(jnp.abs(transformed(grad_MN, transform)) ** norm, -2)
    rank = basis.indices_R.shape[-1]
    _, indices_R = jax.lax.top_k(scores_N, rank)
    return Columns(jnp.sort(indices_R, axis=-1), basis.n)

  def project(grad_MN: jax.Array, basis: Columns) -> jax.Array:
    return svd.project(grad_MN, columns(basis, transform))

  def project_back(low_MR: jax.Array, basis: Columns) -> jax.Array:
    return svd.project_back(low_MR, columns(basis, transform))

  return Projection(init, refresh, project, project_back, select)


def transformed(grad_MN: jax.Array, transform: Transform) -> jax.Array:
  """The gradient times the whole n x n transform, float32.

  By FFT where n is large. XLA divides an FFT over d devices where the axis is
  divided so, and aborts where n is about d^2 or less.
  """
  n = grad_MN.shape[-1]
  if n <= _SHORT:
    all_N = jnp.arange(n, dtype=jnp.int32)
    return jnp.matmul(
      grad_MN.astype(jnp.float32),
      columns(Columns(all_N, n), transform),
      precision=jax.lax.Precision.HIGHEST,
    )
  fft = {'dct2': jax.scipy.fft.dct, 'dct3': jax.scipy.fft.idct}[transform]
  return fft(grad_MN.astype(jnp.float32), axis=-1, norm='ortho')


def columns(basis: Columns, transform: Transform) -> jax.Array:
  """The chosen columns of the transform, ``[*, n, r]``, float32."""
  n = basis.n
  chosen_1R = basis.indices_R.astype(jnp.uint32)[..., None, :]
  along_N1 = jnp.arange(n, dtype=jnp.uint32).reshape(
    *[1] * (chosen_1R.ndim - 2), n, 1
  )
  frequency, place = {
    'dct2': (chosen_1R, along_N1),
    'dct3': (along_N1, chosen_1R),
  }[transform]
  # Whole turns are taken off in integers: float32 would lose the angle.
  angle_NR = (frequency * (2 * place + 1) % (4 * n)).astype(jnp.float32)
  length = jnp.where(
    frequency == 0, jnp.sqrt(jnp.float32(1 / n)), jnp.sqrt(jnp.float32(2 / n))
  )
  return length * jnp.cos(angle_NR * (jnp.pi / (2 * n)))


def select(
  low_MR: jax.Array, old: Columns, new: Columns, power: int = 1
) -> jax.Array:
  """Coordinates of columns that stay; zero for those that are new.

  Bases of one orthogonal matrix turn into each other by a 0/1 matrix, which is
  its own square, element by element: `power` makes no difference.
  """
  del power
  same_RR = new.indices_R[..., :, None] == old.indices_R[..., None, :]
  source_1R = jnp.argmax(same_RR, axis=-1)[..., None, :]
  stays_1R = jnp.any(same_RR, axis=-1)[..., None, :]
  index_MR = jnp.broadcast_to(source_1R, low_MR.shape)
  return jnp.where(stays_1R, jnp.take_along_axis(low_MR, index_MR, axis=-1), 0)
