r"""Time and memory of a step that trains some layers, beside one of all layers.

  python -m benchmarks.step.sampled_step

A LLaMA of 16 layers in float32, AdamW, layer by layer without clipping, as
`train_lm.py` computes it. Steps are taken in turns; all layers at a time are
the same engine with as many slots as layers.

  time     of a step, as a share of that with all layers: median over the
           turns, in brackets its quartiles
  state    of the optimizer
  step     what the compiled step holds, without the batch
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import argparse
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.common import harness, programs, record, turns
from benchmarks.common.tables import median_in_quartiles, of_columns
from gnlorp_jax.compose import optimizer
from gnlorp_jax.config import LayerSamplingOptions, OptimConfig, StepConfig
from gnlorp_jax.models.llama import LlamaConfig
from gnlorp_jax.optim.inspect import tree_bytes
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig

RESULTS = pathlib.Path('benchmarks/results/sampled_step.json')
PAGE = pathlib.Path('docs/results/step.md')
LAYERS = 16
TURN = 3  # Steps of a turn.
EVERYTHING = 'all layers'
# Of each turn another draw: how far down a backward pass goes depends on it.
SAMPLINGS = {
  EVERYTHING: LayerSamplingOptions(draw='uniform', layers=LAYERS, every=TURN),
  'a quarter': LayerSamplingOptions(draw='uniform', layers=4, every=TURN),
  'an eighth': LayerSamplingOptions(draw='uniform', layers=2, every=TURN),
  'a quarter, nothing else': LayerSamplingOptions(
    draw='uniform', layers=4, every=TURN, always_on=()
  ),
}
Row = dict[str, Any]


def _settings(args: argparse.Namespace, name: str) -> TrainConfig:
  return TrainConfig(
    steps=1000,
    batch_size=args.batch_size,
    model=LlamaConfig(
      vocab_size=4096,
      hidden_size=args.hidden,
      intermediate_size=args.hidden * 8 // 3 // 16 * 16,
      num_layers=LAYERS,
      num_heads=8,
      max_seq_len=args.seq_len,
    ),
    data=DataConfig(seq_len=args.seq_len),
    optim=OptimConfig(name='adamw', rank=None, clip_global_norm=None),
    step=StepConfig(mode='layerwise'),
    sampling=SAMPLINGS[name],
  )


def _racer(args: argparse.Namespace, name: str) -> tuple[turns.Racer, Row]:
  """A setting, compiled and warm, and what it holds."""
  config = _settings(args, name)
  planned = recipe.plan(config, jax.devices()[:1])
  program, key = planned.program, jax.random.key(0)
  numbers = optimizer.numbers(config.optim, config.steps)
  rng = np.random.default_rng(0)
  batches = [
    {
      name: rng.integers(0, 4096, x.shape).astype(x.dtype)
      if np.issubdtype(x.dtype, np.integer)
      else np.ones(x.shape, x.dtype)
      for name, x in planned.abstract_batch.items()
    }
    for _ in range(turns.GRADIENTS)
  ]
  compiled = program.train_step.lower(
    program.abstract_state, planned.abstract_batch, program.parameters.frozen
  ).compile()
  steps = programs.Steps(compiled, program.start(key, numbers), batches)
  held = {
    'layers': name,
    'state_bytes': tree_bytes(program.abstract_state.opt_state),
    'step_bytes': programs.memory(compiled)['total'],
  }
  return turns.Racer(name, steps), held


def measure(args: argparse.Namespace) -> list[Row]:
  """All settings in turns."""
  found = {name: _racer(args, name) for name in SAMPLINGS}
  racers = [racer for racer, _ in found.values()]
  turns.rounds(racers, args.rounds, TURN)
  seconds = {
    racer.name: np.array([turn.seconds.sum() for turn in racer.turns])
    for racer in racers
  }
  return [
    held
    | {
      'seconds': float(np.median(seconds[name]) / TURN),
      'share': np.percentile(
        seconds[name] / seconds[EVERYTHING], [25, 50, 75]
      ).tolist(),
    }
    for name, (_, held) in found.items()
  ]


COLUMNS = {
  'layers at a time': lambda row: row['layers'],
  'seconds a step': lambda row: f'{row["seconds"]:.2f}',
  'time': lambda row: median_in_quartiles(row['share']),
  'state': lambda row: f'{row["state_bytes"] / 2**20:.1f} MiB',
  'step': lambda row: f'{row["step_bytes"] / 2**20:.1f} MiB',
}


def tables() -> dict[str, str]:
  """The table of `PAGE`, from the recorded file."""
  return {'sampled_step': of_columns(record.read(RESULTS)['rows'], COLUMNS)}


def main() -> None:
  """Measures, and writes the JSON file and the table."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  add('--hidden', type=harness.positive, default=512, help='features')
  add('--batch-size', type=harness.positive, default=4, help='sequences')
  add('--seq-len', type=harness.positive, default=128, help='tokens of each')
  add('--rounds', type=harness.positive, default=8, help='turns of each')
  harness.add_arguments(parser, RESULTS, has_device=False)
  args = parser.parse_args()
  if args.report:
    report.report('step.sampled_step')
    return
  rows = measure(args)
  record.write(
    args.output, {'environment': harness.environment(), 'rows': rows}
  )
  sys.stdout.write(of_columns(rows, COLUMNS) + '\n')


if __name__ == '__main__':
  main()
