r"""Pre-trains a LLaMA on packed rows, its documents seeing each other or not.

The runs of a seed start from the same weights and see the same rows in the same
order. They differ in `data.document_mask`: whether a token attends to the
documents before its own in the row, at positions that go on, or to its own
alone, at positions that start again. Each model is then evaluated both ways, on
the same held-out rows. The JSON file is written after every run; runs it holds
are not repeated.

  python -m benchmarks.quality.document_mask --data 'wikipedia_en/*train*' \
    --validation 'wikipedia_en/*validation*'

The table has a row for each way to train: the loss, nats per token, mean and
standard deviation over the seeds, where documents see each other and where each
stands alone (there, the first token of a document is not counted).
"""

import argparse
import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.common import harness, record
from benchmarks.common.tables import markdown
from gnlorp_jax.config import DataConfig, MeshConfig, OptimConfig, TrainConfig
from gnlorp_jax.models import llama
from gnlorp_jax.recipes.pretrain import data, recipe
from gnlorp_jax.training import loop

PAGE = pathlib.Path('docs/results/quality.md')
OUTPUT = pathlib.Path('benchmarks/results/document_mask.json')
WAYS = {'each other': False, 'alone': True}


def configure(args: argparse.Namespace, document_mask: bool) -> TrainConfig:
  """The configuration of a way to train, without the seed of a run."""
  return TrainConfig(
    steps=args.steps,
    batch_size=args.batch_size,
    eval_batches=args.eval_batches,
    model=llama.preset('9m', vocab_size=4096),
    data=DataConfig(
      source=args.data,
      validation_source=args.validation,
      seq_len=args.seq_len,
      document_mask=document_mask,
    ),
    optim=OptimConfig(
      name='gradnormlorp', learning_rate=5e-3, rank=32, update_proj_gap=100
    ),
    mesh=MeshConfig(data=1),
  )


def train(
  prepared: recipe.Prepared, others: dict[str, recipe.Prepared], seed: int
) -> dict[str, Any]:
  """One run, and its evaluations in both ways."""
  config = dataclasses.replace(prepared.config, seed=seed)
  run = recipe.make_run(prepared, config)
  state, constants = run.start()
  losses = []
  taken = loop.steps(
    *(run.train_step, state, run.batches, run.mesh, range(1, run.steps + 1)),
    constants,
  )
  with contextlib.closing(run.batches):
    for step in taken:
      state, loss = step.state, step.metrics['loss']
      losses.append(loss)
      if step.number % 100 == 0:
        harness.progress(f'  step {step.number}: {float(loss):.4f}')
  evals = {
    way: recipe.evaluation(other, other.config)(state.params, constants)['loss']
    for way, other in others.items()
  }
  return {
    'seed': seed,
    'eval': evals,
    'train': record.curve([float(x) for x in jax.device_get(losses)]),
  }


def tables(path: pathlib.Path = OUTPUT) -> dict[str, str]:
  """The table of the page."""
  rows = record.read(path)['rows']
  lines = []
  for way in WAYS:
    found = [row for row in rows if row['trained'] == way]
    if not found:
      continue
    losses = {w: [row['eval'][w] for row in found] for w in WAYS}
    cells = [
      f'{np.mean(x):.4f} ± {np.std(x, ddof=len(x) > 1):.4f}'
      for x in losses.values()
    ]
    lines.append([way, *cells, str(len(found))])
  heads = ['documents see', *(f'loss, {way}' for way in WAYS)]
  return {'document_mask': markdown([*heads, 'seeds'], lines)}


def main() -> None:
  """Runs what is missing; the table is that of `benchmarks.report`."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  add('--data', default='stdlib', help="training text, as train_lm's")
  add('--validation', help='validation text (default: the end of --data)')
  harness.add_counts(
    parser,
    ('--steps', 1000, 'steps of a run'),
    ('--batch-size', 8, 'sequences of a step'),
    ('--seq-len', 512, 'tokens of a sequence'),
    ('--eval-batches', 60, 'held-out batches'),
    ('--seeds', 3, 'seeds 0 to N - 1'),
  )
  harness.add_arguments(parser, OUTPUT, has_device=False)
  args = parser.parse_args()
  if args.report:
    report.report('quality.document_mask')
    return
  settings = {
    name: getattr(args, name)
    for name in ('steps', 'batch_size', 'seq_len', 'eval_batches')
  }
  found = {'settings': settings, 'environment': None, 'rows': []}
  if args.output.exists():
    found = record.read(args.output)
  if found['settings'] != settings:
    parser.error(f'{args.output} holds runs of {found["settings"]}.')
  found['environment'] = harness.environment()
  corpus = None
  prepared = {}
  for way, document_mask in WAYS.items():
    planned = recipe.plan(configure(args, document_mask))
    corpus = corpus or data.load(planned.config, planned.config.model)
    prepared[way] = recipe.Prepared(planned, corpus)
  for seed in range(args.seeds):
    for way in WAYS:
      if any((r['trained'], r['seed']) == (way, seed) for r in found['rows']):
        continue
      harness.progress(f'Seed {seed}, documents see {way}')
      row = train(prepared[way], prepared, seed)
      found['rows'].append({'trained': way, **row})
      record.write(args.output, found)


if __name__ == '__main__':
  main()
