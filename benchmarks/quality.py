"""Pre-trains one LLaMA with several optimizers, tuned, over several seeds.

Every optimizer takes equal steps on equal data with the training step,
schedule and clipping of `train_lm.py`, in one process: text is tokenised once,
and each optimizer's step is compiled once, with the learning rate as an
argument. First each peak learning rate of an optimizer is tried with seed 0,
the likeliest first; where the best lies at the edge of those tried, up to
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
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import harness, record
from gnlorp_jax import build, optim
from gnlorp_jax.config import DataConfig, OptimConfig, TrainConfig
from gnlorp_jax.data import batches, text
from gnlorp_jax.models import llama
from gnlorp_jax.training import sharding, step

RESULTS = pathlib.Path('benchmarks/results/quality.json')
PLOT = pathlib.Path('docs/quality.png')
MIB = 2**20
POINTS = 30  # Of a recorded training curve.

Row = dict[str, Any]
Run = tuple[str, float, int]  # Method, peak learning rate, seed.


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


class Plan(NamedTuple):
  """Which runs are wanted."""

  rates: dict[str, tuple[float, ...]]  # By method, the likeliest first.
  seeds: int
  extend: int  # Most rates tried beyond the given ones, per method.


class Corpus(NamedTuple):
  """Tokenised text."""

  train: text.TokenFile
  validation: text.TokenFile
  tokenizer: str  # Its fingerprint.


def final(row: Row) -> float:
  """The evaluation loss after the last step."""
  return row['eval'][-1][1]


def trained(rows: Sequence[Row]) -> list[Row]:
  """The runs that neither failed nor diverged."""
  return [row for row in rows if row.get('outcome') == 'trained']


def best_rate(rows: Sequence[Row], name: str) -> float | None:
  """The rate at which seed 0 ended lowest; None if it trained at none."""
  first = [
    row for row in trained(rows) if (row['method'], row['seed']) == (name, 0)
  ]
  return min(first, key=final)['learning_rate'] if first else None


def pending(name: str, rows: Sequence[Row], plan: Plan) -> list[Run]:
  """The runs of a method that come next, given those that are known.

  First the planned rates, then rates beyond the edge, then seeds: what follows
  depends on how these end.
  """
  done = {
    (row['learning_rate'], row['seed']) for row in rows if row['method'] == name
  }
  planned = plan.rates[name]
  untried = [rate for rate in planned if (rate, 0) not in done]
  if untried:
    return [(name, rate, 0) for rate in untried]
  tried = [rate for rate, seed in done if seed == 0]
  best = best_rate(rows, name)
  if len(set(tried) - set(planned)) < plan.extend:
    # Where nothing trained, the rates were too high.
    if best is None or best == min(tried):
      return [(name, min(tried) / 2, 0)]
    if best == max(tried):
      return [(name, max(tried) * 2, 0)]
  if best is None:
    return []
  seeds = range(1, plan.seeds)
  return [(name, best, seed) for seed in seeds if (best, seed) not in done]


def base_config(
  args: argparse.Namespace, model: llama.LlamaConfig | None = None
) -> TrainConfig:
  """What all runs have in common."""
  return TrainConfig(
    steps=args.steps,
    batch_size=args.batch_size,
    eval_every=args.eval_every or max(args.steps // 4, 1),
    eval_batches=args.eval_batches,
    model=model or llama.preset(args.size),
    data=DataConfig(
      source=args.data,
      validation_source=args.validation,
      tokenizer=args.tokenizer,
      seq_len=args.seq_len,
    ),
  )


def configure(
  base: TrainConfig, options: dict[str, Any], rank: int, gap: int
) -> TrainConfig:
  """The configuration of a method, at a peak learning rate of 1."""
  low_rank = {'rank': rank, 'update_proj_gap': gap}
  if options['name'] == 'adamw':
    low_rank = {}
  return dataclasses.replace(
    base, optim=OptimConfig(learning_rate=1.0, **low_rank, **options)
  )


def read_corpus(config: TrainConfig) -> Corpus:
  """Tokenises the text, or finds it in the cache."""
  tokenizer = build.load_tokenizer(config)
  build.check_tokenizer(config, tokenizer)
  files = build.token_files(config.data, tokenizer)
  return Corpus(*files, tokenizer.fingerprint)


def settings_of(
  args: argparse.Namespace, base: TrainConfig, corpus: Corpus
) -> dict[str, Any]:
  """What the runs of one file share."""

  def names(source: str | None) -> list[str] | None:
    return source and [pathlib.Path(part).name for part in source.split(',')]

  def size(file: text.TokenFile) -> int:
    return file.stop - file.start

  return {
    'size': args.size,
    'parameters': llama.num_params(base.model),
    'data': names(args.data),
    'validation': names(args.validation),
    'training_tokens': size(corpus.train),
    'validation_tokens': size(corpus.validation),
    'tokenizer': corpus.tokenizer,
    'steps': base.steps,
    'batch_size': base.batch_size,
    'seq_len': base.data.seq_len,
    'rank': args.rank,
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

  def __init__(self, config: TrainConfig, corpus: Corpus):
    self._corpus = corpus
    self._parts = build.program(config)
    self._train_step = self._make_step()
    self._eval_batches = self._place_evaluation()
    self.state_bytes = optim.inspect.state_bytes(
      self._parts.abstract_state.opt_state
    )

  def _make_step(self) -> Callable[..., Any]:
    """The training step of `build`, with the peak rate as an argument."""
    config, mesh = self._parts.config, self._parts.mesh
    # Schedules are proportional to their peak, which is 1 here.
    share = self._parts.schedule
    labels = build.labels_of(config)

    def train_step(state, batch, peak):
      tx = build.optimizer(
        config.optim, lambda count: peak * share(count), labels
      )
      return step.make_train_step(
        self._parts.loss_fn, tx, clip_global_norm=config.optim.clip_global_norm
      )(state, batch)

    return step.jit_train_step(
      train_step, self._parts.abstract_state, mesh, self._place_rate(0.0)
    )

  def _place_rate(self, rate: float) -> jax.Array:
    everywhere = NamedSharding(self._parts.mesh, PartitionSpec())
    return jax.device_put(jnp.float32(rate), everywhere)

  def _place_evaluation(self) -> list[step.Batch]:
    config = self._parts.config
    rows = batches.batches(
      self._corpus.validation,
      batch_size=config.batch_size,
      seq_len=config.data.seq_len,
      shuffle=False,
      repeat=False,
    )
    with contextlib.closing(rows):
      return [
        sharding.put_batch(batch, self._parts.mesh)
        for batch, _ in zip(rows, range(config.eval_batches), strict=False)
      ]

  def evaluate(self, params: Any) -> float:
    """Mean loss over the held-out tokens."""
    sums = [self._parts.eval_step(params, b) for b in self._eval_batches]
    losses, weights = np.asarray(jax.device_get(sums), np.float64).T
    return float(losses.sum() / weights.sum())

  def __call__(self, rate: float, seed: int) -> Row:
    """One run: its curves, and how it ended.

    It ends early, at an evaluation, if the loss is not finite any more.
    """
    config = dataclasses.replace(self._parts.config, seed=seed)
    state = build.new_state(self._parts._replace(config=config))
    stream = batches.batches(
      self._corpus.train,
      batch_size=config.batch_size,
      seq_len=config.data.seq_len,
      seed=seed,
    )
    peak = self._place_rate(rate)
    losses: list[float] = []
    evals = [[0, self.evaluate(state.params)]]
    with contextlib.closing(stream):
      while len(losses) < config.steps:
        count = min(config.eval_every, config.steps - len(losses))
        values = []
        for _ in range(count):
          batch = sharding.put_batch(next(stream), self._parts.mesh)
          state, metrics = self._train_step(state, batch, peak)
          values.append(metrics['loss'])
        losses += map(float, jax.device_get(values))
        evals.append([len(losses), self.evaluate(state.params)])
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
  while left := [runs for n in names if (runs := pending(n, rows, plan))]:
    for name, rate, seed in [runs[0] for runs in left]:
      if clock.seconds_left < np.median(seconds or [1.0]):
        harness.progress('Out of time; the same command goes on.')
        return
      row = take_run((name, rate, seed), trainers, make)
      rows.append(row)
      save(row)
      seconds.append(row['seconds'])
      harness.progress(
        f'{name}, rate {rate:g}, seed {seed}: {_ended(row)}, '
        f'{row["seconds"]:.0f} s'
      )


def _ended(row: Row) -> str:
  """The last evaluation loss, or what went wrong."""
  if row.get('outcome') == 'trained':
    return f'{final(row):.4f}'
  return row.get('absent') or row['outcome']


def part(output: pathlib.Path, number: int, count: int) -> pathlib.Path:
  """The file of one of several processes."""
  return output.with_name(f'{output.stem}.{number}of{count}.json')


def read(
  output: pathlib.Path, settings: dict[str, Any] | None = None
) -> tuple[dict[str, Any] | None, list[Row]]:
  """The runs of a file and of its parts, each run once.

  Args:
    output: The file of the whole comparison.
    settings: What the runs must have been made with; None takes those of the
      first file.

  Returns:
    What the first file holds beside its rows (None if there is no file), and
    the rows.

  Raises:
    ValueError: If a file has other settings.
  """
  header, rows = None, {}
  parts = sorted(output.parent.glob(f'{output.stem}.*of*.json'))
  for path in (output, *parts):
    if not path.exists():
      continue
    found = json.loads(path.read_text())
    settings = settings or found['settings']
    check_settings(path, found['settings'], settings)
    rows |= {
      (row['method'], row['learning_rate'], row['seed']): row
      for row in found.pop('rows')
    }
    header = header or found
  order = list(METHODS)
  keys = sorted(rows, key=lambda key: (order.index(key[0]), *key[1:]))
  return header, [rows[key] for key in keys]


def check_settings(
  path: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any]
) -> None:
  """Raises ValueError if a file's settings are not those wanted."""
  other = [
    f'{name} is {found.get(name)!r} there and {wanted.get(name)!r} here'
    for name in sorted({*found, *wanted})
    if found.get(name) != wanted.get(name)
  ]
  if other:
    raise ValueError(
      f'{path} holds runs with other settings: {"; ".join(other)}. Runs of '
      'different settings do not compare: name another --output, or remove '
      'the file.'
    )


def spread(values: Sequence[float], digits: int) -> str:
  """Mean and, of two values or more, their standard deviation, as text."""
  mean = f'{np.mean(values):.{digits}f}'
  if len(values) < 2:
    return mean
  return f'{mean} ± {np.std(values, ddof=1):.{digits}f}'


def chosen(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """The trained runs at the best rate of every method, the lowest first."""
  found = {}
  for name in METHODS:
    best = best_rate(rows, name)
    mine = [
      row
      for row in trained(rows)
      if (row['method'], row['learning_rate']) == (name, best)
    ]
    if mine:
      found[name] = mine
  return dict(
    sorted(found.items(), key=lambda item: np.mean([*map(final, item[1])]))
  )


def table(rows: Sequence[Row]) -> str:
  """A Markdown row per method, the lowest loss first."""
  heads = ['optimizer', 'peak rate', 'eval loss', 'perplexity']
  heads += ['seeds', 'state, MiB', 'tuning']
  lines = []
  winners = chosen(rows)
  failed = [name for name in METHODS if name not in winners]
  for name in (*winners, *failed):
    mine = [row for row in rows if row['method'] == name]
    if not mine:
      continue
    tuning = ', '.join(
      f'{row["learning_rate"]:g}: {_ended(row)}'
      for row in mine
      if row['seed'] == 0
    )
    best = winners.get(name, [])
    if not best:
      lines.append([name, *['-'] * 5, tuning])
      continue
    losses = [final(row) for row in best]
    rate = best[0]['learning_rate']
    seeds = sum(row['learning_rate'] == rate for row in mine)
    lines.append(
      [
        name,
        f'{rate:g}',
        spread(losses, 4),
        spread([math.exp(loss) for loss in losses], 1),
        f'{seeds}' if seeds == len(best) else f'{len(best)} of {seeds} trained',
        f'{sum(best[0]["state_bytes"].values()) / MIB:.1f}',
        tuning,
      ]
    )
  return harness.markdown(heads, lines)


def missing(names: list[str], rows: Sequence[Row], plan: Plan) -> str:
  """Names the runs that are left, for below the table."""
  left = [
    f'{name} at {rate:g} with seed {seed}'
    for method in names
    for name, rate, seed in pending(method, rows, plan)
  ]
  if not left:
    return ''
  return f'Not run, and what would follow: {", ".join(left)}.\n'


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
  """Loss curves with their deviation, and memory against loss."""
  figure = matplotlib.figure.Figure(figsize=(12, 4.8), layout='constrained')
  curves, memory = figure.subplots(1, 2)
  tops = []
  order = list(METHODS)
  for name, runs in chosen(rows).items():
    color = f'C{order.index(name)}'
    steps = [number for number, _ in runs[0]['train']]
    losses = np.array([[loss for _, loss in row['train']] for row in runs])
    evals = np.array([[loss for _, loss in row['eval'][1:]] for row in runs])
    mean, deviation = losses.mean(axis=0), _deviation(losses)
    tops.append(mean[len(mean) // 5])
    curves.fill_between(
      *(steps, mean - deviation, mean + deviation),
      color=color,
      alpha=0.15,
      lw=0,
    )
    curves.plot(steps, mean, color=color, lw=0.8)
    rate = runs[0]['learning_rate']
    curves.errorbar(
      [number for number, _ in runs[0]['eval'][1:]],
      evals.mean(axis=0),
      _deviation(evals),
      fmt='o',
      ms=4,
      capsize=3,
      color=color,
      label=f'{spread(evals[:, -1], 3)}  {name}, {rate:g}',
    )
    point = sum(runs[0]['state_bytes'].values()) / MIB, evals[:, -1].mean()
    memory.errorbar(
      *point, _deviation(evals[:, -1]), fmt='o', capsize=4, color=color
    )
    memory.annotate(
      name, point, xytext=(7, 3), textcoords='offset points', color=color
    )
  curves.set(
    xlabel='step', ylabel='loss, nats per token', ylim=(None, max(tops))
  )
  curves.legend(
    title='evaluation (points), training (lines)', fontsize=8, frameon=False
  )
  memory.set(
    xlabel='optimizer state, MiB',
    ylabel='eval loss after the last step',
    xlim=(0, 1.25 * memory.get_xlim()[1]),  # Room for the names.
  )
  for axes in (curves, memory):
    axes.grid(color='0.9')
    axes.set_axisbelow(True)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130)


def _deviation(values: np.ndarray) -> np.ndarray:
  """Over the first axis; 0 where it is of one run."""
  if len(values) < 2:
    return np.zeros(values.shape[1:])
  return values.std(axis=0, ddof=1)


def report(args: argparse.Namespace, plan: Plan) -> None:
  """Merges the files of all processes into one, and shows what they hold."""
  header, rows = read(args.output)
  if header is None:
    raise ValueError(
      f'{args.output} does not exist, so there is nothing to report. Run '
      'without --report first.'
    )
  record.write_json(args.output, {**header, 'rows': rows})
  sys.stdout.write(table(rows) + missing(args.methods, rows, plan))
  if chosen(rows):
    plot(rows, args.plot)


def measure(
  args: argparse.Namespace,
  plan: Plan,
  share: tuple[int, int],
  model: llama.LlamaConfig | None,
) -> None:
  """Runs what is missing of this process's share of the methods."""
  clock = harness.start(args)
  base = base_config(args, model)
  args.rank = args.rank or base.model.hidden_size // 4
  corpus = read_corpus(base)
  header = {
    'settings': settings_of(args, base, corpus),
    'environment': harness.environment(),
  }
  _, known = read(args.output, header['settings'])
  number, count = share
  path, own = args.output, known
  if count > 1:
    path = part(args.output, number, count)
    own = json.loads(path.read_text())['rows'] if path.exists() else []

  def make(name: str) -> Trainer:
    options = METHODS[name].options
    return Trainer(configure(base, options, args.rank, args.gap), corpus)

  def save(row: Row) -> None:
    own.append(row)
    record.write_json(path, {**header, 'rows': own})

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
  harness.add_arguments(found, RESULTS, 90)
  add = found.add_argument
  number = {'type': int, 'metavar': 'N'}
  add('--size', choices=llama.PRESETS, default='9m', help='preset of LLaMA')
  add('--data', default='stdlib', help="training text, as train_lm's")
  add('--validation', help='validation text (default: the end of --data)')
  add('--tokenizer', default='bpe', help="as train_lm's data.tokenizer")
  add('--steps', **number, default=300, help='steps of a run')
  add('--batch-size', **number, default=4, help='sequences of a step')
  add('--seq-len', **number, default=128, help='tokens of a sequence')
  add('--rank', **number, help='default: a quarter of the width')
  add('--gap', **number, default=50, help='steps between two refreshes')
  add('--eval-every', **number, help='steps; default: a quarter of --steps')
  add('--eval-batches', **number, default=40, help='held-out batches')
  add('--methods', nargs='+', choices=METHODS, default=list(METHODS))
  add(
    *('--rates',),
    **{'nargs': '+', 'default': (), 'metavar': 'METHOD=RATE,RATE'},
    help='peak learning rates instead of those of the script',
  )
  add('--extend', **number, default=2, help='most rates beyond the edge')
  add('--seeds', **number, default=3, help='seeds 0 to N - 1')
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
    if not args.report:
      measure(args, plan, share, model)
    if args.report or share[1] == 1:
      report(args, plan)
  except (ValueError, OSError) as error:
    command.error(str(error))


if __name__ == '__main__':
  main()
