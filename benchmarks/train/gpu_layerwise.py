"""Measures memory and speed of the layer-wise step on one GPU.

  python -m benchmarks.gpu_layerwise                    # all parts
  python -m benchmarks.gpu_layerwise --part memory_1b   # one of them
  python -m benchmarks.gpu_layerwise --tiny             # small, also on a CPU

Every part is a process of its own, takes less than ten minutes, and is written
to the JSON file as soon as it is done; one that fails leaves its error, and the
others go on.

memory_*  A few steps on random tokens, without memory allocated in advance:
          the device's peak (`peak_bytes_in_use`) against the compiled step's
          arguments + outputs + temporaries - aliases. The state is all zeros,
          because random numbers might take more memory than the step. The goal
          is a difference of 5 %.
run_*     At least 50 steps on text, with that share of the card's memory
          allocated in advance which is 24 or 16 GB (10^9 bytes) or less: a
          limit that the run cannot pass. Tokens per second (without the first
          step, which compiles, and without reading data) and the losses.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.common import record

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


def settings(part: str, text: str, tiny: bool) -> Any:
  """The configuration of a part, with 16 x 256 tokens in a layer-wise step."""
  from gnlorp_jax import config

  run = config.load(f'configs/{CONFIGS[part]}.py')
  run = dataclasses.replace(
    run,
    batch_size=16,
    micro_batches=1,
    steps=1000,
    loss_chunk_tokens=2048,
    data=dataclasses.replace(run.data, source=text, mode='packed'),
    step=dataclasses.replace(run.step, mode='layerwise'),
  )
  if not tiny:
    return run
  return dataclasses.replace(
    run,
    batch_size=4,
    model=dataclasses.replace(
      run.model,
      **{'vocab_size': 512, 'hidden_size': 64, 'intermediate_size': 192},
      **{'num_layers': 2, 'num_heads': 2},
    ),
    data=dataclasses.replace(run.data, seq_len=32),
    optim=dataclasses.replace(run.optim, rank=16),
  )


def compiled_bytes(compiled: Any) -> dict[str, int]:
  """The buffers of a compiled program, and their sum."""
  found = compiled.memory_analysis()
  parts = {
    'arguments': found.argument_size_in_bytes,
    'outputs': found.output_size_in_bytes,
    'temporaries': found.temp_size_in_bytes,
    'aliases': found.alias_size_in_bytes,
  }
  total = sum(parts.values()) - 2 * parts['aliases']
  return {**parts, 'total': total}


def peak_bytes() -> int | None:
  """The most that was ever allocated on the device; None on CPUs."""
  import jax

  stats = jax.devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use')


def zeros(planned: Any) -> Any:
  """State and frozen weights, made without any temporary memory."""
  import jax
  import jax.numpy as jnp

  return jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
    (planned.program.abstract_state, planned.program.parameters.frozen),
  )


def start(
  planned: Any, make: Callable[[Any], Any]
) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
  """The compiled step, its state, and what making them needs by itself.

  Args:
    planned: The run.
    make: Makes the state and the frozen weights.

  Returns:
    The step, which is finished when it returns and adds its seconds to
    ``step_s`` of the row; state and frozen weights; the row.
  """
  import jax

  from benchmarks.common import programs

  begin = time.perf_counter()
  compiled = programs.lower(planned).compile()
  seconds = time.perf_counter() - begin
  made = jax.block_until_ready(make(planned))
  row: dict[str, Any] = {
    'compile_s': seconds,
    'compiled': compiled_bytes(compiled),
    'peak_after_initialisation': peak_bytes(),
    'step_s': [],
  }

  def take(*arguments: Any) -> Any:
    since = time.perf_counter()
    found = jax.block_until_ready(compiled(*arguments))
    row['step_s'].append(time.perf_counter() - since)
    return found

  return take, made, row


def measure_memory(run: Any, save: Callable[[Any], None]) -> None:
  """Some steps on random tokens."""
  import jax
  import numpy as np

  from gnlorp_jax.recipes.pretrain import recipe
  from gnlorp_jax.training import loop

  planned = recipe.plan(run, jax.devices()[:1])
  take, (state, frozen), row = start(planned, zeros)
  rng = np.random.default_rng(0)
  vocab, length = run.model.vocab_size, run.data.seq_len
  tokens = rng.integers(0, vocab, (run.batch_size, length + 1), dtype=np.int32)
  batch = {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': np.ones((run.batch_size, length), np.float32),
  }
  mesh, numbers = planned.program.mesh, range(1, MEMORY_STEPS + 1)
  for taken in loop.steps(
    take, state, itertools.repeat(batch), mesh, numbers, frozen
  ):
    row['loss'] = float(taken.metrics['loss'])
  del row['step_s']
  row['peak'] = peak_bytes()
  if row['peak'] is not None:
    row['difference'] = row['peak'] / row['compiled']['total'] - 1
    row['within_goal'] = abs(row['difference']) <= GOAL
  save(row)


def measure_run(run: Any, save: Callable[[Any], None], seconds: float) -> None:
  """Steps on text until the time is over, at least `STEPS`."""
  from benchmarks.common import programs
  from gnlorp_jax.recipes.pretrain import recipe
  from gnlorp_jax.training import loop

  begin = time.perf_counter()
  prepared = recipe.prepare(run)
  parts = recipe.make_run(prepared, prepared.config)
  take, (state, frozen), row = start(prepared.planned, programs.start)
  row |= {'losses': [], 'skipped_steps': 0}
  tokens = run.batch_size * run.data.seq_len

  def has_time(number: int) -> bool:
    if number <= STEPS:
      return True
    return time.perf_counter() - begin + max(row['step_s']) < seconds

  numbers = itertools.takewhile(has_time, range(1, 10 * STEPS + 1))
  for number, *_, metrics in loop.steps(
    take, state, parts.batches, parts.mesh, numbers, frozen
  ):
    row['losses'].append(float(metrics['loss']))
    row['skipped_steps'] = int(metrics['skipped_steps'])
    row['peak'] = peak_bytes()
    later = row['step_s'][1:]
    if later:
      row['tokens_per_second'] = tokens * len(later) / sum(later)
    if number % 10 == 0:
      save(row)
  parts.batches.close()
  save(row)


def run_part(part: str, text: str, tiny: bool, output: pathlib.Path) -> None:
  """One part, in this process; `output` is written while it goes."""
  import jax

  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  found = {
    'part': part,
    'device': device.device_kind,
    'jax': jax.__version__,
    'limit_bytes': stats.get('bytes_limit'),
    'commit': record.commit(),
    'date': datetime.date.today().isoformat(),
  }

  def save(row: dict[str, Any]) -> None:
    record.write(output, {**found, **row})

  run = settings(part, text, tiny)
  try:
    if part.startswith('memory'):
      measure_memory(run, save)
    else:
      measure_run(run, save, 0 if tiny else SECONDS - 90)
  except Exception as error:
    known = json.loads(output.read_text()) if output.exists() else found
    lines = traceback.format_exc().splitlines()
    text = f'{type(error).__name__}: {error}'[:2000]
    record.write(output, {**known, 'error': text, 'trace': lines[-12:]})
    raise


def card_bytes() -> int | None:
  """The first GPU's whole memory, as its driver tells; None without one."""
  try:
    told = subprocess.run(
      [
        *('nvidia-smi', '--query-gpu=memory.total'),
        '--format=csv,noheader,nounits',
      ],
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return int(told.stdout.split()[0]) * 2**20


def environment(part: str) -> dict[str, str]:
  """How much memory the process of a part may allocate, and when."""
  variables = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  card = card_bytes()
  if part in LIMITS and card is not None:
    share = min(LIMITS[part] / card, 0.95)
    variables['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'true'
    variables['XLA_PYTHON_CLIENT_MEM_FRACTION'] = f'{share:.4f}'
  return variables


def in_process(part: str, args: argparse.Namespace) -> dict[str, Any]:
  """What a part measured in a process of its own, or its error."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'part.json'
    command = [
      *(sys.executable, '-m', 'benchmarks.gpu_layerwise', '--inside', part),
      *('--text', args.text, '--output', str(path)),
      *(['--tiny'] if args.tiny else []),
    ]
    variables = environment(part)
    try:
      code = subprocess.run(
        command, env=variables, timeout=SECONDS, check=False
      ).returncode
      error = f'The process ended with code {code}.' if code else None
    except subprocess.TimeoutExpired:
      error = f'Not done after {SECONDS} s.'
    found = json.loads(path.read_text()) if path.exists() else {'part': part}
    if error:
      found.setdefault('error', error)
    share = variables.get('XLA_PYTHON_CLIENT_MEM_FRACTION')
    if part in LIMITS and card_bytes() is not None:
      found['memory_fraction'] = float(share or 0)
    return found


def summary(row: dict[str, Any]) -> str:
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
  if row.get('losses'):
    losses = row['losses']
    words.append(f'{len(losses)} steps, {losses[0]:.3f} -> {losses[-1]:.3f}')
  if 'error' in row:
    words.append('FAILED: ' + row['error'].splitlines()[0])
  return ', '.join(words) + '\n'


def main() -> None:
  """Runs the parts, each by itself, and writes the JSON file."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--part', choices=CONFIGS, nargs='+', default=list(CONFIGS))
  add('--text', default='stdlib', help='as --data.source of train_lm.py')
  add('--tiny', action='store_true', help='small models, to try it out')
  add('--output', type=pathlib.Path, default=RESULTS)
  add('--inside', choices=CONFIGS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.inside:
    run_part(args.inside, args.text, args.tiny, args.output)
    return
  known = json.loads(args.output.read_text()) if args.output.exists() else {}
  parts = known.get('parts', {})
  for part in args.part:
    parts[part] = in_process(part, args)
    record.write(args.output, {'tiny': args.tiny, 'parts': parts})
    sys.stdout.write(summary(parts[part]))
    sys.stdout.flush()
  if any('error' in parts[part] for part in args.part):
    raise SystemExit(1)


if __name__ == '__main__':
  main()
