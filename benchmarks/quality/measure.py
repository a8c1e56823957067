"""Pre-trains one LLaMA with several optimizers, tuned, over several seeds.

Every optimizer takes equal steps on equal data with the training step,
schedule and clipping of `train_lm.py`, in one process: text is tokenised once,
and each optimizer's step is compiled once, with the learning rate as a number
in its state. First each peak learning rate of an optimizer is tried with seed
0, the likeliest first; where the best lies at the edge of those tried, up to
--extend more follow beyond it. The best is then repeated with the other seeds.
A seed decides the initial weights and the order of the data, the same for
every optimizer.

  python -m benchmarks.quality --data 'wikipedia_en/*train*' \
    --validation 'wikipedia_en/*validation*' --tokenizer t5 --seeds 3

The JSON file is written after every run. The same command goes on where it
stopped and repeats no run; a file of other settings is refused. On two cores,
two processes of one thread share the optimizers:

  export XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
  taskset -c 0 python -m benchmarks.quality OPTIONS --process 1/2 &
  taskset -c 1 python -m benchmarks.quality OPTIONS --process 2/2 & wait
  python -m benchmarks.quality --report

The table, and its plot of loss curves and of memory against loss:

  peak rate   the learning rate whose run with seed 0 ended lowest
  eval loss   after the last step, on the same held-out tokens for every run,
              nats per token: mean and standard deviation over the seeds
  perplexity  the same of exp(loss)
  state       the optimizer's arrays, bases included, counted from their shapes
  tuning      the eval loss of seed 0 at each rate tried

Seed 0 chose the rate and counts among the seeds. Differences within the
deviations order nothing.
"""

import os

# As in train_lm.py: OpenBLAS's threads would fight with those of XLA.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.common import harness, record
from benchmarks.quality import quality_rows
from benchmarks.quality.quality_rows import Plan, Row, Run
from gnlorp_jax import optim
from gnlorp_jax.config import DataConfig, MeshConfig, OptimConfig, TrainConfig
from gnlorp_jax.data import text
from gnlorp_jax.models import llama
from gnlorp_jax.recipes.pretrain import data, recipe
from gnlorp_jax.training import loop, sharding, step

RESULTS = pathlib.Path('benchmarks/results/quality.json')
PLOT = pathlib.Path('docs/results/quality.png')
POINTS = 30  # Of a recorded training curve.


class Method(NamedTuple):
  """An optimizer of the comparison."""

  options: dict[str, Any]  # Of OptimConfig, beyond rank and interval.
  rates: tuple[float, ...]  # Peak learning rates, the likeliest first.


METHODS = {
  'adamw': Method({'name': 'adamw'}, (2e-3, 4e-3, 1e-3)),
  'galore': Method({'name': 'galore'}, (5e-3, 1e-2, 2.5e-3)),
  'gradnormlorp': Method({'name': 'gradnormlorp'}, (5e-3, 1e-2, 2.5e-3)),
  'gradnormlorp-8bit': Method(
    {'name': 'gradnormlorp', 'moment_bits': 8, 'basis_bits': 8},
    (5e-3, 1e-2, 2.5e-3),
  ),
  'apollo': Method({'name': 'apollo'}, (5e-3, 2.5e-3, 1e-2)),
  'fira': Method({'name': 'fira'}, (5e-3, 2.5e-3, 1e-2)),
}


def base_config(
  args: argparse.Namespace, model: llama.LlamaConfig | None = None
) -> TrainConfig:
  """What all runs have in common."""
  vocabulary = {} if args.vocab is None else {'vocab_size': args.vocab}
  return TrainConfig(
    steps=args.steps,
    batch_size=args.batch_size,
    eval_every=args.eval_every or max(args.steps // 4, 1),
    eval_batches=args.eval_batches,
    model=model or llama.preset(args.size, **vocabulary),
    data=DataConfig(
      source=args.data,
      validation_source=args.validation,
      tokenizer=args.tokenizer,
      seq_len=args.seq_len,
    ),
    mesh=MeshConfig(data=1),  # Of several devices, one.
  )


def configure(
  base: TrainConfig, options: dict[str, Any], rank: int, gap: int
) -> TrainConfig:
  """The configuration of a method; every run has a learning rate of its own."""
  low_rank = {'rank': rank, 'update_proj_gap': gap}
  if options['name'] == 'adamw':
    low_rank = {}
  return dataclasses.replace(
    base, optim=OptimConfig(learning_rate=1.0, **low_rank, **options)
  )


def settings_of(
  args: argparse.Namespace, base: TrainConfig, rank: int, corpus: data.Text
) -> dict[str, Any]:
  """What the runs of one file share."""

  def names(source: str | None) -> list[str] | None:
    return source and [pathlib.Path(part).name for part in source.split(',')]

  def size(file: text.TokenFile) -> int:
    return file.stop - file.start

  return {
    'size': args.size,
    'vocab_size': base.model.vocab_size,
    'parameters': llama.num_params(base.model),
    'data': names(args.data),
    'validation': names(args.validation),
    'training_tokens': size(corpus.training),
    'validation_tokens': size(corpus.validation),
    'tokenizer': corpus.tokenizer.fingerprint,
    'steps': base.steps,
    'batch_size': base.batch_size,
    'seq_len': base.data.seq_len,
    'rank': rank,
    'update_proj_gap': args.gap,
    'warmup_fraction': base.optim.warmup_fraction,
    'final_fraction': base.optim.final_fraction,
    'clip_global_norm': base.optim.clip_global_norm,
    'eval_every': base.eval_every,
    'eval_batches': base.eval_batches,
    'device': args.device,
  }


class Trainer:
  """Trains with one method; its step is compiled at the first run.

  Args:
    config: What `configure` returned.
    corpus: The tokens.
  """

  def __init__(self, config: TrainConfig, corpus: data.Text):
    self._prepared = recipe.Prepared(recipe.plan(config), corpus)
    self._eval_batches = self._place_evaluation()
    self.state_bytes = optim.inspect.state_bytes(
      self._prepared.program.abstract_state.opt_state
    )

  def _place_evaluation(self) -> list[step.Batch]:
    config, program = self._prepared.config, self._prepared.program
    rows = data.evaluation_batches(config, self._prepared.text)()
    with contextlib.closing(rows):
      return [
        sharding.put_batch(batch, program.mesh)
        for batch in itertools.islice(rows, config.eval_batches)
      ]

  def evaluate(self, params: Any) -> float:
    """Mean loss over the held-out tokens."""
    eval_step = self._prepared.program.eval_step
    # No weight is frozen.
    sums = [eval_step(params, batch, {}) for batch in self._eval_batches]
    losses, weights = np.asarray(jax.device_get(sums), np.float64).T
    return float(losses.sum() / weights.sum())

  def __call__(self, rate: float, seed: int) -> Row:
    """One run: its curves, and how it ended.

    It ends early, at an evaluation, if the loss is not finite any more.
    """
    config = self._prepared.config
    config = dataclasses.replace(
      config,
      seed=seed,
      optim=dataclasses.replace(config.optim, learning_rate=rate),
    )
    run = recipe.make_run(self._prepared, config)
    state, constants = run.start()
    losses: list[float] = []
    waiting: list[jax.Array] = []  # Losses that are not fetched yet.
    evals = [[0, self.evaluate(state.params)]]
    numbers = range(1, run.steps + 1)
    taken = loop.steps(
      run.train_step, state, run.batches, run.mesh, numbers, constants
    )
    with contextlib.closing(run.batches):
      for number, state, _, metrics in taken:
        waiting.append(metrics['loss'])
        if number % config.eval_every and number < run.steps:
          continue
        losses += map(float, jax.device_get(waiting))
        waiting.clear()
        evals.append([number, self.evaluate(state.params)])
        if not math.isfinite(losses[-1] + evals[-1][1]):
          break
    return {
      'outcome': outcome(evals, losses),
      'eval': [[number, _finite(loss)] for number, loss in evals],
      'train': thinned(losses),
      'skipped_steps': int(state.skipped),
      'state_bytes': self.state_bytes,
    }


def outcome(evals: list[list[float]], losses: list[float]) -> str:
  """How a run ended, in words for the table."""
  finite = np.isfinite(losses)
  if not finite.all():
    return f'loss not finite from step {int(np.argmin(finite)) + 1}'
  if not math.isfinite(evals[-1][1]):
    return f'eval loss not finite after step {evals[-1][0]}'
  if evals[-1][1] > evals[0][1]:
    return f'eval loss {evals[-1][1]:.2f}, above the untrained'
  return 'trained'


def thinned(losses: list[float]) -> list[list[float | None]]:
  """Means of equal windows of steps, with the last step of each window."""
  window = max(len(losses) // POINTS, 1)
  return [
    [end, _finite(float(np.mean(losses[end - window : end])))]
    for end in range(window, len(losses) + 1, window)
  ]


def _finite(value: float) -> float | None:
  """JSON has no NaN."""
  return value if math.isfinite(value) else None


def take_run(
  run: Run, trainers: dict[str, Trainer], make: Callable[[str], Trainer]
) -> Row:
  """The row of a run; one that fails says why."""
  name, rate, seed = run
  started, worked = time.monotonic(), time.process_time()
  row: Row = {'method': name, 'learning_rate': rate, 'seed': seed}
  try:
    if name not in trainers:
      trainers[name] = make(name)
    row |= trainers[name](rate, seed)
  except Exception as error:  # Whatever it is, the other runs go on.
    lines = str(error).splitlines() or ['']
    row['absent'] = f'{type(error).__name__}: {lines[0]}'
  return row | {
    'seconds': round(time.monotonic() - started, 1),
    'cpu_seconds': round(time.process_time() - worked, 1),
    'date': datetime.date.today().isoformat(),
    'commit': record.commit(),
  }


def run_all(
  names: list[str],
  plan: Plan,
  make: Callable[[str], Trainer],
  clock: harness.Clock,
  known: list[Row],
  save: Callable[[Row], None],
) -> None:
  """Takes the runs of the methods in turns, until none or no time is left.

  Args:
    names: The methods.
    plan: Which runs are wanted.
    make: Makes the trainer of a method.
    clock: No run starts that would not end in its time, were it as slow as
      the median so far: a process may have been stopped for a while.
    known: Rows of runs that are not repeated.
    save: Is called with the row of each run.
  """
  rows, trainers, seconds = list(known), {}, []
  while left := [
    runs for n in names if (runs := quality_rows.pending(n, rows, plan))
  ]:
    for name, rate, seed in [runs[0] for runs in left]:
      if clock.seconds_left < np.median(seconds or [1.0]):
        harness.progress('Out of time; the same command goes on.')
        return
      row = take_run((name, rate, seed), trainers, make)
      rows.append(row)
      save(row)
      seconds.append(row['seconds'])
      harness.progress(
        f'{name}, rate {rate:g}, seed {seed}: {quality_rows.ended(row)}, '
        f'{row["seconds"]:.0f} s'
      )


def report(args: argparse.Namespace, plan: Plan) -> None:
  """Merges the files of all processes into one, and shows what they hold."""
  header, rows = quality_rows.read(args.output)
  if header is None:
    raise ValueError(
      f'{args.output} does not exist, so there is nothing to report. Run '
      'without --report first.'
    )
  record.write(args.output, {**header, 'rows': rows})
  sys.stdout.write(
    quality_rows.table(rows) + quality_rows.missing(args.methods, rows, plan)
  )
  if quality_rows.chosen(rows):
    quality_rows.plot(rows, args.plot)


def measure(
  args: argparse.Namespace,
  plan: Plan,
  share: tuple[int, int],
  model: llama.LlamaConfig | None,
) -> None:
  """Runs what is missing of this process's share of the methods."""
  clock = harness.start(args)
  base = base_config(args, model)
  rank = args.rank or base.model.hidden_size // 4
  corpus = data.load(base, base.model)
  header = {
    'settings': settings_of(args, base, rank, corpus),
    'environment': harness.environment(),
  }
  _, known = quality_rows.read(args.output, header['settings'])
  known = quality_rows.without_failed(known)
  number, count = share
  path, own = args.output, known
  if count > 1:
    path = quality_rows.part_path(args.output, number, count)
    rows = json.loads(path.read_text())['rows'] if path.exists() else []
    own = quality_rows.without_failed(rows)

  def make(name: str) -> Trainer:
    options = METHODS[name].options
    return Trainer(configure(base, options, rank, args.gap), corpus)

  def save(*rows: Row) -> None:
    own.extend(rows)
    record.write(path, {**header, 'rows': own})

  save()
  # A process keeps a method to itself: its seeds follow from its rates.
  names = args.methods[number - 1 :: count]
  run_all(names, plan, make, clock, known, save)


def parse_rates(words: Sequence[str]) -> dict[str, tuple[float, ...]]:
  """Reads ``METHOD=RATE,RATE`` words; methods without one keep their rates.

  Raises:
    ValueError: If a word does not read so.
  """
  rates = {name: method.rates for name, method in METHODS.items()}
  for word in words:
    name, _, values = word.partition('=')
    try:
      given = tuple(map(float, values.split(',')))
    except ValueError:
      given = ()
    if name not in METHODS or not given or min(given) <= 0:
      raise ValueError(
        f'--rates {word} must be METHOD=RATE[,RATE...] with positive rates and '
        f'a method of {", ".join(METHODS)}.'
      )
    rates[name] = given
  return rates


def parse_share(word: str) -> tuple[int, int]:
  """Reads ``I/N``.

  Raises:
    ValueError: If it does not read so, or I is not one of N.
  """
  match = re.fullmatch(r'(\d+)/(\d+)', word)
  number, count = map(int, match.groups()) if match else (0, 0)
  if not 1 <= number <= count:
    raise ValueError(f'--process {word} must be I/N with 1 <= I <= N.')
  return number, count


def parser() -> argparse.ArgumentParser:
  """The command line."""
  found = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  harness.add_arguments(found, RESULTS, minutes=90)
  add = found.add_argument
  number = {'type': int, 'metavar': 'N'}
  add('--size', choices=llama.PRESETS, default='9m', help='preset of LLaMA')
  add('--data', default='stdlib', help="training text, as train_lm's")
  add('--validation', help='validation text (default: the end of --data)')
  add('--tokenizer', default='bpe', help="as train_lm's data.tokenizer")
  add('--vocab', **number, help="vocabulary (default: the preset's)")
  add('--steps', **number, default=300, help='steps of a run (default: 300)')
  add(
    '--batch-size', **number, default=4, help='sequences of a step (default: 4)'
  )
  add(
    '--seq-len',
    **number,
    default=128,
    help='tokens of a sequence (default: 128)',
  )
  add('--rank', **number, help='default: a quarter of the width')
  add(
    '--gap',
    **number,
    default=50,
    help='between two refreshes, steps (default: 50)',
  )
  add('--eval-every', **number, help='steps; default: a quarter of --steps')
  add(
    '--eval-batches',
    **number,
    default=40,
    help='held-out batches (default: 40)',
  )
  add(
    '--methods',
    nargs='+',
    choices=METHODS,
    default=list(METHODS),
    metavar='NAME',
    help='default: all, ' + ', '.join(METHODS),
  )
  add(
    '--rates',
    nargs='+',
    default=(),
    metavar='METHOD=RATE,RATE',
    help='peak learning rates to try, the likeliest first',
  )
  add('--extend', **number, default=2, help='most rates beyond the edge')
  add('--seeds', **number, default=3, help='seeds 0 to N - 1 (default: 3)')
  add('--process', default='1/1', help='I/N: the I-th of N processes')
  add('--report', action='store_true', help='only merge, table and plot')
  add('--plot', type=pathlib.Path, default=PLOT, help='PNG file')
  return found


def main(
  arguments: list[str] | None = None, model: llama.LlamaConfig | None = None
) -> None:
  """Runs what is missing, then reports; one of several processes only runs."""
  command = parser()
  args = command.parse_args(arguments)
  try:
    plan = Plan(parse_rates(args.rates), args.seeds, args.extend)
    share = parse_share(args.process)
    if args.seeds < 1 or args.extend < 0:
      raise ValueError(
        f'--seeds {args.seeds} must be at least 1 and --extend {args.extend} '
        'at least 0.'
      )
    if not args.report:
      measure(args, plan, share, model)
    if args.report or share[1] == 1:
      report(args, plan)
  except (ValueError, OSError) as error:
    command.error(str(error))


if __name__ == '__main__':
  main()
