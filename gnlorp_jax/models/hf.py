"""Weights in the layout of Hugging Face: import and export, without PyTorch.

A model describes its layout by a table of rows (our path, their name,
transposed), such as `llama.HF_TENSORS`. A path joins the keys of the nested
dict with '/'. A name with '{layer}' in it stands for one tensor per layer,
which we keep as one array with a leading layer axis. A transposed matrix is
[in, out] with us and [out, in] there.

A row for a path that an earlier row has names a copy: a tensor that some
checkpoints hold beside the one that the model reads, such as the head of tied
embeddings. A copy is not written. Where a checkpoint has it, it must be equal,
unless the model has another use for a tensor of that name.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from types import EllipsisType
from typing import Any, NamedTuple, get_type_hints

import jax
import numpy as np
from flax import traverse_util

from gnlorp_jax.models import _hf_files
from gnlorp_jax.models.field_types import described, is_of
from gnlorp_jax.models.on_host import is_writer, to_host

Table = Sequence[tuple[str, str, bool]]

_CONFIG = 'config.json'


def load_config(folder: str | os.PathLike) -> dict[str, Any]:
  """Reads the configuration of a checkpoint.

  Args:
    folder: Folder with a `config.json`.

  Returns:
    The JSON object.

  Raises:
    ValueError: If the file is absent or holds no JSON object.
  """
  return _hf_files.read_object(pathlib.Path(folder) / _CONFIG)


def check_supported(
  family: str, hf_config: dict[str, Any], supported: dict[str, Any]
) -> None:
  """Checks the fields of a configuration that change what is computed.

  Args:
    family: What to call the model in an error.
    hf_config: The JSON object of a `config.json`.
    supported: The only value of a field that is supported, which its absence
      means too.

  Raises:
    ValueError: If a field has another value; all such are named.
  """
  wrong = [
    f'{name}={hf_config[name]!r} (supported: {value!r})'
    for name, value in supported.items()
    if name in hf_config and hf_config[name] != value
  ]
  if wrong:
    raise ValueError(f'Unsupported {family} configuration: {", ".join(wrong)}.')


def read_fields(
  family: str,
  hf_config: dict[str, Any],
  config_class: type,
  names: dict[str, str],
) -> dict[str, Any]:
  """Fields of a model's configuration from those of a `config.json`.

  Args:
    family: What to call the model in an error.
    hf_config: The JSON object.
    config_class: Dataclass of the model's configuration.
    names: Hugging Face's name of each field of ours that it has.

  Returns:
    The fields that the JSON object has, and `param_dtype`: bfloat16 if the
    checkpoint is, otherwise float32.

  Raises:
    ValueError: If fields without a default are missing, or have values of
      another type; all are named.
  """
  missing = [
    names[field.name]
    for field in dataclasses.fields(config_class)
    if field.default is dataclasses.MISSING
    and names[field.name] not in hf_config
  ]
  if missing:
    raise ValueError(f'{family} configuration lacks the fields {missing}.')
  types = get_type_hints(config_class)
  wrong = [
    f'{theirs}={hf_config[theirs]!r} (supported: {described(types[ours])})'
    for ours, theirs in names.items()
    if theirs in hf_config and not is_of(hf_config[theirs], types[ours])
  ]
  if wrong:
    raise ValueError(f'Unsupported {family} configuration: {", ".join(wrong)}.')
  dtype = hf_config.get('dtype') or hf_config.get('torch_dtype')
  return {
    'param_dtype': 'bfloat16' if dtype == 'bfloat16' else 'float32',
    **{
      ours: hf_config[theirs]
      for ours, theirs in names.items()
      if theirs in hf_config
    },
  }


def tensor_shapes(folder: str | os.PathLike) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the tensors of a checkpoint; their data is not read.

  Args:
    folder: As in `load_params`.

  Returns:
    The shape of each tensor in the checkpoint's layout, by its name there.

  Raises:
    ValueError: If a file is absent or damaged.
  """
  with contextlib.ExitStack() as stack:
    return _hf_files.shapes(_hf_files.open_tensors(folder, stack))


def check_size(folder: str | os.PathLike, num_params: int) -> None:
  """Refuses a model far larger than its checkpoint, before it is planned.

  Args:
    folder: As in `load_params`; one without weights passes.
    num_params: Number of parameters of the model that its `config.json`
      describes, with any head.

  Raises:
    ValueError: If these are more than twice what the files hold, or a file is
      damaged. `load_params` compares every tensor.
  """
  folder = pathlib.Path(folder)
  if not _hf_files.has_weights(folder):
    return
  held = sum(math.prod(shape) for shape in tensor_shapes(folder).values())
  # A head that the checkpoint lacks is smaller than the rest.
  if num_params > 2 * held:
    raise ValueError(
      f'{folder / _CONFIG} describes a model of {num_params:,} parameters, but '
      f'the files beside it hold {held:,} values: it is not '
      'theirs. Get config.json and weights from one checkpoint.'
    )


def load_params(
  folder: str | os.PathLike,
  table: Table,
  abstract_params: dict[str, Any],
  convert: Callable[[str, jax.Array], Any] = lambda path, array: array,
  unread: str = '',
) -> dict[str, Any]:
  """Reads the weights of a checkpoint into the layout of a model.

  Only one parameter at a time is held in host memory.

  Args:
    folder: Folder with `model.safetensors`, or with several such files and
      `model.safetensors.index.json`.
    table: The model's rows (our path, their name, transposed). Rows whose path
      is not in `abstract_params`, as of a tied head, are passed over.
    abstract_params: Nested dict with the shape, the dtype and, if set, the
      sharding of every parameter: `jax.eval_shape` of the model's init.
    convert: ``convert(path, array)`` makes of a parameter what is returned for
      it.
      It is called before the next one is read, so that a smaller form of it
      can take its place.
    unread: A regex over the whole names of tensors that the checkpoint may hold
      beside the model's; the default allows none.

  Returns:
    What `convert` makes of arrays in the layout of `abstract_params`, cast to
    its dtypes; without it, these arrays.

  Raises:
    ValueError: If a file is absent or damaged; if tensors are missing, left
      over or of another shape, all of which are named; if a copy differs from
      what it is a copy of, or a tensor holds no floating-point numbers. All of
      this is found before anything is allocated.
  """
  leaves = traverse_util.flatten_dict(abstract_params, sep='/')
  params = {}
  with contextlib.ExitStack() as stack:
    files = _hf_files.open_tensors(folder, stack)
    _check_depth(folder, table, leaves, len(files))
    tensors = _tensors(table, leaves)
    expected = {tensor.name: tensor.shape for tensor in tensors}
    found = {
      name: shape
      for name, shape in _hf_files.shapes(files).items()
      if not re.fullmatch(unread, name)
    }
    copies = _copies(table, leaves, found, expected)
    _check_fit(
      expected | {copy: expected[name] for copy, name in copies.items()}, found
    )
    _hf_files.check_floats(folder, expected, files)
    for copy, name in copies.items():
      _hf_files.check_equal(copy, name, files)
    for path, group in itertools.groupby(tensors, lambda tensor: tensor.path):
      params[path] = convert(path, _read(leaves[path], list(group), files))
  return traverse_util.unflatten_dict(params, sep='/')


def check_export_folder(folder: str | os.PathLike) -> None:
  """Raises ValueError where `export` would refuse; worth asking before a run.

  Args:
    folder: The folder to be created.

  Raises:
    ValueError: If something other than an empty folder is there already.
  """
  _hf_files.check_absent(pathlib.Path(folder))


def export(
  folder: str | os.PathLike,
  params: dict[str, Any],
  table: Table,
  hf_config: dict[str, Any],
  max_shard_bytes: int = 5 * 2**30,
) -> None:
  """Writes a checkpoint that transformers reads with `from_pretrained`.

  The folder appears when it is complete: it is written under another name in
  the same place, then renamed. Every tensor keeps its dtype. All processes that
  hold parts of the arrays must ask: process 0 writes, tensor by tensor.

  Args:
    folder: Folder to create.
    params: Nested dict of arrays, or of what has a shape, a dtype and arrays as
      slices of its first axis.
    table: The model's rows (our path, their name, transposed).
    hf_config: Contents of `config.json`.
    max_shard_bytes: Size above which the weights are split into several files,
      and the size of one in bytes, unless a single tensor is larger.

  Raises:
    ValueError: If the folder holds something already.
    OSError: If it cannot be written.
  """
  leaves = traverse_util.flatten_dict(params, sep='/')
  shards = _hf_files.divide(_tensors(table, leaves), max_shard_bytes)
  if not is_writer():
    for tensor in itertools.chain.from_iterable(shards.values()):
      _to_numpy(leaves[tensor.path], tensor)
    return
  with _hf_files.staged(pathlib.Path(folder)) as stage:
    for name, shard in shards.items():
      tensors = {t.name: _to_numpy(leaves[t.path], t) for t in shard}
      _hf_files.save(stage / name, tensors)
    if len(shards) > 1:
      _hf_files.write_object(
        stage / _hf_files.INDEX, _hf_files.index_of(shards)
      )
    _hf_files.write_object(stage / _CONFIG, hf_config)


class _Tensor(NamedTuple):
  """One tensor of a checkpoint."""

  name: str
  path: str
  index: int | EllipsisType  # layer of the array at that path, or all of it
  transpose: bool
  shape: tuple[int, ...]  # in the checkpoint
  nbytes: int  # in our dtype


def _tensors(table: Table, leaves: dict[str, Any]) -> list[_Tensor]:
  """The checkpoint's tensors for these parameters, those of a path together."""
  unnamed = sorted(set(leaves) - {path for path, _, _ in table})
  if unnamed:
    raise ValueError(
      f'No Hugging Face name for the parameters {unnamed}; add rows for them '
      'to the table.'
    )
  tensors = []
  for path, template, transpose in _first_rows(table):
    if path not in leaves:
      continue
    shape, dtype = leaves[path].shape, leaves[path].dtype
    stacked = '{layer}' in template
    shape_there = shape[1:] if stacked else shape
    for index in range(shape[0]) if stacked else (...,):
      tensors.append(
        _Tensor(
          name=template.format(layer=index),
          path=path,
          index=index,
          transpose=transpose,
          shape=shape_there[::-1] if transpose else shape_there,
          nbytes=math.prod(shape_there) * dtype.itemsize,
        )
      )
  return tensors


def _first_rows(table: Table) -> Iterable[tuple[str, str, bool]]:
  """The rows that are no copies."""
  rows: dict[str, tuple[str, str, bool]] = {}
  for row in table:
    rows.setdefault(row[0], row)
  return rows.values()


def _copies(
  table: Table,
  leaves: dict[str, Any],
  found: Iterable[str],
  expected: Iterable[str],
) -> dict[str, str]:
  """The copies in a checkpoint, each with the name of what it must equal."""
  original = {path: name for path, name, _ in _first_rows(table)}
  return {
    name: original[path]
    for path, name, _ in table
    if path in leaves and name in found and name not in expected
  }


def _read(
  leaf: jax.ShapeDtypeStruct, tensors: list[_Tensor], files: dict[str, Any]
) -> jax.Array:
  """One parameter from its tensors; nothing of it stays on the host.

  A matrix is turned on its way to the device, where the runtime goes through it
  block by block: NumPy, value by value, takes several times as long.
  """
  if leaf.sharding is not None and not leaf.sharding.is_fully_addressable:
    return _read_own(leaf, tensors, files)
  shape = leaf.shape
  is_turned = tensors[0].transpose
  if is_turned:
    shape = (*shape[:-2], shape[-1], shape[-2])
  host = np.empty(shape, leaf.dtype)
  for tensor in tensors:
    host[tensor.index] = files[tensor.name].get_tensor(tensor.name)
  if is_turned:
    host = host.swapaxes(-2, -1)
  return jax.device_put(host, leaf.sharding, may_alias=False)


def _read_own(
  leaf: jax.ShapeDtypeStruct, tensors: list[_Tensor], files: dict[str, Any]
) -> jax.Array:
  """One parameter, of which every process reads what its devices hold."""
  is_stacked = tensors[0].index is not ...
  pieces: dict[str, np.ndarray] = {}

  def read(index: tuple[slice, ...]) -> np.ndarray:
    key = str(index)  # Of copies on several devices, read once.
    if key not in pieces:
      layers, rest = (index[0], index[1:]) if is_stacked else (slice(1), index)
      there = rest[::-1] if tensors[0].transpose else rest
      found = np.stack(
        [files[t.name].get_slice(t.name)[there] for t in tensors[layers]]
      )
      if tensors[0].transpose:
        found = found.swapaxes(-2, -1)
      pieces[key] = (found if is_stacked else found[0]).astype(leaf.dtype)
    return pieces[key]

  return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)


def _to_numpy(leaf: jax.Array, tensor: _Tensor) -> np.ndarray:
  value = to_host(leaf[tensor.index])
  return np.ascontiguousarray(value.T if tensor.transpose else value)


def _check_fit(
  expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
  missing = [name for name in expected if name not in found]
  extra = [name for name in found if name not in expected]
  shape = [
    f'{name}: {found[name]} in the checkpoint, {expected[name]} in the model'
    for name in expected
    if name in found and found[name] != expected[name]
  ]
  if missing or extra or shape:
    raise ValueError(
      f'Checkpoint does not fit model. Missing: {missing}. Extra: {extra}. '
      f'Shape: {shape}.'
    )


def _check_depth(
  folder: str | os.PathLike, table: Table, leaves: dict[str, Any], count: int
) -> None:
  """Refuses more layers than tensors, of which a list would be endless."""
  depth = max(
    (
      leaves[path].shape[0]
      for path, name, _ in table
      if path in leaves and '{layer}' in name
    ),
    default=0,
  )
  if depth > count:
    raise ValueError(
      f'The model has {depth} layers, but {folder} holds {count} tensors in '
      'all: its config.json is not that of its weights. Get both from one '
      'checkpoint.'
    )
