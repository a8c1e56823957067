"""The files of a checkpoint of Hugging Face: which tensor lies where."""

import contextlib
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from gnlorp_jax.disk import writing

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
_SHARD = 'model-{number:05d}-of-{count:05d}.safetensors'

# Constants that early versions of transformers saved among the weights.
_BUFFERS = ('rotary_emb.inv_freq',)

# What stands for weights, as a file's header calls it. Codes do not: without
# their scales they are other numbers.
_FLOATS = ('BF16', 'F16', 'F32', 'F64')
# Values of two tensors that are compared at once.
_COMPARED = 2**24


class Sized(Protocol):
  """A tensor that is to be written: its name, and its size in bytes."""

  @property
  def name(self) -> str:
    """Its name in the checkpoint."""

  @property
  def nbytes(self) -> int:
    """Its size there."""


AnySized = TypeVar('AnySized', bound=Sized)


def save(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes a file of safetensors, as transformers and PEFT want it.

  Raises:
    OSError: If it cannot be written, such as on a full disk.
  """
  try:
    # transformers insists on the format.
    safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})
  except safetensors.SafetensorError as error:  # It says why, not where.
    raise OSError(
      f'{path} could not be written: {error}. Check the free space.'
    ) from error


def divide(
  tensors: Iterable[AnySized], max_bytes: int
) -> dict[str, list[AnySized]]:
  """Divides tensors, in order, among files of limited size, by their names."""
  shards: list[list[AnySized]] = [[]]
  room = max_bytes
  for tensor in tensors:
    if shards[-1] and tensor.nbytes > room:
      shards.append([])
      room = max_bytes
    shards[-1].append(tensor)
    room -= tensor.nbytes
  if len(shards) == 1:
    return {WEIGHTS: shards[0]}
  return {
    _SHARD.format(number=i, count=len(shards)): shard
    for i, shard in enumerate(shards, start=1)
  }


def index_of(shards: dict[str, list[AnySized]]) -> dict[str, Any]:
  """Contents of the index that tells which file holds a tensor."""
  return {
    'metadata': {
      'total_size': sum(t.nbytes for shard in shards.values() for t in shard)
    },
    'weight_map': {
      t.name: name for name, shard in shards.items() for t in shard
    },
  }


def has_weights(folder: pathlib.Path) -> bool:
  """Whether there are weights, or an index of them."""
  return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def check_absent(folder: pathlib.Path) -> None:
  """Raises ValueError if there is anything but an empty folder."""
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise ValueError(
      f'Cannot export to {folder}: it exists, and an export overwrites '
      'nothing. Choose another folder or remove it.'
    )


@contextlib.contextmanager
def staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write to, which gets its name when it is complete.

  Args:
    folder: Folder to create.

  Yields:
    A folder in the same place under another name.

  Raises:
    ValueError: If `folder` holds something already.
  """
  folder = folder.absolute()
  check_absent(folder)
  writing.sweep(folder.parent, writing.prefix_of(folder))
  with writing.drafted(folder) as stage:
    yield stage
    writing.put_in_place(stage, folder)


def open_tensors(
  folder: str | os.PathLike, stack: contextlib.ExitStack
) -> dict[str, safetensors.safe_open]:
  """The file that holds each tensor, by the tensor's name; no data is read.

  Args:
    folder: Folder with `model.safetensors`, or with several such files and
      `model.safetensors.index.json`.
    stack: Closes the files.

  Raises:
    ValueError: If a file is absent or damaged, or the index and its files do
      not agree.
  """
  folder = pathlib.Path(folder)
  index: dict[str, str] = {}
  if (folder / WEIGHTS).is_file():
    names = [WEIGHTS]
  elif (folder / INDEX).is_file():
    index = _read_index(folder / INDEX)
    names = sorted(set(index.values()))
  else:
    raise ValueError(
      f'{folder} holds neither {WEIGHTS} nor {INDEX}. Other formats are not '
      "read; convert them with transformers' save_pretrained."
    )
  opened = {}
  for name in names:
    try:
      opened[name] = stack.enter_context(
        safetensors.safe_open(folder / name, 'numpy')
      )
    except (OSError, ValueError, safetensors.SafetensorError) as error:
      raise ValueError(f'Cannot read {folder / name}: {error}') from error
  files = {}
  for name, file in opened.items():
    absent = [tensor for tensor, place in index.items() if place == name]
    for tensor in file.keys():
      # Of a tensor in several files, the index says which.
      if index.get(tensor, name) == name:
        files[tensor] = file
    absent = [tensor for tensor in absent if tensor not in files]
    if absent:
      raise ValueError(
        f'{folder / name} lacks the tensors {absent}, which {INDEX} says it '
        'holds. Get both files from the same checkpoint.'
      )
  return {
    name: file for name, file in files.items() if not name.endswith(_BUFFERS)
  }


def shapes(
  files: dict[str, safetensors.safe_open],
) -> dict[str, tuple[int, ...]]:
  """The shape of each tensor, from the headers of the files."""
  return {
    name: tuple(file.get_slice(name).get_shape())
    for name, file in files.items()
  }


def check_floats(
  folder: str | os.PathLike,
  names: Iterable[str],
  files: dict[str, safetensors.safe_open],
) -> None:
  """Raises ValueError if any of the tensors holds no floating-point numbers."""
  dtypes = {name: files[name].get_slice(name).get_dtype() for name in names}
  wrong = {n: dtype for n, dtype in dtypes.items() if dtype not in _FLOATS}
  if wrong:
    raise ValueError(
      f'{folder} holds weights of other dtypes than {_FLOATS}: {wrong}. '
      'Quantised checkpoints are not read; use the original.'
    )


def check_equal(
  copy: str, name: str, files: dict[str, safetensors.safe_open]
) -> None:
  """Compares two tensors of the same shape, some rows at a time.

  Raises:
    ValueError: If any value differs.
  """
  pair = [files[tensor].get_slice(tensor) for tensor in (copy, name)]
  rows, *others = pair[0].get_shape()
  width = math.prod(others)
  step = max(1, _COMPARED // max(1, width))
  differing, first = 0, rows
  for start in range(0, rows, step):
    stop = min(start + step, rows)
    a, b = (part[start:stop].astype(np.float64) for part in pair)
    is_other = (a != b) & ~(np.isnan(a) & np.isnan(b))
    (found,) = np.nonzero(is_other.reshape(len(a), width).any(axis=1))
    differing += np.count_nonzero(is_other)
    first = min([first, *(start + found[:1])])
  if differing:
    raise ValueError(
      f'{copy} differs from {name} in {differing} of {rows * width} values, '
      f'first in row {first}, but the model ties the two. If the checkpoint '
      "does not, say so: tie_embeddings=False in the model's configuration, "
      f'"tie_word_embeddings": false in config.json. Or else remove {copy}.'
    )


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; raises ValueError if there is none."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f'Cannot read {path}: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(
      f'{path} must hold a JSON object, not {reprlib.repr(value)}.'
    )
  return value


def write_object(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a JSON object."""
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """The name of the file that holds each tensor."""
  index = read_object(path).get('weight_map')
  if not isinstance(index, dict):
    raise ValueError(
      f'{path} has no object "weight_map", which says in which file each '
      'tensor is. Get it and the weights from one checkpoint.'
    )
  for tensor, name in index.items():
    if (
      not isinstance(name, str)
      or pathlib.PurePath(name).name != name
      or name in ('', '.', '..')
    ):
      raise ValueError(
        f'{path} places {tensor} in {name!r}; it must be the name of a file in '
        'the same folder.'
      )
  return index
