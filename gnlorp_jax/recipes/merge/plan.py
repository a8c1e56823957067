"""What becomes of every tensor, and whether the folders fit each other.

All of it is known from names and shapes, before any value is read.
"""

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from gnlorp_jax.merging import methods
from gnlorp_jax.merging.baselines import is_thin
from gnlorp_jax.models.hf_tensors import DTYPES, Tensor
from gnlorp_jax.recipes.merge.folders import LM_HEAD, Folder, is_head
from gnlorp_jax.recipes.merge.settings import MergeConfig

Action = Literal['merged', 'average', 'base', 'head', 'left out']
_CODES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}


class Row(NamedTuple):
  """What becomes of a tensor.

  Attributes:
    name: Its name in the base, or in the expert whose head it is.
    tensor: What is written; of what is left out, what there was.
    action: Where its values come from.
    why: The reason.
  """

  name: str
  tensor: Tensor
  action: Action
  why: str


class Plan(NamedTuple):
  """What becomes of all tensors.

  Attributes:
    rows: By tensor.
    headed: The expert whose heads and config.json are taken, if any.
  """

  rows: list[Row]
  headed: Folder | None

  @property
  def merged(self) -> list[str]:
    """Names of the tensors that are merged by the method."""
    return [row.name for row in self.rows if row.action == 'merged']


def make(config: MergeConfig, base: Folder, experts: Sequence[Folder]) -> Plan:
  """Decides about every tensor.

  Args:
    config: The settings.
    base: The base.
    experts: The experts.

  Raises:
    ValueError: If tensors do not fit each other, all of which are named; or
      nothing would be merged, or the heads of an expert are asked for that is
      not there or has none.
  """
  headed = _headed(config, experts)
  rows = [
    _row(config, base, experts, headed, tensor)
    for tensor in base.tensors.values()
  ]
  problems = _problems(config, base, experts, headed, rows)
  if problems:
    raise ValueError(
      f'{len(problems)} tensors do not fit:\n'
      + '\n'.join(f'  {problem}' for problem in problems)
      + '\n--exclude REGEX keeps the tensors of the base that it matches.'
    )
  if not any(row.action in ('merged', 'average') for row in rows):
    raise ValueError(
      f'Nothing would be merged: include={config.included!r}, exclude='
      f'{config.exclude!r} leave no tensor to {config.method}. Names are such '
      f'as {list(base.tensors)[:3]}.'
    )
  if headed is not None:
    why = f'a head of {headed.label}: --heads {headed.label}'
    rows += [
      Row(n, _as(config, t), 'head', why)
      for n, t in headed.heads.items()
      if not _is_shared(n, base, experts)
    ]
  return Plan(rows, headed)


def peak_bytes(config: MergeConfig, plan: Plan) -> int:
  """About how much memory the largest tensor takes while it is merged.

  Args:
    config: The settings.
    plan: What `make` made.

  Returns:
    Bytes. Counted are float32 copies of the tensor: its task vectors and as
    many as the method has beside them.
  """
  # Measured by benchmarks.scaling.merge_memory.
  beside = {'average': 6, 'tsv': 9, 'doge': 20}.get(config.method, 5)
  count = 0 if config.method == 'average' else len(config.folders)
  sizes = {'merged': count + beside, 'average': 6, 'base': 1, 'head': 1}
  return max(
    4 * sizes.get(row.action, 0) * math.prod(row.tensor.shape)
    for row in plan.rows
  )


def _headed(config: MergeConfig, experts: Sequence[Folder]) -> Folder | None:
  """The expert whose heads are taken."""
  if config.heads in ('base', 'each'):
    return None
  found = [e for e in experts if e.label == config.heads]
  choices = ('base', 'each', *(e.label for e in experts))
  if not found:
    raise ValueError(
      f'Unknown heads {config.heads!r}; expected one of {choices}.'
    )
  if not found[0].heads:
    raise ValueError(f'--heads {config.heads}: {found[0].path} has no head.')
  return found[0]


def _row(
  config: MergeConfig,
  base: Folder,
  experts: Sequence[Folder],
  headed: Folder | None,
  tensor: Tensor,
) -> Row:
  """What becomes of a tensor of the base."""
  name = tensor.name
  # The names of a model with a head, which its config.json speaks of.
  new = (
    tensor if headed is None else tensor._replace(name=headed.own_name(name))
  )
  new = _as(config, new)
  if not tensor.is_float:
    return Row(name, new, 'base', 'holds no floating-point numbers')
  if name == LM_HEAD and base.ties:
    return Row(name, tensor, 'left out', 'tied: the embedding is the head')
  if is_head(name) and not _is_shared(name, base, experts):
    if headed is not None:
      return Row(name, tensor, 'left out', f'--heads {headed.label}')
    return Row(name, new, 'base', f'a head: --heads {config.heads}')
  if _is_excluded(config, name):
    return Row(name, new, 'base', f'--exclude {config.exclude}')
  if not re.search(config.included, name):
    why = f'not included by {config.included}'
  elif config.method in methods.MATRICES_ONLY and len(tensor.shape) != 2:
    why = f'{config.method} merges matrices'
  elif config.method == 'tsv' and is_thin(tensor.shape, len(experts)):
    why = f'tsv has no direction for each of {len(experts)} experts'
  else:
    return Row(name, new, 'merged', f'--method {config.method}')
  return Row(name, new, config.of_others, f'{why}: --others {config.of_others}')


def _is_shared(name: str, base: Folder, experts: Sequence[Folder]) -> bool:
  """Whether a head is that of language models of one vocabulary."""
  if name != LM_HEAD or name not in base.tensors:
    return False
  shape = base.tensors[name].shape
  return all(
    expert.is_adapter
    or (name in expert.tensors and expert.tensors[name].shape == shape)
    for expert in experts
  )


def _is_excluded(config: MergeConfig, name: str) -> bool:
  return config.exclude is not None and bool(re.search(config.exclude, name))


def _as(config: MergeConfig, tensor: Tensor) -> Tensor:
  """The tensor in the dtype that is written."""
  if config.dtype == 'base' or not tensor.is_float:
    return tensor
  return tensor._replace(dtype=_CODES[config.dtype])


def _problems(
  config: MergeConfig,
  base: Folder,
  experts: Sequence[Folder],
  headed: Folder | None,
  rows: Sequence[Row],
) -> list[str]:
  """All that does not fit, a line each."""
  problems = []
  for expert in experts:
    for row in rows:
      problems += _misfit(config, base, expert, row)
      if expert is headed:
        problems += _misfit_of_headed(config, base, expert, row)
    for name, tensor in expert.tensors.items():
      is_own_head = is_head(name) and not expert.is_adapter
      is_known = name in base.tensors or is_own_head
      if not is_known and not _is_excluded(config, name):
        problems.append(
          f'{tensor.name}: {expert.label} has it, the base has no such tensor'
        )
    if not expert.is_adapter and expert.ties != base.ties:
      heads = LM_HEAD in expert.tensors or LM_HEAD in base.tensors
      if heads and not _is_excluded(config, LM_HEAD):
        which = ('the base', expert.label)
        tied, untied = which if base.ties else which[::-1]
        problems.append(
          f'{LM_HEAD}: {tied} ties its head to its embedding, {untied} does '
          "not; to drop or keep the latter's: --exclude '^lm_head'"
        )
  return problems


def _misfit(
  config: MergeConfig, base: Folder, expert: Folder, row: Row
) -> list[str]:
  """What is wrong with a tensor of an expert."""
  is_merged = row.action in ('merged', 'average')
  old, new = base.tensors[row.name], expert.tensors.get(row.name)
  if new is None:
    if is_merged and not expert.is_adapter:
      return [f'{row.name}: {expert.label} lacks it']
    return []
  is_tied = row.name == LM_HEAD and base.ties
  if is_tied and expert.is_adapter and not _is_excluded(config, row.name):
    return [
      f'{row.name}: {expert.label} adapts it, and the base ties it to its '
      "embedding; to go without: --exclude '^lm_head'"
    ]
  is_kept = row.action == 'left out' or _is_excluded(config, row.name)
  if is_kept or (is_head(row.name) and not is_merged):
    return []
  if new.shape != old.shape:
    return [
      f'{row.name}: {list(old.shape)} in the base, {list(new.shape)} in '
      f'{expert.label}{_hint(row.name, old, new)}'
    ]
  if is_merged and new.dtype not in DTYPES:
    return [f'{row.name}: {new.dtype} in {expert.label}, no float']
  return []


def _misfit_of_headed(
  config: MergeConfig, base: Folder, expert: Folder, row: Row
) -> list[str]:
  """What of the base does not fit the config.json of an expert."""
  old, new = base.tensors[row.name], expert.tensors.get(row.name)
  if not _is_excluded(config, row.name) or row.action == 'left out':
    return []
  if new is None or new.shape == old.shape:
    return []
  return [
    f'{row.name}: {list(old.shape)} in the base, {list(new.shape)} in '
    f'{expert.label}, whose config.json --heads {expert.label} takes: use '
    '--heads base or each'
  ]


def _hint(name: str, old: Tensor, new: Tensor) -> str:
  """What helps where vocabularies differ."""
  is_vocabulary = 'embed' in name or name == LM_HEAD
  if not is_vocabulary or old.shape[1:] != new.shape[1:]:
    return ''
  return (
    f' (vocabularies of {old.shape[0]} and {new.shape[0]} tokens: --exclude '
    f"'{name}' merges the rest, with the base's embedding and tokenizer)"
  )
