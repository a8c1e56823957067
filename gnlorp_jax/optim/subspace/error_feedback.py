"""Remembers what a projection lost of a gradient, for the next step.

Shape suffixes in this file:
  IO    a kernel's input and output axes, the last two of its array
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.checks import check_static
from gnlorp_jax.optim.projections.base import Projection
from gnlorp_jax.optim.quantized.arrays import (
  QuantizedArray,
  dequantize,
  quantize,
)
from gnlorp_jax.optim.quantized.codecs import affine


def check_error_bits(bits: int | None) -> None:
  """Raises a `ValueError` unless `bits` is None, 32, 8 or 4."""
  if bits is None:
    return
  check_static('error_bits', bits)
  if bits not in (32, 8, 4):
    raise ValueError(
      f'error_bits must be None (no error feedback), 32, 8 or 4, got {bits!r}.'
    )


def check_error_feedback(bits: int | None, projection: Projection) -> None:
  """As `check_error_bits`; also if errors of a projection could grow."""
  check_error_bits(bits)
  if bits is not None and not projection.is_orthonormal:
    raise ValueError(
      f'error_bits={bits} would feed back what this projection leaves out, '
      'which may be longer than the gradient and then grows without end: its '
      'bases are not orthonormal. Use error_bits=None, or a projection whose '
      "bases are, such as 'svd' or 'dct'."
    )


def encode_error(error_IO: jax.Array, bits: int) -> Any:
  """An error ``[*, in, out]`` as it is stored.

  Args:
    error_IO: What is left of a gradient, any floating dtype.
    bits: 32 keeps it in float32; 8 and 4 take evenly spaced codes between the
      extremes of every output unit.

  Returns:
    An array, or a `QuantizedArray` of its transpose, whose rows are units.

  Note:
    The public code of DCT-AdamW decodes 4-bit errors in another order than it
    encodes them, and its 8-bit code has 16 levels; here both are right. A unit
    whose entries are all equal divides by zero there.
  """
  error_IO = error_IO.astype(jnp.float32)
  if bits == 32:
    return error_IO
  return quantize(error_IO.mT, affine(bits, block=None))


def decode_error(error: Any) -> jax.Array:
  """The error ``[*, in, out]``, float32, that `encode_error` stored."""
  if isinstance(error, QuantizedArray):
    return dequantize(error).mT
  return error


def zero_errors(params: optax.Params, bits: int | None) -> Any:
  """Errors of zero for every parameter, or None where `bits` is None."""
  if bits is None:
    return None
  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  # Behind the barrier: XLA would spend seconds on folding constant codes.
  zeros = jax.lax.optimization_barrier(zeros)  # type: ignore[no-untyped-call]
  return jax.tree.map(lambda zero: encode_error(zero, bits), zeros)
