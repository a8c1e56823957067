r"""Fine-tuning speed beside transformers' PyTorch: same model, batches, task.

  python -m benchmarks.finetune_step --data.source glue/ --model mini \
    --tokenizer roberta-base/

Both sides take whole steps of full fine-tuning in float32, AdamW without decay,
on the same batches in turns. PyTorch pads to the longest row of a batch, ours
to one of a few lengths, and both count examples per second; each length is
compiled before. Without `--data.source` the task is the generated one. Dropout
0.1 is how RoBERTa is fine-tuned; with 0 the two compute the same.

  ratio    ours to PyTorch's examples per second: median over the turns, in
           brackets its quartiles; above 1 ours is faster
  losses   largest difference of the two losses in the first steps
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
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.common import harness, peers, programs, record, turns
from benchmarks.common.tables import median_in_quartiles, number, of_columns
from gnlorp_jax.models import roberta
from gnlorp_jax.recipes.glue import recipe, tasks
from gnlorp_jax.recipes.glue.settings import GlueConfig, TaskDataConfig
from gnlorp_jax.training import loop, sharding

RESULTS = pathlib.Path('benchmarks/results/finetune_step.json')
PAGE = pathlib.Path('docs/results/train.md')
LEARNING_RATE = 1e-4
BATCH_SIZE, MAX_LENGTH = 16, 128  # Examples of a step, their tokens.
DROPOUTS = (0.0, 0.1)  # Of the rows.
Row = dict[str, Any]


def _settings(args: argparse.Namespace, dropout: float) -> GlueConfig:
  """The fine-tuning that is timed."""
  named = {'task': 'mrpc', 'max_length': MAX_LENGTH} if args.source else {}
  return GlueConfig(
    **named,
    method='full',
    init_from=args.model,
    tokenizer=args.tokenizer,
    optim=dataclasses.replace(GlueConfig().optim, learning_rate=LEARNING_RATE),
    batch_size=BATCH_SIZE,
    epochs=10**6,  # The learning rate hardly falls: PyTorch's is constant.
    dropout=dropout,
    data=TaskDataConfig(source=args.source),
  )


def _ours(run: loop.Run, batches: list[Any]) -> programs.Steps:
  """Steps of `train_glue.py` from the run's start."""

  def step(state: Any, batch: Any, frozen: Any) -> Any:
    return run.train_step(state, sharding.put_batch(batch, run.mesh), frozen)

  return programs.Steps(step, run.start(), batches)


class _Theirs(peers.TorchTraining):
  """The same steps with transformers and PyTorch."""

  def __init__(
    self, data: tasks.TaskData, params: Any, dropout: float, batches: list[Any]
  ):
    super().__init__('cpu')
    self._pad_id, self._batches = data.architecture.pad_id, batches
    classifier = peers.module('transformers').RobertaForSequenceClassification
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, 'hf')
      labels = data.task.labels
      roberta.export_classifier(path, data.architecture, params, labels)
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

  def loss_of(self, index: int) -> Any:
    """As `peers.TorchTraining`."""
    torch, batch = self.torch, self._batches[index]
    longest = (batch['inputs'] != self._pad_id).sum(axis=1).max()
    is_row = batch['weights'] > 0
    tokens = torch.from_numpy(batch['inputs'][is_row, :longest]).long()
    labels = torch.from_numpy(batch['labels'][is_row])
    if labels.dtype == torch.int32:
      labels = labels.long()
    return self._model(
      input_ids=tokens, attention_mask=tokens != self._pad_id, labels=labels
    ).loss


def _race(args: argparse.Namespace, dropout: float) -> Row:
  """Both sides on the same batches, turn by turn."""
  settings = _settings(args, dropout)
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
  compiling = _ours(run, batches)
  for index in lengths.values():
    compiling.step(index)
  compile_seconds = time.perf_counter() - started
  sides = {
    'ours': _ours(run, batches),
    'pytorch': _Theirs(data, params, dropout, batches),
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


COLUMNS: dict[str, Callable[[Row], str]] = {
  'task': lambda row: row['task'],
  'dropout': lambda row: str(row['dropout']),
  'ours, examples/s': lambda row: f'{row["examples_per_second"]["ours"]:.0f}',
  'PyTorch': lambda row: f'{row["examples_per_second"]["pytorch"]:.0f}',
  'ratio': lambda row: median_in_quartiles(row['ratio']),
  'compilation, s': lambda row: f'{row["compile_seconds"]:.0f}',
  'losses differ by': lambda row: number(
    None if row['dropout'] else row['loss_difference'], '.0e'
  ),
}


def table(rows: list[Row]) -> str:
  """The rows as a Markdown table."""
  return of_columns(rows, COLUMNS)


def tables() -> dict[str, str]:
  """The table of `PAGE`, from the recorded file."""
  return {'fine-tuning': table(record.read(RESULTS)['rows'])}


def main() -> None:
  """Measures, and writes the JSON file and the table."""
  parser = harness.parser(__doc__)
  harness.add_arguments(parser, RESULTS, has_device=False)
  add = parser.add_argument
  add('--data.source', dest='source', help="folder of GLUE's official files")
  add('--model', help='Hugging Face folder or preset (default: a tiny one)')
  add('--tokenizer', help='tokenizer.json, where the model brings none')
  add('--rounds', type=int, default=10, help='turns of either side')
  add('--turn', type=int, default=10, help='steps of a turn')
  args = parser.parse_args()
  if args.report:
    report.report('train.finetune_step')
    return
  if args.source is not None and args.model is None:
    parser.error('--data.source needs --model: a folder, or a preset.')
  written: Row = {
    'model': None if args.model is None else pathlib.Path(args.model).name,
    **{'batch_size': BATCH_SIZE, 'max_length': MAX_LENGTH, 'turn': args.turn},
    **{**harness.environment(), 'rows': []},
  }
  for dropout in DROPOUTS:
    written['rows'].append(_race(args, dropout))
    record.write(args.output, written)
  sys.stdout.write(table(written['rows']))


if __name__ == '__main__':
  main()
