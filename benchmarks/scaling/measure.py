"""How the cost grows: with the parameters, with the rank, with the devices.

  python -m benchmarks.scaling                      # all parts, as below
  python -m benchmarks.scaling time --minutes 3     # on a quiet machine
  python -m benchmarks.scaling state devices plan   # these time nothing

Each part is a process of its own and replaces its own rows in the JSON file.
The models are LLaMAs of the published presets, 9m to 7b; the rank is a quarter
of the width unless a row says otherwise; `8 bits` means moments and bases.

state     Bytes of the optimizer state from shapes: of every preset, and of 7b
          at several ranks.
time      Seconds of the optimizer step on all weights of a model, float32,
          bases refreshed in turn over 200 steps, by size and by rank; and of
          the whole training step on 4 x 128 tokens. Methods take turns; sizes
          do not: a machine that slows down bends the curve, not the ratio.
devices   Compiled steps of a small LLaMA on meshes of 1 to 8 forced CPU
          devices; nothing runs.
plan      The same of 1b and 7b on 1, 8 and 64 described H100s, by XLA's own
          compiler for GPUs. It needs the extra `cuda` and no GPU.

What the columns mean:
  exponent     b of cost = a * parameters^b over all sizes (how far the worst
               one lies off it); behind it that of the two largest alone
  of AdamW     median ratio to AdamW's turn in the same round, [quartiles]
  on a device  bytes of the compiled step on one device: arguments, outputs and
               temporaries, less what outputs share with arguments
  sent         bytes of the arrays that are summed, gathered or scattered in a
               step, on one device, times the turns of the loops around them
  refreshes    those in loops of unknown length or in conditionals, one turn of
               each: what refitting bases adds. In most steps no loop turns
"""

import argparse
import functools
import itertools
import math
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

# After `harness`, which sets what must be set before it.
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import report
from benchmarks.common import cases, harness, methods, programs, turns
from benchmarks.common.cases import Case, Row
from benchmarks.common.plots import save
from benchmarks.scaling import picture, state_bytes
from benchmarks.scaling import tables as scaling_tables
from gnlorp_jax import config
from gnlorp_jax.models import llama
from gnlorp_jax.plan import accelerators
from gnlorp_jax.plan.collectives import collectives
from gnlorp_jax.recipes.pretrain import recipe

RESULTS = pathlib.Path('benchmarks/results/scaling.json')
PAGE = pathlib.Path('docs/results/scaling.md')
PLOT = pathlib.Path('docs/results/scaling.png')
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
  **{'vocab_size': 4096, 'hidden_size': 512, 'intermediate_size': 1376},
  **{'num_layers': 8, 'num_heads': 8, 'max_seq_len': 128},
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


def optimizer(method: str, rank: int) -> optax.GradientTransformation:
  """A row's optimizer."""
  return methods.build(
    *METHODS[method],
    **{'learning_rate': RATE, 'rank': rank, 'update_proj_gap': GAP},
  )


def quarter(size: str) -> int:
  """The rank of a preset's rows: a quarter of its width."""
  return llama.PRESETS[size].hidden_size // 4


# State.


def state_row(size: str, method: str, rank: int) -> Row:
  """Bytes of an optimizer's state; nothing is allocated."""
  shapes = state_bytes.shapes_of(size)
  return {
    'parameters': state_bytes.count_parameters(shapes),
    'bytes': state_bytes.count(optimizer(method, rank), shapes),
  }


def state_cases() -> Iterator[Case]:
  """Every preset, then one preset at several ranks."""
  size, ranks = RANKED
  settings = [('parameters', name, quarter(name)) for name in SIZES]
  settings += [('rank', size, rank) for rank in ranks]
  for (against, name, rank), method in itertools.product(settings, METHODS):
    if against == 'parameters' or method != 'adamw':
      key = {'size': name, 'rank': rank, 'method': method}
      take = functools.partial(state_row, **key)
      yield Case({'against': against, **key}, take)


# Time.


def random_arrays(shapes: Any, seed: int, scale: float) -> Any:
  """Normal float32 arrays of these shapes."""
  draw = np.random.default_rng(seed).standard_normal
  return jax.tree.map(
    lambda leaf: jnp.asarray(scale * draw(leaf.shape, np.float32)), shapes
  )


def optimizer_steps(size: str) -> Callable[[Row], cases.Compiled]:
  """Makes updates of all weights of a preset, which all optimizers share."""
  shapes = state_bytes.shapes_of(size)
  weights = random_arrays(shapes, 0, 0.02)
  gradients = random_arrays(shapes, 1, 1e-3)

  def make(key: Row) -> cases.Compiled:
    tx = optimizer(key['method'], key['rank'])
    state = jax.jit(tx.init)(weights)

    def update(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
      updates, state = tx.update(gradients, state, weights)
      return optax.apply_updates(weights, updates), state

    def take(compiled: jax.stages.Compiled) -> Any:
      nonlocal weights, state
      weights, state = compiled(weights, state, gradients)
      return weights, state

    jitted = jax.jit(update, donate_argnums=(0, 1))
    return cases.Compiled(key, jitted.lower(weights, state, gradients), take)

  return make


def training_steps(size: str) -> Callable[[Row], cases.Compiled]:
  """Makes whole training steps of a preset on random tokens."""
  batch_size, seq_len = TOKENS
  model = llama.preset(size)
  tokens = np.random.default_rng(0).integers(
    *(0, model.vocab_size, (batch_size, seq_len + 1)), dtype=np.int32
  )
  batch = {
    'inputs': jnp.asarray(tokens[:, :-1]),
    'targets': jnp.asarray(tokens[:, 1:]),
    'weights': jnp.ones(TOKENS),
  }

  def make(key: Row) -> cases.Compiled:
    run = run_of(model, key, batch_size=batch_size, seq_len=seq_len)
    planned = recipe.plan(run, jax.devices()[:1])
    state, frozen = programs.start(planned)

    def take(compiled: jax.stages.Compiled) -> Any:
      nonlocal state
      state, found = compiled(state, batch, frozen)
      return state, found

    return cases.Compiled(key, programs.lower(planned), take)

  return make


STEP_MAKERS = {'optimizer': optimizer_steps, 'training': training_steps}


def race(
  what: str, size: str, keys: list[Row], clock: harness.Clock
) -> list[Row]:
  """Times some steps in turns; one that fails is a row with the reason."""
  parameters = state_bytes.count_parameters(state_bytes.shapes_of(size))
  make, racers, failed = STEP_MAKERS[what](size), [], []
  for key in keys:
    try:
      racers.append(turns.Racer(key['method'], make(key)))
    except Exception as error:  # Whatever it is, the others race.
      failed.append({**key, 'absent': turns.reason(error)})
  cases.race(racers, ROUNDS, TURN, clock)
  rows = scaling_tables.timed_rows(racers)
  return [{**row, 'parameters': parameters} for row in rows] + failed


def time_cases() -> Iterator[Case]:
  """The optimizer step by size, the training step, the rank; by their worth.

  The largest size comes last: it takes as long as all others.
  """

  def case(what: str, size: str, pairs: Any, against: str) -> Case:
    keys = [{'method': method, 'rank': rank} for method, rank in pairs]
    key = {'step': what, 'against': against, 'size': size}
    return Case(key, functools.partial(race, what, size, keys), clock='share')

  def by_size(what: str, size: str, names: Any) -> Case:
    pairs = [(name, quarter(size)) for name in names]
    return case(what, size, pairs, 'parameters')

  *sizes, largest = TIMED
  ranked, ranks = TIMED_RANKED
  yield from (by_size('optimizer', size, METHODS) for size in sizes)
  for size in TRAINED:
    yield by_size('training', size, ('adamw', 'gradnormlorp'))
  pairs = itertools.product(('galore', 'gradnormlorp'), ranks)
  yield case('optimizer', ranked, [('adamw', 0), *pairs], 'rank')
  yield by_size('optimizer', largest, METHODS)


# Devices.


def run_of(model: llama.LlamaConfig, key: Row, **options: int) -> Any:
  """A training run: a row's method, rank, mesh and step."""
  alias, method_options = METHODS[key['method']]
  return config.TrainConfig(
    steps=1000,
    model=model,
    data=config.DataConfig(seq_len=options.pop('seq_len')),
    optim=config.OptimConfig(
      name=alias,
      rank=None if alias == 'adamw' else key['rank'],
      learning_rate=RATE,
      clip_global_norm=None,
      **method_options,
    ),
    step=config.StepConfig(**STEPS.get(key.get('step', ''), {})),
    mesh=config.MeshConfig(data=key.get('data', 1), fsdp=key.get('fsdp', 1)),
    **options,
  )


def compiled_row(planned: recipe.Planned, options: Row) -> Row:
  """What a compiled step takes on a device, and sends."""
  compiled = programs.lower(planned).compile(compiler_options=options)
  found = compiled.memory_analysis()
  kinds: dict[str, int] = {}
  refresh_bytes = 0
  for sent in collectives(compiled.as_text()):
    if sent.bytes_per_step is None or sent.conditionals:
      once = math.prod(n or 1 for n in sent.loops)
      refresh_bytes += sent.instructions * sent.bytes_each * once
    else:
      kinds[sent.kind] = kinds.get(sent.kind, 0) + sent.bytes_per_step
  params = jax.tree.leaves(planned.program.abstract_state.params)
  return {
    'parameter_bytes': sum(p.size * p.dtype.itemsize for p in params),
    'device_bytes': found.argument_size_in_bytes
    + found.output_size_in_bytes
    + found.temp_size_in_bytes
    - found.alias_size_in_bytes,
    'temporary_bytes': found.temp_size_in_bytes,
    'bytes_per_step': sum(kinds.values()),
    'bytes_by_kind': kinds,
    'refresh_bytes': refresh_bytes,
  }


def device_row(key: Row) -> Row:
  """The small model on forced CPU devices."""
  count = key['data'] * key['fsdp']
  if count > len(jax.devices()):
    raise methods.AbsentError(f'{len(jax.devices())} devices, not {count}')
  run = run_of(SMALL, key, batch_size=16, seq_len=128, micro_batches=2)
  return compiled_row(recipe.plan(run, jax.devices()[:count]), CPU_OPTIONS)


def planned_row(key: Row) -> Row:
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
  return compiled_row(recipe.plan(run, devices), GPU_OPTIONS)


def device_cases() -> Iterator[Case]:
  """Every mesh along one axis; all steps, and AdamW's as a yardstick."""
  meshes = [(n, 1) for n in DEVICES] + [(1, n) for n in DEVICES if n > 1]
  rows = [('gradnormlorp', step) for step in STEPS]
  rows += [('adamw', 'whole'), *(('galore', step) for step in STEPS)]
  for (method, step), (data, fsdp) in itertools.product(rows, meshes):
    key = {'method': method, 'step': step, 'rank': 64}
    key |= {'data': data, 'fsdp': fsdp}
    yield Case(key, functools.partial(device_row, key))


def plan_cases() -> Iterator[Case]:
  """The larger model first; 8-bit states, and AdamW's as a yardstick."""
  ours, largest = 'gradnormlorp, 8 bits', PLANNED[0]
  kinds = itertools.product(PLANNED, (ours,), ('layerwise, gradient', 'whole'))
  kinds = [*kinds, (largest, 'adamw', 'whole')]
  for (size, method, step), (data, fsdp) in itertools.product(kinds, MESHES):
    key = {'size': size, 'method': method, 'step': step}
    key |= {'rank': quarter(size), 'data': data, 'fsdp': fsdp}
    yield Case(key, functools.partial(planned_row, key))


# All parts.

sizes = scaling_tables.sizes  # For benchmarks.check.
CASES: dict[str, Callable[[], Iterator[Case]]] = {
  'state': state_cases,
  'time': time_cases,
  'devices': device_cases,
  'plan': plan_cases,
}


def tables() -> dict[str, str]:
  """The tables of the page, from the recorded file."""
  found = cases.load(RESULTS)
  shown = [scaling_tables.tables(part, found) for part in CASES]
  return {name: table for part in shown for name, table in part.items()}


def plots() -> None:
  """Draws the picture of the recorded file."""
  save(picture.draw(cases.load(RESULTS)), PLOT)


def in_this_process(part: str, args: argparse.Namespace) -> None:
  """Measures one part, and writes file, plot and tables."""
  if part == 'devices':
    jax.config.update('jax_num_cpu_devices', max(DEVICES))
  if part != 'time':  # The others compile, on any machine's CPUs.
    args.device = 'cpu'
  clock = harness.start(args)
  found = cases.measure(
    part, CASES[part](), args.output, clock, resume=args.resume
  )
  for name, table in scaling_tables.tables(part, found).items():
    sys.stdout.write(f'{name[0].upper()}{name[1:]}:\n\n{table}\n')
  sys.stdout.write(cases.absent(cases.rows(found, part)))
  save(picture.draw(found), args.plot)


def main() -> None:
  """Measures the parts, each in a process of its own."""
  parser = harness.parser(__doc__)
  cases.add_parts(parser, CASES)
  harness.add_arguments(parser, RESULTS, minutes=15, plot=PLOT)
  parser.add_argument(
    '--resume',
    action='store_true',
    help='keep the rows that the JSON file has, and measure the others; those '
    'kept name their commit',
  )
  args = parser.parse_args()
  if args.report:
    report.report('scaling.measure')
    return
  parts = args.names or list(CASES)
  if len(parts) == 1:
    in_this_process(parts[0], args)
    return
  clock = harness.Clock(args.minutes)
  for done, part in enumerate(parts):
    minutes = clock.share(len(parts) - done).seconds_left / 60
    command = [sys.executable, '-m', 'benchmarks.scaling', part]
    for name in ('device', 'output', 'plot'):
      command += [f'--{name}', str(getattr(args, name))]
    command += ['--resume'] * args.resume
    subprocess.run([*command, '--minutes', str(minutes)], check=True)


if __name__ == '__main__':
  main()
