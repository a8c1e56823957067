"""Compares the layer-wise training step with the whole one, on CPUs.

  python -m benchmarks.layerwise_step time
  python -m benchmarks.layerwise_step memory

`time`: a LLaMA of 8 layers of width 512, vocabulary 4096, 4 x 128 random
tokens, float32, rank 128. Each method and setting has its whole step with
remat (the same work: the layer-wise step recomputes blocks too), without, and
its layer-wise steps, compiled side by side. They take turns of a few steps in
another order each round, so that a machine that slows down slows them all. All
begin at step 0, so that the same steps refresh the same bases.

  median   of a turn's steps, then over the rounds
  ratio    to the whole step with remat: the median over the rounds of the ratio
           of medians in a round, in brackets its quartiles
  minima   the ratio of the fastest steps

`memory`: the temporary buffers of compiled steps (`memory_analysis`; nothing
runs) as the layers grow, 9, 17, 33. Width 256, rank 64, 4 x 128 tokens. What
may grow is counted from shapes: the inputs of the blocks, and where the
gradients wait (see gnlorp_jax.training.layerwise) their projections. `copied`
are stacked matrices that a loop's body copies.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.common import harness, programs, record, turns
from benchmarks.common.tables import markdown, median_in_quartiles
from gnlorp_jax import config
from gnlorp_jax.models import llama
from gnlorp_jax.recipes.pretrain import recipe

RESULTS = pathlib.Path('benchmarks/results')
PAGE = pathlib.Path('docs/results/step.md')
Options = dict[str, Any]
Row = dict[str, Any]

EIGHT_BITS = 'gradnormlorp, 8-bit moments'
METHODS: dict[str, dict[str, Options]] = {
  'time': {
    'gradnormlorp': {},
    EIGHT_BITS: {'moment_bits': 8},
    'galore': {'name': 'galore'},
    'apollo': {'name': 'apollo'},
    'adamw': {'name': 'adamw'},
  },
  'memory': {
    'gradnormlorp': {},
    EIGHT_BITS: {'moment_bits': 8},
    f'{EIGHT_BITS}, 4-bit bases': {'moment_bits': 8, 'basis_bits': 4},
    f'{EIGHT_BITS} and weights': {'moment_bits': 8, 'weight_bits': 8},
    'q_galore': {'name': 'q_galore'},
    'fira': {'name': 'fira'},
    'ldadam': {'name': 'ldadam'},
  },
}
# For `memory`: gradients at once; waiting for their norm; summed projected.
SETTINGS: dict[str, dict[str, Options]] = {
  'time': {
    'plain': {'clip_global_norm': None},
    'clipped': {'clip_global_norm': 1.0},
    'accumulated': {'clip_global_norm': None, 'micro_batches': 4},
  },
  'memory': {
    'plain': {'clip_global_norm': None},
    'clipped': {'clip_global_norm': 1.0},
    'projected': {
      **{'clip_global_norm': 1.0, 'accumulate': 'projected'},
      'micro_batches': 4,
    },
  },
}
REFERENCE = 'whole, remat'
STEPS: dict[str, Options] = {
  REFERENCE: {'mode': 'whole', 'remat': True},
  'whole': {'mode': 'whole'},
  'layerwise': {},
  'projected': {'accumulate': 'projected'},
}
# Without LLVM's optimizations, for `memory`: buffers are assigned before.
FAST: Options = {'xla_backend_optimization_level': 0}
LAYER_COUNTS = (9, 17, 33)  # No other axis is as long.
# Methods whose step needs the whole gradient to its end.
WHOLE_GRADIENT = ('adamw', 'fira', 'ldadam')


def plan(
  *,
  hidden: int,
  layers: int,
  rank: int,
  batch_size: int = 4,
  seq_len: int = 128,
  vocab_size: int = 4096,
  remat: bool = False,
  micro_batches: int = 1,
  **options: Any,
) -> recipe.Planned:
  """A layer-wise run of a LLaMA with the usual proportions.

  `options` are those of `config.StepConfig`, and for the rest the optimizer's.
  """
  keys = ('mode', 'accumulate', 'weight_bits')
  step = {key: options.pop(key) for key in keys if key in options}
  run = config.TrainConfig(
    steps=1000,
    batch_size=batch_size,
    micro_batches=micro_batches,
    model=llama.LlamaConfig(
      vocab_size=vocab_size,
      hidden_size=hidden,
      intermediate_size=hidden * 43 // 16,
      num_layers=layers,
      num_heads=hidden // 64,
      max_seq_len=seq_len,
      remat=remat,
    ),
    data=config.DataConfig(seq_len=seq_len),
    optim=config.OptimConfig(rank=rank, **options),
    step=config.StepConfig(**{'mode': 'layerwise', **step}),
  )
  return recipe.plan(run, jax.devices()[:1])


# Time.


class Step(turns.Method):
  """A compiled step with a state of its own."""

  def __init__(self, planned: recipe.Planned):
    run = planned.config
    self._step, self.compile_s = programs.compiled(
      lambda: programs.lower(planned)
    )
    self._state, self._frozen = programs.start(planned)
    batch = programs.random_batch(
      run.model.vocab_size, run.batch_size, run.data.seq_len
    )
    self._batch = jax.tree.map(jnp.asarray, batch)

  def step(self, index: int) -> None:
    """As `turns.Method`, on the same batch always."""
    self._state, _ = jax.block_until_ready(
      self._step(self._state, self._batch, self._frozen)
    )


def race(
  method: str, setting: str, sizes: dict[str, int], rounds: int, turn: int
) -> list[Row]:
  """Times all steps of a method in a setting, in turns."""
  options = {**METHODS['time'][method], **SETTINGS['time'][setting], **sizes}
  left_out = set()
  if setting != 'accumulated' or options.get('name') in WHOLE_GRADIENT:
    left_out.add('projected')
  if setting != 'plain':  # Once is enough to see what remat costs.
    left_out.add('whole')
  racers = [
    turns.Racer(name, Step(plan(**options, **step)), 1)
    for name, step in STEPS.items()
    if name not in left_out
  ]
  turns.rounds(racers, rounds, turn)
  fastest = [
    min(turn.seconds.min() for turn in racer.turns) for racer in racers
  ]
  return [
    {
      **{'method': method, 'setting': setting, 'step': racer.name},
      'compile_s': racer.method.compile_s,
      'median_s': float(np.median(turns.medians(racer.turns))),
      'fastest_s': float(least),
      'ratio': turns.ratio_quartiles(racer.turns, racers[0].turns),
      'ratio_of_minima': float(least / fastest[0]),
    }
    for racer, least in zip(racers, fastest, strict=True)
  ]


def time_table(rows: list[Row]) -> str:
  """The rows as a Markdown table."""
  return markdown(
    ['method', 'setting', 'step', 'median, s', 'ratio', 'minima'],
    [
      [
        *(row['method'], row['setting'], row['step'], f'{row["median_s"]:.3f}'),
        *(median_in_quartiles(row['ratio']), f'{row["ratio_of_minima"]:.2f}'),
      ]
      for row in rows
    ],
  )


# Memory.


def allowed_growth(planned: recipe.Planned, waits: bool) -> int:
  """Bytes of temporaries that a layer may add, from shapes.

  These are a block's input and, if gradients wait, one layer's projected ones.
  """
  run, program = planned.config, planned.program
  is_projected = run.step.accumulate == 'projected'
  rows = run.batch_size // (run.micro_batches if is_projected else 1)
  itemsize = jnp.dtype(run.model.compute_dtype).itemsize
  saved = rows * run.data.seq_len * run.model.hidden_size * itemsize
  if not waits:
    return saved

  def project(params: Any, opt_state: Any) -> Any:
    exact = program.parameters.decode_exact(params)
    return program.tx.project(exact, opt_state, exact)[0]

  state = program.abstract_state
  projected = jax.eval_shape(project, state.params, state.opt_state)
  total = sum(
    leaf.size * jnp.dtype(leaf.dtype).itemsize
    for path, leaf in jax.tree_util.tree_leaves_with_path(projected)
    if any(getattr(key, 'key', None) == 'layers' for key in path)
  )
  return saved + total // run.model.num_layers


def stacked_copies(hlo_text: str, layers: int) -> list[str]:
  """Shapes of stacks ``[L, m, n]`` that anything but the entry copies.

  Args:
    hlo_text: What `jax.stages.Compiled.as_text` returns.
    layers: L, a number that is the first axis of nothing else.

  Returns:
    A shape for each copy or transposition that takes memory, such as
    ``f32[17,256,64]``; vectors ``[L, n]`` are left out.
  """
  found = []
  in_entry = False
  copy = re.compile(rf'= (\w+\[{layers},\d+,\d[\d,]*\])\S* (copy|transpose)\(')
  for line in hlo_text.splitlines():
    if not line.startswith(' '):
      in_entry = line.startswith('ENTRY')
    match = copy.search(line)
    if match and not in_entry:
      found.append(match[1])
  return found


def memory_row(method: str, setting: str) -> Row:
  """Temporaries of a method's layer-wise step as the layers grow."""
  options = {**METHODS['memory'][method], **SETTINGS['memory'][setting]}
  temps, arguments, copied = [], [], []
  for layers in LAYER_COUNTS:
    planned = plan(
      **{'hidden': 256, 'layers': layers, 'rank': 64, 'vocab_size': 2048},
      **options,
    )
    compiled, _ = programs.compiled(lambda p=planned: programs.lower(p), FAST)
    memory = programs.memory(compiled)
    temps.append(memory['temporaries'])
    arguments.append(memory['arguments'])
    copied += stacked_copies(compiled.as_text(), layers)
  waits = setting != 'plain' and hasattr(planned.program.tx, 'project')
  steps = np.diff(LAYER_COUNTS)
  return {
    **{'method': method, 'setting': setting},
    'layers': LAYER_COUNTS,
    'argument_bytes': arguments,
    'temp_bytes': temps,
    'growth_per_layer': (np.diff(temps) / steps).tolist(),
    'allowed_per_layer': allowed_growth(planned, waits),
    'state_per_layer': (np.diff(arguments) / steps).tolist(),
    'copied': copied,
  }


def memory_table(rows: list[Row]) -> str:
  """The rows as a Markdown table."""

  def sizes(values: list[float], form: str, unit: int) -> str:
    return ', '.join(format(value / unit, form) for value in values)

  return markdown(
    [
      *('method', 'setting', 'layers', 'temporaries, MiB'),
      *('growth per layer, KiB', 'of it allowed, KiB', 'state, KiB', 'copied'),
    ],
    [
      [
        *(row['method'], row['setting'], sizes(row['layers'], '.0f', 1)),
        sizes(row['temp_bytes'], '.1f', 2**20),
        sizes(row['growth_per_layer'], '.0f', 1024),
        sizes([row['allowed_per_layer']], '.0f', 1024),
        sizes(row['state_per_layer'][-1:], '.0f', 1024),
        str(len(row['copied'])),
      ]
      for row in rows
    ],
  )


# Both.

TABLES = {'time': time_table, 'memory': memory_table}


def tables() -> dict[str, str]:
  """The tables of `PAGE`, from the recorded files."""
  return {
    f'layerwise {what}': table(
      record.read(RESULTS / f'layerwise_{what}.json')['rows']
    )
    for what, table in TABLES.items()
  }


def main() -> None:
  """Measures, and writes the JSON file and the table."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  add('what', choices=TABLES)
  harness.add_arguments(
    parser, RESULTS / 'layerwise_{what}.json', has_device=False
  )
  add('--methods', nargs='+', help='rows of the table (default: all)')
  add('--settings', nargs='+', help='of them (default: all)')
  add('--rounds', type=int, default=5, help='turns of every step')
  add('--turn', type=int, default=3, help='steps of a turn')
  add('--hidden', type=int, default=512, help='width of the model (time)')
  add('--layers', type=int, default=8, help='its layers (time)')
  args = parser.parse_args()
  if args.report:
    report.report('step.layerwise_step')
    return
  methods, settings = METHODS[args.what], SETTINGS[args.what]
  for name in args.methods or ():
    if name not in methods:
      parser.error(f'No method {name!r}; there are {list(methods)}.')
  output = pathlib.Path(str(args.output).format(what=args.what))
  sizes = {'hidden': args.hidden, 'layers': args.layers}
  sizes['rank'] = args.hidden // 4
  written: Row = {'command': ' '.join(sys.argv[1:])}
  written |= sizes if args.what == 'time' else {}
  written |= {**harness.environment(), 'rows': []}
  for setting in args.settings or settings:
    for method in args.methods or methods:
      needs_all = methods[method].get('name') in WHOLE_GRADIENT
      if args.what == 'time':
        written['rows'] += race(method, setting, sizes, args.rounds, args.turn)
      elif setting != 'projected' or not needs_all:
        written['rows'].append(memory_row(method, setting))
      record.write(output, written)
      harness.progress(f'{method}, {setting}')
  sys.stdout.write(TABLES[args.what](written['rows']))


if __name__ == '__main__':
  main()
