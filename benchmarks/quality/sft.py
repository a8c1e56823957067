r"""Fine-tunes a pre-trained model on two real tasks, by every method.

SST-2: a sentence of a film review, and whether it is positive: 2,000 sentences
to train on, 200 more to choose learning rates by (those with the lowest
validation loss), and the whole dev set, answered twice, by the likelier of the
two words and by what the model writes. GSM8K: 500 problems to train on with
their solutions, 100 more to choose by, and the mean loss of the solutions of
300 test problems.

Learning rates go up by a factor of 3. Of each method the middle one of three is
tried first with its neighbours, and then further ones until the best is not at
an end. The best runs once more with another seed. All methods see the same
tokens in the same order. Runs are kept in --runs and go on where they stopped;
the JSON file is written after each.

  python -m benchmarks.quality.sft --model SMOLLM2_FOLDER --glue GLUE_FOLDER \
    --gsm8k GSM8K_FOLDER --runs runs/sft_quality
"""

import argparse
import csv
import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import matplotlib.figure
import numpy as np

from benchmarks import report
from benchmarks.common import harness, programs, record
from benchmarks.common.tables import markdown
from gnlorp_jax.compose import scores
from gnlorp_jax.config import (
  ChatDataConfig,
  MeshConfig,
  OptimConfig,
  SftConfig,
  SftEvalOptions,
)
from gnlorp_jax.data import chat
from gnlorp_jax.data.tasks.questions import Choice, Task
from gnlorp_jax.recipes import grid
from gnlorp_jax.recipes.sft import evaluation, recipe
from gnlorp_jax.recipes.sft.report import summarise
from gnlorp_jax.training import loop
from gnlorp_jax.training.interrupt import StopRequest

PAGE = pathlib.Path('docs/results/sft.md')
OUTPUT = pathlib.Path('benchmarks/results/sft.json')
PLOT = PAGE.with_name('sft.png')
WORDS = (' negative', ' positive')
FACTOR = 3.0


class Method(NamedTuple):
  """A method of the comparison, and the rate in the middle of its first three.

  Attributes:
    rate: The learning rate.
    rank: Of subspaces or adapters; None where there is none.
  """

  rate: float
  rank: int | None = None


METHODS = {
  'gradnormlorp': Method(3e-4, 32),
  'full': Method(3e-5),
  'lora': Method(3e-4, 8),
  'galore': Method(3e-4, 32),
  'apollo': Method(1e-4, 32),
  'gradnormlorp_adapter': Method(1e-3, 8),
  'dora': Method(3e-4, 8),
  'q_galore': Method(3e-4, 32),
  'vlorp': Method(1e-4),
}
TASKS = ('sst2', 'gsm8k')


def write_data(args: argparse.Namespace) -> None:
  """Writes the files of conversations, unless they are there."""
  args.runs.mkdir(parents=True, exist_ok=True)

  def write(name: str, rows: list[dict[str, str]]) -> None:
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    (args.runs / name).write_text(text, encoding='utf-8')

  train, dev = (_sst2(args.glue, part) for part in ('train', 'dev'))
  order = np.random.default_rng(0).permutation(len(train))[:2200]
  drawn = [train[i] for i in order]
  write('sst2_train.jsonl', drawn[:2000])
  write('sst2_valid.jsonl', drawn[2000:])
  write('sst2_dev.jsonl', dev)
  for part, file, first, last in (
    ('train', 'train', 0, 500),
    ('valid', 'train', 500, 600),
    ('test', 'test', 0, 300),
  ):
    lines = (args.gsm8k / f'{file}.jsonl').read_text('utf-8').splitlines()
    rows = [json.loads(line) for line in lines[first:last]]
    write(
      f'gsm8k_{part}.jsonl',
      [
        {
          'prompt': f'Question: {row["question"]}\nAnswer:',
          'completion': f' {row["answer"]}',
        }
        for row in rows
      ],
    )


def _sst2(folder: pathlib.Path, part: str) -> list[dict[str, str]]:
  with (folder / 'SST-2' / f'{part}.tsv').open(encoding='utf-8') as file:
    rows = list(csv.DictReader(file, delimiter='\t', quoting=csv.QUOTE_NONE))
  return [
    {
      'prompt': f'Review: {row["sentence"].strip()}\nSentiment:',
      'completion': WORDS[int(row['label'])],
    }
    for row in rows
  ]


def configure(args: argparse.Namespace, task: str, name: str) -> SftConfig:
  """The configuration of a method on a task, without rate and seed."""
  method = METHODS[name]
  files = {
    'sst2': ('sst2_train.jsonl', 'sst2_valid.jsonl', 256),
    'gsm8k': ('gsm8k_train.jsonl', 'gsm8k_valid.jsonl', 512),
  }
  train, valid, length = files[task]
  is_adapter = name in ('lora', 'dora', 'gradnormlorp_adapter')
  config = SftConfig(
    init_from=str(args.model),
    method=name,
    run_dir=str(args.runs / task / name),
    batch_size=2,
    epochs=1,
    export='none',
    keep_best=False,
    checkpoint_every=20,
    checkpoint_keep=1,
    data=ChatDataConfig(
      source=str(args.runs / train),
      validation_source=str(args.runs / valid),
      template='none',
      max_length=length,
    ),
    eval=SftEvalOptions(generate=0),
    mesh=MeshConfig(data=1),
  )
  optim: OptimConfig = dataclasses.replace(
    config.optim, learning_rate=method.rate
  )
  if is_adapter:
    adapter = dataclasses.replace(config.adapter, rank=method.rank)
    config = dataclasses.replace(config, adapter=adapter)
  elif name != 'full':
    optim = dataclasses.replace(optim, rank=method.rank, update_proj_gap=25)
  return dataclasses.replace(config, optim=optim)


def score(
  args: argparse.Namespace,
  task: str,
  prepared: recipe.Prepared,
  trained: Any,
  frozen: Any,
) -> dict[str, float]:
  """What a model scores on what it was neither trained nor chosen by."""
  if task == 'gsm8k':
    tested = chat.prepare(
      chat.read(str(args.runs / 'gsm8k_test.jsonl')),
      prepared.chat.template,
      max_length=prepared.config.data.max_length,
    )
    examples = prepared.chat.examples._replace(validation=tested.training)
    found = prepared.chat._replace(examples=examples)
    sums = evaluation.losses(
      prepared.program, found, prepared.config, trained, frozen
    )
    return {'test_loss': sums['loss']}
  params = prepared.program.parameters.join(trained, frozen)
  return _answers(args, prepared, params)


def _answers(
  args: argparse.Namespace, prepared: recipe.Prepared, params: Any
) -> dict[str, float]:
  """What a model answers of the dev set of SST-2, read and written."""
  (source,) = chat.read(str(args.runs / 'sst2_dev.jsonl'))
  asked = source.conversations[: args.limit]
  questions = [
    Choice(
      conversation.messages[0].content,
      tuple(word.strip() for word in WORDS),
      WORDS.index(conversation.messages[-1].content),
    )
    for conversation in asked
  ]
  task = Task(name='sst2', questions=questions, shots=0, has_acc_norm=False)
  found = scores.evaluate_tasks(
    *(prepared.program.model, params, prepared.chat.tokenizer, [task])
  )['sst2']['metrics']['acc']
  written = evaluation.answer(
    prepared.program.model,
    params,
    prepared.chat,
    [conversation.messages[:-1] for conversation in asked],
    [() for _ in asked],
    dataclasses.replace(
      prepared.config, eval=SftEvalOptions(max_tokens=4, batch_size=32)
    ),
  )
  right = [
    text == conversation.messages[-1].content.strip()
    for text, conversation in zip(written, asked, strict=True)
  ]
  return {
    'accuracy': found['value'],
    'accuracy_stderr': found['stderr'],
    'written_accuracy': float(np.mean(right)),
  }


def run(
  args: argparse.Namespace,
  task: str,
  name: str,
  prepared: recipe.Prepared,
  rate: float,
  seed: int,
  stop: StopRequest,
) -> dict[str, Any]:
  """A run of a method, as a row of the record."""
  config = dataclasses.replace(
    prepared.config,
    seed=seed,
    run_dir=f'{prepared.config.run_dir}/lr{rate:.3g}_seed{seed}',
    optim=dataclasses.replace(prepared.config.optim, learning_rate=rate),
  )
  row: dict[str, Any] = {'task': task, 'method': name}

  def finish(outcome: loop.Outcome) -> None:
    summary = summarise(prepared, config, outcome)
    for key in ('trained_parameters', 'optimizer_state_bytes', 'steps'):
      row[key] = summary[key]
    row['first_loss'] = summary['first']['loss']
    row['loss'] = summary['last']['loss']
    row.update(score(args, task, prepared, outcome.params, outcome.constants))

  member = grid.Member(
    run=recipe.make_run(prepared, config),
    finish=finish,
    describe=lambda: row | {'group': '', 'learning_rate': rate, 'seed': seed},
    metric='loss',
    higher_is_better=False,
  )
  found = grid.run_once(member, stop, keep='none', is_single=False)
  dropped = ('best', 'last', 'settings', 'group', 'main_metric', 'diverged')
  kept = {k: v for k, v in found.items() if k not in dropped}
  return kept | {'loss': found['last'].get('loss')}


def compare(args: argparse.Namespace, task: str, name: str, keep: Any) -> None:
  """All runs of a method on a task."""
  method = METHODS[name]
  prepared = recipe.prepare(configure(args, task, name))
  lowered = prepared.program.train_step.lower(
    prepared.program.abstract_state,
    recipe.plan(prepared.config).abstract_batch,
    prepared.program.parameters.frozen,
  )
  memory = programs.memory(lowered.compile())['total']
  found: dict[float, dict[str, Any]] = {}
  with StopRequest() as stop:
    take = functools.partial(run, args, task, name, prepared, stop=stop)

    def try_rate(rate: float, seed: int = 0) -> None:
      row = take(rate=rate, seed=seed) | {'step_bytes': memory}
      if seed == 0:
        found[rate] = row
      keep(row)
      harness.progress(
        f'  {task} {name}, rate {rate:.3g}, seed {seed}: loss {row["loss"]}, '
        f'accuracy {row.get("accuracy")}'
      )

    for power in (0, 1, -1):
      try_rate(_rounded(method.rate * FACTOR**power))
    while (best := _best(found)) in (min(found), max(found)):
      factor = FACTOR if best == max(found) else 1 / FACTOR
      try_rate(_rounded(best * factor))
    try_rate(best, seed=1)


def _rounded(rate: float) -> float:
  return float(f'{rate:.2g}')


def _best(found: dict[float, dict[str, Any]]) -> float:
  """The rate with the lowest validation loss."""
  losses = {r: row['loss'] for r, row in found.items()}
  return min(
    losses, key=lambda r: float('inf') if losses[r] is None else losses[r]
  )


def before(args: argparse.Namespace, task: str) -> dict[str, Any]:
  """What the model scores that all start from."""
  prepared = recipe.prepare(configure(args, task, 'lora'))
  trained, frozen = prepared.program.parameters.start(jax.random.key(0))
  run = recipe.make_run(prepared, prepared.config)
  row = {'task': task, 'method': 'before', 'seed': 0, 'learning_rate': 0.0}
  row['loss'] = run.evaluate(trained, frozen)['loss']
  return row | score(args, task, prepared, trained, frozen)


def tables(path: pathlib.Path = OUTPUT) -> dict[str, str]:
  """The tables of the page, one of each task."""
  rows = record.read(path)['rows']
  return {f'sft_{task}': _table(task, rows) for task in TASKS}


def _table(task: str, rows: list[dict[str, Any]]) -> str:
  heads = ['method', 'rate', 'trained', 'state', 'step', 'seconds a step']
  heads += ['loss']
  heads += ['accuracy', 'written'] if task == 'sst2' else ['test loss']
  heads += ['seeds']
  lines = []
  for name in ('before', *METHODS):
    found = [r for r in rows if (r['task'], r['method']) == (task, name)]
    if not found:
      continue
    first = {r['learning_rate']: r for r in found if r['seed'] == 0}
    rate = _best(first)
    best = [r for r in found if r['learning_rate'] == rate]
    cells = [name, f'{rate:g}', *_sizes(best[0]), _mean(best, 'loss', '.4f')]
    if task == 'sst2':
      error = 100 * best[0]['accuracy_stderr']
      cells += [
        f'{_mean(best, "accuracy", ".1f", 100)} (± {error:.1f})',
        _mean(best, 'written_accuracy', '.1f', 100),
      ]
    else:
      cells.append(_mean(best, 'test_loss', '.4f'))
    lines.append([*cells, str(len(best))])
  return markdown(heads, lines)


def _sizes(row: dict[str, Any]) -> list[str]:
  if 'trained_parameters' not in row:  # Not trained, or diverged.
    return [''] * 4
  return [
    f'{row["trained_parameters"] / 1e6:.2f} M',
    f'{row["optimizer_state_bytes"] / 2**20:.0f} MiB',
    f'{row["step_bytes"] / 2**20:.0f} MiB',
    f'{row["seconds_per_step"]:.1f}',
  ]


def _mean(
  rows: list[dict[str, Any]], name: str, form: str, times: float = 1.0
) -> str:
  """Mean of the seeds and half the distance of the farthest two."""
  values = [times * row[name] for row in rows if row.get(name) is not None]
  if not values:
    return 'no number'
  text = f'{np.mean(values):{form}}'
  if len(values) == 1:
    return text
  return f'{text} ± {(max(values) - min(values)) / 2:{form}}'


def plots(path: pathlib.Path = OUTPUT, picture: pathlib.Path = PLOT) -> None:
  """Draws accuracy on SST-2 against the memory of a step."""
  rows = [r for r in record.read(path)['rows'] if r['task'] == 'sst2']
  figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout='constrained')
  axes = figure.subplots()
  for name in METHODS:
    first = {
      r['learning_rate']: r
      for r in rows
      if r['method'] == name and r['seed'] == 0
    }
    if not first:
      continue
    row = first[_best(first)]
    x, y = row['step_bytes'] / 2**20, 100 * row['accuracy']
    axes.errorbar(x, y, 100 * row['accuracy_stderr'], fmt='o', capsize=3)
    axes.annotate(name, (x, y), (6, 4), textcoords='offset points')
  for row in rows:
    if row['method'] == 'before':
      label = 'before'
      axes.axhline(100 * row['accuracy'], color='grey', ls=':', label=label)
      axes.legend()
  axes.set_xlabel('memory of a training step, MiB')
  axes.set_ylabel('accuracy on the dev set of SST-2, %')
  axes.grid(alpha=0.3)
  figure.savefig(picture, dpi=150)


def main() -> None:
  """Runs what is missing; the tables are those of `benchmarks.report`."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  folder = {'type': pathlib.Path, 'metavar': 'FOLDER'}
  add('--model', **folder, help='Hugging Face folder of the model')
  add('--glue', **folder, help="GLUE's files (SST-2/train.tsv, ...)")
  add('--gsm8k', **folder, help='train.jsonl and test.jsonl of GSM8K')
  add('--runs', **folder, default=pathlib.Path('runs/sft_quality'))
  add('--tasks', nargs='+', choices=TASKS, default=TASKS)
  add('--methods', nargs='+', choices=(*METHODS,), default=(*METHODS,))
  add('--limit', type=harness.positive, help='ask so many of the dev set')
  harness.add_arguments(parser, OUTPUT, plot=PLOT, has_device=False)
  args = parser.parse_args()
  if args.report:
    report.report('quality.sft')
    return
  for name in ('model', 'glue', 'gsm8k'):
    if getattr(args, name) is None:
      parser.error(f'--{name} is needed.')
  found: dict[str, Any] = {'environment': None, 'rows': []}
  if args.output.exists():
    found = record.read(args.output)
  found['environment'] = harness.environment()

  def keep(row: dict[str, Any]) -> None:
    keys = ('task', 'method', 'learning_rate', 'seed')
    same = tuple(row[key] for key in keys)
    others = [r for r in found['rows'] if tuple(r[k] for k in keys) != same]
    found['rows'] = [*others, row]
    record.write(args.output, found)

  write_data(args)
  for task in args.tasks:
    if not any(
      (r['task'], r['method']) == (task, 'before') for r in found['rows']
    ):
      keep(before(args, task))
    for name in args.methods:
      compare(args, task, name, keep)


if __name__ == '__main__':
  main()
