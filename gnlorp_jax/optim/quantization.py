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
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gnlorp_jax.optim.checks import check_choice
from gnlorp_jax.optim.stochastic_rounding import random_words

Kind = Literal['dynamic', 'linear', 'affine']

_TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Codec:
  """How the elements of a block become codes; see the functions below."""

  kind: Kind
  bits: int  # per element, 8 or 4
  signed: bool
  block: int | None  # elements per block; None: a row of the last axis
  floor: bool = False  # no positive element becomes 0

  def __post_init__(self) -> None:
    check_choice('kind', self.kind, get_args(Kind))
    if self.bits not in (8, 4):
      raise ValueError(f'bits must be 8 or 4, got {self.bits!r}.')
    if self.block is not None and self.block < 1:
      raise ValueError(
        f'block must be at least 1, or None for rows, got {self.block}.'
      )


def dynamic(
  bits: int = 8, *, signed: bool, block: int = 256, floor: bool = False
) -> Codec:
  r"""The code whose relative precision falls with the size of the element.

  Elements are divided by the largest absolute value of their block. There are
  ``bits - 1`` decades, the highest of which ends at 1; decade :math:`i` of
  :math:`D`, counted from 0, is cut in :math:`n = 2^i` (signed) or
  :math:`2^{i+1}` cells whose centres are the values

  .. math:: 10^{i - D + 1} (0.1 + 0.9 (j + 1/2) / n), \qquad 0 \le j < n,

  and 0 and 1 complete them. Codes number the values in ascending order.

  Args:
    bits: 8, or 4: then the values are 0, 1 and, with both signs, 0.0055,
      0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875.
    signed: Whether elements may be negative; -1 itself is no value.
    block: Elements that share a scale.
    floor: Rounds positive elements up to the first positive value, where the
      nearest is 0; of an unsigned code.

  Returns:
    The codec.

  Raises:
    ValueError: If `bits` is neither 8 nor 4, or `block` below 1.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization`, 2021,
    arXiv:2110.02861; the values are bitsandbytes'.

  Note:
    An element takes the nearest value, by closed form. The CUDA kernels of
    bitsandbytes moreover push a negative element off 0 to the first negative
    value. Its CPU kernel reads the code from a table of 65536 entries over
    [-1, 1], which is coarser than the three lowest decades.
  """
  return Codec('dynamic', bits, signed, block, floor)


def linear(bits: int = 4, *, block: int = 128) -> Codec:
  r"""The unsigned code without zero, :math:`i / 2^b` for i = 1, ..., 2^b.

  Elements, at least 0, are divided by the largest of their block. It is meant
  for second moments: with few bits most of them would become 0 in a code that
  has a zero, and the step divided by their root explodes. Here they are
  overestimated, which shortens the step. All zeros stay zeros.

  Args:
    bits: :math:`b`, 8 or 4.
    block: Elements that share a scale.

  Returns:
    The codec.

  Raises:
    ValueError: If `bits` is neither 8 nor 4, or `block` below 1.

  References:
    Li et al., `Memory Efficient Optimizers with 4-bit States`, 2023,
    arXiv:2309.01507, on the zero of second moments.
  """
  return Codec('linear', bits, False, block)


def affine(bits: int, *, block: int | None = 256) -> Codec:
  r"""The code of evenly spaced values between a block's extremes.

  With :math:`q_{max} = 2^b - 1`,

  .. math::
    s = (\max - \min) / q_{max}, \quad z = -\mathrm{round}(\min / s), \quad
    q = \mathrm{clip}(\mathrm{round}(x / s) + z, 0, q_{max}), \quad
    x' = (q - z) s

  so that 0 is a value wherever it lies inside the range.

  Args:
    bits: :math:`b`, 8 or 4.
    block: Elements that share scale and zero; None for one block per row of
      the last axis.

  Returns:
    The codec.

  Raises:
    ValueError: If `bits` is neither 8 nor 4, or `block` below 1.

  References:
    Zhang et al., `Q-GaLore`, 2024, arXiv:2407.08296.

  Note:
    Public code clips z to :math:`[0, q_{max}]`, so that a block on one side of
    0 loses range; here z may be any integer. It also keeps ``max - min`` at
    1e-5 or more; here blocks of any size keep their precision, and a constant
    block is exact.
  """
  return Codec('affine', bits, True, block)


class _Piece(NamedTuple):
  """Values ``centre + step * (number - first)`` of a `dynamic` code.

  Numbers count the values away from zero, which has the number 0.
  """

  border: float  # Below it the values of an earlier piece are nearer.
  first: int
  last: int
  centre: float
  step: float


def _pieces(codec: Codec) -> list[_Piece]:
  """Zero, the decades and one of a `dynamic` codec, ascending."""
  pieces = [_Piece(border=-1.0, first=0, last=0, centre=0.0, step=1.0)]
  for i in range(codec.bits - 1):
    cells = 2**i if codec.signed else 2 ** (i + 1)
    end = 10.0 ** (i - codec.bits + 2)
    first = pieces[-1].last + 1
    below = pieces[-1].centre + pieces[-1].step * (first - 1 - pieces[-1].first)
    centre = end * (0.1 + 0.45 / cells)
    pieces.append(
      _Piece(
        border=(below + centre) / 2,
        first=first,
        last=first + cells - 1,
        centre=centre,
        step=end * 0.9 / cells,
      )
    )
  below = 1 - pieces[-1].step / 2
  one = pieces[-1].last + 1
  pieces.append(_Piece((below + 1) / 2, one, one, centre=1.0, step=1.0))
  return pieces


def _encode_dynamic(x: jax.Array, codec: Codec) -> jax.Array:
  """Codes of elements in [-1, 1], uint8; no table is searched."""
  pieces = _pieces(codec)
  size = jnp.abs(x)
  slope, shift, last = [jnp.zeros_like(size)] * 3
  for piece in pieces[1:]:
    above = size > piece.border
    slope = jnp.where(above, 1 / piece.step, slope)
    shift = jnp.where(
      above, piece.first + 0.5 - piece.centre / piece.step, shift
    )
    last = jnp.where(above, piece.last, last)
  # A border may lie beyond the last value's own cell.
  number = jnp.minimum(jnp.floor(size * slope + shift), last)
  if codec.floor:
    number = jnp.maximum(number, (x > 0).astype(number.dtype))
  if codec.signed:
    one = pieces[-1].first
    # -1 is no value.
    number = one - 1 + jnp.where(x < 0, -jnp.minimum(number, one - 1), number)
  return number.astype(jnp.uint8)


def _decode_dynamic(codes: jax.Array, codec: Codec) -> jax.Array:
  """Elements of codes, float32.

  As fast as a table of 256 values, and it fuses with what follows, where the
  entries of a table are written out first.
  """
  pieces = _pieces(codec)
  number = codes.astype(jnp.float32)
  zero = pieces[-1].first - 1 if codec.signed else 0
  number = number - zero
  count = jnp.abs(number)
  first, centre, step = [jnp.zeros_like(count)] * 3
  for piece in pieces[1:]:
    above = count >= piece.first
    first = jnp.where(above, piece.first, first)
    centre = jnp.where(above, piece.centre, centre)
    step = jnp.where(above, piece.step, step)
  size = centre + step * (count - first)
  return jnp.where(number < 0, -size, size)


def _encode(x: jax.Array, codec: Codec) -> jax.Array:
  """Codes of scaled elements, uint8."""
  if codec.kind == 'dynamic':
    return _encode_dynamic(x, codec)
  number = jnp.round(x * 2**codec.bits) - 1
  return jnp.maximum(number, 0).astype(jnp.uint8)


def _decode(codes: jax.Array, codec: Codec) -> jax.Array:
  """Scaled elements of codes, float32."""
  if codec.kind == 'dynamic':
    return _decode_dynamic(codes, codec)
  return (codes.astype(jnp.float32) + 1) / 2**codec.bits


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['codes', 'scale', 'zero'],
  meta_fields=['codec', 'shape'],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
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
    codes_KB = _encode(x_KB * (1 / jnp.maximum(scale_K1, _TINY)), codec)
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
    x_KB = _decode(codes_KB, q.codec) * scale_K1
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
