"""How the cost grows: with the parameters, with the rank, with the devices.

  python -m benchmarks.scaling                   # all parts, each a process
  python -m benchmarks.scaling time --minutes 3  # one, on a quiet machine

state    bytes of optimizer states of all presets, and of 7b at several ranks
time     seconds of optimizer steps (float32) by size and by rank, and of whole
         training steps; methods take turns, sizes do not
devices  compiled steps of a small LLaMA on meshes of 1 to 8 forced CPU devices
plan     the same of 1b and 7b on described H100s: with the extra `cuda`, no GPU

The rank is a quarter of the width unless a row says otherwise; `8 bits` means
moments and bases. A part replaces its own rows in the JSON file. Columns:

exponent     b of cost = a * parameters^b (how far the worst size lies off it);
             behind it that of the two largest alone
of AdamW     median ratio to AdamW's turn in the same round, [quartiles]
on a device  arguments, outputs and temporaries of the step on one device
sent         bytes summed, gathered or scattered in a step, on one device
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


def _optimizer(method: str, rank: int) -> optax.GradientTransformation:
  options = {'learning_rate': RATE, 'rank': rank, 'update_proj_gap': GAP}
  return methods.build(*METHODS[method], **options)


def quarter(size: str) -> int:
  """The rank of a preset's rows: a quarter of its width."""
  return llama.PRESETS[size].hidden_size // 4


# State.


def _state_row(size: str, method: str, rank: int) -> Row:
  shapes = state_bytes.shapes_of(size)
  return {
    'parameters': state_bytes.count_parameters(shapes),
    'bytes': state_bytes.count(_optimizer(method, rank), shapes),
  }


def state_cases() -> Iterator[Case]:
  """Every preset, then one preset at several ranks."""
  size, ranks = RANKED
  settings = [('parameters', name, quarter(name)) for name in SIZES]
  settings += [('rank', size, rank) for rank in ranks]
  for (against, name, rank), method in itertools.product(settings, METHODS):
    if against == 'parameters' or method != 'adamw':
      key = {'size': name, 'rank': rank, 'method': method}
      take = functools.partial(_state_row, **key)
      yield Case({'against': against, **key}, take)


# Time.


def _optimizer_steps(size: str) -> Callable[[Row], turns.Method]:
  """Makes updates of all weights of a preset, which all optimizers share."""

  def random(seed: int, scale: float) -> Any:
    draw = np.random.default_rng(seed).standard_normal
    shapes = state_bytes.shapes_of(size)
    return jax.tree.map(
      lambda leaf: jax.device_put(scale * draw(leaf.shape, np.float32)), shapes
    )

  weights, gradients = random(0, np.float32(0.02)), random(1, np.float32(1e-3))

  def make(key: Row) -> turns.Method:
    tx = _optimizer(key['method'], key['rank'])
    state = jax.jit(tx.init)(weights)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
      updates, state = tx.update(gradients, state, weights)
      return optax.apply_updates(weights, updates), state

    def take(compiled: jax.stages.Compiled) -> Any:
      nonlocal weights, state
      weights, state = compiled(weights, state, gradients)
      return weights, state

    return programs.Repeated(update.lower(weights, state, gradients), take)

  return make


def _training_steps(size: str) -> Callable[[Row], turns.Method]:
  """Makes whole training steps of a preset on random tokens."""
  model = llama.preset(size)
  batch = jax.device_put(programs.random_batch(model.vocab_size, *TOKENS))

  def make(key: Row) -> turns.Method:
    planned = recipe.plan(_run_of(model, key, TOKENS), jax.devices()[:1])
    state, frozen = programs.start(planned)

    def take(compiled: jax.stages.Compiled) -> Any:
      nonlocal state
      state, found = compiled(state, batch, frozen)
      return state, found

    return programs.Repeated(programs.lower(planned), take)

  return make


STEP_MAKERS = {'optimizer': _optimizer_steps, 'training': _training_steps}


def race(
  what: str, size: str, keys: list[Row], clock: harness.Clock
) -> list[Row]:
  """Times some steps in turns; one that fails is a row with the reason."""
  parameters = state_bytes.count_parameters(state_bytes.shapes_of(size))
  make, racers, failed = STEP_MAKERS[what](size), [], []
  for key in keys:
    try:
      racers.append((key, turns.Racer(key['method'], make(key))))
    except Exception as error:  # Whatever it is, the others race.
      failed.append({**key, 'absent': turns.reason(error)})
  least, most = ROUNDS
  entered = [racer for _, racer in racers]
  turns.rounds(entered, most, TURN, least=least, clock=clock)
  adamw = next((racer for racer in entered if racer.name == 'adamw'), None)
  return [
    {**key, 'parameters': parameters, **timed(racer, adamw)}
    for key, racer in racers
  ] + failed


def timed(racer: turns.Racer, adamw: turns.Racer | None) -> Row:
  """What its turns came to, beside AdamW's where that raced."""
  low, median, high = turns.quartiles(racer.turns)
  ratio = adamw and turns.ratio_quartiles(racer.turns, adamw.turns)
  return {
    **{'median_s': median, 'quartiles_s': [low, high], 'of_adamw': ratio},
    **{'first_s': racer.first_s, 'compile_s': racer.method.compile_s},
    'steps': racer.count - turns.APART,
  }


def time_cases() -> Iterator[Case]:
  """The optimizer step by size, the training step, the rank; by their worth.

  The largest size comes last: it takes as long as all others.
  """

  def by_size(what: str, sizes: Any, names: Any) -> Iterator[Any]:
    for size in sizes:
      pairs = [(name, quarter(size)) for name in names]
      yield what, 'parameters', size, pairs

  *sizes, largest = TIMED
  ranked, ranks = TIMED_RANKED
  by_rank = itertools.product(('galore', 'gradnormlorp'), ranks)
  for step, against, size, pairs in (
    *by_size('optimizer', sizes, METHODS),
    *by_size('training', TRAINED, ('adamw', 'gradnormlorp')),
    ('optimizer', 'rank', ranked, [('adamw', 0), *by_rank]),
    *by_size('optimizer', [largest], METHODS),
  ):
    keys = [{'method': method, 'rank': rank} for method, rank in pairs]
    take = functools.partial(race, step, size, keys)
    yield Case({'step': step, 'against': against, 'size': size}, take, 'share')


# Devices.


def _run_of(
  model: llama.LlamaConfig, key: Row, batch: tuple[int, int], **options: Any
) -> config.TrainConfig:
  """A training run: a row's method, rank, mesh and step."""
  alias, kind = METHODS[key['method']]
  kind = {**kind, 'rank': None if alias == 'adamw' else key['rank']}
  kind |= {'learning_rate': RATE, 'clip_global_norm': None}
  batch_size, seq_len = batch
  return config.TrainConfig(
    **{'steps': 1000, 'model': model, 'batch_size': batch_size, **options},
    data=config.DataConfig(seq_len=seq_len),
    optim=config.OptimConfig(name=alias, **kind),
    step=config.StepConfig(**STEPS.get(key.get('step', ''), {})),
    mesh=config.MeshConfig(data=key.get('data', 1), fsdp=key.get('fsdp', 1)),
  )


def _compiled_row(planned: recipe.Planned, options: Row) -> Row:
  """What a compiled step takes on a device, and sends."""
  compiled, _ = programs.compiled(lambda: programs.lower(planned), options)
  held = programs.memory(compiled)
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
    'device_bytes': held['total'],
    'temporary_bytes': held['temporaries'],
    'bytes_per_step': sum(kinds.values()),
    'bytes_by_kind': kinds,
    'refresh_bytes': refresh_bytes,
  }


def device_row(key: Row) -> Row:
  """The small model on forced CPU devices."""
  count = key['data'] * key['fsdp']
  if count > len(jax.devices()):
    raise methods.AbsentError(f'{len(jax.devices())} devices, not {count}')
  run = _run_of(SMALL, key, (16, 128), micro_batches=2)
  return _compiled_row(recipe.plan(run, jax.devices()[:count]), CPU_OPTIONS)


def _planned_row(key: Row) -> Row:
  """A preset on described GPUs, as many sequences on each of them."""
  if not accelerators.compiler_is_installed():
    raise methods.AbsentError("XLA's GPU compiler, of the extra cuda, is not")
  count = key['data'] * key['fsdp']
  dtypes = {'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16'}
  model = llama.preset(key['size'], **dtypes, remat=True)
  run = _run_of(model, key, (16 * count, 256))
  devices = accelerators.described_devices(
    accelerators.ACCELERATORS[GPU], count, -(-count // GPUS_PER_MACHINE)
  )
  return _compiled_row(recipe.plan(run, devices), GPU_OPTIONS)


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
    yield Case(key, functools.partial(_planned_row, key))


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


def _in_this_process(part: str, args: argparse.Namespace) -> None:
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
  sys.stdout.write(cases.absent(found[part]['rows']))
  save(picture.draw(found), args.plot)


def main() -> None:
  """Measures the parts, each in a process of its own."""
  parser = harness.parser(__doc__)
  cases.add_parts(parser, CASES)
  harness.add_arguments(parser, RESULTS, minutes=15, plot=PLOT)
  parser.add_argument(
    '--resume',
    action='store_true',
    help='keep the rows that the JSON file has, each with its commit, and '
    'measure the others',
  )
  args = parser.parse_args()
  if args.report:
    report.report('scaling.measure')
    return
  parts = args.names or list(CASES)
  if len(parts) == 1:
    _in_this_process(parts[0], args)
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
