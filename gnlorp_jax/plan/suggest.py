"""What would make a run fit: changes of its settings, tried one at a time."""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax

from gnlorp_jax.plan.accelerators import ACCELERATORS
from gnlorp_jax.plan.count import Plan, compiled, lower_bound
from gnlorp_jax.plan.settings import Settings
from gnlorp_jax.training import sharding

_logger = logging.getLogger(__name__)


class Suggestion(NamedTuple):
  """A change that lowers the memory of a run."""

  options: str  # For the command line.
  saves: int | None  # Bytes; None where only compiling would tell.
  peak: int  # Bytes after it; a lower bound unless compiled.
  compiled: bool
  fits: Literal['yes', 'no', 'perhaps', 'unlikely']


Change = dict[str, Any]  # New values of dotted fields.

# Changes to try, in families that go from mild to harsh.
_FAMILIES: tuple[tuple[Change, ...], ...] = (
  (
    {'step.mode': 'layerwise'},
    {'step.mode': 'layerwise', 'step.offload': True},
    {'step.mode': 'layerwise', 'step.weight_bits': 8},
  ),
  ({'step.accumulate': 'projected'},),
  ({'model.remat': True},),
  ({'optim.moment_bits': 8}, {'optim.moment_bits': 4}),
  ({'optim.basis_bits': 16}, {'optim.basis_bits': 8}, {'optim.basis_bits': 4}),
  ({'optim.error_bits': 8}, {'optim.error_bits': 4}),
  ({'model.compute_dtype': 'bfloat16'},),
  ({'model.param_dtype': 'bfloat16'},),
)
# What these save is mostly outside of what a lower bound counts.
_ONLY_COMPILING_TELLS = {
  'step.mode',
  'step.accumulate',
  'step.clipping',
  'model.remat',
  'model.compute_dtype',
  'micro_batches',
  'mesh.fsdp',
}
# Compiling takes most of the time, about as long for each change as for the
# run itself.
MOST_COMPILED = 4


def suggestions(
  settings: Settings, plan: Plan, bound: Plan
) -> list[Suggestion]:
  """Tries changes one at a time; keeps those that save memory.

  A change whose lower bound is too large does not make the run fit. Of the
  others the first that are promising are compiled, where `plan` was. Once a
  value fits, no harsher one is tried.

  Args:
    settings: A run that does not fit.
    plan: Its plan.
    bound: Its lower bound.

  Returns:
    The changes, those that suffice first, then by the bytes they save.
  """
  found = []
  remaining = 0 if plan.xla is None else MOST_COMPILED
  for family in changes(settings):
    for change in family:
      suggestion = _try(
        settings, change, plan, bound, may_compile=remaining > 0
      )
      if suggestion is None:
        continue
      found.append(suggestion)
      remaining -= suggestion.compiled
      if suggestion.fits == 'yes':
        break
  order = ('yes', 'perhaps', 'unlikely', 'no')
  return sorted(found, key=lambda s: (order.index(s.fits), -(s.saves or 0)))


def _try(
  settings: Settings,
  change: Change,
  plan: Plan,
  bound: Plan,
  *,
  may_compile: bool,
) -> Suggestion | None:
  """What a change does; None if it saves nothing or is not possible."""
  usable = ACCELERATORS[settings.device].usable
  is_unknown = bool(_ONLY_COMPILING_TELLS & set(change))
  try:
    changed = replace(settings, change)
    after = lower_bound(changed)
    saves = bound.peak - after.peak
  except ValueError:
    return None  # The parts of the run rule it out.
  is_promising = is_unknown or plan.peak - saves <= usable
  is_compiled = may_compile and is_promising and after.peak <= usable
  if is_compiled:
    found = try_compiled(changed, option_text(change))
    if found is None:
      return None
    after = found
    saves = plan.peak - after.peak
  fits = after.fits(usable)
  # Where neither the saving is known nor its failure it stays a possibility.
  if saves <= 0 and not (is_unknown and fits is None):
    return None
  return Suggestion(
    options=option_text(change),
    saves=saves if saves > 0 else None,
    peak=after.peak,
    compiled=is_compiled,
    fits={
      True: 'yes',
      False: 'no',
      None: 'perhaps' if is_promising else 'unlikely',
    }[fits],
  )


def try_compiled(settings: Settings, name: str) -> Plan | None:
  """The compiled plan of a run called `name`; says so where there is none."""
  try:
    return compiled(settings)
  except (ValueError, jax.errors.JaxRuntimeError) as error:
    reason = str(error).partition('\n')[0]
    _logger.warning('%s cannot be compiled: %s', name, reason)
    return None


def changes(settings: Settings) -> Iterator[list[Change]]:
  """Changes to try, in families that go from mild to harsh.

  Args:
    settings: The run to change.

  Yields:
    New values of dotted fields, without those that are so already.
  """
  clips = settings.optim.clip_global_norm is not None
  waits = clips or settings.step.accumulate == 'projected'
  # Then projected gradients of all blocks are kept.
  waiting: tuple[Change, ...] = ()
  if settings.step.mode == 'layerwise' and waits:
    waiting = ({'step.accumulate': 'gradient', 'step.clipping': 'recompute'},)
  for family in (waiting, *_FAMILIES):
    yield _fresh(settings, *family)
  is_adapted = settings.adapter.kind is not None
  if is_adapted:
    yield _fresh(settings, *({'step.weight_bits': n} for n in (8, 4)))
  if rank := settings.optim.rank:
    yield [{'optim.rank': max(rank // by, 1)} for by in (2, 4)]
  # Weights that are drawn at random have to train themselves.
  if settings.init_from is not None and not is_adapted:
    lora: Change = {'adapter.kind': 'lora'}
    bits = ({**lora, 'step.weight_bits': n} for n in (8, 4))
    yield _fresh(settings, lora, *bits)
  mesh = sharding.make_mesh(
    settings.mesh.data, settings.mesh.fsdp, devices=settings.devices
  )
  # Every device takes part in every micro-batch.
  most = settings.batch_size // mesh.size
  counts = sorted({settings.micro_batches * 2, most})
  yield [{'micro_batches': n} for n in counts if n <= most]
  fsdp = mesh.shape['fsdp']
  if fsdp < settings.devices:
    yield [{'mesh.data': 1, 'mesh.fsdp': settings.devices}]
  yield [
    {'devices': times * settings.devices, 'mesh.fsdp': times * fsdp}
    for times in (2, 4, 8)
  ]


def _fresh(settings: Settings, *family: Change) -> list[Change]:
  """The changes without what is so already, or of more bits than there are."""
  bits = field(settings, 'step.weight_bits') or 32
  fresh = [
    {name: v for name, v in change.items() if field(settings, name) != v}
    for change in family
    if change.get('step.weight_bits', 0) <= bits
  ]
  return [change for change in fresh if change]


def field(settings: Any, name: str) -> Any:
  """The value of a dotted field."""
  return functools.reduce(getattr, name.split('.'), settings)


def replace(settings: Any, change: Change) -> Any:
  """The configuration with other values of dotted fields."""
  # Fields of a group are replaced together: some need each other.
  groups: dict[str, Change] = {}
  values: Change = {}
  for name, value in change.items():
    first, _, rest = name.partition('.')
    if rest:
      groups.setdefault(first, {})[rest] = value
    else:
      values[first] = value
  for first, inner in groups.items():
    values[first] = dataclasses.replace(getattr(settings, first), **inner)
  return dataclasses.replace(settings, **values)


def option_text(change: Change) -> str:
  """A change as options of the command line."""
  options = []
  for name, value in change.items():
    option = f'--{name}'.replace('_', '-')
    if value is False:
      group, _, flag = option.rpartition('.')
      options.append(f'{group}.no-{flag}')
    else:
      options.append(option if value is True else f'{option} {value}')
  return ' '.join(options)
