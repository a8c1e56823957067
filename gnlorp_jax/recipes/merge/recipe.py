"""From the folders of a base and its experts to one merged folder."""

import contextlib
import dataclasses
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gnlorp_jax.compose.progress import Progress
from gnlorp_jax.merging import methods
from gnlorp_jax.models import hf, hf_tensors
from gnlorp_jax.models.hf_tensors import DTYPES, Tensor
from gnlorp_jax.recipes.merge import folders, plan, report
from gnlorp_jax.recipes.merge.folders import Folder
from gnlorp_jax.recipes.merge.settings import MergeConfig

# Patterns of what a model is loaded with, of whatever architecture.
_COPIED = (
  *('generation_config.json', 'tokenizer.json', 'tokenizer_config.json'),
  *('special_tokens_map.json', 'added_tokens.json', 'chat_template.*'),
  *('vocab.*', 'merges.txt', 'bpe.codes', 'tokenizer.model', 'spiece.model'),
  *('spm.model', 'sentencepiece.bpe.model', '*processor_config.json', '*.py'),
)


def merge(config: MergeConfig, progress: Progress) -> dict[str, Any]:
  """Merges experts, or says what would be done.

  One tensor at a time is held. The folder appears when it is complete.

  Args:
    config: The settings.
    progress: ``progress(title)`` is a context whose value is called with how
      much is done, and is there.

  Returns:
    What was done, for `report`: the settings, and a row for each tensor under
    ``tensors``.

  Raises:
    ValueError: If the folder to write holds something, folders do not fit each
      other or hold numbers that are not finite, or a result does not fit its
      dtype.
  """
  begin = time.perf_counter()
  with contextlib.ExitStack() as stack:
    if config.out:
      hf.check_export_folder(config.out)
    base = folders.open_base(config.base, stack)
    experts = folders.open_experts(config.folders, base, stack)
    made = plan.make(config, base, experts)
    found = _described(config, experts, made)
    if config.dry_run:
      return found
    merger = Merger(config, base, experts)
    # GPUs would round the factors of float32 products otherwise.
    stack.enter_context(jax.default_matmul_precision('float32'))
    stage = stack.enter_context(hf_tensors.staged(config.out))
    if config.method != 'average':
      with progress('Reading changes') as advance:
        merger.survey(made.merged, advance)
    with progress('Merging') as advance:
      _write(stage, config, made, merger, advance)
    _write_beside(stage, config, base, experts, made.headed)
    found |= _summary(merger, time.perf_counter() - begin)
    for row in found['tensors']:
      row |= merger.notes.get(row['name'], {})
    report.write(stage, found)
  return found


class Merger:
  """Merges tensors by name, and notes what came of each.

  Attributes:
    found: What is known of all tensors, once `survey` has run.
    notes: What there is to tell of a tensor, by its name in what is written.
  """

  def __init__(
    self, config: MergeConfig, base: Folder, experts: Sequence[Folder]
  ):
    """Reads nothing yet.

    Args:
      config: The settings.
      base: The base.
      experts: The experts.
    """
    self.found = methods.Survey({})
    self.notes: dict[str, dict[str, Any]] = {}
    self._options = config.options
    self._base = base
    self._experts = experts
    self._labels = [expert.label for expert in experts]

  def survey(
    self, names: Sequence[str], progress: Callable[[int, int], None]
  ) -> None:
    """Looks at all task vectors, one tensor at a time."""
    self.found = methods.survey(self._options, names, self._taus, progress)

  def values(self, row: plan.Row, headed: Folder | None) -> np.ndarray:
    """The values of a tensor that is written.

    Args:
      row: What becomes of it.
      headed: The expert whose heads are taken.
    """
    if row.action == 'head':
      return _cast(row.tensor, headed.get(row.name))
    is_average = row.action == 'average' or self._options.method == 'average'
    if row.action == 'base':
      return _cast(row.tensor, self._base.get(row.name))
    note = self.notes.setdefault(row.tensor.name, {})
    make = self._average if is_average else self._merged
    made = make(row.name, note)
    if not np.isfinite(made.astype(np.float32, copy=False)).all():
      raise ValueError(
        f'{row.name}: {self._options.method} gave numbers that are not finite. '
        'Leave the tensor alone by --exclude, or choose another method.'
      )
    return _cast(row.tensor, made)

  def _taus(self, name: str) -> np.ndarray:
    return self._taus_of(name, self._base_values(name))

  def _taus_of(self, name: str, base: np.ndarray) -> np.ndarray:
    taus = (expert.tau(name, base) for expert in self._experts)
    return methods.stack(name, self._labels, taus)

  def _base_values(self, name: str) -> np.ndarray:
    return self._base.get(name).astype(np.float32)

  def _average(self, name: str, note: dict[str, Any]) -> np.ndarray:
    """The weighted mean; of experts that are equal, that tensor bit by bit."""
    base = self._base_values(name)
    weights = np.array(self._options.weights, np.float64)
    weights /= weights.sum()
    first, are_equal = None, True
    total = np.zeros_like(base)
    for weight, expert in zip(weights, self._experts, strict=True):
      theta = expert.theta(name, base)
      first = theta if first is None else first
      are_equal = are_equal and np.array_equal(first, theta)
      total += np.float32(weight) * theta
    note['result'] = 'equal in all experts' if are_equal else 'averaged'
    if are_equal:
      whole = self._experts[0]
      return first if whole.is_adapter else whole.get(name)
    _note_lengths(note, base, total - base)
    return total

  def _merged(self, name: str, note: dict[str, Any]) -> np.ndarray:
    norms = self.found.norms[name]
    note['tau_norms'] = norms.tolist()
    if not norms.any():
      note['result'] = 'no expert changed it: the base'
      return self._base.get(name)
    unchanged = [
      label
      for label, norm in zip(self._labels, norms, strict=True)
      if norm == 0
    ]
    note['result'] = 'merged'
    if unchanged:
      note['result'] += f', unchanged in {", ".join(unchanged)}'
    base = self._base_values(name)
    update, more = methods.update(
      self._options, self.found, name, self._labels, self._taus_of(name, base)
    )
    note |= more
    _note_lengths(note, base, update)
    base += update
    return base


def _note_lengths(
  note: dict[str, Any], base: np.ndarray, update: np.ndarray
) -> None:
  note['update_norm'] = float(np.linalg.norm(update))
  note['base_norm'] = float(np.linalg.norm(base))


def _cast(tensor: Tensor, values: np.ndarray) -> np.ndarray:
  """The values in the dtype that is written."""
  if not tensor.is_float or values.dtype == DTYPES[tensor.dtype]:
    return values
  with np.errstate(over='ignore'):
    cast = values.astype(DTYPES[tensor.dtype])
  became_infinite = np.isinf(cast) & ~np.isinf(values)
  if became_infinite.any():
    largest = np.abs(values[became_infinite]).max()
    raise ValueError(
      f'{tensor.name} has values up to {largest:g}, which {tensor.dtype} '
      'cannot hold. Write another: --dtype bfloat16 or float32.'
    )
  return cast


def _write(
  stage: pathlib.Path,
  config: MergeConfig,
  made: plan.Plan,
  merger: Merger,
  progress: Callable[[int, int], None],
) -> None:
  """Writes the merged weights."""
  rows = {r.tensor.name: r for r in made.rows if r.action != 'left out'}
  done = 0

  def values(tensor: Tensor) -> np.ndarray:
    nonlocal done
    found = merger.values(rows[tensor.name], made.headed)
    done += 1
    progress(done, len(rows))
    return found

  tensors = [row.tensor for row in rows.values()]
  hf_tensors.write(stage, tensors, values, int(config.shard_gb * 2**30))


def _write_beside(
  stage: pathlib.Path,
  config: MergeConfig,
  base: Folder,
  experts: Sequence[Folder],
  headed: Folder | None,
) -> None:
  """Writes the configuration, the tokenizer, and heads that are kept apart."""
  fields = dict((headed or base).config)
  if config.dtype != 'base':
    fields.pop('torch_dtype', None)
    fields['dtype'] = config.dtype
  hf_tensors.write_object(stage / 'config.json', fields)
  for pattern in _COPIED:
    for path in filter(pathlib.Path.is_file, base.path.glob(pattern)):
      shutil.copyfile(path, stage / path.name)
  if config.heads == 'each':
    for expert in experts:
      if expert.heads:
        _write_heads(stage / 'heads' / f'{expert.label}.safetensors', expert)


def _write_heads(path: pathlib.Path, expert: Folder) -> None:
  path.parent.mkdir(exist_ok=True)
  names = {tensor.name: name for name, tensor in expert.heads.items()}
  hf_tensors.write_file(
    path,
    list(expert.heads.values()),
    lambda tensor: expert.get(names[tensor.name]),
  )


def _described(
  config: MergeConfig,
  experts: Sequence[Folder],
  made: plan.Plan,
) -> dict[str, Any]:
  """What is known before anything is read."""
  options = dataclasses.asdict(config.options)
  if config.method != 'average':
    options['scale'] = config.options.scaled
  if config.method in methods.KEPT:
    options['keep'] = config.options.kept
  return {
    'base': str(config.base),
    'experts': [
      {
        'label': expert.label,
        'folder': name,
        'kind': 'LoRA' if expert.is_adapter else 'whole',
        'weight': weight,
      }
      for expert, name, weight in zip(
        experts, config.folders, config.options.weights, strict=True
      )
    ],
    'out': config.out,
    'method': config.method,
    'options': options,
    'settings': dataclasses.asdict(config),
    'peak_bytes': plan.peak_bytes(config, made),
    'tensors': [
      {
        'name': row.tensor.name,
        'shape': list(row.tensor.shape),
        'dtype': row.tensor.dtype,
        'action': row.action,
        'why': row.why,
      }
      for row in made.rows
    ],
  }


def _summary(merger: Merger, seconds: float) -> dict[str, Any]:
  """What is known when all is merged."""
  found = merger.found
  kibi = 1 if sys.platform == 'darwin' else 1024
  summary = {
    'seconds': round(seconds, 1),
    # With the pages of mapped files, which the system takes back at will.
    'max_resident_bytes': kibi
    * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
  }
  if found.eta is not None:
    summary['eta'] = found.eta
  if found.thresholds_N is not None:
    summary['thresholds'] = found.thresholds_N.tolist()
  return summary
