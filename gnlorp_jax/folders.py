"""Weights from and to Hugging Face folders, also those kept in 8 bits.

Hugging Face's files hold the values that 8-bit weights stand for. Beside them
lie the scales and zeros of their blocks: values alone do not tell a block's
grid, and on another grid the weights would be rounded again.
"""

import dataclasses
import functools
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from gnlorp_jax import models, optim
from gnlorp_jax.config import TrainConfig
from gnlorp_jax.models import hf
from gnlorp_jax.optim.labels import path_name
from gnlorp_jax.optim.quantization import (
  QuantizedArray,
  dequantize,
  quantize_onto,
)
from gnlorp_jax.training import sharding

GRID_FILE = 'grid_8bit.safetensors'


def load(folder: str, config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
  """Reads a model's weights as a run stores them.

  A kernel is quantised as soon as it is read: beside the result there is one
  stacked kernel in full precision at a time, on the host and on the devices.

  Args:
    folder: A Hugging Face folder of a model.
    config: The run's configuration, with the folder's architecture.
    mesh: The mesh to place the weights on.

  Returns:
    The parameters. Quantised kernels that `export` wrote in float32 have the
    bits they had; of those written in bfloat16 see `quantize_onto`.

  Raises:
    ValueError: As `hf.load_params`, or if the file of scales is damaged.
  """
  family = models.family(config.model)
  shapes = jax.eval_shape(family.make(config.model).init, jax.random.key(0))
  shapes = jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
    shapes,
    sharding.infer_shardings({'params': shapes}, mesh)['params'],
  )
  if config.step.weight_bits is None:
    return hf.load_params(
      folder, family.HF_TENSORS, shapes, unread=family.HF_UNREAD
    )
  codec = optim.quantized_weights.CODEC
  nearest = jax.jit(
    functools.partial(optim.quantization.quantize, codec=codec, matrix_axes=2)
  )
  onto = jax.jit(functools.partial(quantize_onto, codec=codec))
  grid = _read_grid(pathlib.Path(folder) / GRID_FILE)

  def keep(path: str, array: jax.Array) -> Any:
    if not (path.startswith('layers/') and path.endswith('/kernel')):
      return array
    scale, zero = (grid.get(f'{path}/{part}') for part in ('scale', 'zero'))
    if scale is None or zero is None:
      kept = nearest(array)
    else:
      kept = onto(array, scale=scale, zero=zero)
    # Before the next kernel takes its room.
    return jax.block_until_ready(kept)

  return hf.load_params(
    folder, family.HF_TENSORS, shapes, keep, unread=family.HF_UNREAD
  )


def _read_grid(path: pathlib.Path) -> dict[str, np.ndarray]:
  if not path.is_file():
    return {}
  try:
    return safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f'Cannot read {path}: {error}') from error


@dataclasses.dataclass(frozen=True)
class _Decoded:
  """A quantised stack of kernels that decodes the layer that is asked for."""

  stored: QuantizedArray
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return self.stored.codes.shape

  def __getitem__(self, layer: int) -> jax.Array:
    one = jax.tree.map(lambda x: x[layer], self.stored)
    return dequantize(one).astype(self.dtype)


def export(
  folder: pathlib.Path,
  params: Any,
  config: models.Config,
  **token_ids: int,
) -> None:
  """Writes a Hugging Face folder, in place of one that is there.

  Args:
    folder: The folder.
    params: The parameters as they are stored. Quantised kernels are decoded one
      layer at a time, and written in the model's `param_dtype`.
    config: The architecture.
    **token_ids: As `config_to_hf` of the model.
  """

  def is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedArray)

  dtype = np.dtype(jax.numpy.dtype(config.param_dtype))
  decoded = jax.tree.map(
    lambda node: _Decoded(node, dtype) if is_quantized(node) else node,
    params,
    is_leaf=is_quantized,
  )
  shutil.rmtree(folder, ignore_errors=True)
  family = models.family(config)
  hf_config = family.config_to_hf(config, **token_ids)
  hf.export(folder, decoded, family.HF_TENSORS, hf_config)
  grid = {
    f'{path_name(path)}/{part}': np.asarray(getattr(node, part))
    for path, node in jax.tree_util.tree_leaves_with_path(
      params, is_leaf=is_quantized
    )
    if is_quantized(node)
    for part in ('scale', 'zero')
  }
  if grid:
    safetensors.numpy.save_file(grid, folder / GRID_FILE)
