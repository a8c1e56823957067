r"""Pre-trains a LLaMA in full, with adapters, and with adapters that restart.

`full` trains all weights, `lora` adapters of all kernels of the blocks, and
`relora` adapters that restart, under the jagged schedule; embeddings, norms and
head train with all three, by AdamW. Each begins `at random`, or `warm`: with
the weights that a quarter of the steps in full left, whose schedule was one for
all steps. Then it takes the other three quarters, on the batches that are left,
so that all runs of a seed see the same tokens in the same order. Parameters and
states are float32, all else bfloat16.

Each peak learning rate of a method is tried with seed 0, further ones by
factors of 2 until the best is not at an end, and the best is repeated with the
other seeds. The JSON file is written after every run, and runs that it holds
are not repeated; weights to start from are kept in --runs.

  python -m benchmarks.quality.relora --data 'wikipedia_en/*train*' \
    --validation 'wikipedia_en/*validation*' --runs runs/relora

The table: the loss on held-out text after the last step, nats per token, mean
and standard deviation over the seeds, and what it was with seed 0 at each rate.
Seed 0 chose the rate and counts among the seeds.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.common import harness, record
from benchmarks.common.tables import markdown
from gnlorp_jax.compose import language_model
from gnlorp_jax.config import (
  AdapterOptions,
  DataConfig,
  MeshConfig,
  OptimConfig,
  TrainConfig,
)
from gnlorp_jax.models import llama
from gnlorp_jax.optim.inspect import tree_bytes
from gnlorp_jax.recipes.pretrain import data, recipe
from gnlorp_jax.training import loop

PAGE = pathlib.Path('docs/results/quality.md')
OUTPUT = pathlib.Path('benchmarks/results/relora.json')
# Peak learning rates; the first one of `full` is that of the warm start.
METHODS = {
  'full': (2e-3, 1e-3, 5e-4),
  'lora': (1e-3, 2e-3, 5e-4),
  'relora': (1e-3, 2e-3, 5e-4),
}
STARTS = ('at random', 'warm')
WARM = 1 / 4  # Of the steps.


def warm_steps(steps: int) -> int:
  """Steps that lead to a warm start."""
  return round(WARM * steps)


def configure(
  args: argparse.Namespace,
  method: str,
  init_from: pathlib.Path | None = None,
) -> TrainConfig:
  """The configuration of a method, without rate and seed of a run."""
  adapter = AdapterOptions()
  if method != 'full':
    adapter = AdapterOptions(
      kind='lora',
      rank=args.rank,
      alpha=float(args.rank),
      train_others=True,
      restart_every=args.restart_every if method == 'relora' else None,
    )
  taken = 0 if init_from is None else warm_steps(args.steps)
  return TrainConfig(
    steps=args.steps - taken,
    batch_size=args.batch_size,
    eval_batches=args.eval_batches,
    init_from=None if init_from is None else str(init_from),
    model=llama.preset(
      args.size, vocab_size=args.vocab, compute_dtype='bfloat16'
    ),
    data=DataConfig(
      source=args.data, validation_source=args.validation, seq_len=args.seq_len
    ),
    optim=OptimConfig(
      name='adamw',
      learning_rate=1.0,
      schedule='jagged' if method == 'relora' else 'cosine',
    ),
    adapter=adapter,
    mesh=MeshConfig(data=1),
  )


def train(
  prepared: recipe.Prepared,
  rate: float,
  seed: int,
  position: Any = None,
  steps: int | None = None,
) -> tuple[loop.Outcome, Any, list[float]]:
  """One run, or the first steps of it.

  Args:
    prepared: What the runs of a method and a start share.
    rate: The peak learning rate.
    seed: The seed.
    position: Where in the data to begin; None is its beginning.
    steps: How many steps to take; None takes all.

  Returns:
    What it left, where in the data it ended, and the losses of its steps.
  """
  optim = dataclasses.replace(prepared.config.optim, learning_rate=rate)
  config = dataclasses.replace(prepared.config, optim=optim, seed=seed)
  run = recipe.make_run(prepared, config)
  state, constants = run.start()
  if position is not None:
    run.batches.set_state(position)
  losses = []
  numbers = range(1, (steps or run.steps) + 1)
  taken = loop.steps(
    *(run.train_step, state, run.batches, run.mesh, numbers), constants
  )
  with contextlib.closing(run.batches):
    for step in taken:
      state, loss = step.state, step.metrics['loss']
      losses.append(loss)
      if step.number % 100 == 0:
        harness.progress(f'  step {step.number}: {float(loss):.4f}')
    position = run.batches.get_state()
  outcome = loop.Outcome(state.params, constants, {})
  return outcome, position, [float(x) for x in jax.device_get(losses)]


def warm_start(
  args: argparse.Namespace, corpus: data.Text, seed: int
) -> pathlib.Path:
  """The folder of the weights to start from, and of the place in the data."""
  folder = args.runs / f'warm_seed{seed}'
  if (folder / 'position.json').exists():
    return folder
  harness.progress(f'Seed {seed}: the weights of a warm start')
  prepared = recipe.Prepared(recipe.plan(configure(args, 'full')), corpus)
  outcome, position, _ = train(
    prepared, args.rates['full'][0], seed, steps=warm_steps(args.steps)
  )
  language_model.export(
    *(prepared.program, prepared.config.model, corpus.tokenizer, outcome),
    folder,
    add_bos=False,
  )
  # The last to be written: with it, all is there.
  (folder / 'position.json').write_text(json.dumps(position))
  return folder


def measure(
  args: argparse.Namespace,
  corpus: data.Text,
  method: str,
  start: str,
  seed: int,
  rates: list[float],
) -> Iterator[dict[str, Any]]:
  """Runs a method from a start with one seed, once for each rate."""
  folder = position = None
  if start == 'warm':
    folder = warm_start(args, corpus, seed)
    position = json.loads((folder / 'position.json').read_text())
  prepared = recipe.Prepared(
    recipe.plan(configure(args, method, folder)), corpus
  )
  built = prepared.program
  evaluate = recipe.evaluation(prepared, prepared.config)
  for rate in rates:
    harness.progress(f'Seed {seed}, {method} {start}, rate {rate:g}')
    outcome, _, losses = train(prepared, rate, seed, position)
    found = evaluate(outcome.params, outcome.constants)
    yield {
      'method': method,
      'start': start,
      'seed': seed,
      'rate': rate,
      'eval_loss': record.finite(found['loss']),
      'trained_parameters': sum(
        leaf.size for leaf in jax.tree.leaves(built.parameters.trained)
      ),
      'state_bytes': tree_bytes(built.abstract_state.opt_state),
      'train': record.curve(losses),
    }


def run(
  args: argparse.Namespace,
  corpus: data.Text,
  found: dict[str, Any],
  method: str,
  start: str,
  seed: int,
) -> None:
  """Runs what the record lacks of a method, a start and a seed."""
  while True:
    rows = of(found['rows'], method, start)
    rates = missing(rows, args.rates[method], seed)
    if not rates:
      return
    for row in measure(args, corpus, method, start, seed, rates):
      found['rows'].append(row)
      record.write(args.output, found)


def of(
  rows: list[dict[str, Any]], method: str, start: str
) -> list[dict[str, Any]]:
  """The runs of a method from a start."""
  return [r for r in rows if (r['method'], r['start']) == (method, start)]


def loss_of(row: dict[str, Any]) -> float:
  """The loss on held-out text; of a run that diverged more than any."""
  return math.inf if row['eval_loss'] is None else row['eval_loss']


def best_rate(rows: list[dict[str, Any]]) -> float:
  """The rate whose run with seed 0 ended lowest."""
  return min((r for r in rows if r['seed'] == 0), key=loss_of)['rate']


def missing(
  rows: list[dict[str, Any]], rates: tuple[float, ...], seed: int
) -> list[float]:
  """Rates that a method and start has to run next with a seed.

  With seed 0 those that are given, and then, if they are several, while the
  best is at an end of what was tried, the one beyond it.
  """
  there = {row['rate'] for row in rows if row['seed'] == seed}
  wanted = rates if seed == 0 else (best_rate(rows),)
  if seed == 0 and len(rates) > 1 and there.issuperset(rates):
    best = best_rate(rows)
    beyond = {max(there): best * 2, min(there): best / 2}
    wanted = (beyond.get(best, best),)
  return [rate for rate in wanted if rate not in there]


def tables(path: pathlib.Path = OUTPUT) -> dict[str, str]:
  """The table of the page."""
  rows, lines = record.read(path)['rows'], []
  for start in STARTS:
    for method in METHODS:
      found = of(rows, method, start)
      if not any(row['seed'] == 0 for row in found):
        continue
      rate = best_rate(found)
      chosen = [row for row in found if row['rate'] == rate]
      losses = [loss_of(row) for row in chosen]
      tuning = ', '.join(
        f'{row["rate"]:g}: {loss_of(row):.4f}'
        for row in sorted(found, key=lambda row: row['rate'])
        if row['seed'] == 0
      )
      spread = np.std(losses, ddof=len(losses) > 1)
      cells = [
        *(method, start, f'{rate:g}'),
        f'{np.mean(losses):.4f} ± {spread:.4f}',
        f'{np.exp(np.mean(losses)):.1f}',
        str(len(losses)),
        f'{chosen[0]["trained_parameters"] / 1e6:.2f}',
        f'{chosen[0]["state_bytes"] / 2**20:.1f}',
        tuning,
      ]
      lines.append(cells)
  heads = [
    *('method', 'start', 'peak rate', 'eval loss', 'perplexity', 'seeds'),
    *('trained, millions', 'state, MiB', 'tuning'),
  ]
  return {'relora': markdown(heads, lines)}


def rates_of(words: list[str]) -> dict[str, tuple[float, ...]]:
  """The rates of all methods, of those that are named as given.

  Raises:
    ValueError: If a method is unknown, or a rate no number.
  """
  found = dict(METHODS)
  for word in words:
    name, _, numbers = word.partition('=')
    if name not in METHODS:
      raise ValueError(f'{word!r} names none of {list(METHODS)}.')
    found[name] = tuple(map(float, numbers.split(',')))
  return found


def arguments() -> argparse.ArgumentParser:
  """The command line."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  add('--data', default='stdlib', help="training text, as train_lm's")
  add('--validation', help='validation text (default: the end of --data)')
  add('--size', default='20m', choices=tuple(llama.PRESETS), help='the model')
  harness.add_counts(
    parser,
    ('--vocab', 4096, 'words of the vocabulary'),
    ('--steps', 4000, 'steps of a run, those of a warm start among them'),
    ('--batch-size', 16, 'sequences of a step'),
    ('--seq-len', 128, 'tokens of a sequence'),
    ('--rank', 32, 'of the adapters'),
    ('--restart-every', 500, 'steps between two restarts'),
    ('--eval-batches', 60, 'held-out batches'),
    ('--seeds', 2, 'seeds 0 to N - 1'),
  )
  add('--rates', nargs='*', default=[], help='such as lora=4e-3,8e-3')
  folder = 'where weights to start from are kept (default: %(default)s)'
  add('--runs', type=pathlib.Path, default='runs/relora', help=folder)
  harness.add_arguments(parser, OUTPUT, has_device=False)
  return parser


def main() -> None:
  """Runs what is missing; the table is that of `benchmarks.report`."""
  parser = arguments()
  args = parser.parse_args()
  if args.report:
    report.report('quality.relora')
    return
  try:
    args.rates = rates_of(args.rates)
  except ValueError as error:
    parser.error(str(error))
  names = (
    *('size', 'vocab', 'steps', 'batch_size', 'seq_len', 'rank'),
    *('restart_every', 'eval_batches'),
  )
  settings = {name: getattr(args, name) for name in names}
  settings['warm_rate'] = args.rates['full'][0]
  found = {'settings': settings, 'environment': None, 'rows': []}
  if args.output.exists():
    found = record.read(args.output)
  if found['settings'] != settings:
    parser.error(f'{args.output} holds runs of {found["settings"]}.')
  found['environment'] = harness.environment()
  planned = recipe.plan(configure(args, 'full'))
  corpus = data.load(planned.config, planned.config.model)
  for seed in range(args.seeds):
    for start in STARTS:
      for method in METHODS:
        run(args, corpus, found, method, start, seed)


if __name__ == '__main__':
  main()
