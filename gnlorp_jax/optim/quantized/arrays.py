r"""Arrays in 8 or 4 bits per element, quantised block by block.

Shape suffixes in this file:
  X     an array's own axes, ``[*, m, n]`` or ``[*, d]``; the leading ones stack
        matrices, and each matrix is quantised by itself
  KB    K blocks of B neighbours of a flattened matrix, ``[*, K, B]``
  K1    one value per block, ``[*, K, 1]``
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from gnlorp_jax.optim.parts.flax_serialization import FlaxSerializable
from gnlorp_jax.optim.parts.random_bits import random_words
from gnlorp_jax.optim.quantized.codecs import Codec, decode, encode

_TINY = float(np.finfo(np.float32).tiny)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['codes', 'scale', 'zero'],
  meta_fields=['codec', 'shape'],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray(FlaxSerializable):
  """A stack of quantised matrices (or vectors).

  Its arrays share the leading axes: the same slice of each is the slice of the
  stack.
  """

  codes: jax.Array  # uint8 [*, m, n]; of 4 bits two in a byte, [*, m, ceil n/2]
  scale: jax.Array  # float32 [*, blocks]
  zero: jax.Array | None  # float32 [*, blocks], of an `affine` codec
  codec: Codec
  shape: tuple[int, ...]  # (m, n) of a matrix or (d,) of a vector


def quantize(
  x: jax.Array,
  codec: Codec,
  *,
  matrix_axes: int | None = None,
  key: jax.Array | None = None,
) -> QuantizedArray:
  """Quantises each matrix of a stack.

  A matrix is flattened row by row and cut in blocks, of which the last one may
  be short.

  Args:
    x: Finite array ``[*, m, n]`` or ``[*, d]``, any floating dtype.
    codec: How.
    matrix_axes: Trailing axes that make up a matrix, 1 or 2; None for as many
      of two as there are.
    key: For stochastic rounding, which leaves elements unchanged on average;
      None rounds to nearest. Of `affine` codecs only.

  Returns:
    The quantised stack. It takes 1 or 1/2 byte per element and 4 bytes (8 for
    `affine`) per block. Blocks of zeros are exact.

  Raises:
    ValueError: If `x` has fewer axes than a matrix, or a key comes with another
      codec.

  Note:
    Stochastic rounding may round a block's extremes outwards, where it is
    clipped: their average is off by up to half a step.
  """
  axes = min(x.ndim, 2) if matrix_axes is None else matrix_axes
  if axes not in (1, 2) or x.ndim < axes:
    raise ValueError(
      f'An array of shape {list(x.shape)} holds no matrices of {axes} axes: '
      'matrix_axes must be 1 or 2, and the array have as many.'
    )
  if key is not None and codec.kind != 'affine':
    raise ValueError(
      f"Stochastic rounding is for 'affine' codecs, got {codec.kind!r}. Leave "
      'key out.'
    )
  shape = x.shape[x.ndim - axes :]
  x_KB = _blocks(x.astype(jnp.float32), codec, shape)
  if codec.kind == 'affine':
    codes_KB, scale_K1, zero_K1 = _quantize_affine(x_KB, codec, key)
  else:
    scale_K1, zero_K1 = _largest(x_KB), None
    codes_KB = encode(x_KB * (1 / jnp.maximum(scale_K1, _TINY)), codec)
  return _assemble(codes_KB, scale_K1, zero_K1, codec, shape)


def quantize_onto(
  x: jax.Array, codec: Codec, scale: jax.Array, zero: jax.Array
) -> QuantizedArray:
  """Quantises matrices to nearest, on given values if they lie on these.

  Scale and zero follow from a block's extremes, and the extremes of decoded
  values need not be those that were encoded. Here a block whose elements are
  values of the given scale and zero, or such values rounded to bfloat16, keeps
  scale and zero and gets the codes that they were decoded from (in bfloat16 one
  off at most, and only beyond 128 steps from zero, where a step is less than
  its unit); any other block gets its own scale and zero.

  Args:
    x: Finite array ``[*, m, n]``, any floating dtype.
    codec: How; an `affine` codec.
    scale: float32 ``[*, blocks]``, of the array that may have been decoded.
    zero: The same of its zeros.

  Returns:
    The quantised stack.
  """
  shape = x.shape[-2:]
  x_KB = _blocks(x.astype(jnp.float32), codec, shape)
  own_KB, own_scale_K1, own_zero_K1 = _quantize_affine(x_KB, codec, None)
  scale_K1, zero_K1 = scale[..., None], zero[..., None]
  codes_KB = jnp.clip(
    jnp.round(x_KB / scale_K1) + zero_K1, 0, 2**codec.bits - 1
  )
  value_KB = (codes_KB - zero_K1) * scale_K1
  # Rounding to bfloat16 moves a number by up to 2**-8 of itself.
  near_KB = jnp.abs(x_KB - value_KB) <= 2.0**-8 * jnp.abs(value_KB)
  fits_K1 = jnp.all(near_KB, axis=-1, keepdims=True)
  return _assemble(
    jnp.where(fits_K1, codes_KB.astype(jnp.uint8), own_KB),
    jnp.where(fits_K1, scale_K1, own_scale_K1),
    jnp.where(fits_K1, zero_K1, own_zero_K1),
    codec,
    shape,
  )


def _assemble(
  codes_KB: jax.Array,
  scale_K1: jax.Array,
  zero_K1: jax.Array | None,
  codec: Codec,
  shape: tuple[int, ...],
) -> QuantizedArray:
  """The quantised stack of blocks."""
  codes = _unblock(codes_KB, shape)
  if codec.bits == 4:
    codes = _pack(codes)
  zero = None if zero_K1 is None else zero_K1[..., 0]
  return QuantizedArray(codes, scale_K1[..., 0], zero, codec, shape)


def dequantize(q: QuantizedArray) -> jax.Array:
  """The array that codes stand for.

  Args:
    q: A quantised stack, a slice of one over its leading axes, or the first
      axis of a matrix cut where a block ends, and its blocks with it.

  Returns:
    float32 ``[*, m, n]`` or ``[*, d]``.
  """
  codes = q.codes
  if q.codec.bits == 4:
    codes = _unpack(codes, q.shape[-1])
  shape = codes.shape[codes.ndim - len(q.shape) :]
  codes_KB = _blocks(codes, q.codec, shape)
  scale_K1 = q.scale[..., None]
  if q.zero is None:
    x_KB = decode(codes_KB, q.codec) * scale_K1
  else:
    x_KB = (codes_KB.astype(jnp.float32) - q.zero[..., None]) * scale_K1
  return _unblock(x_KB, shape)


def requantize(
  x: jax.Array, old: QuantizedArray, *, key: jax.Array | None = None
) -> QuantizedArray:
  """Quantises new values as others were; matrices that stay keep their codes.

  Encoding what was decoded need not give the same codes, and with a key another
  grid and other numbers every time.

  Args:
    x: New values, ``[*, m, n]`` or ``[*, d]``.
    old: The stack that they replace.
    key: As in `quantize`.

  Returns:
    The quantised stack; where a matrix is exactly what `old` stands for, the
    part of `old`.
  """
  axes = len(old.shape)
  moved = jnp.any(x != dequantize(old), axis=tuple(range(-axes, 0)))

  def select(new: jax.Array, before: jax.Array) -> jax.Array:
    ones = [1] * (new.ndim - moved.ndim)
    return jnp.where(moved.reshape(*moved.shape, *ones), new, before)

  new = quantize(x, old.codec, matrix_axes=axes, key=key)
  # As leaves: `old` may be cut from a larger matrix, see `dequantize`.
  leaves = map(select, jax.tree.leaves(new), jax.tree.leaves(old))
  return jax.tree.unflatten(jax.tree.structure(new), leaves)


def _largest(x_KB: jax.Array) -> jax.Array:
  """Largest absolute value of each block, ``[*, K, 1]``."""
  return jnp.max(jnp.abs(x_KB), axis=-1, keepdims=True)


def _quantize_affine(
  x_KB: jax.Array, codec: Codec, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Codes uint8 ``[*, K, B]``, scale and zero ``[*, K, 1]``."""
  low_K1 = jnp.min(x_KB, axis=-1, keepdims=True)
  high_K1 = jnp.max(x_KB, axis=-1, keepdims=True)
  most = 2**codec.bits - 1
  # A constant c is one step from 0 if the step is |c|. The product, unlike a
  # quotient, is compiled the same for arrays of any size.
  step_K1 = jnp.where(
    high_K1 > low_K1, (high_K1 - low_K1) * (1 / most), jnp.abs(high_K1)
  )
  scale_K1 = jnp.where(step_K1 >= _TINY, step_K1, 1)
  zero_K1 = -jnp.round(low_K1 / scale_K1)
  y_KB = x_KB / scale_K1
  if key is None:
    y_KB = jnp.round(y_KB)
  else:
    words = jax.random.key_data(key)
    random_KB = random_words((words[0], words[1]), y_KB.shape)
    # The upper 24 bits, as many as a float32 in [0, 1) can tell apart.
    uniform_KB = (random_KB >> 8).astype(jnp.float32) * 2.0**-24
    y_KB = jnp.floor(y_KB + uniform_KB)
  codes_KB = jnp.clip(y_KB + zero_K1, 0, most).astype(jnp.uint8)
  return codes_KB, scale_K1, zero_K1


def _blocks(x: jax.Array, codec: Codec, shape: tuple[int, ...]) -> jax.Array:
  """``[*, K, B]``; a short last block repeats the matrix's last element."""
  stack = x.shape[: x.ndim - len(shape)]
  size = math.prod(shape)
  block = shape[-1] if codec.block is None else min(codec.block, size)
  x = x.reshape(*stack, size)
  if missing := -size % block:
    # No new extremes, so that neither scale nor zero change.
    x = jnp.pad(x, [(0, 0)] * len(stack) + [(0, missing)], mode='edge')
  return x.reshape(*stack, (size + missing) // block, block)


def _unblock(x_KB: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """``[*, m, n]`` or ``[*, d]``, the inverse of `_blocks`."""
  stack = x_KB.shape[:-2]
  size = math.prod(shape)
  return x_KB.reshape(*stack, -1)[..., :size].reshape(*stack, *shape)


def _pack(codes: jax.Array) -> jax.Array:
  """Two neighbours of the last axis in a byte, the first in the low bits."""
  if codes.shape[-1] % 2:
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
  return codes[..., ::2] | (codes[..., 1::2] << 4)


def _unpack(packed: jax.Array, n: int) -> jax.Array:
  """The first n codes of the last axis, the inverse of `_pack`."""
  # This fuses with what follows; two halves stacked would be written out.
  shift = jax.lax.broadcasted_iota(jnp.uint8, (*packed.shape, 2), packed.ndim)
  pairs = (packed[..., None] >> (4 * shift)) & 15
  return pairs.reshape(*packed.shape[:-1], -1)[..., :n]
