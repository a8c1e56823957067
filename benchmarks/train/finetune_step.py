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
  loss      largest difference of the two losses in the first turn, with dropout
            0: the two compute the same

Rows with dropout 0.1 are how RoBERTa is fine-tuned; there the losses differ, as
the random numbers do.
"""

import os

# As in train_glue.py: OpenBLAS's threads would fight with those of XLA.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
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

from benchmarks.common import harness, record
from gnlorp_jax.models import roberta
from gnlorp_jax.recipes.glue import recipe, tasks
from gnlorp_jax.recipes.glue.settings import GlueConfig, TaskDataConfig
from gnlorp_jax.training import loop, sharding

RESULTS = pathlib.Path('benchmarks/results/finetune_step.json')
LEARNING_RATE = 1e-4


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


class Ours:
  """Takes steps of `train_glue.py`."""

  def __init__(self, run: loop.Run):
    self._run = run
    self._state, self._frozen = run.start()

  def step(self, batch: dict[str, np.ndarray]) -> Any:
    """One step; the loss, which may still be on its way."""
    placed = sharding.put_batch(batch, self._run.mesh)
    self._state, values = self._run.train_step(
      self._state, placed, self._frozen
    )
    return values['loss']


class Theirs:
  """Takes the same steps with transformers and PyTorch."""

  def __init__(self, data: tasks.TaskData, params: Any, dropout: float):
    import torch
    import transformers

    self._torch = torch
    torch.set_num_threads(os.cpu_count() or 1)
    self._pad_id = data.architecture.pad_id
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, 'hf')
      roberta.export_classifier(
        path, data.architecture, params, data.task.labels
      )
      self._model = (
        transformers.RobertaForSequenceClassification.from_pretrained(
          path,
          hidden_dropout_prob=dropout,
          attention_probs_dropout_prob=dropout,
          classifier_dropout=dropout,
        )
      )
    self._model.train()
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(), LEARNING_RATE, eps=1e-8, weight_decay=0.0
    )

  def step(self, batch: dict[str, np.ndarray]) -> Any:
    """One step; the loss."""
    torch = self._torch
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
    self._optimizer.step()
    self._optimizer.zero_grad()
    return loss.detach()


def race(args: argparse.Namespace, dropout: float) -> dict[str, Any]:
  """Both sides on the same batches, turn by turn."""
  settings = settings_of(args, dropout)
  (task,) = tasks.find_tasks(settings)
  data = tasks.load_task(settings, task)
  prepared = recipe.prepare(settings, data, 'full')
  run = recipe.make_run(prepared, learning_rate=None, seed=0).run
  start, _ = run.start()
  params = prepared.program.parameters.merge(start.params, {})
  sides = {'ours': Ours(run), 'pytorch': Theirs(data, params, dropout)}
  turns = [
    list(itertools.islice(run.batches, args.turn))
    for _ in range(1 + args.rounds)
  ]
  by_length = {batch['inputs'].shape: batch for turn in turns for batch in turn}
  # Ours compiles with a state of its own: both sides then see the same steps.
  started = time.perf_counter()
  compiling = Ours(run)
  for batch in by_length.values():
    jax.block_until_ready(compiling.step(batch))
  compile_seconds = time.perf_counter() - started
  first = {
    name: [float(side.step(batch)) for batch in turns[0]]
    for name, side in sides.items()
  }
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  for number, turn in enumerate(turns[1:]):
    names = sorted(sides, reverse=bool(number % 2))
    for name in names:
      started = time.perf_counter()
      for batch in turn:
        loss = sides[name].step(batch)
      jax.block_until_ready(loss)
      seconds[name].append(time.perf_counter() - started)
    harness.progress(f'dropout {dropout}, round {number + 1}')
  examples = [sum(int(b['weights'].sum()) for b in turn) for turn in turns[1:]]
  ratios = np.array(seconds['pytorch']) / np.array(seconds['ours'])
  return {
    'dropout': dropout,
    'task': task.name,
    'examples_per_second': {
      name: float(np.median(np.array(examples) / np.array(values)))
      for name, values in seconds.items()
    },
    'ratio': [float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75))],
    'lengths': sorted(shape[1] for shape in by_length),
    'compile_seconds': compile_seconds,
    'loss_difference': max(
      abs(a - b) for a, b in zip(*first.values(), strict=True)
    ),
    'seconds': seconds,
  }


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  lines = [
    '| task | dropout | ours, examples/s | PyTorch | ratio | compilation, s '
    '| losses differ by |',
    '|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    low, middle, high = row['ratio']
    rates = row['examples_per_second']
    difference = '-' if row['dropout'] else f'{row["loss_difference"]:.1e}'
    lines.append(
      f'| {row["task"]} | {row["dropout"]} | {rates["ours"]:.0f} '
      f'| {rates["pytorch"]:.0f} | {middle:.2f} [{low:.2f}, {high:.2f}] '
      f'| {row["compile_seconds"]:.0f} | {difference} |'
    )
  return '\n'.join(lines) + '\n'


def main() -> None:
  """Measures, and writes the JSON file and the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
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
  add('--output', type=pathlib.Path, default=RESULTS, help='JSON file')
  args = parser.parse_args()
  if args.source is not None and args.model is None:
    parser.error('--data.source needs --model: a folder, or a preset.')
  header = {
    'model': None if args.model is None else pathlib.Path(args.model).name,
    **{n: getattr(args, n) for n in ('batch_size', 'max_length', 'turn')},
    **harness.environment(),
  }
  rows: list[dict[str, Any]] = []
  for dropout in args.dropout:
    rows.append(race(args, dropout))
    record.write(args.output, {**header, 'rows': rows})
  sys.stdout.write(table(rows))


if __name__ == '__main__':
  main()
