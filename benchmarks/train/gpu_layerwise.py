"""Measures memory and speed of the layer-wise step on one GPU.

  python -m benchmarks.gpu_layerwise                    # all parts
  python -m benchmarks.gpu_layerwise --part memory_1b   # one of them
  python -m benchmarks.gpu_layerwise --tiny             # small, also on a CPU

Every part is a process of its own, takes less than ten minutes, and is written
to the JSON file while it goes; one that fails leaves its error.

memory_*  A few steps on random tokens, from a state of zeros: the device's peak
          against the compiled step's arguments + outputs + temporaries -
          aliases. The goal is a difference of 5 %.
run_*     At least 50 steps on text within 24 or 16 GB (10^9 bytes), the share
          of the card's memory that is allocated in advance. Tokens per second,
          without the first step and reading data, and the losses.
"""

import argparse
import datetime
import itertools
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import harness, programs, record
from gnlorp_jax import config
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.training import loop

RESULTS = pathlib.Path('benchmarks/results/gpu_layerwise.json')
GOAL = 0.05  # Relative difference of measured and compiled peak.
SECONDS = 570  # A part may take.
STEPS = 50  # A run takes at least.
MEMORY_STEPS = 3
CONFIGS = {
  'memory_130m': 'llama_130m',
  'memory_1b': 'llama_1b',
  'memory_7b_24gb': 'llama_7b_24gb',
  'memory_7b_16gb': 'llama_7b_16gb',
  'run_7b_24gb': 'llama_7b_24gb',
  'run_7b_16gb': 'llama_7b_16gb',
}
LIMITS = {'run_7b_24gb': 24 * 10**9, 'run_7b_16gb': 16 * 10**9}
Row = dict[str, Any]


def _settings(part: str, text: str, tiny: bool) -> config.TrainConfig:
  """The configuration of a part, with 16 x 256 tokens in a layer-wise step."""
  run = config.load(f'configs/{CONFIGS[part]}.py')
  run = replace(
    run,
    **{'batch_size': 16, 'micro_batches': 1, 'steps': 1000},
    loss_chunk_tokens=2048,
    data=replace(run.data, source=text, mode='packed'),
    step=replace(run.step, mode='layerwise'),
  )
  if not tiny:
    return run
  model = {'vocab_size': 512, 'hidden_size': 64, 'intermediate_size': 192}
  return replace(
    run,
    batch_size=4,
    model=replace(run.model, num_layers=2, num_heads=2, **model),
    data=replace(run.data, seq_len=32),
    optim=replace(run.optim, rank=16),
  )


def _memory_stats() -> dict[str, int]:
  """What the device tells of its memory; CPUs tell nothing."""
  return jax.devices()[0].memory_stats() or {}


def _prepared(run: config.TrainConfig, on_text: bool) -> tuple[Any, Any, Any]:
  """The program of a run, its batches, and what makes state and constants."""
  if on_text:
    found = recipe.prepare(run)
    batches = recipe.make_run(found, found.config).batches
    return found.planned, batches, lambda: programs.start(found.planned)
  planned = recipe.plan(run, jax.devices()[:1])
  sizes = run.model.vocab_size, run.batch_size, run.data.seq_len
  batches = itertools.repeat(programs.random_batch(*sizes))
  program = planned.program

  # Random numbers might take more memory than the step.
  def zeros() -> Any:
    return jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
      (program.abstract_state, program.parameters.frozen),
    )

  return planned, batches, zeros


def _measure(
  run: config.TrainConfig,
  on_text: bool,
  seconds: float,
  save: Callable[[Row], None],
) -> None:
  """Takes steps on text, as many as fit, or a few on random tokens."""
  begin = time.perf_counter()
  planned, batches, make = _prepared(run, on_text)
  compiled, compile_s = programs.compiled(lambda: programs.lower(planned))
  state, frozen = jax.block_until_ready(make())
  memory, step_s, losses = programs.memory(compiled), [], []
  row: Row = {
    **{'compile_s': compile_s, 'compiled': memory},
    'peak_after_initialisation': _memory_stats().get('peak_bytes_in_use'),
    **{'step_s': step_s, 'losses': losses},
  }

  def take(*arguments: Any) -> Any:
    since = time.perf_counter()
    found = jax.block_until_ready(compiled(*arguments))
    step_s.append(time.perf_counter() - since)
    return found

  def goes_on(number: int) -> bool:
    if number <= (STEPS if on_text else MEMORY_STEPS):
      return True
    return on_text and max(step_s) < seconds - (time.perf_counter() - begin)

  numbers = itertools.takewhile(goes_on, range(1, 10 * STEPS + 1))
  for taken in loop.steps(
    take, state, batches, planned.program.mesh, numbers, frozen
  ):
    number, metrics = taken.number, taken.metrics
    losses.append(float(metrics['loss']))
    row['skipped_steps'] = int(metrics['skipped_steps'])
    row['peak'] = _memory_stats().get('peak_bytes_in_use')
    if later := step_s[1:]:
      tokens = run.batch_size * run.data.seq_len * len(later)
      row['tokens_per_second'] = tokens / sum(later)
    if number % 10 == 0:
      save(row)
  if not on_text and row['peak'] is not None:
    row['difference'] = row['peak'] / memory['total'] - 1
    row['within_goal'] = abs(row['difference']) <= GOAL
  save(row)


def _card_bytes() -> int | None:
  """The first GPU's whole memory, as its driver tells; None without one."""
  command = ['nvidia-smi', '--query-gpu=memory.total']
  command += ['--format=csv,noheader,nounits']
  try:
    told = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return int(told.stdout.split()[0]) * 2**20


def _run_part(args: argparse.Namespace, part: str) -> None:
  """One part, in this process, of which nothing has used a device."""
  row: Row = {'part': part}
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  card = _card_bytes()
  if part in LIMITS and card is not None:
    row['memory_fraction'] = round(min(LIMITS[part] / card, 0.95), 4)
    os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'true'
    os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'] = str(row['memory_fraction'])
  row |= {
    **{'device': jax.devices()[0].device_kind, 'jax': jax.__version__},
    'limit_bytes': _memory_stats().get('bytes_limit'),
    'commit': record.commit(),
    'date': datetime.date.today().isoformat(),
  }

  def save(found: Row) -> None:
    row.update(found)
    _write(args, part, row)

  try:
    run = _settings(part, args.text, args.tiny)
    seconds = 0 if args.tiny else SECONDS - 90
    _measure(run, part.startswith('run'), seconds, save)
  except Exception as error:
    save({'error': f'{type(error).__name__}: {error}'[:2000]})
    raise
  finally:
    sys.stdout.write(_summary(row))


def _write(args: argparse.Namespace, part: str, row: Row) -> None:
  """Writes a part beside the others that are there."""
  parts = record.read(args.output)['parts'] if args.output.exists() else {}
  record.write(args.output, {'tiny': args.tiny, 'parts': {**parts, part: row}})


def _in_process(args: argparse.Namespace, part: str) -> bool:
  """Whether a part succeeds in a process of its own."""
  command = [
    *(sys.executable, '-m', 'benchmarks.gpu_layerwise', '--part', part),
    *('--text', args.text, '--output', str(args.output)),
    *['--tiny'] * args.tiny,
  ]
  _write(args, part, {'part': part})
  try:
    code = subprocess.run(command, timeout=SECONDS, check=False).returncode
    why = f'The process ended with code {code}.'
  except subprocess.TimeoutExpired:
    code, why = 1, f'Not done after {SECONDS} s.'
  if code:
    known = record.read(args.output)['parts'][part]
    _write(args, part, {'error': why, **known})
  return not code


def _summary(row: Row) -> str:
  """A part in a line."""
  words = [row['part']]
  if 'compiled' in row:
    words.append(f'compiled {row["compiled"]["total"] / 1e9:.3f} GB')
  if row.get('peak'):
    words.append(f'peak {row["peak"] / 1e9:.3f} GB')
  if 'difference' in row:
    words.append(f'difference {row["difference"]:+.1%}')
  if 'tokens_per_second' in row:
    words.append(f'{row["tokens_per_second"]:.0f} tokens/s')
  if losses := row.get('losses'):
    words.append(f'{len(losses)} steps, {losses[0]:.3f} -> {losses[-1]:.3f}')
  if 'error' in row:
    words.append(f'FAILED: {row["error"]}')
  return ', '.join(words) + '\n'


def main() -> None:
  """Runs the parts, each by itself, and writes the JSON file."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  add('--part', choices=CONFIGS, nargs='+', default=list(CONFIGS))
  add('--text', default='stdlib', help='as --data.source of train_lm.py')
  add('--tiny', action='store_true', help='small models, to try it out')
  add('--output', type=pathlib.Path, default=RESULTS)
  args = parser.parse_args()
  if len(args.part) == 1:
    _run_part(args, *args.part)
  elif not all([_in_process(args, part) for part in args.part]):
    raise SystemExit(1)


if __name__ == '__main__':
  main()
