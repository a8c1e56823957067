"""Codes of 8 or 4 bits: which numbers a block of an array can hold."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gnlorp_jax.optim.parts.checks import check_choice

Kind = Literal['dynamic', 'linear', 'affine', 'nf4']


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
  ``bits - 1`` decades, the highest of which ends at 1; decade ``i`` of
  ``D``, counted from 0, is cut in ``n = 2^i`` (signed) or
  ``2^{i+1}`` cells whose centres are the values

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
  """The unsigned code without zero, ``i / 2^b`` for i = 1, ..., 2^b.

  Elements, at least 0, are divided by the largest of their block. It is meant
  for second moments: with few bits most of them would become 0 in a code that
  has a zero, and the step divided by their root explodes. Here they are
  overestimated, which shortens the step. All zeros stay zeros.

  Args:
    bits: ``b``, 8 or 4.
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

  With ``q_max = 2^b - 1``,

  .. math::
    s = (\max - \min) / q_{max}, \quad z = -\mathrm{round}(\min / s), \quad
    q = \mathrm{clip}(\mathrm{round}(x / s) + z, 0, q_{max}), \quad
    x' = (q - z) s

  so that 0 is a value wherever it lies inside the range.

  Args:
    bits: ``b``, 8 or 4.
    block: Elements that share scale and zero; None for one block per row of
      the last axis.

  Returns:
    The codec.

  Raises:
    ValueError: If `bits` is neither 8 nor 4, or `block` below 1.

  References:
    Zhang et al., `Q-GaLore`, 2024, arXiv:2407.08296.

  Note:
    Public code clips z to ``[0, q_max]``, so that a block on one side of
    0 loses range; here z may be any integer. It also keeps ``max - min`` at
    1e-5 or more; here blocks of any size keep their precision, and a constant
    block is exact.
  """
  return Codec('affine', bits, True, block)


def nf4(*, block: int = 64) -> Codec:
  """The code of 16 values that normal numbers take about equally often.

  Elements are divided by the largest absolute value of their block and take the
  nearest value, of two that are equally near the lower one. It is meant for
  weights that stay as they are.

  Args:
    block: Elements that share a scale.

  Returns:
    The codec.

  Raises:
    ValueError: If `block` is below 1.

  References:
    Dettmers et al., `QLoRA`, 2023, arXiv:2305.14314; the values are those of
    bitsandbytes.

  Note:
    Codes, scales and values are those of bitsandbytes on a CPU, bit by bit,
    where blocks are whole: of a short last block it takes another quotient. It
    puts the first of two codes into a byte's high bits, here it is in the low
    ones.
  """
  return Codec('nf4', 4, True, block)


_NF4 = np.array(
  [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
  ],
  np.float32,
)


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


def _encode_nf4(x: jax.Array) -> jax.Array:
  """Codes of elements in [-1, 1]: how many borders lie below."""
  borders = (_NF4[1:] + _NF4[:-1]) / 2
  number = jnp.zeros(x.shape, jnp.uint8)
  for border in borders:
    number += (x > border).astype(jnp.uint8)
  return number


def _decode_nf4(codes: jax.Array) -> jax.Array:
  """Elements of codes, float32: selected bit by bit, for which see above."""
  # As words: a number to select would become an array of as many, and JAX moves
  # such constants out of a loop over layers, where they stay for all of it.
  values: list[Any] = list(_NF4.view(np.uint32))
  for bit in range(4):
    mask = -((codes >> bit) & 1).astype(jnp.uint32)
    pairs = zip(values[::2], values[1::2], strict=True)
    values = [even ^ (mask & (even ^ odd)) for even, odd in pairs]
  return jax.lax.bitcast_convert_type(values[0], jnp.float32)


def encode(x: jax.Array, codec: Codec) -> jax.Array:
  """Codes of scaled elements, uint8."""
  if codec.kind == 'dynamic':
    return _encode_dynamic(x, codec)
  if codec.kind == 'nf4':
    return _encode_nf4(x)
  number = jnp.round(x * 2**codec.bits) - 1
  return jnp.maximum(number, 0).astype(jnp.uint8)


def decode(codes: jax.Array, codec: Codec) -> jax.Array:
  """Scaled elements of codes, float32."""
  if codec.kind == 'dynamic':
    return _decode_dynamic(codes, codec)
  if codec.kind == 'nf4':
    return _decode_nf4(codes)
  return (codes.astype(jnp.float32) + 1) / 2**codec.bits
