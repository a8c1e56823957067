"""Tells whether a run fits a GPU, and what would make it fit, without a GPU.

It takes the options of train_lm.py and three of its own: --device, --devices
and --json. Weights and optimizer state are counted exactly. With the CUDA
wheels (pip install 'gnlorp_jax[cuda]'), XLA compiles the training step for the
GPU and says what it takes; without them the rest is a lower bound. If the run
does not fit, changes that lower its memory are tried one by one.

  python -m gnlorp_jax.plan --config configs/llama_7b.py --device rtx4090
  python -m gnlorp_jax.plan --config configs/llama_7b.py --devices 8 \
    --mesh.fsdp 8 --json plan.json
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table

from gnlorp_jax import build, config, optim
from gnlorp_jax.accelerators import (
  ACCELERATORS,
  RESERVED,
  Accelerator,
  check_name,
  compiler_is_installed,
  described_devices,
)
from gnlorp_jax.collectives import Collective, collectives
from gnlorp_jax.training import sharding

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(config.TrainConfig):
  """A training run, and the GPUs to plan it for."""

  device: str = 'h100'
  """The GPU: rtx4090, rtx4060ti (16 GB), a100 (80 GB), h100 or h200."""
  devices: int = 1
  """Number of these GPUs, in one machine."""
  json: str | None = None
  """File to write the plan to as JSON; '-' prints it instead of the tables."""

  def __post_init__(self):
    super().__post_init__()
    check_name(self.device)
    if self.devices < 1:
      raise ValueError(
        f'PlanConfig.devices must be at least 1, got {self.devices}.'
      )


class Plan(NamedTuple):
  """Bytes of a run on one of its devices; the components add up to the peak.

  Attributes:
    components: Bytes by component, in the order of `LABELS`. What is not known
      apart is missing.
    xla: The buffer assignment of the compiled step; None makes the plan a lower
      bound.
    collectives: Communication of a step; None where nothing was compiled.
    mesh: Number of devices along each axis of the mesh.
  """

  components: dict[str, int]
  xla: dict[str, int] | None
  collectives: list[Collective] | None
  mesh: dict[str, int]

  @property
  def peak(self) -> int:
    """Bytes of the step at its largest; a lower bound without `xla`."""
    return sum(self.components.values())

  def fits(self, usable: int) -> bool | None:
    """Whether it fits `usable` bytes; None if a lower bound does not tell."""
    if self.peak > usable:
      return False
    return None if self.xla is None else True


class Suggestion(NamedTuple):
  """A change that lowers the memory of a run."""

  options: str  # For the command line.
  saves: int | None  # Bytes; None where only compiling would tell.
  peak: int  # Bytes after it; a lower bound unless compiled.
  compiled: bool
  fits: Literal['yes', 'no', 'perhaps', 'unlikely']


LABELS = {
  'weights': 'weights',
  'moments': 'moments',
  'bases': 'bases',
  'errors': 'errors',
  'other': 'other state',
  'batch': 'batch',
  'saved_activations': 'saved activations',
  'gradients': 'gradients',
  'temporaries': 'temporaries',
  'attention_workspace': 'attention workspace (estimated)',
}
"""Components of a plan and what the table calls them."""


def main(args: list[str]) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  logging.basicConfig(format='%(message)s', stream=sys.stderr, force=True)
  # XLA warns of programs larger than it likes; the table says so too. JAX has
  # set '1' already, and what a user sets stays.
  if os.environ.get('TF_CPP_MIN_LOG_LEVEL') == '1':
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
  # Nothing runs here: a GPU of this machine stays free for others.
  jax.config.update('jax_platforms', 'cpu')
  try:
    settings = config.parse(args, __doc__, PlanConfig)
    report(settings, args)
  except (ValueError, OSError) as error:
    config.exit_with_message(error)


def report(settings: PlanConfig, args: list[str]) -> None:
  """Plans a run and its alternatives, and prints or writes what it finds.

  Args:
    settings: The run.
    args: The command line it came from, for the record.
  """
  # With the JSON on standard output there is no place for tables.
  console = rich.console.Console(
    quiet=settings.json == '-', highlight=False, markup=False
  )
  if settings.json not in (None, '-'):
    folder = pathlib.Path(settings.json).parent
    if not folder.is_dir():
      raise ValueError(f'There is no folder {str(folder)!r} for json. Make it.')
  bound = lower_bound(settings)
  with quiet():  # The same program again has nothing new to warn of.
    plan = compiled(settings) if compiler_is_installed() else bound
    print_plan(console, settings, plan)
    found = []
    if plan.fits(ACCELERATORS[settings.device].usable) is False:
      found = suggestions(settings, plan, bound)
      print_suggestions(console, found)
  text = json.dumps(as_json(settings, args, plan, found), indent=2) + '\n'
  if settings.json == '-':
    sys.stdout.write(text)
  elif settings.json is not None:
    pathlib.Path(settings.json).write_text(text)


# Counting.


def lower_bound(settings: PlanConfig) -> Plan:
  """Counts what must exist at once in a step; compiles nothing.

  That is the state, the batch, the saved inputs of the blocks, and gradients:
  of a whole step those of everything but the embedding, whose own comes last,
  when the inputs are gone. Micro-batches add float32 sums of all gradients.
  Layer by layer it is the gradient of the largest matrix.
  """
  program = build.program(settings, settings.devices)
  return Plan(
    components={
      **counted(program),
      'saved_activations': block_inputs(program),
      'gradients': _gradients(program),
    },
    xla=None,
    collectives=None,
    mesh=dict(program.mesh.shape),
  )


def compiled(settings: PlanConfig) -> Plan:
  """Compiles the training step with XLA's own compiler for the GPU."""
  devices = described_devices(ACCELERATORS[settings.device], settings.devices)
  program = build.program(settings, devices)
  step = program.train_step.lower(
    program.abstract_state, program.abstract_batch
  ).compile(
    # The fastest kernels are found by trying them, for which a GPU is needed.
    compiler_options={'xla_gpu_autotune_level': 0}
  )
  text = step.as_text()
  xla = _buffer_assignment(step.memory_analysis())
  components = counted(program)
  if program.config.model.remat or settings.step.mode == 'layerwise':
    components['saved_activations'] = block_inputs(program)
  components['temporaries'] = xla['peak'] - sum(components.values())
  if '__cudnn$fmha' in text:
    components['attention_workspace'] = _attention_workspace(program)
  return Plan(
    components=components,
    xla=xla,
    collectives=collectives(text),
    mesh=dict(program.mesh.shape),
  )


def counted(program: build.Program) -> dict[str, int]:
  """Bytes on one device of what a step is given: exact, from the shardings."""
  state = jax.tree.map(_shard, program.abstract_state)
  components = {
    'weights': optim.inspect.tree_bytes(state.params),
    **optim.inspect.state_bytes(state.opt_state),
    'batch': optim.inspect.tree_bytes(
      jax.tree.map(_shard, program.abstract_batch)
    ),
  }
  components['other'] += optim.inspect.tree_bytes((state.step, state.skipped))
  return components


def block_inputs(program: build.Program) -> int:
  """Bytes on one device of the inputs of all blocks, ``[L, B, T, D]``."""
  c = program.config
  if c.step.offload:
    return 0
  # Layer by layer, exact sums need all micro-batches of a block at once.
  is_whole_batch = (
    c.step.mode == 'layerwise' and c.step.accumulate == 'gradient'
  )
  pieces = 1 if is_whole_batch else c.micro_batches
  tokens = c.batch_size // pieces * c.data.seq_len
  size = c.model.num_layers * tokens * c.model.hidden_size
  return size * jnp.dtype(c.model.compute_dtype).itemsize // program.mesh.size


def _gradients(program: build.Program) -> int:
  """Bytes on one device of the gradients that exist at once, at least."""
  c = program.config.model
  params = jax.eval_shape(program.model.init, jax.random.key(0))
  shardings = sharding.infer_shardings(params, program.mesh)
  shards = jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(s.shard_shape(leaf.shape), leaf.dtype),
    params,
    shardings,
  )
  parts = {
    name: optim.inspect.tree_bytes(part) for name, part in shards.items()
  }
  if program.config.step.mode == 'layerwise':
    stack = jax.tree.leaves(shards.pop('layers'))
    layer = max(map(optim.inspect.tree_bytes, stack)) // c.num_layers
    return max(layer, *map(optim.inspect.tree_bytes, jax.tree.leaves(shards)))
  sums = 0
  if program.config.micro_batches > 1:
    sums = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shards))
  return sums + sum(parts.values()) - parts['embed']


def _attention_workspace(program: build.Program) -> int:
  """What cuDNN is likely to ask for at run time, which XLA cannot know here.

  The backward pass of its fused attention adds up the gradient of the queries
  ``[B, T, N, H]`` in float32.
  """
  c = program.config
  tokens = c.batch_size // c.micro_batches * c.data.seq_len
  return 4 * tokens * c.model.hidden_size // program.mesh.size


def _shard(leaf: Any) -> jax.ShapeDtypeStruct:
  """The piece of an abstract array that one device holds."""
  shape = leaf.sharding.shard_shape(leaf.shape)
  return jax.ShapeDtypeStruct(shape, leaf.dtype)


def _buffer_assignment(stats: Any) -> dict[str, int]:
  """XLA's bytes; `peak` is what is allocated, donated arguments only once."""
  xla = {
    name: getattr(stats, f'{name}_size_in_bytes')
    for name in ('argument', 'output', 'temp', 'alias')
  }
  xla['peak'] = xla['argument'] + xla['output'] + xla['temp'] - xla['alias']
  return xla


# What would make it fit.

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
_MOST_COMPILED = 4


def suggestions(
  settings: PlanConfig, plan: Plan, bound: Plan
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
  left = 0 if plan.xla is None else _MOST_COMPILED
  for family in changes(settings):
    for change in family:
      suggestion = _try(settings, change, plan, bound, may_compile=left > 0)
      if suggestion is None:
        continue
      found.append(suggestion)
      left -= suggestion.compiled
      if suggestion.fits == 'yes':
        break
  order = ('yes', 'perhaps', 'unlikely', 'no')
  return sorted(found, key=lambda s: (order.index(s.fits), -(s.saves or 0)))


def _try(
  settings: PlanConfig,
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
    try:
      after = compiled(changed)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
      reason = str(error).partition('\n')[0]
      _logger.warning('%s cannot be compiled: %s', option_text(change), reason)
      return None
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


def changes(settings: PlanConfig) -> Iterator[list[Change]]:
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
    fresh = [
      {name: v for name, v in change.items() if field(settings, name) != v}
      for change in family
    ]
    yield [change for change in fresh if change]
  if rank := settings.optim.rank:
    yield [{'optim.rank': max(rank // by, 1)} for by in (2, 4)]
  mesh = sharding.make_mesh(
    settings.mesh.data, settings.mesh.fsdp, devices=settings.devices
  )
  # As many as the batch has pieces for.
  most = settings.batch_size // mesh.size
  pieces = sorted({settings.micro_batches * 2, most})
  yield [{'micro_batches': n} for n in pieces if n <= most]
  fsdp = mesh.shape['fsdp']
  if fsdp < settings.devices:
    yield [{'mesh.data': 1, 'mesh.fsdp': settings.devices}]
  yield [
    {'devices': times * settings.devices, 'mesh.fsdp': times * fsdp}
    for times in (2, 4, 8)
  ]


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
    options.append(option if value is True else f'{option} {value}')
  return ' '.join(options)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences what building a program warns of."""
  logger = logging.getLogger(build.__name__)
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


# Reporting.


def print_plan(
  console: rich.console.Console, settings: PlanConfig, plan: Plan
) -> None:
  """Prints the components of a plan, its verdict and its communication."""
  device = ACCELERATORS[settings.device]
  console.print(f'{device.description}: {_mesh_text(plan)}')
  table = rich.table.Table(box=rich.box.SIMPLE)
  table.add_column('on one device')
  table.add_column('GiB', justify='right')
  for name, size in plan.components.items():
    table.add_row(LABELS[name], gib(size))
  table.add_section()
  table.add_row('peak' if plan.xla else 'peak, at least', gib(plan.peak))
  table.add_row('memory', gib(device.memory))
  table.add_row('  of it for XLA, assumed', gib(device.usable))
  console.print(table)
  for sentence in _verdict(plan, device):
    console.print(sentence)
  if plan.collectives:
    _print_collectives(console, plan.collectives)


def _mesh_text(plan: Plan) -> str:
  data, fsdp = plan.mesh['data'], plan.mesh['fsdp']
  return f'{data * fsdp} in use, mesh data={data}, fsdp={fsdp}'


def _verdict(plan: Plan, device: Accelerator) -> Iterator[str]:
  """What the numbers mean, in sentences."""
  difference = gib(abs(device.usable - plan.peak))
  fits = plan.fits(device.usable)
  if fits:
    yield f'It fits, with {difference} GiB to spare.'
  elif fits is None:
    yield 'It may fit: the lower bound does.'
  else:
    yield f'It does not fit: {difference} GiB are missing.'
  if fits is not False and plan.peak > 0.75 * device.memory:
    yield (
      'JAX takes only 75 % of the memory unless told otherwise: set '
      f'XLA_PYTHON_CLIENT_MEM_FRACTION={device.fraction} in the environment.'
    )
  if plan.xla is None:
    yield (
      'This is a lower bound: activations inside a block, logits and what the '
      'optimizer computes come on top. For the exact figure install the CUDA '
      "wheels, for which no GPU is needed: pip install 'gnlorp_jax[cuda]'"
    )


def _print_collectives(
  console: rich.console.Console, rows: list[Collective]
) -> None:
  """Bytes of each kind of collective, those that may not happen apart."""
  console.print('\nCommunication of a step, on one device')
  table = rich.table.Table(box=rich.box.SIMPLE)
  table.add_column('collective')
  table.add_column('where')
  table.add_column('times', justify='right')
  table.add_column('GiB', justify='right')
  for row in summed(rows):
    table.add_row(
      row.kind,
      _place(row),
      '?' if row.times is None else str(row.times),
      '?' if row.bytes is None else gib(row.bytes),
    )
  console.print(table)


class Communication(NamedTuple):
  """All collectives of a kind at places alike."""

  kind: str
  loops: tuple[int | None, ...]
  conditionals: int
  times: int | None  # None in a loop whose turns XLA does not know.
  bytes: int | None  # Per step, every branch taken; None likewise.


def summed(rows: list[Collective]) -> list[Communication]:
  """Adds up collectives of all sizes, those of every step first."""
  groups: dict[tuple, list[Collective]] = {}
  for row in rows:
    key = row.kind, row.loops, row.conditionals
    groups.setdefault(key, []).append(row)
  found = []
  for (kind, loops, conditionals), members in groups.items():
    times = size = None
    if None not in loops:
      times = math.prod(loops) * sum(row.instructions for row in members)
      size = sum(row.bytes_per_step for row in members)
    found.append(Communication(kind, loops, conditionals, times, size))
  return sorted(found, key=lambda c: (None in c.loops, c.conditionals, c.kind))


def _place(row: Communication) -> str:
  """Where in the program, in words."""
  places = []
  if row.conditionals:
    places.append(
      'conditional' + f' x{row.conditionals}' * (row.conditionals > 1)
    )
  for turns in row.loops:
    places.append('loop of ' + ('?' if turns is None else str(turns)))
  return ', '.join(places) or 'once'


def print_suggestions(
  console: rich.console.Console, found: list[Suggestion]
) -> None:
  """Prints changes, what each saves, and whether it suffices."""
  console.print('\nWhat one change saves')
  table = rich.table.Table(box=rich.box.SIMPLE)
  table.add_column('option', no_wrap=True)
  table.add_column('saves GiB', justify='right')
  table.add_column('peak GiB', justify='right')
  table.add_column('fits')
  for row in found:
    table.add_row(
      row.options,
      '?' if row.saves is None else gib(row.saves),
      gib(row.peak) if row.compiled else f'>= {gib(row.peak)}',
      row.fits,
    )
  console.print(table)
  if any(row.fits in ('perhaps', 'unlikely') for row in found):
    console.print(
      'Where only the lower bound fits it says perhaps, or unlikely if the '
      'saving seems too small: plan with that option to know.'
    )
  if all(row.fits == 'no' for row in found):
    console.print('None of them suffices alone: combine some.')


def as_json(
  settings: PlanConfig,
  args: list[str],
  plan: Plan,
  found: list[Suggestion],
) -> dict[str, Any]:
  """Everything that was found out, in a form `json` writes; sizes in bytes."""
  device = ACCELERATORS[settings.device]
  return {
    'arguments': args,
    'device': {
      'name': settings.device,
      **device._asdict(),
      'reserved': RESERVED,
      'usable': device.usable,
    },
    'mesh': plan.mesh,
    'compiled': plan.xla is not None,
    'components': plan.components,
    'peak': plan.peak,
    'peak_is_lower_bound': plan.xla is None,
    'fits': plan.fits(device.usable),
    'xla': plan.xla,
    'collectives': plan.collectives
    and [
      {**row._asdict(), 'bytes_per_step': row.bytes_per_step}
      for row in plan.collectives
    ],
    'suggestions': [row._asdict() for row in found],
    'config': dataclasses.asdict(settings),
    'versions': versions(),
  }


def versions() -> dict[str, str | None]:
  """Versions of the packages that decide the numbers; None if absent."""
  found: dict[str, str | None] = {}
  for name in ('gnlorp_jax', 'jax', 'jaxlib', 'jax-cuda12-plugin'):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def gib(size: int) -> str:
  """Bytes in GiB, to the MiB."""
  return f'{size / 2**30:.3f}'


if __name__ == '__main__':
  main(sys.argv[1:])
