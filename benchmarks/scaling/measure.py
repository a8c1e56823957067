"""How the cost grows: with the parameters, with the rank, with the devices.

  python -m benchmarks.scaling                      # all parts, as below
  python -m benchmarks.scaling time --minutes 3     # on a quiet machine
  python -m benchmarks.scaling state devices plan   # these time nothing

Each part is a process of its own and replaces its own rows in the JSON file, so
that parts can be made on different days and machines: each names its own, and
each row its commit. --resume goes on with a part that was interrupted. The
models are LLaMAs of the published presets, 9m to 7b; the rank is a quarter of
the width unless a row says otherwise; `8 bits` means moments and bases.

state     Bytes of the optimizer state, counted from shapes alone: of every
          preset, and of 7b at several ranks.
time      Seconds of the optimizer step (update and addition, all weights of the
          model, float32, random gradients, bases refreshed in turn over 200
          steps, with the aliases' guard against gradients that are not finite,
          which benchmarks.step leaves out), 9m to 350m, and of 60m at several
          ranks; and of the whole training step on 4 x 128 random tokens, 9m
          to 60m. Within a size all methods take turns of a few steps in one
          process, in an order that alternates. The sizes come one after the
          other: a machine that slows down between them bends the curve, but
          not the ratio to AdamW.
devices   Compiled steps of a LLaMA of width 512, 8 layers, rank 64, vocabulary
          4096, float32, 16 x 128 tokens in two micro-batches, on meshes of 1,
          2, 4 and 8 forced CPU devices. Nothing runs: devices that share the
          cores of one machine cannot show any speed-up.
plan      The same of 1b and 7b (bfloat16, remat, 16 x 256 tokens a device) on
          1, 8 and 64 described H100s, 8 to a machine, by XLA's own compiler for
          GPUs. It needs the extra `cuda` and no GPU.

What the columns mean:
  exponent     b of cost = a * parameters^b, fitted to the logarithms over all
               sizes; behind it that of the two largest sizes alone. Embedding
               and head are most of a small model and little of a large one, so
               no single power fits all
  of AdamW     median over the rounds of the ratio to AdamW's turn in the same
               round, quartiles in brackets
  on a device  bytes of the compiled step on one device: arguments, outputs and
               temporaries, less what outputs share with arguments
  sent         bytes of the arrays that are summed, gathered or scattered in a
               step, on one device, times the turns of the loops around them.
               (What crosses a wire depends on the algorithm: a ring of n sends
               (n - 1) / n of them, and twice that to sum.)
  refreshes    those in loops of unknown length or in conditionals, one turn of
               each: what refitting bases adds. In most steps no loop turns
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# After `harness`, which sets what must be set before it.
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import harness, methods, programs, record
from benchmarks.scaling import scaling_report, state_bytes
from gnlorp_jax import config
from gnlorp_jax.models import llama
from gnlorp_jax.plan import accelerators
from gnlorp_jax.plan.collectives import collectives
from gnlorp_jax.recipes.pretrain import recipe

RESULTS = pathlib.Path('benchmarks/results/scaling.json')
PLOT = pathlib.Path('docs/results/scaling.png')
PARTS = ('state', 'time', 'devices', 'plan')
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
  'adamw': ('adamw', {}),
  'galore': ('galore', {}),
  'gradnormlorp': ('gradnormlorp', {}),
  'gradnormlorp, 8 bits': ('gradnormlorp', {'moment_bits': 8, 'basis_bits': 8}),
}
"""Name in the tables: alias of gnlorp_jax.optim, and its options."""
SIZES = tuple(llama.PRESETS)
RANKED = '7b', (128, 256, 512, 1024, 2048)
TIMED = ('9m', '20m', '60m', '130m', '350m')
TIMED_RANKED = '60m', (32, 64, 128, 256)
TRAINED = ('9m', '20m', '60m')
RATE = 1e-6
GAP = 200  # Steps between two refreshes of a basis.
ROUNDS = (2, 8)  # At least, where time is short, and at most.
TURN = 2  # Steps.
TOKENS = (4, 128)

DEVICES = (1, 2, 4, 8)
SMALL = llama.LlamaConfig(
  vocab_size=4096,
  hidden_size=512,
  intermediate_size=1376,
  num_layers=8,
  num_heads=8,
  max_seq_len=128,
)
STEPS: dict[str, dict[str, Any]] = {
  'whole': {'mode': 'whole'},
  'layerwise, gradient': {'mode': 'layerwise'},
  'layerwise, projected': {'mode': 'layerwise', 'accumulate': 'projected'},
}
GPU = 'h100'
GPUS_PER_MACHINE = 8
PLANNED = ('7b', '1b')
MESHES = ((8, 8), (1, 8), (8, 1), (1, 1))  # data, fsdp.
# Without LLVM's optimizations: buffers are assigned, and collectives chosen,
# before. On a GPU the fastest kernels cannot be found by trying.
CPU_OPTIONS = {'xla_backend_optimization_level': 0}
GPU_OPTIONS = {'xla_gpu_autotune_level': 0}

Row = dict[str, Any]


class Case(NamedTuple):
  """What is measured together, and what its rows are called without figures."""

  key: Row
  measure: Callable[[harness.Clock], list[Row]]


def optimizer(
  method: str, rank: int, learning_rate: float = RATE
) -> optax.GradientTransformation:
  """A row's optimizer."""
  alias, options = METHODS[method]
  return methods.build(
    *(alias, options),
    **{'learning_rate': learning_rate, 'rank': rank, 'update_proj_gap': GAP},
  )


def count_parameters(tree: Any) -> int:
  """Elements of all arrays."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def quarter(size: str) -> int:
  """The rank of a preset's rows: a quarter of its width."""
  return llama.PRESETS[size].hidden_size // 4


# State.


def state_row(key: Row) -> list[Row]:
  """Bytes of an optimizer's state; nothing is allocated."""
  shapes = state_bytes.shapes_of(key['size'])
  parts = state_bytes.count(optimizer(key['method'], key['rank']), shapes)
  return [
    {
      **key,
      'parameters': count_parameters(shapes),
      'bytes': sum(parts.values()),
      **{f'{part}_bytes': size for part, size in parts.items()},
    }
  ]


def state_cases() -> Iterator[Case]:
  """Every preset, then one preset at several ranks."""
  size, ranks = RANKED
  settings = [('parameters', name, quarter(name)) for name in SIZES]
  settings += [('rank', size, rank) for rank in ranks]
  for (against, name, rank), method in itertools.product(settings, METHODS):
    if against == 'rank' and method == 'adamw':
      continue
    key = {'against': against, 'size': name, 'rank': rank, 'method': method}
    yield Case(key, lambda clock, key=key: state_row(key))


# Time.


class Racer:
  """A step that takes turns with others.

  Args:
    key: What it is.
    compile_s: What compiling it took.
    step: Takes a step, which is finished when it returns. The first one, which
      fits all bases, is taken here.
  """

  def __init__(self, key: Row, compile_s: float, step: Callable[[], None]):
    self.key, self.compile_s, self._step = key, compile_s, step
    self.turns: list[list[float]] = []
    self.turn(1)
    ((self.first_s,),) = self.turns
    self.turns.clear()

  def turn(self, steps: int) -> None:
    """Takes and times some steps."""
    seconds = []
    for _ in range(steps):
      start = time.perf_counter()
      self._step()
      seconds.append(time.perf_counter() - start)
    self.turns.append(seconds)


class Weights:
  """Weights and gradients of a preset; all optimizers update the same ones."""

  def __init__(self, size: str):
    def random(seed: int, scale: float) -> Any:
      shapes = state_bytes.shapes_of(size)
      leaves, tree = jax.tree.flatten(shapes)
      keys = jax.random.split(jax.random.key(seed), len(leaves))
      return tree.unflatten(
        [
          scale * jax.random.normal(key, leaf.shape)
          for key, leaf in zip(keys, leaves, strict=True)
        ]
      )

    self.weights = jax.jit(random, static_argnums=(0, 1))(0, 0.02)
    self.gradients = jax.jit(random, static_argnums=(0, 1))(1, 1e-3)


def optimizer_racer(key: Row, data: Weights) -> Racer:
  """The update of all weights by one optimizer, compiled."""
  tx = optimizer(key['method'], key['rank'])

  def step(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, weights)
    return optax.apply_updates(weights, updates), state

  state = jax.jit(tx.init)(data.weights)
  start = time.perf_counter()
  compiled = (
    jax.jit(step, donate_argnums=(0, 1))
    .lower(data.weights, state, data.gradients)
    .compile()
  )
  compile_s = time.perf_counter() - start

  def take() -> None:
    nonlocal state
    data.weights, state = jax.block_until_ready(
      compiled(data.weights, state, data.gradients)
    )

  return Racer(key, compile_s, take)


def training_racer(key: Row) -> Racer:
  """The whole training step of one optimizer, compiled."""
  batch_size, seq_len = TOKENS
  model = llama.preset(key['size'])
  run = run_of(model, key, batch_size=batch_size, seq_len=seq_len)
  planned = recipe.plan(run, jax.devices()[:1])
  start = time.perf_counter()
  compiled = programs.lower(planned).compile()
  compile_s = time.perf_counter() - start
  state, frozen = programs.start(planned)
  tokens = np.random.default_rng(0).integers(
    *(0, model.vocab_size, (batch_size, seq_len + 1)), dtype=np.int32
  )
  batch = {
    'inputs': jnp.asarray(tokens[:, :-1]),
    'targets': jnp.asarray(tokens[:, 1:]),
    'weights': jnp.ones(TOKENS),
  }

  def take() -> None:
    nonlocal state
    state, _ = jax.block_until_ready(compiled(state, batch, frozen))

  return Racer(key, compile_s, take)


def race(
  keys: list[Row],
  make: Callable[[Row], Racer],
  parameters: int,
  clock: harness.Clock,
) -> list[Row]:
  """Times some steps in turns; one that fails is a row with the reason."""
  racers, failed = [], []
  for key in keys:
    try:
      racers.append(make(key))
    except Exception as error:
      failed.append({**key, **reason(error)})
  least, most = ROUNDS
  for number in range(most):
    if number >= least and not clock.seconds_left:
      break
    for racer in racers[:: -1 if number % 2 else 1]:
      racer.turn(TURN)
  return scaling_report.timed_rows(racers, parameters) + failed


def optimizer_race(keys: list[Row], clock: harness.Clock) -> list[Row]:
  """All optimizers on one set of weights."""
  data = Weights(keys[0]['size'])
  return race(
    keys,
    lambda key: optimizer_racer(key, data),
    count_parameters(data.weights),
    clock,
  )


def training_race(keys: list[Row], clock: harness.Clock) -> list[Row]:
  """All training steps of one preset."""
  parameters = count_parameters(state_bytes.shapes_of(keys[0]['size']))
  return race(keys, training_racer, parameters, clock)


def time_cases() -> Iterator[Case]:
  """The optimizer step by size, the training step, the rank; by their worth.

  The largest size comes last: it takes as long as all others.
  """
  *sizes, largest = TIMED
  ranked, ranks = TIMED_RANKED

  def case(what: str, size: str, pairs: list[tuple[str, int]]) -> Case:
    key = {'step': what, 'against': 'parameters', 'size': size}
    keys = [{**key, 'method': method, 'rank': rank} for method, rank in pairs]
    run = training_race if what == 'training' else optimizer_race
    return Case(key, functools.partial(run, keys))

  def all_methods(what: str, size: str, *left_out: str) -> Case:
    chosen = [name for name in METHODS if name not in left_out]
    return case(what, size, [(name, quarter(size)) for name in chosen])

  yield from (all_methods('optimizer', size) for size in sizes)
  for size in TRAINED:
    yield all_methods('training', size, 'galore', 'gradnormlorp, 8 bits')
  pairs = itertools.product(('galore', 'gradnormlorp'), ranks)
  by_rank = case('optimizer', ranked, [('adamw', 0), *pairs])
  yield Case(
    {**by_rank.key, 'against': 'rank'},
    lambda clock: [{**r, 'against': 'rank'} for r in by_rank.measure(clock)],
  )
  yield all_methods('optimizer', largest)


# Devices.


def run_of(
  model: llama.LlamaConfig,
  key: Row,
  *,
  batch_size: int,
  seq_len: int,
  micro_batches: int = 1,
) -> config.TrainConfig:
  """A training run: a row's method, rank, mesh and step."""
  alias, options = METHODS[key['method']]
  return config.TrainConfig(
    steps=1000,
    batch_size=batch_size,
    micro_batches=micro_batches,
    model=model,
    data=config.DataConfig(seq_len=seq_len),
    optim=config.OptimConfig(
      name=alias,
      rank=None if alias == 'adamw' else key['rank'],
      learning_rate=RATE,
      clip_global_norm=None,
      **options,
    ),
    step=config.StepConfig(**STEPS.get(key['step'], {})),
    mesh=config.MeshConfig(data=key.get('data', 1), fsdp=key.get('fsdp', 1)),
  )


def compiled_row(key: Row, planned: recipe.Planned, options: Row) -> Row:
  """What a compiled step takes on a device, and sends."""
  compiled = programs.lower(planned).compile(compiler_options=options)
  found = compiled.memory_analysis()
  rows = collectives(compiled.as_text())
  certain = [
    c for c in rows if c.bytes_per_step is not None and not c.conditionals
  ]
  kinds: dict[str, int] = {}
  for c in certain:
    kinds[c.kind] = kinds.get(c.kind, 0) + c.bytes_per_step
  params = jax.tree.leaves(planned.program.abstract_state.params)
  return {
    **key,
    'parameters': sum(p.size for p in params),
    'parameter_bytes': sum(p.size * p.dtype.itemsize for p in params),
    'device_bytes': found.argument_size_in_bytes
    + found.output_size_in_bytes
    + found.temp_size_in_bytes
    - found.alias_size_in_bytes,
    'temporary_bytes': found.temp_size_in_bytes,
    'bytes_per_step': sum(kinds.values()),
    'bytes_by_kind': kinds,
    'refresh_bytes': sum(
      c.instructions * c.bytes_each * math.prod(n or 1 for n in c.loops)
      for c in rows
      if c not in certain
    ),
    'collectives': [c._asdict() for c in rows],
  }


def device_row(key: Row) -> list[Row]:
  """The small model on forced CPU devices."""
  count = key['data'] * key['fsdp']
  if count > len(jax.devices()):
    raise methods.AbsentError(f'{len(jax.devices())} devices, not {count}')
  run = run_of(SMALL, key, batch_size=16, seq_len=128, micro_batches=2)
  planned = recipe.plan(run, jax.devices()[:count])
  return [compiled_row(key, planned, CPU_OPTIONS)]


def planned_row(key: Row) -> list[Row]:
  """A preset on described GPUs, as many sequences on each of them."""
  if not accelerators.compiler_is_installed():
    raise methods.AbsentError("XLA's GPU compiler, of the extra cuda, is not")
  count = key['data'] * key['fsdp']
  model = llama.preset(
    key['size'],
    **{'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16', 'remat': True},
  )
  run = run_of(model, key, batch_size=16 * count, seq_len=256)
  devices = accelerators.described_devices(
    accelerators.ACCELERATORS[GPU], count, -(-count // GPUS_PER_MACHINE)
  )
  return [compiled_row(key, recipe.plan(run, devices), GPU_OPTIONS)]


def device_cases() -> Iterator[Case]:
  """Every mesh along one axis; all steps, and AdamW's as a yardstick."""
  meshes = [(n, 1) for n in DEVICES] + [(1, n) for n in DEVICES if n > 1]
  rows = [('gradnormlorp', step) for step in STEPS]
  rows += [('adamw', 'whole'), *(('galore', step) for step in STEPS)]
  for (method, step), (data, fsdp) in itertools.product(rows, meshes):
    key = {
      **{'method': method, 'step': step, 'rank': 64},
      **{'data': data, 'fsdp': fsdp},
    }
    yield Case(key, lambda clock, key=key: device_row(key))


def plan_cases() -> Iterator[Case]:
  """The larger model first; 8-bit states, and AdamW's as a yardstick."""
  ours, largest = 'gradnormlorp, 8 bits', PLANNED[0]
  kinds = itertools.product(PLANNED, (ours,), ('layerwise, gradient', 'whole'))
  kinds = [*kinds, (largest, 'adamw', 'whole')]
  for (size, method, step), (data, fsdp) in itertools.product(kinds, MESHES):
    key = {
      **{'size': size, 'method': method, 'step': step},
      **{'rank': quarter(size), 'data': data, 'fsdp': fsdp},
    }
    yield Case(key, lambda clock, key=key: planned_row(key))


# All parts.

sizes = scaling_report.sizes  # For benchmarks.check.
CASES: dict[str, Callable[[], Iterator[Case]]] = {
  'state': state_cases,
  'time': time_cases,
  'devices': device_cases,
  'plan': plan_cases,
}


def reason(error: Exception) -> Row:
  """Why a row has no figures: what is absent, or an error's first line."""
  if isinstance(error, methods.AbsentError):
    return {'absent': str(error)}
  first = str(error).partition('\n')[0]
  return {'error': f'{type(error).__name__}: {first}'}


def measure(
  part: str,
  clock: harness.Clock,
  save: Callable[[Row], None],
  known: Sequence[Row] = (),
) -> None:
  """Measures a part.

  Args:
    part: One of `PARTS`.
    clock: What no longer fits its time is left out.
    save: Given all rows, and the names of those left out, after every case.
    known: Rows that need not be measured again.
  """
  commit = record.commit()
  cases = list(CASES[part]())
  found = [
    [row for row in known if case.key.items() <= row.items()] for case in cases
  ]
  left_out: list[Row] = []
  for number, case in enumerate(cases):
    if found[number]:
      continue
    if clock.seconds_left:
      name = ', '.join(str(value) for value in case.key.values())
      harness.progress(f'{part}: {name}')
      try:
        rows = case.measure(clock.share(len(cases) - number))
      except Exception as error:
        rows = [{**case.key, **reason(error)}]
      found[number] = [{**row, 'commit': commit} for row in rows]
    else:
      left_out.append(case.key)
    save({'rows': list(itertools.chain(*found)), 'left_out': left_out})


def in_this_process(part: str, args: argparse.Namespace) -> None:
  """Measures one part, and writes file, plot and tables."""
  if part == 'devices':
    jax.config.update('jax_num_cpu_devices', max(DEVICES))
  if part != 'time':  # The others compile, on any machine's CPUs.
    args = argparse.Namespace(**{**vars(args), 'device': 'cpu'})
  clock = harness.start(args)
  found = load(args.output)
  header = harness.environment()

  def save(rows: Row) -> None:
    found['parts'][part] = {'environment': header, **rows}
    record.write(args.output, found)

  known = found['parts'].get(part, {}).get('rows', []) if args.resume else []
  known = [r for r in known if not {'absent', 'error'} & r.keys()]
  measure(part, clock, save, known)
  args.plot.parent.mkdir(parents=True, exist_ok=True)
  scaling_report.plot(found).savefig(args.plot, dpi=120)
  sys.stdout.write(scaling_report.tables(found, part))


def load(path: pathlib.Path) -> dict[str, Any]:
  """The parts that were measured before."""
  if not path.exists():
    return {'parts': {}}
  return json.loads(path.read_text())


def main() -> None:
  """Measures the parts, each in a process of its own."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'parts', nargs='*', metavar='PART', help=f'of {", ".join(PARTS)}: all'
  )
  harness.add_arguments(parser, RESULTS, minutes=15)
  parser.add_argument(
    '--plot',
    type=pathlib.Path,
    default=PLOT,
    help='image of all parts that are in the JSON file (default: %(default)s)',
  )
  parser.add_argument(
    '--resume',
    action='store_true',
    help='keep the rows that the JSON file has, and measure the others',
  )
  args = parser.parse_args()
  for part in args.parts:
    if part not in PARTS:
      parser.error(f'no part {part!r}; there are {", ".join(PARTS)}.')
  parts = args.parts or list(PARTS)
  if len(parts) == 1:
    in_this_process(parts[0], args)
    return
  clock = harness.Clock(args.minutes)
  for done, part in enumerate(parts):
    minutes = clock.share(len(parts) - done).seconds_left / 60
    command = [sys.executable, '-m', 'benchmarks.scaling', part]
    for name in ('device', 'output', 'plot'):
      command += [f'--{name}', str(getattr(args, name))]
    command += ['--resume'] if args.resume else []
    subprocess.run([*command, '--minutes', str(minutes)], check=True)


if __name__ == '__main__':
  main()
