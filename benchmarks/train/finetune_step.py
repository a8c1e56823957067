"""Fine-tuning speed beside transformers' PyTorch: same model, batches, task.

  python -m benchmarks.finetune_step --data.source glue/ --model mini \
    --tokenizer roberta-base/
  python -m benchmarks.finetune_step

Both sides take whole training steps of full fine-tuning, float32, AdamW
without decay: forward, backward, update. They start from the same weights and
see the same examples in the same batches, in turns of a few steps whose order
alternates, so that a machine that slows down slows both. PyTorch has its usual
dynamic padding, to the longest row of a batch; ours pads to one of a few
lengths, and both count examples per second. Each length is compiled before, and
that time is given by itself. Without `--data.source` the task is the generated
one.

  ratio     ours to PyTorch's examples per second: median over the turns, in
            brackets its quartiles; above 1 ours is faster
  loss      largest difference of the two losses in the first steps, with
            dropout 0: the two compute the same

Rows with dropout 0.1 are how RoBERTa is fine-tuned; there the losses differ, as
the random numbers do.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import argparse
import dataclasses
import itertools
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.common import harness, peers, record, turns
from benchmarks.common.tables import markdown, median_in_quartiles
from gnlorp_jax.models import roberta
from gnlorp_jax.recipes.glue import recipe, tasks
from gnlorp_jax.recipes.glue.settings import GlueConfig, TaskDataConfig
from gnlorp_jax.training import loop, sharding

RESULTS = pathlib.Path('benchmarks/results/finetune_step.json')
PAGE = pathlib.Path('docs/results/train.md')
LEARNING_RATE = 1e-4
Row = dict[str, Any]


def settings_of(args: argparse.Namespace, dropout: float) -> GlueConfig:
  """The fine-tuning that is timed."""
  named = {} if args.source is None else {'task': args.task}
  return GlueConfig(
    **named,
    method='full',
    init_from=args.model,
    tokenizer=args.tokenizer,
    optim=dataclasses.replace(GlueConfig().optim, learning_rate=LEARNING_RATE),
    batch_size=args.batch_size,
    max_length=args.max_length if args.source else None,
    epochs=10**6,  # The learning rate hardly falls: PyTorch's is constant.
    dropout=dropout,
    data=TaskDataConfig(source=args.source),
  )


class Ours(turns.Method):
  """Takes steps of `train_glue.py`, each of its batches once."""

  def __init__(self, run: loop.Run, batches: list[dict[str, np.ndarray]]):
    self._run, self._batches = run, batches
    self._state, self._frozen = run.start()
    self.losses: list[float] = []

  def step(self, index: int) -> None:
    """As `turns.Method`."""
    placed = sharding.put_batch(self._batches[index], self._run.mesh)
    self._state, values = self._run.train_step(
      self._state, placed, self._frozen
    )
    self.losses.append(float(jax.block_until_ready(values)['loss']))


class Theirs(peers.TorchMethod):
  """Takes the same steps with transformers and PyTorch."""

  def __init__(
    self, data: tasks.TaskData, params: Any, dropout: float, batches: list[Any]
  ):
    super().__init__('cpu')
    self._pad_id, self._batches = data.architecture.pad_id, batches
    classifier = peers.module('transformers').RobertaForSequenceClassification
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, 'hf')
      roberta.export_classifier(
        path, data.architecture, params, data.task.labels
      )
      self._model = classifier.from_pretrained(
        path,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        classifier_dropout=dropout,
      )
    self._model.train()
    self.optimizer = self.torch.optim.AdamW(
      self._model.parameters(), LEARNING_RATE, eps=1e-8, weight_decay=0.0
    )
    self.losses: list[float] = []

  def take(self, index: int) -> None:
    """As `peers.TorchMethod`."""
    torch, batch = self.torch, self._batches[index]
    longest = (batch['inputs'] != self._pad_id).sum(axis=1).max()
    is_row = batch['weights'] > 0
    tokens = torch.from_numpy(batch['inputs'][is_row, :longest]).long()
    labels = torch.from_numpy(batch['labels'][is_row])
    if labels.dtype == torch.int32:
      labels = labels.long()
    loss = self._model(
      input_ids=tokens, attention_mask=tokens != self._pad_id, labels=labels
    ).loss
    loss.backward()
    self.optimizer.step()
    self.optimizer.zero_grad()
    self.losses.append(float(loss.detach()))


def race(args: argparse.Namespace, dropout: float) -> Row:
  """Both sides on the same batches, turn by turn."""
  settings = settings_of(args, dropout)
  (task,) = tasks.find_tasks(settings)
  data = tasks.load_task(settings, task)
  prepared = recipe.prepare(settings, data, 'full')
  run = recipe.make_run(prepared, learning_rate=None, seed=0).run
  start, _ = run.start()
  params = prepared.program.parameters.merge(start.params, {})
  count = turns.APART + args.rounds * args.turn
  batches = list(itertools.islice(run.batches, count))
  lengths = {batch['inputs'].shape[1]: i for i, batch in enumerate(batches)}
  # Ours compiles with a state of its own: both sides then see the same steps.
  started = time.perf_counter()
  compiling = Ours(run, batches)
  for index in lengths.values():
    compiling.step(index)
  compile_seconds = time.perf_counter() - started
  sides = {
    'ours': Ours(run, batches),
    'pytorch': Theirs(data, params, dropout, batches),
  }
  racers = [turns.Racer(name, side, count) for name, side in sides.items()]
  turns.rounds(racers, args.rounds, args.turn)
  seconds = {
    racer.name: [float(turn.seconds.sum()) for turn in racer.turns]
    for racer in racers
  }
  examples = np.array([batch['weights'].sum() for batch in batches])
  examples = examples[turns.APART :].reshape(args.rounds, args.turn).sum(axis=1)
  ratios = np.array(seconds['pytorch']) / np.array(seconds['ours'])
  losses = (side.losses[: turns.APART] for side in sides.values())
  return {
    'dropout': dropout,
    'task': task.name,
    'examples_per_second': {
      name: float(np.median(examples / np.array(values)))
      for name, values in seconds.items()
    },
    'ratio': np.percentile(ratios, [25, 50, 75]).tolist(),
    'lengths': sorted(lengths),
    'compile_seconds': compile_seconds,
    'loss_difference': max(abs(a - b) for a, b in zip(*losses, strict=True)),
    'seconds': seconds,
  }


def table(rows: list[Row]) -> str:
  """The rows as a Markdown table."""
  heads = ['task', 'dropout', 'ours, examples/s', 'PyTorch', 'ratio']
  heads += ['compilation, s', 'losses differ by']
  return markdown(
    heads,
    [
      [
        *(row['task'], str(row['dropout'])),
        *(f'{rate:.0f}' for rate in row['examples_per_second'].values()),
        *(median_in_quartiles(row['ratio']), f'{row["compile_seconds"]:.0f}'),
        '-' if row['dropout'] else f'{row["loss_difference"]:.0e}',
      ]
      for row in rows
    ],
  )


def tables() -> dict[str, str]:
  """The table of `PAGE`, from the recorded file."""
  return {'fine-tuning': table(record.read(RESULTS)['rows'])}


def main() -> None:
  """Measures, and writes the JSON file and the table."""
  parser = harness.parser(__doc__)
  harness.add_arguments(parser, RESULTS, has_device=False)
  add = parser.add_argument
  add('--data.source', dest='source', help="folder of GLUE's official files")
  add('--task', default='mrpc', help='task of --data.source')
  add('--model', help='Hugging Face folder or preset (default: a tiny one)')
  add('--tokenizer', help='tokenizer.json, where the model brings none')
  add('--batch-size', type=int, default=16, help='examples per step')
  add('--max-length', type=int, default=128, help='tokens of an example')
  add('--rounds', type=int, default=10, help='turns of either side')
  add('--turn', type=int, default=10, help='steps of a turn')
  add('--dropout', type=float, nargs='+', default=(0.0, 0.1), help='rows')
  args = parser.parse_args()
  if args.report:
    report.report('train.finetune_step')
    return
  if args.source is not None and args.model is None:
    parser.error('--data.source needs --model: a folder, or a preset.')
  written: Row = {
    'model': None if args.model is None else pathlib.Path(args.model).name,
    **{n: getattr(args, n) for n in ('batch_size', 'max_length', 'turn')},
    **{**harness.environment(), 'rows': []},
  }
  for dropout in args.dropout:
    written['rows'].append(race(args, dropout))
    record.write(args.output, written)
  sys.stdout.write(table(written['rows']))


if __name__ == '__main__':
  main()
