"""Trains the same small LLaMA with every optimizer of the library.

The protocol is that of `reference_curves` (the same weights, 300 batches and
schedule; rank 32, refresh every 60 steps, no clipping), with each optimizer as
the library's defaults make it and its learning rate tuned over three values.
Results go to a JSON file after every run; runs it holds already are not
repeated. The table and the plot come at the end, or from `--report`.

On two cores, two processes of one thread each finish more runs per hour than
one process of two threads:

  curves='--reference ../shared/reference/curves'
  taskset -c 0 python -m benchmarks.methods_lm $curves --process 1/2 &
  taskset -c 1 python -m benchmarks.methods_lm $curves --process 2/2 & wait
  python -m benchmarks.methods_lm --report

Shape suffixes in this file:
  S, B, T  batches, sequences in a batch, positions
  D, V     features, vocabulary
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax

from benchmarks.common import record
from benchmarks.quality import reference_curves as reference
from gnlorp_jax import optim
from gnlorp_jax.models import llama
from gnlorp_jax.training import step
from gnlorp_jax.training.state import TrainState

RESULTS = pathlib.Path('benchmarks/results/methods_lm.json')
PLOT = pathlib.Path('docs/results/methods_lm.png')

# Without the guard: a run that diverges shall show it, and on a CPU the guard's
# branch over all parameters takes about a quarter of a step's time.
FULL = {'skip_nonfinite': False}
LOW_RANK = {**reference.LOW_RANK, **FULL}

Factory = Callable[[optax.Schedule], optax.GradientTransformation]
Row = dict[str, Any]

# Random pieces of a quarter of an axis, eight coordinates each: as many
# coordinates as rank 32 has.
PIECES = {'rank': 8, 'granularity': 4, 'update_proj_gap': 60, **FULL}

# Name: (optimizer of a schedule, peak learning rates, the likeliest first).
METHODS: dict[str, tuple[Factory, tuple[float, ...]]] = {
  'gradnormlorp': (
    lambda rate: optim.gradnormlorp(rate, **LOW_RANK),
    (1e-2, 2e-2, 5e-3),
  ),
  'gradnormlorp, 8 bits': (
    lambda rate: optim.gradnormlorp(
      rate, **LOW_RANK, moment_bits=8, basis_bits=8
    ),
    (1e-2, 2e-2, 5e-3),
  ),
  'gradnormlorp, 4 bits': (
    lambda rate: optim.gradnormlorp(
      rate, **LOW_RANK, moment_bits=4, basis_bits=4
    ),
    (1e-2, 5e-3, 2e-2),
  ),
  'gradnormlorp, both sides': (
    lambda rate: optim.gradnormlorp(rate, **LOW_RANK, side='both'),
    (1e-2, 2e-2, 5e-3),
  ),
  'gradnormlorp, rotated': (
    lambda rate: optim.gradnormlorp(
      rate, **LOW_RANK, moments_on_refresh='rotate'
    ),
    (1e-2, 2e-2, 5e-3),
  ),
  'galore': (
    lambda rate: optim.galore(rate, **LOW_RANK),
    (1e-2, 5e-3, 2.5e-3),
  ),
  'galore, 8 bits': (
    lambda rate: optim.galore(rate, **LOW_RANK, moment_bits=8),
    (1e-2, 5e-3, 2.5e-3),
  ),
  'q_galore': (
    lambda rate: optim.q_galore(rate, **LOW_RANK),
    (1e-2, 5e-3, 2.5e-3),
  ),
  'galore_adafactor': (
    lambda rate: optim.galore_adafactor(rate, **LOW_RANK),
    (1e-2, 5e-3, 2e-2),
  ),
  'dct_adamw': (
    lambda rate: optim.dct_adamw(rate, rank=32, **FULL),
    (5e-3, 2e-3, 1e-3),
  ),
  'dct_adamw, errors in 8 bits': (
    lambda rate: optim.dct_adamw(rate, rank=32, error_bits=8, **FULL),
    (5e-3, 2e-3, 1e-3),
  ),
  'vlorp': (
    lambda rate: optim.vlorp(rate, scale=0.25, **PIECES),
    (1e-2, 5e-3, 2.5e-3),
  ),
  'projfactor': (
    lambda rate: optim.projfactor(rate, **PIECES),
    (5e-3, 2e-3, 1e-3),
  ),
  'apollo': (
    lambda rate: optim.apollo(rate, rank=32, update_proj_gap=60, **FULL),
    (1e-2, 5e-3, 2.5e-3),
  ),
  'apollo_mini': (
    # The published scale is a quarter of the width.
    lambda rate: optim.apollo_mini(rate, update_proj_gap=60, scale=32, **FULL),
    (1e-2, 5e-3, 2.5e-3),
  ),
  'fira': (
    lambda rate: optim.fira(rate, **LOW_RANK),
    (1e-2, 5e-3, 2.5e-3),
  ),
  'ldadam': (
    lambda rate: optim.ldadam(rate, rank=32, **FULL),
    (5e-3, 2e-3, 1e-2),
  ),
  'adamw': (lambda rate: optim.adamw(rate, **FULL), (2e-3, 1e-3, 4e-3)),
}


@jax.custom_vjp
def head_loss(
  x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array
) -> jax.Array:
  """Mean cross-entropy of all positions, a float32 scalar.

  The number `losses.chunked_cross_entropy` gives. The head is nine tenths of
  this model's arithmetic; here the forward pass leaves the gradients behind,
  which saves one of four products with it, and a chunk is one sequence, whose
  logits stay in the cache.
  """
  return _head_gradients(x_BTD, head_DV, targets_BT)[0]


def _head_gradients(x_BTD, head_DV, targets_BT):
  def add_sequence(carry, sequence):
    loss, head_grad_DV = carry
    x_TD, targets_T = sequence
    logits_TV = x_TD @ head_DV
    total_T1 = jax.nn.logsumexp(logits_TV, axis=-1, keepdims=True)
    target_T1 = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)
    hit_TV = jax.nn.one_hot(targets_T, head_DV.shape[1])
    grad_TV = (jnp.exp(logits_TV - total_T1) - hit_TV) / targets_BT.size
    loss = loss + jnp.sum(total_T1 - target_T1) / targets_BT.size
    return (loss, head_grad_DV + x_TD.T @ grad_TV), grad_TV @ head_DV.T

  zero = jnp.zeros([], jnp.float32), jnp.zeros_like(head_DV)
  (loss, head_grad_DV), x_grad_BTD = jax.lax.scan(
    add_sequence, zero, (x_BTD, targets_BT)
  )
  return loss, x_grad_BTD, head_grad_DV


def _head_forward(x_BTD, head_DV, targets_BT):
  loss, *grads = _head_gradients(x_BTD, head_DV, targets_BT)
  return loss, grads


def _head_backward(grads, cotangent):
  return *(cotangent * grad for grad in grads), None


head_loss.defvjp(_head_forward, _head_backward)


def loss_fn(
  params: Any, batch: step.Batch, config: llama.LlamaConfig
) -> jax.Array:
  """Mean next-token loss of a batch of rows."""
  x_BTD = llama.make(config).hidden(params, batch['inputs'])
  return head_loss(x_BTD, params['lm_head']['kernel'], batch['targets'])


def compile_training(
  factory: Factory, tokens_SBT: np.ndarray, config: llama.LlamaConfig
) -> Callable[[float], tuple[Any, np.ndarray]]:
  """Compiles the steps of a run, one per batch, for every learning rate.

  Args:
    factory: Makes the optimizer for a learning-rate schedule.
    tokens_SBT: The batches of the run, int ids.
    config: The architecture.

  Returns:
    A function from the peak learning rate to the trained parameters and the
    losses of all steps. It never compiles again: the rate is an argument.
  """
  steps = len(tokens_SBT)

  def train_step(
    now: TrainState, batch: step.Batch, peak: jax.Array
  ) -> tuple[TrainState, step.Metrics]:
    # Without the guard of `step.make_train_step`, as `FULL` says.
    tx = factory(reference.schedule(peak, steps, max(steps // 10, 1)))
    loss, grads = jax.value_and_grad(loss_fn)(now.params, batch, config)
    updates, opt_state = tx.update(grads, now.opt_state, now.params)
    params = optax.apply_updates(now.params, updates)
    now = TrainState(now.step + 1, now.skipped, params, opt_state)
    return now, {'loss': loss}

  return reference.compile_training(
    train_step,
    factory(reference.schedule(0.0)),  # No rate is part of a state.
    reference.initial_params(config),
    tokens_SBT,
    0.0,
  )


def state_bytes(factory: Factory, config: llama.LlamaConfig) -> int:
  """Bytes of the optimizer state, from shapes alone."""
  tx = factory(reference.schedule(0.0))
  state = jax.eval_shape(lambda: tx.init(reference.initial_params(config)))
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(state)
  )


def outcome(eval_loss: float, train_loss: np.ndarray, untrained: float) -> str:
  """How a run ended, in words for the table."""
  finite = np.isfinite(train_loss)
  if not finite.all():
    return f'not finite from step {int(np.argmin(finite)) + 1}'
  if not math.isfinite(eval_loss):
    return 'not finite after the last step'
  if eval_loss > untrained:
    return 'above the untrained loss'
  return 'trained'


def pending(
  names: list[str], steps: int, rows: list[Row]
) -> list[tuple[str, float]]:
  """Runs no row holds: the likeliest rate of every method, then the others."""
  done = {_key(row) for row in rows}
  rounds = itertools.zip_longest(*(METHODS[name][1] for name in names))
  return [
    (name, rate)
    for rates in rounds
    for name, rate in zip(names, rates, strict=True)
    if rate is not None and (name, rate, steps) not in done
  ]


def run_all(
  runs: list[tuple[str, float]],
  tokens_SBT: np.ndarray,
  steps: int,
  config: llama.LlamaConfig,
  minutes: float,
  path: pathlib.Path,
) -> None:
  """Takes the runs in turn and adds a row to the JSON file after each.

  Args:
    runs: Method and peak learning rate of each.
    tokens_SBT: All batches, int ids; the last ones are those of evaluations.
    steps: Steps of a run.
    config: The architecture.
    minutes: No run starts that would not end in this time, were it as slow as
      the slowest so far, compilation included.
    path: The JSON file.
  """
  start, slowest = time.time(), 0.0
  rows = read(path)
  evaluate = functools.partial(
    reference.evaluate, tokens_SBT=tokens_SBT, config=config
  )
  untrained = evaluate(reference.initial_params(config))
  compiled: dict[str, Callable[[float], tuple[Any, np.ndarray]]] = {}
  for number, (name, rate) in enumerate(runs, start=1):
    began = time.time()
    if began - start + slowest > 60 * minutes:
      sys.stdout.write(f'{len(runs) - number + 1} runs left: out of time.\n')
      return
    factory, _ = METHODS[name]
    if name not in compiled:
      compiled[name] = compile_training(factory, tokens_SBT[:steps], config)
    ready = time.time()
    params, train_loss = compiled[name](rate)
    eval_loss = evaluate(params)
    end = time.time()
    row = {
      'method': name,
      'learning_rate': rate,
      'steps': steps,
      'outcome': outcome(eval_loss, train_loss, untrained),
      'eval_loss': _finite(eval_loss),
      'untrained_eval_loss': untrained,
      'train_loss': [_finite(loss) for loss in train_loss.tolist()],
      'state_bytes': state_bytes(factory, config),
      'compile_seconds': round(ready - began, 1),
      'seconds': round(end - ready, 1),
      'commit': record.commit(),
    }
    rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, allow_nan=False) + '\n')
    slowest = max(slowest, end - began)
    sys.stdout.write(
      f'{number}/{len(runs)} {name}, lr {rate:g}: {eval_loss:.4f} '
      f'({row["outcome"]}), {row["compile_seconds"]} + {row["seconds"]} s\n'
    )
    sys.stdout.flush()


def _finite(value: float) -> float | None:
  """JSON has no NaN."""
  return value if math.isfinite(value) else None


def _key(row: Row) -> tuple[str, float, int]:
  return row['method'], row['learning_rate'], row['steps']


def read(path: pathlib.Path) -> list[Row]:
  """The rows of a file; none where it is absent."""
  return json.loads(path.read_text()) if path.exists() else []


def part(output: pathlib.Path, number: int, count: int) -> pathlib.Path:
  """The file of one of several processes."""
  return output.with_name(f'{output.stem}.{number}of{count}.json')


def merged(output: pathlib.Path) -> list[Row]:
  """The rows of the file and of all its parts, each run once."""
  parts = sorted(output.parent.glob(f'{output.stem}.*of*.json'))
  rows = [row for path in (output, *parts) for row in read(path)]
  order = list(METHODS)
  unique = {_key(row): row for row in rows if row['method'] in order}
  return sorted(
    unique.values(),
    key=lambda r: (r['steps'], order.index(r['method']), r['learning_rate']),
  )


def best(rows: list[Row]) -> dict[str, Row]:
  """The run with the lowest evaluation loss per method, the best first."""
  found: dict[str, Row] = {}
  trained = [row for row in rows if row['outcome'] == 'trained']
  for row in sorted(trained, key=lambda row: row['eval_loss']):
    found.setdefault(row['method'], row)
  return found


def table(rows: list[Row]) -> str:
  """A Markdown row per method, the best first; its best loss in bold."""
  winners = best(rows)
  failed = [name for name in METHODS if name not in winners]
  lines = [
    '| optimizer | peak learning rate: eval loss | state MiB | s per run |',
    '|---|---|---|---|',
  ]
  for name in (*winners, *failed):
    runs = [row for row in rows if row['method'] == name]
    if not runs:
      continue
    cells = []
    for row in runs:
      text = row['outcome']
      if row['outcome'] == 'trained':
        mark = '**' if row is winners[name] else ''
        text = f'{mark}{row["eval_loss"]:.4f}{mark}'
      cells.append(f'{row["learning_rate"]:g}: {text}')
    seconds = sum(row['seconds'] for row in runs) / len(runs)
    lines.append(
      f'| {name} | {", ".join(cells)} '
      f'| {runs[0]["state_bytes"] / 2**20:.1f} | {seconds:.0f} |'
    )
  return '\n'.join(lines) + '\n'


def plot(rows: list[Row], path: pathlib.Path) -> None:
  """Training losses of the best runs, and the evaluation losses of all."""
  winners = best(rows)
  figure = matplotlib.figure.Figure(figsize=(12, 8), layout='constrained')
  panels = figure.subplot_mosaic(
    [['loss', 'eval'], ['gap', 'eval']], width_ratios=(3, 2)
  )
  window = max(len(next(iter(winners.values()))['train_loss']) // 15, 1)
  smooth = {
    name: np.convolve(row['train_loss'], np.ones(window) / window, 'valid')
    for name, row in winners.items()
  }
  # All runs see the same batches: the noise they share hides how they differ.
  mean = np.mean(list(smooth.values()), axis=0)
  steps = np.arange(window, window + len(mean))
  evals = [row['eval_loss'] for row in winners.values()]
  limit = evals[-1] + max(evals[-1] - evals[0], 0.1)
  for place, (name, row) in enumerate(winners.items()):
    color, line = f'C{place % 10}', '-' if place < 10 else '--'
    style = {'color': color, 'ls': line, 'lw': 1.3}
    label = f'{row["eval_loss"]:.3f}  {name}, lr {row["learning_rate"]:g}'
    panels['loss'].plot(steps, smooth[name], label=label, **style)
    panels['gap'].plot(steps, smooth[name] - mean, **style)
    trained = sorted(
      (r for r in rows if r['method'] == name and r['outcome'] == 'trained'),
      key=lambda r: r['eval_loss'],
    )
    for number, other in enumerate(trained):
      point = min(other['eval_loss'], limit), place
      marker = 'o' if other['eval_loss'] < limit else '>'
      fill = color if other is row else 'none'
      panels['eval'].plot(*point, marker, mec=color, mfc=fill)
      panels['eval'].annotate(
        f'{other["learning_rate"]:g}',
        point,
        # Neighbours in turn above and below, where points lie close together.
        xytext=(0, -13 if number % 2 else 6),
        textcoords='offset points',
        ha='center',
        fontsize=7,
      )
  panels['loss'].set_ylabel(f'training loss, mean of {window} steps')
  panels['loss'].legend(title='eval loss, best run of each', fontsize=8)
  panels['gap'].set(xlabel='step', ylabel='the same, less the mean of all')
  panels['eval'].set(
    xlabel='eval loss by peak learning rate\n(filled: best, >: off the scale)',
    yticks=range(len(winners)),
    yticklabels=list(winners),
  )
  panels['eval'].invert_yaxis()
  for axes in panels.values():
    axes.grid(color='0.9')
    axes.set_axisbelow(True)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


def report(output: pathlib.Path, path: pathlib.Path, steps: int) -> None:
  """Merges the files of all processes into one, and shows what they hold."""
  rows = merged(output)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(json.dumps(rows, indent=1, allow_nan=False) + '\n')
  shown = [row for row in rows if row['steps'] == steps]
  sys.stdout.write(table(shown))
  if best(shown):
    plot(shown, path)


def main(
  arguments: list[str] | None = None, config: llama.LlamaConfig | None = None
) -> None:
  """Runs what is missing, then reports; one of several processes only runs."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--reference', type=pathlib.Path, help='folder with tokens.npz')
  add('--methods', nargs='+', choices=METHODS, default=list(METHODS))
  add('--minutes', type=float, default=math.inf, help='time for all runs')
  add('--steps', type=int, default=reference.STEPS, help='steps of a run')
  add('--process', default='1/1', help='k/n: the k-th of n processes')
  add('--report', action='store_true', help='only merge, table and plot')
  add('--output', type=pathlib.Path, default=RESULTS)
  add('--plot', type=pathlib.Path, default=PLOT)
  args = parser.parse_args(arguments)
  last = reference.EVAL_BATCHES[0]
  if not 2 <= args.steps <= last:
    parser.error(
      f'--steps {args.steps} must be in [2, {last}]: the batches after these '
      'are those of the evaluation.'
    )
  match = re.fullmatch(r'(\d+)/(\d+)', args.process)
  number, count = map(int, match.groups()) if match else (0, 0)
  if not 1 <= number <= count:
    parser.error(f'--process {args.process} must be k/n with 1 <= k <= n.')
  if not args.report:
    if args.reference is None:
      parser.error('--reference is missing: the folder with tokens.npz.')
    # A process keeps a method to itself: nothing is compiled twice.
    names = args.methods[number - 1 :: count]
    path = part(args.output, number, count) if count > 1 else args.output
    run_all(
      pending(names, args.steps, merged(args.output)),
      reference.read_tokens(args.reference),
      args.steps,
      config or reference.CONFIG,
      args.minutes,
      path,
    )
  if args.report or count == 1:
    report(args.output, args.plot, args.steps)


if __name__ == '__main__':
  main()
