"""Adapters in the folders of the library `peft`, without PyTorch.

A folder holds the factors of every adapted module, a file for all of them, and
says in JSON how they change it. The table of a decoder's tensors, of which `hf`
tells, has the names of its modules, too. The factors of a stack of kernels are
one tensor for each layer there, and turned.
"""

import contextlib
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
import safetensors
from flax import traverse_util

from gnlorp_jax.models import _hf_files, hf
from gnlorp_jax.models.adapted_layer import (
  NAMES,
  AdapterConfig,
  check_arrays,
)
from gnlorp_jax.models.on_host import is_writer, to_host

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'

_PREFIX = 'base_model.model.'
# Our arrays beside a kernel, and what follows the name of a module there.
_ENDINGS = dict(
  zip(
    NAMES,
    ('lora_A.weight', 'lora_B.weight', 'lora_magnitude_vector'),
    strict=True,
  )
)
_MERGE = (
  'Merge the adapter in peft (merge_and_unload), save the model and start from '
  'that folder.'
)

# What `read_config` makes use of, and what says nothing of a trained adapter.
_READ = (
  *('peft_type', 'r', 'lora_alpha', 'lora_dropout', 'use_dora', 'use_rslora'),
  *('bias', 'init_lora_weights'),
)
_SILENT = (
  *('task_type', 'auto_mapping', 'peft_version', 'base_model_name_or_path'),
  *('revision', 'inference_mode', 'megatron_core', 'qalora_group_size'),
  *('loftq_config', 'eva_config', 'corda_config', 'lora_ga_config'),
  # Which modules: their tensors tell.
  *('target_modules', 'exclude_modules', 'layers_to_transform'),
  'layers_pattern',
)
# Ways to draw factors that leave the model's own weights as they are.
_DRAWN = (True, False, None, 'gaussian', 'eva', 'orthogonal')


def export(
  folder: str | os.PathLike,
  config: AdapterConfig,
  arrays: dict[str, Any],
  table: hf.Table,
  *,
  base: str | None = None,
  revision: str | None = None,
) -> None:
  """Writes a folder that `peft.PeftModel.from_pretrained` reads.

  The folder appears when it is complete. Arrays keep their dtypes.

  Args:
    folder: Folder to create.
    config: The configuration of the adapters.
    arrays: Nested dict of the adapters' arrays alone, as of `adapters.init`
      without `call`. All processes that hold parts of them must ask; process 0
      writes.
    table: `HF_TENSORS` of the decoder's family.
    base: Folder of the model that is adapted, or its name on the hub; None
      names none, and whoever reads the adapter has to know.
    revision: Commit, branch or tag of such a name.

  Raises:
    ValueError: If the folder holds something already, the adapters have no
      form in `peft`, are not of that configuration, or there are others than
      beside kernels of the table.
  """
  if config.kind == 'gradnormlorp':
    raise ValueError(
      "Adapters of kind='gradnormlorp' have no form in peft, which trains "
      'through the norm for none. Export the merged model instead.'
    )
  layers: dict[str, dict[str, Any]] = {}
  for (*layer, name), leaf in traverse_util.flatten_dict(arrays).items():
    layers.setdefault('/'.join(layer), {})[name] = leaf
  modules = _modules(table)
  unnamed = sorted(layers.keys() - modules.keys())
  if unnamed or not layers:
    raise ValueError(
      f'{unnamed or "Nothing"} can be exported as adapters: they must stand '
      f'beside kernels with a Hugging Face name, such as {sorted(modules)[:3]}.'
    )
  for layer, found in layers.items():
    check_arrays(config, layer, found)
  tensors = {
    _key(module, name): _to_peft(name, leaf[index])
    for layer, found in layers.items()
    for name, leaf in found.items()
    for index, module in _places(modules[layer], leaf.shape[0])
  }
  if not is_writer():
    return
  with _hf_files.staged(pathlib.Path(folder)) as stage:
    _hf_files.save(stage / WEIGHTS, tensors)
    fields = _fields(config) | {
      'base_model_name_or_path': base,
      'revision': revision,
      'target_modules': sorted(
        {modules[layer].rpartition('.')[2] for layer in layers}
      ),
    }
    _hf_files.write_object(stage / CONFIG, fields)


def read_config(folder: str | os.PathLike, table: hf.Table) -> AdapterConfig:
  """The configuration of adapters in a folder of `peft`; reads no data.

  Args:
    folder: What `save_pretrained` of `peft`, or `export`, wrote.
    table: `HF_TENSORS` of the decoder's family.

  Returns:
    The configuration, with a rule for each kernel that is adapted.

  Raises:
    ValueError: If a file is absent or damaged, or holds what `adapters` does
      not know, or has other tensors than the configuration says.
  """
  with _opened(pathlib.Path(folder), table) as (config, _, _):
    return config


def read(
  folder: str | os.PathLike, table: hf.Table
) -> tuple[AdapterConfig, dict[str, Any]]:
  """Adapters from a folder of `peft`.

  Args:
    folder: As of `read_config`.
    table: As there.

  Returns:
    The configuration, and a nested dict of the adapters' arrays alone, NumPy's
    in the dtypes of the file: ``lora_a``, ``[*, in, r]``, ``lora_b``,
    ``[*, r, out]`` and, of ``dora``, ``magnitude``, ``[*, 1, out]``.

  Raises:
    ValueError: As `read_config`.
  """
  flat = {}
  with _opened(pathlib.Path(folder), table) as (config, layers, file):
    for layer, found in layers.items():
      for name in _names(config):
        stack = [
          _from_peft(name, file.get_tensor(_key(module, name)))
          for _, module in found
        ]
        is_stack = found[0][0] is not ...
        flat[f'{layer}/{name}'] = np.stack(stack) if is_stack else stack[0]
  return config, traverse_util.unflatten_dict(flat, sep='/')


class Product(NamedTuple):
  """What LoRA adds to a tensor.

  Attributes:
    shape: That of the tensor, ``[out, in]``.
    read: Gives ``scale * B A``, float32.
  """

  shape: tuple[int, int]
  read: Callable[[], np.ndarray]


def open_products(
  folder: str | os.PathLike, stack: contextlib.ExitStack
) -> dict[str, Product]:
  """What LoRA in a folder of `peft` adds to each tensor, of any architecture.

  Args:
    folder: As of `read_config`; no table of a family is asked.
    stack: Closes the file.

  Returns:
    What is added, by the name of the base's tensor.

  Raises:
    ValueError: If a file is absent or damaged, or holds anything but the
      factors of LoRA.
  """
  folder = pathlib.Path(folder)
  fields = _hf_files.read_object(folder / CONFIG)
  _check_fields(folder / CONFIG, fields)
  if fields.get('use_dora'):
    raise ValueError(
      f'{folder / CONFIG} says use_dora=True: DoRA scales the columns of the '
      f'kernel itself, which is no product of two factors. {_MERGE}'
    )
  file = stack.enter_context(_open(folder / WEIGHTS))
  ends = tuple(f'.{_ENDINGS[name]}' for name in NAMES[:2])
  keys = set(file.keys())
  modules = {
    key.removesuffix(end)
    for key in keys
    for end in ends
    if key.startswith(_PREFIX) and key.endswith(end)
  }
  wanted = {module + end for module in modules for end in ends}
  extra, missing = keys - wanted, wanted - keys
  if extra or missing or not modules:
    raise ValueError(
      f'{folder / WEIGHTS} must hold two factors of each matrix that is '
      f'adapted, and nothing else. Missing: {sorted(missing)}. Extra: '
      f'{sorted(extra)}. {_MERGE}'
    )

  files = {key: file for key in wanted}
  _hf_files.check_floats(folder, wanted, files)
  alpha = fields.get('lora_alpha', 8)
  is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
  if not is_number or not math.isfinite(alpha):
    raise ValueError(
      f'{folder / CONFIG} has lora_alpha={alpha!r}; expected a finite number.'
    )
  shapes = _hf_files.shapes(files)

  def read(module: str) -> np.ndarray:
    a, b = (file.get_tensor(module + end).astype(np.float32) for end in ends)
    # The rank is the file's: that of one matrix may be smaller.
    root = len(a) ** 0.5 if fields.get('use_rslora') else len(a)
    return np.float32(alpha / root) * (b @ a)

  def product(module: str) -> Product:
    a, b = (shapes[module + end] for end in ends)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
      raise ValueError(
        f'{folder / WEIGHTS} has factors of {module} with the shapes {a} and '
        f'{b}, which have no product: they are not of linear layers. {_MERGE}'
      )
    return Product((b[0], a[1]), functools.partial(read, module))

  return {
    f'{module.removeprefix(_PREFIX)}.weight': product(module)
    for module in sorted(modules)
  }


# Names.

# A layer of ours, or all of a kernel that is not stacked, and a module there.
_Place = tuple[int | EllipsisType, str]


def _modules(table: hf.Table) -> dict[str, str]:
  """The modules' names, with '{layer}' in them, by the paths of our layers."""
  return {
    path.removesuffix('/kernel'): name.removesuffix('.weight')
    for path, name, _ in table
    if path.endswith('/kernel')
  }


def _places(module: str, count: int) -> list[_Place]:
  """The modules of a name with '{layer}' in it; without, there is but one."""
  if '{layer}' not in module:
    return [(..., module)]
  return [(layer, module.format(layer=layer)) for layer in range(count)]


def _key(module: str, name: str) -> str:
  """The name of a tensor there."""
  return f'{_PREFIX}{module}.{_ENDINGS[name]}'


def _names(config: AdapterConfig) -> tuple[str, ...]:
  """The arrays of an adapter."""
  return NAMES if config.kind == 'dora' else NAMES[:2]


def _to_peft(name: str, x: Any) -> np.ndarray:
  """``[in, r]``, ``[r, out]`` or ``[1, out]`` as a tensor of theirs."""
  x = to_host(x)
  return x[0] if name == 'magnitude' else np.ascontiguousarray(x.T)


def _from_peft(name: str, x: np.ndarray) -> np.ndarray:
  """The inverse of `_to_peft`."""
  return x[None] if name == 'magnitude' else x.T


# The configuration.


def _fields(config: AdapterConfig) -> dict[str, Any]:
  """Fields of a configuration there that follow from one of ours."""
  is_whole = config.alpha == int(config.alpha)
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'r': config.rank,
    'lora_alpha': int(config.alpha) if is_whole else config.alpha,
    'lora_dropout': config.dropout,
    'use_dora': config.kind == 'dora',
    'use_rslora': config.rank_stabilized,
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'modules_to_save': None,
    'inference_mode': True,
  }


def _check_fields(path: pathlib.Path, fields: dict[str, Any]) -> None:
  """Raises ValueError if a configuration asks for what `adapters` has not."""
  kind = fields.get('peft_type')
  if kind != 'LORA':
    raise ValueError(
      f"{path} says peft_type={kind!r}; only 'LORA' is read, which is that of "
      f'DoRA too. {_MERGE}'
    )
  reasons = {
    name: value
    for name, value in fields.items()
    if value and name not in _READ and name not in _SILENT
  }
  if fields.get('bias', 'none') != 'none':
    reasons['bias'] = fields['bias']
  drawn = fields.get('init_lora_weights')
  if drawn not in _DRAWN:
    reasons['init_lora_weights'] = drawn
  if reasons:
    text = ', '.join(f'{name}={value!r}' for name, value in reasons.items())
    raise ValueError(f'{path} asks for what is not supported: {text}. {_MERGE}')


@contextlib.contextmanager
def _opened(
  folder: pathlib.Path, table: hf.Table
) -> Iterator[tuple[AdapterConfig, dict[str, list[_Place]], Any]]:
  """A folder's configuration, the modules of our layers, and its tensors."""
  fields = _hf_files.read_object(folder / CONFIG)
  _check_fields(folder / CONFIG, fields)
  with _open(folder / WEIGHTS) as file:
    layers = _adapted(_modules(table), file.keys())
    if not layers:
      raise ValueError(
        f'{folder / WEIGHTS} adapts no kernel of such a model: is it of '
        f'another family? Its tensors: {sorted(file.keys())[:3]}.'
      )
    try:
      config = AdapterConfig(
        kind='dora' if fields.get('use_dora') else 'lora',
        rank=fields.get('r', 8),
        alpha=fields.get('lora_alpha', 8),
        dropout=fields.get('lora_dropout', 0.0),
        rank_stabilized=bool(fields.get('use_rslora')),
        rules=tuple(f'^{layer}/kernel$' for layer in sorted(layers)),
      )
    except (TypeError, ValueError) as error:
      raise ValueError(f'Cannot read {folder / CONFIG}: {error}') from error
    _check_tensors(folder, config, layers, file)
    yield config, layers, file


def _open(path: pathlib.Path) -> Any:
  """A file of tensors; a context that closes it."""
  try:
    return safetensors.safe_open(path, 'numpy')
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f'Cannot read {path}: {error}') from error


def _adapted(
  modules: dict[str, str], keys: Iterable[str]
) -> dict[str, list[_Place]]:
  """Our layers of which any module is adapted, with all their modules."""
  present = {
    key.removeprefix(_PREFIX).removesuffix(f'.{_ENDINGS["lora_a"]}')
    for key in keys
    if key.endswith(_ENDINGS['lora_a'])
  }
  numbers: dict[str, list[int]] = {}
  for layer, module in modules.items():
    pattern = re.escape(module).replace(re.escape('{layer}'), '([0-9]+)')
    matches = [re.fullmatch(pattern, name) for name in present]
    found = [int(''.join(match.groups()) or 0) for match in matches if match]
    if found:
      numbers[layer] = found
  # No more layers than there are modules, whatever number they bear.
  depth = min(1 + max(map(max, numbers.values()), default=0), len(present))
  return {layer: _places(modules[layer], depth) for layer in numbers}


def _check_tensors(
  folder: pathlib.Path,
  config: AdapterConfig,
  layers: dict[str, list[_Place]],
  file: Any,
) -> None:
  """Raises ValueError unless the adapters of all layers are all there is."""
  found = _hf_files.shapes({name: file for name in file.keys()})
  wanted = {
    _key(module, name)
    for places in layers.values()
    for _, module in places
    for name in _names(config)
  }
  missing, extra = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
  if missing or extra:
    raise ValueError(
      f'{folder / WEIGHTS} must hold adapters of kind={config.kind!r} for all '
      f'layers of what it adapts, and nothing else. Missing: {missing}. Extra: '
      f'{extra}. {_MERGE}'
    )
  _hf_files.check_floats(folder, found, {name: file for name in found})
  for places in layers.values():
    for name in _names(config):
      axis = {'lora_a': 0, 'lora_b': 1}.get(name)
      shapes = {found[_key(module, name)] for _, module in places}
      shape = next(iter(shapes))
      fits = len(shapes) == 1 and len(shape) == (1 if axis is None else 2)
      if not fits or (axis is not None and shape[axis] != config.rank):
        raise ValueError(
          f'{_key(places[0][1], name)} and those of other layers have the '
          f'shapes {sorted(shapes)} in {folder / WEIGHTS}: they must have the '
          f'same rank, r={config.rank}, in all layers. {_MERGE}'
        )
