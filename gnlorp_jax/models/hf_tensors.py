"""Checkpoints of Hugging Face as tensors by name, of whatever architecture.

Tensors are read, and written, one at a time: nothing here holds a model.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gnlorp_jax.models import _hf_files

DTYPES = {
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F16': np.dtype(np.float16),
  'F32': np.dtype(np.float32),
  'F64': np.dtype(np.float64),
}
"""Floating dtypes, as a file's header calls them."""
_OTHERS = {'BOOL': 1, 'U8': 1, 'I8': 1, 'I16': 2, 'U16': 2, 'I32': 4, 'U32': 4}
_OTHERS |= {'I64': 8, 'U64': 8}


class Tensor(NamedTuple):
  """A tensor of a checkpoint, without its values.

  Attributes:
    name: Its name.
    shape: Its shape.
    dtype: As a file's header calls it: 'F32', 'BF16', ...
  """

  name: str
  shape: tuple[int, ...]
  dtype: str

  @property
  def is_float(self) -> bool:
    """Whether it holds floating-point numbers."""
    return self.dtype in DTYPES

  @property
  def nbytes(self) -> int:
    """Its size in a file."""
    dtype = DTYPES.get(self.dtype)
    size = _OTHERS[self.dtype] if dtype is None else dtype.itemsize
    return math.prod(self.shape) * size


class Tensors(NamedTuple):
  """What a checkpoint holds.

  Attributes:
    by_name: Its tensors.
    read: Gives the values of a tensor by name, an array that owns its memory.
  """

  by_name: dict[str, Tensor]
  read: Callable[[str], np.ndarray]


def open_tensors(
  folder: str | os.PathLike, stack: contextlib.ExitStack
) -> Tensors:
  """The tensors of a checkpoint; no data is read yet.

  Args:
    folder: Folder with `model.safetensors`, or with several such files and
      `model.safetensors.index.json`.
    stack: Closes the files.

  Raises:
    ValueError: If a file is absent or damaged, or holds numbers in codes.
  """
  files = _hf_files.open_tensors(folder, stack)
  by_name, wrong = {}, {}
  for name, file in files.items():
    found = file.get_slice(name)
    dtype = found.get_dtype()
    if dtype not in DTYPES and dtype not in _OTHERS:
      wrong[name] = dtype
    by_name[name] = Tensor(name, tuple(found.get_shape()), dtype)
  if wrong:
    raise ValueError(
      f'{folder} holds tensors of dtypes that are not read: {wrong}. Quantised '
      'checkpoints are not; use the original.'
    )
  return Tensors(by_name, lambda name: files[name].get_tensor(name))


@contextlib.contextmanager
def staged(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A folder to write to, which gets its name when it is complete.

  Args:
    folder: Folder to create.

  Yields:
    A folder in the same place under another name.

  Raises:
    ValueError: If `folder` holds something already.
  """
  with _hf_files.staged(pathlib.Path(folder)) as stage:
    yield stage


def write(
  stage: pathlib.Path,
  tensors: Sequence[Tensor],
  values: Callable[[Tensor], np.ndarray],
  max_shard_bytes: int = 5 * 2**30,
) -> None:
  """Writes the weights of a checkpoint, one tensor after another.

  Args:
    stage: Folder that is there.
    tensors: What to write, in this order.
    values: Gives the values of a tensor, of its shape and dtype, when its turn
      has come.
    max_shard_bytes: Size above which the weights are split into several files,
      and the size of one in bytes, unless a single tensor is larger.
  """
  shards = _hf_files.divide(tensors, max_shard_bytes)
  for name, shard in shards.items():
    write_file(stage / name, shard, values)
  if len(shards) > 1:
    write_object(stage / _hf_files.INDEX, _hf_files.index_of(shards))


def write_file(
  path: pathlib.Path,
  tensors: Sequence[Tensor],
  values: Callable[[Tensor], np.ndarray],
) -> None:
  """Writes a file of tensors, one after another.

  Args:
    path: The file.
    tensors: As of `write`.
    values: As of `write`.
  """
  with path.open('wb') as file:
    file.write(_header(tensors))
    for tensor in tensors:
      array = np.asarray(values(tensor), order='C')
      if array.shape != tensor.shape or array.nbytes != tensor.nbytes:
        raise ValueError(
          f'{tensor.name} is {tensor.dtype}{list(tensor.shape)}, and its '
          f'values are {array.dtype}{list(array.shape)}.'
        )
      file.write(array.reshape(-1).view(np.uint8).data)


def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes one file of arrays that are all there; as `_hf_files.save`."""
  _hf_files.save(path, arrays)


def write_object(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a JSON object, such as a configuration."""
  _hf_files.write_object(path, value)


def _header(shard: Sequence[Tensor]) -> bytes:
  """The beginning of a file: its length, and where each tensor lies.

  The package safetensors writes a file of tensors that are all there. The
  format is https://huggingface.co/docs/safetensors.
  """
  # transformers insists on the format.
  fields: dict[str, object] = {'__metadata__': {'format': 'pt'}}
  begin = 0
  for tensor in shard:
    end = begin + tensor.nbytes
    fields[tensor.name] = {
      'dtype': tensor.dtype,
      'shape': list(tensor.shape),
      'data_offsets': [begin, end],
    }
    begin = end
  text = json.dumps(fields).encode()
  text += b' ' * (-len(text) % 8)  # Tensors begin at multiples of 8 bytes.
  return len(text).to_bytes(8, 'little') + text
