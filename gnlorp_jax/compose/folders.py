"""Weights from and to Hugging Face folders, also those kept in few bits.

Hugging Face's files hold the values that 8-bit weights stand for. Beside them
lie the scales and zeros of their blocks: values alone do not tell a block's
grid, and on another grid the weights would be rounded again.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from gnlorp_jax import optim
from gnlorp_jax.models import adapters, hf_tensors
from gnlorp_jax.models.on_host import is_writer, to_host
from gnlorp_jax.optim.quantized.arrays import (
  QuantizedArray,
  dequantize,
  quantize,
  quantize_onto,
)

GRID_FILE = 'grid_8bit.safetensors'


def is_quantized(node: Any) -> bool:
  """Whether a node of a tree of parameters is kept in codes."""
  return isinstance(node, QuantizedArray)


def keeper(
  folder: str, weight_bits: int | None
) -> Callable[[str, jax.Array], Any]:
  """What becomes of each weight that is read from a folder.

  A kernel is quantised as soon as it is read: beside the result there is one
  stacked kernel in full precision at a time, on the host and on the devices.

  Args:
    folder: A Hugging Face folder of a model.
    weight_bits: 8 or 4 quantises the kernels of the blocks; None keeps all as
      it is.

  Returns:
    A function (path, array), as `hf.load_params` takes it. Quantised kernels
    that `export` wrote in float32 get the bits they had; of those written in
    bfloat16 see `quantize_onto`.

  Raises:
    ValueError: If the file of scales is damaged; the function raises it too, if
      these are not of the weights that are read.
  """
  if weight_bits is None:
    return lambda path, array: array
  codec = optim.quantized_weights.CODECS[weight_bits]
  # Only evenly spaced values have a grid; the others are found without.
  is_even = codec.kind == 'affine'
  grid = _read_grid(pathlib.Path(folder) / GRID_FILE) if is_even else {}

  def keep(path: str, array: jax.Array) -> Any:
    if not (path.startswith('layers/') and path.endswith('/kernel')):
      return array
    scale, zero = (grid.get(f'{path}/{part}') for part in ('scale', 'zero'))
    if scale is None or zero is None:
      kept = _nearest(array, codec=codec)
    else:
      wanted = _nearest.eval_shape(array, codec=codec).scale.shape
      if not scale.shape == zero.shape == wanted:
        raise ValueError(
          f'{path} has scales {scale.shape} and zeros {zero.shape} in '
          f'{pathlib.Path(folder) / GRID_FILE}, and {wanted} blocks. If the '
          'weights beside it are of another run, remove this file.'
        )
      kept = _onto(array, scale=scale, zero=zero)
    # Before the next kernel takes its room.
    return jax.block_until_ready(kept)

  return keep


# Compiled once for all the runs of a comparison.
_nearest = jax.jit(
  functools.partial(quantize, matrix_axes=2), static_argnames='codec'
)
_onto = jax.jit(
  functools.partial(quantize_onto, codec=optim.quantized_weights.CODEC)
)


def _read_grid(path: pathlib.Path) -> dict[str, np.ndarray]:
  if not path.is_file():
    return {}
  try:
    return safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f'Cannot read {path}: {error}') from error


@dataclasses.dataclass(frozen=True)
class LayerByLayer:
  """A stack of kernels of which each layer is worked out when asked for."""

  stored: Any  # An array or a `QuantizedArray`, [L, in, out].
  arrays: dict[str, jax.Array]  # Of the adapter beside it; empty without.
  adapter: adapters.AdapterConfig | None
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the whole stack."""
    if is_quantized(self.stored):
      return (*self.stored.codes.shape[:-2], *self.stored.shape)
    return self.stored.shape

  def __getitem__(self, layer: int) -> jax.Array:
    """The kernel of a layer, its adapter folded in."""
    kernel, arrays = jax.tree.map(
      lambda x: x[layer], (self.stored, self.arrays)
    )
    if is_quantized(kernel):
      kernel = dequantize(kernel)
    kernel = kernel.astype(self.dtype)
    if not arrays:
      return kernel
    merged = adapters.merge(
      self.adapter, {'layer': {'kernel': kernel} | arrays}
    )
    return merged['layer']['kernel']


def merged(
  params: Any, adapter: adapters.AdapterConfig | None, dtype: str
) -> Any:
  """A model's parameters without codes and adapters, for `export`.

  Args:
    params: The parameters as they are stored, adapters among them.
    adapter: The configuration of the adapters; None if there are none.
    dtype: Of the kernels, float32 or bfloat16.

  Returns:
    A tree of arrays. A stack of kernels that is kept in codes, or that has
    adapters, is a `LayerByLayer`: no such stack exists whole.
  """
  flat = traverse_util.flatten_dict(params)
  beside: dict[tuple[str, ...], dict[str, Any]] = {}
  for (*layer, name), leaf in flat.items():
    if adapter is not None and name in adapters.NAMES:
      beside.setdefault(tuple(layer), {})[name] = leaf
  found = {}
  for path, leaf in flat.items():
    arrays = beside.get(path[:-1], {})
    if path[-1] in arrays:
      continue
    if path[-1] != 'kernel' or not (arrays or is_quantized(leaf)):
      found[path] = leaf
      continue
    kernel = LayerByLayer(leaf, arrays, adapter, jnp.dtype(dtype))
    if len(kernel.shape) == 2:  # Not stacked.
      stack = jax.tree.map(lambda x: x[None], (leaf, arrays))
      kernel = LayerByLayer(*stack, adapter, jnp.dtype(dtype))[0]
    found[path] = kernel
  return traverse_util.unflatten_dict(found)


def export(
  folder: pathlib.Path,
  params: Any,
  write: Callable[[pathlib.Path, Any], None],
) -> None:
  """Writes a Hugging Face folder.

  All processes that hold parts of the parameters must ask; process 0 writes.

  Args:
    folder: The folder, which is absent or empty.
    params: What `merged` returned.
    write: Writes a folder of parameters, such as `hf.export` with its table.
  """
  write(folder, params)
  grid = {
    f'{"/".join(path)}/{part}': to_host(getattr(leaf.stored, part))
    for path, leaf in traverse_util.flatten_dict(params).items()
    if isinstance(leaf, LayerByLayer)
    and is_quantized(leaf.stored)
    and leaf.stored.zero is not None
    and not leaf.arrays
    for part in ('scale', 'zero')
  }
  if grid and is_writer():
    hf_tensors.save(folder / GRID_FILE, grid)
