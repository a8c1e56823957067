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

# As in train_lm.py: OpenBLAS's threads would fight with those of XLA.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import argparse
import pathlib
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import harness, programs, record
from gnlorp_jax import config
from gnlorp_jax.models import llama
from gnlorp_jax.recipes.pretrain import recipe

RESULTS = pathlib.Path('benchmarks/results')
GOAL = 1.15  # Layer-wise step, in whole steps with remat.

METHODS: dict[str, dict[str, Any]] = {
  'gradnormlorp': {},
  'gradnormlorp, 8-bit moments': {'moment_bits': 8},
  'galore': {'name': 'galore'},
  'apollo': {'name': 'apollo'},
  'adamw': {'name': 'adamw'},
}
MEMORY_METHODS: dict[str, dict[str, Any]] = {
  'gradnormlorp': {},
  'gradnormlorp, 8-bit moments': {'moment_bits': 8},
  'gradnormlorp, 8-bit moments, 4-bit bases': {
    **{'moment_bits': 8, 'basis_bits': 4}
  },
  'gradnormlorp, 8-bit moments and weights': {
    **{'moment_bits': 8, 'weight_bits': 8}
  },
  'q_galore': {'name': 'q_galore'},
  'fira': {'name': 'fira'},
  'ldadam': {'name': 'ldadam'},
}
# Of the same work: whole with remat, whole, layer-wise, and with projected
# gradients summed.
SETTINGS: dict[str, dict[str, Any]] = {
  'plain': {'clip_global_norm': None, 'micro_batches': 1},
  'clipped': {'clip_global_norm': 1.0, 'micro_batches': 1},
  'accumulated': {'clip_global_norm': None, 'micro_batches': 4},
}
STEPS: dict[str, dict[str, Any]] = {
  'whole, remat': {'mode': 'whole', 'remat': True},
  'whole': {'mode': 'whole'},
  'layerwise': {'mode': 'layerwise'},
  'projected': {'mode': 'layerwise', 'accumulate': 'projected'},
}
# Gradients at once; waiting for their norm; summed after projecting.
MEMORY_SETTINGS: dict[str, dict[str, Any]] = {
  'plain': {'clip_global_norm': None},
  'clipped': {'clip_global_norm': 1.0},
  'projected': {
    **{'clip_global_norm': 1.0, 'accumulate': 'projected', 'micro_batches': 4}
  },
}
# Without LLVM's optimizations, for `memory`: buffers are assigned before.
FAST: dict[str, Any] = {'xla_backend_optimization_level': 0}
LAYER_COUNTS = (9, 17, 33)  # No other axis is as long.
# Methods whose step needs the whole gradient to its end.
WHOLE_GRADIENT = ('adamw', 'fira', 'ldadam')


def settings(
  *,
  hidden: int,
  layers: int,
  rank: int,
  batch_size: int = 4,
  seq_len: int = 128,
  vocab_size: int = 4096,
  remat: bool = False,
  micro_batches: int = 1,
  mode: str = 'whole',
  accumulate: str = 'gradient',
  weight_bits: int | None = None,
  **optim: Any,
) -> config.TrainConfig:
  """A run of a LLaMA with the usual proportions; `optim` are its options."""
  return config.TrainConfig(
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
    optim=config.OptimConfig(rank=rank, **optim),
    step=config.StepConfig(
      mode=mode, accumulate=accumulate, weight_bits=weight_bits
    ),
  )


def compile_step(
  planned: recipe.Planned, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
  """The compiled training step."""
  return programs.lower(planned).compile(compiler_options=options)


# Time.


class Racer:
  """A compiled step with a state of its own."""

  def __init__(self, run: config.TrainConfig):
    planned = recipe.plan(run, jax.devices()[:1])
    start = time.perf_counter()
    self._step = compile_step(planned)
    self.compile_s = time.perf_counter() - start
    self._state, self._frozen = programs.start(planned)
    rng = np.random.default_rng(0)
    shape = run.batch_size, run.data.seq_len + 1
    tokens = rng.integers(0, run.model.vocab_size, shape, dtype=np.int32)
    self._batch = {
      'inputs': jnp.asarray(tokens[:, :-1]),
      'targets': jnp.asarray(tokens[:, 1:]),
      'weights': jnp.ones((shape[0], shape[1] - 1)),
    }
    self.turns: list[list[float]] = []
    self.turn(1)
    self.turns.clear()  # The first step fits all bases.

  def turn(self, steps: int) -> None:
    """Takes and times some steps."""
    seconds = []
    for _ in range(steps):
      start = time.perf_counter()
      self._state, metrics = self._step(self._state, self._batch, self._frozen)
      jax.block_until_ready((self._state, metrics))
      seconds.append(time.perf_counter() - start)
    self.turns.append(seconds)


def race(
  method: str, setting: str, sizes: dict[str, int], rounds: int, turn: int
) -> list[dict[str, Any]]:
  """Times all steps of a method in a setting, in turns."""
  options = METHODS[method]
  chosen = dict(STEPS)
  if setting != 'accumulated' or options.get('name') in WHOLE_GRADIENT:
    del chosen['projected']
  if setting != 'plain':  # Once is enough to see what remat costs.
    del chosen['whole']
  racers = {
    name: Racer(settings(**sizes, **options, **SETTINGS[setting], **step))
    for name, step in chosen.items()
  }
  order = list(racers.values())
  for number in range(rounds):
    first = number % len(order)
    for racer in order[first:] + order[:first]:
      racer.turn(turn)
  whole = racers['whole, remat'].turns
  rows = []
  for name, racer in racers.items():
    medians = np.median(racer.turns, axis=1)
    ratios = medians / np.median(whole, axis=1)
    rows.append(
      {
        **{'method': method, 'setting': setting, 'step': name},
        'compile_s': racer.compile_s,
        'median_s': float(np.median(medians)),
        'fastest_s': float(np.min(racer.turns)),
        'ratio': float(np.median(ratios)),
        'ratio_quartiles': np.percentile(ratios, [25, 75]).tolist(),
        'ratio_of_minima': float(np.min(racer.turns) / np.min(whole)),
      }
    )
  return rows


def time_table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  lines = [
    '| method | setting | step | median, s | ratio | minima |',
    '|---|---|---|---|---|---|',
  ]
  for row in rows:
    low, high = row['ratio_quartiles']
    lines.append(
      f'| {row["method"]} | {row["setting"]} | {row["step"]} '
      f'| {row["median_s"]:.3f} | {row["ratio"]:.2f} ({low:.2f}-{high:.2f}) '
      f'| {row["ratio_of_minima"]:.2f} |'
    )
  return '\n'.join(lines) + '\n'


# Memory.


def allowed_growth(planned: recipe.Planned, waits: bool) -> int:
  """Bytes of temporaries that a layer may add, from shapes.

  Args:
    planned: A layer-wise run.
    waits: Whether the projected gradients of all layers are kept.

  Returns:
    Bytes of a block's input and of one layer's projected gradients.
  """
  run, program = planned.config, planned.program
  rows = run.batch_size
  if run.step.accumulate == 'projected':
    rows //= run.micro_batches
  itemsize = jnp.dtype(run.model.compute_dtype).itemsize
  saved = rows * run.data.seq_len * run.model.hidden_size * itemsize
  if not waits:
    return saved

  def project(params: Any, opt_state: Any) -> Any:
    exact = program.parameters.decode_exact(params)
    return program.tx.project(exact, opt_state, exact)[0]

  projected = jax.eval_shape(
    project, program.abstract_state.params, program.abstract_state.opt_state
  )
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


def memory_row(method: str, setting: str) -> dict[str, Any]:
  """Temporaries of a method's layer-wise step as the layers grow."""
  options = {
    **{**MEMORY_METHODS[method], **MEMORY_SETTINGS[setting]},
    'mode': 'layerwise',
  }
  temps, copied, state_bytes = [], [], []
  for layers in LAYER_COUNTS:
    run = settings(
      hidden=256, layers=layers, rank=64, vocab_size=2048, **options
    )
    planned = recipe.plan(run, jax.devices()[:1])
    compiled = compile_step(planned, FAST)
    analysis = compiled.memory_analysis()
    temps.append(analysis.temp_size_in_bytes)
    state_bytes.append(analysis.argument_size_in_bytes)
    copied += stacked_copies(compiled.as_text(), layers)
  waits = setting != 'plain' and hasattr(planned.program.tx, 'project')
  steps = np.diff(LAYER_COUNTS)
  return {
    **{'method': method, 'setting': setting},
    'layers': LAYER_COUNTS,
    'argument_bytes': state_bytes,
    'temp_bytes': temps,
    'growth_per_layer': (np.diff(temps) / steps).tolist(),
    'allowed_per_layer': allowed_growth(planned, waits),
    'state_per_layer': (np.diff(state_bytes) / steps).tolist(),
    'copied': copied,
  }


def memory_table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  counts = ', '.join(map(str, LAYER_COUNTS))
  lines = [
    f'| method | setting | temporaries with {counts} layers, MiB '
    '| growth per layer, KiB | of it allowed, KiB | state, KiB | copied |',
    '|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    temps = ', '.join(f'{size / 2**20:.1f}' for size in row['temp_bytes'])
    growth = ', '.join(f'{g / 1024:.0f}' for g in row['growth_per_layer'])
    lines.append(
      f'| {row["method"]} | {row["setting"]} | {temps} | {growth} '
      f'| {row["allowed_per_layer"] / 1024:.0f} '
      f'| {row["state_per_layer"][-1] / 1024:.0f} | {len(row["copied"])} |'
    )
  return '\n'.join(lines) + '\n'


# Both.


def main() -> None:
  """Measures, and writes the JSON file and the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('what', choices=('time', 'memory'))
  add('--methods', nargs='+', help='rows of the table (default: all)')
  add('--settings', nargs='+', help='of them (default: all)')
  add('--rounds', type=int, default=5, help='turns of every step')
  add('--turn', type=int, default=3, help='steps of a turn')
  add('--hidden', type=int, default=512, help='width of the model (time)')
  add('--layers', type=int, default=8, help='its layers (time)')
  add('--output', type=pathlib.Path, help='JSON file')
  args = parser.parse_args()
  methods = METHODS if args.what == 'time' else MEMORY_METHODS
  for name in args.methods or ():
    if name not in methods:
      parser.error(f'No method {name!r}; there are {list(methods)}.')
  output = args.output or RESULTS / f'layerwise_{args.what}.json'
  sizes = {'hidden': args.hidden, 'layers': args.layers}
  sizes['rank'] = args.hidden // 4
  header = {
    'command': ' '.join(sys.argv[1:]),
    **(sizes if args.what == 'time' else {}),
    **harness.environment(),
  }
  rows: list[dict[str, Any]] = []
  names = SETTINGS if args.what == 'time' else MEMORY_SETTINGS
  for setting in args.settings or names:
    for method in args.methods or methods:
      projects = methods[method].get('name') not in WHOLE_GRADIENT
      if args.what == 'time':
        rows += race(method, setting, sizes, args.rounds, args.turn)
      elif setting != 'projected' or projects:
        rows.append(memory_row(method, setting))
      record.write(output, {**header, 'rows': rows})
      harness.progress(f'{method}, {setting}')
  table = time_table if args.what == 'time' else memory_table
  sys.stdout.write(table(rows))


if __name__ == '__main__':
  main()
