"""Keeps the bases of any projection in fewer bits."""

from typing import Any

import jax
import jax.numpy as jnp

from gnlorp_jax.optim.parts.checks import check_static
from gnlorp_jax.optim.projections.base import Basis, Projection, Tracked
from gnlorp_jax.optim.projections.base import transport as transport_between
from gnlorp_jax.optim.quantized.arrays import (
  QuantizedArray,
  dequantize,
  quantize,
)
from gnlorp_jax.optim.quantized.codecs import affine


def quantize_basis(projection: Projection, bits: int) -> Projection:
  """Stores the floating-point arrays of a basis in 16, 8 or 4 bits.

  They are decoded wherever the projection needs them. With 8 and 4 bits they
  take `codecs.affine` codes, in blocks of 256. The columns are then orthonormal
  to about three digits with 8 bits, to one with 4. What a basis remembers stays
  float32.

  Args:
    projection: Any projection that keeps floating-point bases.
    bits: 32, which changes nothing, 16 (bfloat16), 8 or 4.

  Returns:
    The projection with the smaller basis.

  Raises:
    ValueError: If `bits` is something else; at `init`, if the basis holds no
      floating-point array.

  Examples:
    >>> from gnlorp_jax.optim import projections
    >>> svd = quantize_basis(projections.get('svd'), bits=4)
    >>> svd.init((3, 512, 256), 64, 0).codes.shape
    (3, 256, 32)

  References:
    Zhang et al., `Q-GaLore`, 2024, arXiv:2407.08296, section 3.3.

  Note:
    Public code of Q-GaLore keeps one 4-bit value in a byte; here two. Blocks
    run along the rows of ``[n, r]``; there, where the basis is on the right of
    a PyTorch gradient, along those of ``[r, n]``.
  """
  check_static('basis_bits', bits)
  if bits not in (32, 16, 8, 4):
    raise ValueError(f'basis_bits must be 32, 16, 8 or 4, got {bits!r}.')
  if bits == 32:
    return projection

  def encode(basis: Basis) -> Basis:
    if isinstance(basis, Tracked):
      return basis._replace(columns_NR=encode(basis.columns_NR))

    def store(x: jax.Array) -> Any:
      if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
      if bits == 16:
        return x.astype(jnp.bfloat16)
      return quantize(x, affine(bits))

    return jax.tree.map(store, basis)

  def decode(basis: Basis) -> Basis:
    def load(x: Any) -> jax.Array:
      if isinstance(x, QuantizedArray):
        return dequantize(x)
      return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    return jax.tree.map(
      load, basis, is_leaf=lambda x: isinstance(x, QuantizedArray)
    )

  def init(shape: tuple[int, ...], rank: int, seed: int) -> Basis:
    basis = projection.init(shape, rank, seed)
    dtypes = [x.dtype for x in jax.tree.leaves(basis)]
    if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
      raise ValueError(
        f'basis_bits={bits} has nothing to quantise: this projection keeps '
        f'{[str(dtype) for dtype in dtypes]}. Use basis_bits=32.'
      )
    return encode(basis)

  def refresh(grad_MN: jax.Array, basis: Basis, count: jax.Array) -> Basis:
    return encode(projection.refresh(grad_MN, decode(basis), count))

  def project(grad_MN: jax.Array, basis: Basis) -> jax.Array:
    return projection.project(grad_MN, decode(basis))

  def project_back(low_MR: jax.Array, basis: Basis) -> jax.Array:
    return projection.project_back(low_MR, decode(basis))

  def transport(
    low_MR: jax.Array, old: Basis, new: Basis, power: int
  ) -> jax.Array:
    return transport_between(
      projection, low_MR, decode(old), decode(new), power
    )

  def remember(low_MR: jax.Array, basis: Basis) -> Basis:
    assert projection.remember is not None
    # Small steps of an average would be lost in few bits.
    new = projection.remember(low_MR, decode(basis))
    return new._replace(columns_NR=basis.columns_NR)

  def turn(old: Basis, new: Basis) -> jax.Array:
    assert projection.turn is not None
    return projection.turn(decode(old), decode(new))

  return Projection(
    init,
    refresh,
    project,
    project_back,
    transport,
    turn if projection.turn is not None else None,
    remember if projection.remember is not None else None,
    projection.is_orthonormal,
  )
