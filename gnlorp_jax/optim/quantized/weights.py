"""Keeps the kernels of a model in few bits while it trains, or adapters do.

A kernel of few bits cannot hold a small update: rounded to nearest, most are
lost. Rounded at random, with the probability of the remainder, none is lost on
average.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.optim.quantized.arrays import (
  QuantizedArray,
  dequantize,
  quantize,
  requantize,
)
from gnlorp_jax.optim.quantized.codecs import Codec, affine, nf4

CODEC: Codec = affine(8, block=256)
CODECS: dict[int, Codec] = {8: CODEC, 4: nf4()}
"""Codec by number of bits. NF4 (4 bits) cannot be rounded stochastically, so it
is for kernels that stay as they are."""


def _is_quantized(node: Any) -> bool:
  return isinstance(node, QuantizedArray)


def quantize_weights(params: Any, codec: Codec = CODEC) -> Any:
  """Parameters with their kernels quantised to nearest.

  Args:
    params: Pytree of arrays. Those named ``kernel`` are stacks ``[*, in, out]``
      and are quantised, each matrix by itself; others stay.
    codec: How.

  Returns:
    The same tree with a `QuantizedArray` for each kernel.

  Raises:
    ValueError: If a kernel is no floating array, or is no stack of matrices.

  Examples:
    >>> params = {'kernel': jnp.ones((3, 16, 32)), 'bias': jnp.ones((3, 32))}
    >>> quantize_weights(params)['kernel'].scale.shape
    (3, 2)

  References:
    Zhang et al., `Q-GaLore`, 2024, arXiv:2407.08296, section 3.4.
  """

  def encode(path: Any, leaf: jax.Array) -> Any:
    name = path_name(path)
    if name.split('/')[-1] != 'kernel':
      return leaf
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(
        f'{name!r} has dtype {leaf.dtype}: only floating kernels are '
        'quantised. Cast it, or give those that are already quantised to '
        'requantize_weights.'
      )
    return quantize(leaf, codec, matrix_axes=2)

  return jax.tree_util.tree_map_with_path(encode, params)


def dequantize_weights(params: Any, dtype: jax.typing.DTypeLike) -> Any:
  """Parameters with their quantised kernels as arrays of `dtype`.

  Args:
    params: What `quantize_weights` returned, or a slice of it over the leading
      axes.
    dtype: A floating dtype; what is not quantised keeps its own.

  Returns:
    A tree of arrays.
  """
  return jax.tree.map(
    lambda node: (
      dequantize(node).astype(dtype) if _is_quantized(node) else node
    ),
    params,
    is_leaf=_is_quantized,
  )


def requantize_weights(new: Any, old: Any, key: jax.Array | None) -> Any:
  """Quantises new values as the old ones are, stochastically.

  Args:
    new: Arrays, float32.
    old: The tree to be replaced; where it holds plain arrays the new values
      are cast to their dtypes.
    key: A PRNG key, of which every kernel gets its own by its path; None rounds
      to nearest.

  Returns:
    A tree like `old`. A kernel that did not move, such as a frozen one, keeps
    its codes.

  References:
    Zhang et al., `Q-GaLore`, 2024, arXiv:2407.08296, section 3.4.

  Note:
    The public code of Q-GaLore takes scale and zero of a block from the new
    values too. A value that met a code exactly is then no longer on the grid
    when its block's extremes have moved; stochastic rounding keeps its mean.
  """

  def encode(path: Any, value: jax.Array, before: Any) -> Any:
    if not _is_quantized(before):
      return value.astype(before.dtype)
    own = None
    if key is not None:
      own = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
    return requantize(value, before, key=own)

  return jax.tree_util.tree_map_with_path(encode, new, old)
