"""Compares the layer-wise training step with the whole one, on CPUs.

  python -m benchmarks.layerwise_step time --settings plain clipped
  python -m benchmarks.layerwise_step memory

`time`: steps of a LLaMA of 8 layers of width 512, compiled side by side, take
turns on 4 x 128 random tokens. All begin at step 0, so that the same steps
refresh the same bases. The whole step with remat does the same work as the
layer-wise one.

  median   of a turn's steps, then over the rounds
  ratio    to the whole step with remat: the median over the rounds of the ratio
           of medians in a round, in brackets its quartiles
  minima   the ratio of the fastest steps

`memory`: the temporary buffers of compiled steps as the layers grow, at width
256; nothing runs. What may grow is counted from shapes: the inputs of blocks,
and where the gradients wait (see gnlorp_jax.training.layerwise) what projecting
leaves of them. `copied` are stacked matrices that a loop's body copies.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import operator
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.common import harness, programs, record, turns
from benchmarks.common.tables import median_in_quartiles, of_columns
from gnlorp_jax import config
from gnlorp_jax.models import llama
from gnlorp_jax.recipes.pretrain import recipe

RESULTS = pathlib.Path('benchmarks/results')
PAGE = pathlib.Path('docs/results/step.md')
Options = dict[str, Any]
Row = dict[str, Any]

EIGHT_BITS = 'gradnormlorp, 8-bit moments'
TIMED: dict[str, Options] = {
  'gradnormlorp': {},
  EIGHT_BITS: {'moment_bits': 8},
  **{name: {'name': name} for name in ('galore', 'apollo', 'adamw')},
}
WEIGHED: dict[str, Options] = {
  'gradnormlorp': {},
  EIGHT_BITS: {'moment_bits': 8},
  f'{EIGHT_BITS}, 4-bit bases': {'moment_bits': 8, 'basis_bits': 4},
  f'{EIGHT_BITS} and weights': {'moment_bits': 8, 'weight_bits': 8},
  **{name: {'name': name} for name in ('q_galore', 'fira', 'ldadam')},
}
METHODS = {'time': TIMED, 'memory': WEIGHED}
PLAIN: Options = {'clip_global_norm': None}
CLIPPED: Options = {'clip_global_norm': 1.0}
# For `memory`: gradients at once; waiting for their norm; summed projected.
SETTINGS: dict[str, dict[str, Options]] = {
  'time': {
    **{'plain': PLAIN, 'clipped': CLIPPED},
    'accumulated': {**PLAIN, 'micro_batches': 4},
  },
  'memory': {
    **{'plain': PLAIN, 'clipped': CLIPPED},
    'projected': {**CLIPPED, 'accumulate': 'projected', 'micro_batches': 4},
  },
}
STEPS: dict[str, Options] = {
  'whole, remat': {'mode': 'whole', 'remat': True},
  'whole': {'mode': 'whole'},
  'layerwise': {},
  'projected': {'accumulate': 'projected'},
}
SIZES = {'hidden': 512, 'layers': 8, 'rank': 128}  # For `time`.
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
      **{'vocab_size': vocab_size, 'max_seq_len': seq_len, 'remat': remat},
      **{'hidden_size': hidden, 'intermediate_size': hidden * 43 // 16},
      **{'num_layers': layers, 'num_heads': hidden // 64},
    ),
    data=config.DataConfig(seq_len=seq_len),
    optim=config.OptimConfig(rank=rank, **options),
    step=config.StepConfig(**{'mode': 'layerwise', **step}),
  )
  return recipe.plan(run, jax.devices()[:1])


def _steps(planned: recipe.Planned) -> programs.Steps:
  """A compiled step with a state of its own, on the same batch always."""
  run = planned.config
  compiled, compile_s = programs.compiled(lambda: programs.lower(planned))
  sizes = run.model.vocab_size, run.batch_size, run.data.seq_len
  batch = jax.tree.map(jnp.asarray, programs.random_batch(*sizes))
  steps = programs.Steps(compiled, programs.start(planned), [batch])
  steps.compile_s = compile_s
  return steps


def _race(method: str, setting: str, rounds: int, turn: int) -> list[Row]:
  """Times all steps of a method in a setting, in turns."""
  options = {**TIMED[method], **SETTINGS['time'][setting], **SIZES}
  left_out = set()
  if setting != 'accumulated' or options.get('name') in WHOLE_GRADIENT:
    left_out.add('projected')
  if setting != 'plain':  # Once is enough to see what remat costs.
    left_out.add('whole')
  racers = [
    turns.Racer(name, _steps(plan(**options, **step)), 1)
    for name, step in STEPS.items()
    if name not in left_out
  ]
  turns.rounds(racers, rounds, turn)
  fastest = [
    float(min(turn.seconds.min() for turn in racer.turns)) for racer in racers
  ]
  return [
    {
      **{'method': method, 'setting': setting, 'step': racer.name},
      'compile_s': racer.method.compile_s,
      'median_s': float(np.median(turns.medians(racer.turns))),
      'fastest_s': least,
      'ratio': turns.ratio_quartiles(racer.turns, racers[0].turns),
      'ratio_of_minima': least / fastest[0],
    }
    for racer, least in zip(racers, fastest, strict=True)
  ]


def _allowed_growth(planned: recipe.Planned, waits: bool) -> int:
  """Bytes of temporaries that a layer may add: see the top of the file."""
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
  """Shapes such as ``f32[17,256,64]`` that anything but the entry copies.

  Args:
    hlo_text: What `jax.stages.Compiled.as_text` returns.
    layers: The first axis of stacks ``[layers, m, n]``, and of nothing else.
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


def _memory_row(method: str, setting: str) -> Row:
  """Temporaries of a method's layer-wise step as the layers grow."""
  options = {**WEIGHED[method], **SETTINGS['memory'][setting]}
  sizes = {'hidden': 256, 'rank': 64, 'vocab_size': 2048}
  temps, arguments, copied = [], [], []
  for layers in LAYER_COUNTS:
    planned = plan(layers=layers, **sizes, **options)
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
    'allowed_per_layer': _allowed_growth(planned, waits),
    'state_per_layer': (np.diff(arguments) / steps).tolist(),
    'copied': copied,
  }


def _sizes(values: list[float], form: str, unit: int) -> str:
  return ', '.join(format(value / unit, form) for value in values)


COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
  'time': {
    **{key: operator.itemgetter(key) for key in ('method', 'setting', 'step')},
    'median, s': lambda row: f'{row["median_s"]:.3f}',
    'ratio': lambda row: median_in_quartiles(row['ratio']),
    'minima': lambda row: f'{row["ratio_of_minima"]:.2f}',
  },
  'memory': {
    **{key: operator.itemgetter(key) for key in ('method', 'setting')},
    'layers': lambda row: _sizes(row['layers'], '.0f', 1),
    'temporaries, MiB': lambda row: _sizes(row['temp_bytes'], '.1f', 2**20),
    'growth per layer, KiB': lambda row: _sizes(
      row['growth_per_layer'], '.0f', 1024
    ),
    'of it allowed, KiB': lambda row: f'{row["allowed_per_layer"] / 1024:.0f}',
    'state, KiB': lambda row: f'{row["state_per_layer"][-1] / 1024:.0f}',
    'copied': lambda row: str(len(row['copied'])),
  },
}


def tables() -> dict[str, str]:
  """The tables of `PAGE`, from the recorded files."""
  found = {}
  for what, columns in COLUMNS.items():
    rows = record.read(RESULTS / f'layerwise_{what}.json')['rows']
    found[f'layerwise {what}'] = of_columns(rows, columns)
  return found


def main() -> None:
  """Measures, and writes the JSON file and the table."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  add('what', choices=COLUMNS)
  output = RESULTS / 'layerwise_{what}.json'
  harness.add_arguments(parser, output, has_device=False)
  for option, known in (('methods', METHODS), ('settings', SETTINGS)):
    names = '; '.join(f'{what}: {", ".join(known[what])}' for what in known)
    add(f'--{option}', nargs='+', help=f'(default: all) {names}')
  add('--rounds', type=int, default=5, help='turns of every step')
  add('--turn', type=int, default=3, help='steps of a turn')
  args = parser.parse_args()
  if args.report:
    report.report('step.layerwise_step')
    return
  methods, settings = METHODS[args.what], SETTINGS[args.what]
  try:
    args.methods = harness.select(args.methods or methods, methods)
    args.settings = harness.select(args.settings or settings, settings)
  except ValueError as error:
    parser.error(str(error))
  output = pathlib.Path(str(args.output).format(what=args.what))
  is_timed = args.what == 'time'
  written: Row = {
    'command': ' '.join(sys.argv[1:]),
    **(SIZES if is_timed else {}),
    **{**harness.environment(), 'rows': []},
  }
  for setting in args.settings:
    for method in args.methods:
      needs_all = methods[method].get('name') in WHOLE_GRADIENT
      if is_timed:
        written['rows'] += _race(method, setting, args.rounds, args.turn)
      elif setting != 'projected' or not needs_all:
        written['rows'].append(_memory_row(method, setting))
      record.write(output, written)
      harness.progress(f'{method}, {setting}')
  sys.stdout.write(of_columns(written['rows'], COLUMNS[args.what]))


if __name__ == '__main__':
  main()
