r"""Fine-tunes a pre-trained model on two real tasks, by every method.

SST-2: a sentence of a film review, and whether it is positive: 2,000 sentences
to train on, 200 more to choose learning rates by (those with the lowest
validation loss), and the whole dev set, answered twice, by the likelier of the
two words and by what the model writes. GSM8K: 500 problems to train on with
their solutions, 100 more to choose by, and the mean loss of the solutions of
300 test problems.

Learning rates go up by a factor of 3, and are chosen with a part of the rows
(600 and 200), by the lowest validation loss. Of each method the middle one of
three is tried first with its neighbours, and then further ones until the best
is not at an end. The best then runs with all rows and two seeds, and only these
runs are scored. All methods see the same tokens in the same order. Runs are
kept in --runs and go on where they stopped; the JSON file is written after
each, and what is in it is not run again.

  python -m benchmarks.quality.sft --model SMOLLM2_FOLDER --glue GLUE_FOLDER \
    --gsm8k GSM8K_FOLDER --runs runs/sft_quality

Time and memory of a step are measured apart, when nothing else runs:
the same command with --timed 5.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import matplotlib.figure
import numpy as np

from benchmarks import report
from benchmarks.common import harness, programs, record
from benchmarks.common.plots import legend
from benchmarks.common.rows import Rows
from benchmarks.common.tables import markdown, median_in_quartiles
from gnlorp_jax import layer_scores
from gnlorp_jax.compose import scores
from gnlorp_jax.config import (
  ChatDataConfig,
  LayerSamplingOptions,
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
from gnlorp_jax.training import loop, sharding
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
  # Some layers at a time: of these two pairs the first draws by outliers.
  'owlore': Method(3e-4, 32),
  'owlore_uniform': Method(3e-4, 32),
  'ows': Method(3e-5),
  'lisa': Method(3e-5),
  'badam': Method(3e-5),
}
# How they draw layers; the runs are too short for the published intervals.
PERIOD = {'sst2': 5, 'gsm8k': 10}  # Steps.
SAMPLINGS = {
  'owlore': LayerSamplingOptions(draw='scores', layers=5),
  'owlore_uniform': LayerSamplingOptions(draw='uniform', layers=5),
  'ows': LayerSamplingOptions(draw='scores', layers=2),
  'lisa': LayerSamplingOptions(draw='uniform', layers=2),
  'badam': LayerSamplingOptions(draw='shuffled', layers=1, always_on=()),
}
_OPTIMIZER = {'owlore': 'galore', 'owlore_uniform': 'galore'}
_OPTIMIZER |= dict.fromkeys(('ows', 'lisa', 'badam'), 'full')
TASKS = ('sst2', 'gsm8k')
# What is computed in; weights, their gradients and states are float32.
COMPUTE_DTYPE = {'sst2': 'float32', 'gsm8k': 'bfloat16'}
SEARCHED = {'sst2': 600, 'gsm8k': 200}  # Rows that rates are chosen with.
# Of a run.
KEYS = ('task', 'method', 'rows', 'learning_rate', 'seed')
SEEDS = (0, 1)  # Of the best rate.


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


def write_scores(args: argparse.Namespace, task: str) -> None:
  """Scores the layers by their outliers on what is trained on, once."""
  path = args.runs / f'{task}_layers.json'
  if not path.exists():
    layer_scores.main(
      [
        *(str(args.model), '--data', str(args.runs / f'{task}_train.jsonl')),
        *('--format', 'chat', '--template', 'none', '--sequences', '128'),
        *('--length', '256', '--measure', 'outliers', '--output', str(path)),
      ]
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


def configure(
  args: argparse.Namespace, task: str, name: str, limit: int | None = None
) -> SftConfig:
  """The configuration of a method on a task, without rate and seed."""
  method = METHODS[name]
  files = {
    'sst2': ('sst2_train.jsonl', 'sst2_valid.jsonl', 256),
    'gsm8k': ('gsm8k_train.jsonl', 'gsm8k_valid.jsonl', 512),
  }
  train, valid, length = files[task]
  is_adapter = name in ('lora', 'dora', 'gradnormlorp_adapter')
  sampling = LayerSamplingOptions()
  if name in SAMPLINGS:
    sampling = dataclasses.replace(SAMPLINGS[name], every=PERIOD[task])
    if sampling.draw == 'scores':
      scores = str(args.runs / f'{task}_layers.json')
      sampling = dataclasses.replace(sampling, scores=scores)
  config = SftConfig(
    init_from=str(args.model),
    method=_OPTIMIZER.get(name, name),
    sampling=sampling,
    run_dir=str(args.runs / task / name),
    batch_size=2,
    epochs=1,
    export='none',
    keep_best=False,
    checkpoint_every=50,
    checkpoint_keep=1,
    data=ChatDataConfig(
      source=str(args.runs / train),
      validation_source=str(args.runs / valid),
      template='none',
      max_length=length,
      limit=limit,
    ),
    eval=SftEvalOptions(generate=0),
    mesh=MeshConfig(data=1),
  )
  model = dataclasses.replace(config.model, compute_dtype=COMPUTE_DTYPE[task])
  config = dataclasses.replace(config, model=model)
  optim: OptimConfig = dataclasses.replace(
    config.optim, learning_rate=method.rate
  )
  if is_adapter:
    adapter = dataclasses.replace(config.adapter, rank=method.rank)
    config = dataclasses.replace(config, adapter=adapter)
  elif method.rank is not None or name == 'vlorp':
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
  row: dict[str, Any],
  prepared: recipe.Prepared,
  stop: StopRequest,
) -> dict[str, Any]:
  """A run of a method, as a row of the record.

  Args:
    args: The command line.
    row: What tells this run from others: see `compare`.
    prepared: What it shares with others.
    stop: Tells of signals.
  """
  rate, seed = row['learning_rate'], row['seed']
  config = dataclasses.replace(
    prepared.config,
    seed=seed,
    run_dir=f'{prepared.config.run_dir}/{row["rows"]}/lr{rate:.3g}_seed{seed}',
    optim=dataclasses.replace(prepared.config.optim, learning_rate=rate),
  )
  scored: dict[str, Any] = {}

  def finish(outcome: loop.Outcome) -> None:
    summary = summarise(prepared, config, outcome)
    for key in ('trained_parameters', 'optimizer_state_bytes', 'steps'):
      scored[key] = summary[key]
    scored['first_loss'] = summary['first']['loss']
    if row['rows'] == 'all':
      scored.update(
        score(args, row['task'], prepared, outcome.params, outcome.constants)
      )

  member = grid.Member(
    run=recipe.make_run(prepared, config),
    finish=finish,
    describe=lambda: row | scored,
    metric='loss',
    higher_is_better=False,
  )
  found = grid.run_once(member, stop, keep='none', is_single=False)
  # Other work may have run beside it: seconds are measured apart.
  dropped = ('best', 'last', 'settings', 'main_metric', 'higher_is_better')
  dropped += ('diverged', 'seconds_per_step')
  kept = {k: v for k, v in found.items() if k not in dropped}
  return kept | {'loss': found['last'].get('loss')}


def compare(
  args: argparse.Namespace, task: str, name: str, record_of: Rows
) -> None:
  """All runs of a method on a task."""
  prepared = functools.cache(
    lambda limit: recipe.prepare(configure(args, task, name, limit))
  )
  with StopRequest() as stop:

    def take(rate: float, seed: int, rows: str) -> dict[str, Any]:
      row = {'task': task, 'method': name, 'rows': rows}
      row |= {'learning_rate': rate, 'seed': seed}
      found = record_of.find(row)
      if found is None:
        limit = None if rows == 'all' else SEARCHED[task]
        found = run(args, row, prepared(limit), stop)
        record_of.keep(found)
        harness.progress(
          f'  {task} {name}, {rows} rows, rate {rate:.3g}, seed {seed}: '
          f'loss {found["loss"]}, accuracy {found.get("accuracy")}'
        )
      return found

    def try_rate(rate: float) -> None:
      losses[rate] = take(rate, 0, 'part')['loss']

    losses: dict[float, float | None] = {}
    for power in (0, 1, -1):
      try_rate(_rounded(METHODS[name].rate * FACTOR**power))
    while (best := _best(losses)) in (min(losses), max(losses)):
      factor = FACTOR if best == max(losses) else 1 / FACTOR
      try_rate(_rounded(best * factor))
    for seed in SEEDS:
      take(best, seed, 'all')


def _rounded(rate: float) -> float:
  return float(f'{rate:.2g}')


def _best(losses: dict[float, float | None]) -> float:
  """The rate with the lowest validation loss."""
  return min(losses, key=lambda rate: _or_worst(losses[rate]))


def _or_worst(loss: float | None) -> float:
  return float('inf') if loss is None else loss


def before(args: argparse.Namespace, task: str) -> dict[str, Any]:
  """What the model scores that all start from."""
  prepared = recipe.prepare(configure(args, task, 'lora'))
  trained, frozen = prepared.program.parameters.start(jax.random.key(0))
  run = recipe.make_run(prepared, prepared.config)
  row = {'task': task, 'method': 'before', 'rows': 'all'}
  row |= {'seed': 0, 'learning_rate': 0.0}
  row['loss'] = run.evaluate(trained, frozen)['loss']
  return row | score(args, task, prepared, trained, frozen)


def measure(args: argparse.Namespace, task: str, name: str) -> dict[str, Any]:
  """Memory and time of a step, on a machine that does nothing else."""
  prepared = recipe.prepare(configure(args, task, name))
  run = recipe.make_run(prepared, prepared.config)
  state, frozen = run.start()
  first, *batches = (
    sharding.put_batch(batch, run.mesh)
    for batch in itertools.islice(run.batches, 1 + args.timed)
  )
  step = run.train_step.lower(state, first, frozen).compile()
  seconds = []
  for placed in (first, *batches):
    started = time.perf_counter()
    state, aux = step(state, placed, frozen)
    jax.block_until_ready((state, aux))
    seconds.append(time.perf_counter() - started)
  row = {'task': task, 'method': name}
  row['step_bytes'] = programs.memory(step)['total']
  # The first step makes subspaces.
  return row | {'seconds': np.percentile(seconds[1:], [25, 50, 75]).tolist()}


def tables(path: pathlib.Path = OUTPUT) -> dict[str, str]:
  """The tables of the page, one of each task."""
  found = record.read(path)
  return {f'sft_{task}': _table(task, found) for task in TASKS}


def _table(task: str, found: dict[str, Any]) -> str:
  heads = ['method', 'rate', 'trained', 'state', 'step', 'seconds a step']
  heads += ['loss']
  heads += ['accuracy', 'written'] if task == 'sst2' else ['test loss']
  lines = []
  for name in ('before', *METHODS):
    rows = _whole_runs(found, task, name)
    if not rows:
      continue
    rate = rows[0]['learning_rate']
    sizes = _sizes(rows[0], _measured(found, task, name))
    cells = [name, f'{rate:g}' if rate else '', *sizes]
    cells.append(_mean(rows, 'loss', '.4f'))
    if task == 'sst2':
      error = 100 * np.mean([row['accuracy_stderr'] for row in rows])
      cells += [
        f'{_mean(rows, "accuracy", ".1f", 100)} (standard error {error:.1f})',
        _mean(rows, 'written_accuracy', '.1f', 100),
      ]
    else:
      cells.append(_mean(rows, 'test_loss', '.4f'))
    lines.append(cells)
  return markdown(heads, lines)


def _whole_runs(
  found: dict[str, Any], task: str, name: str
) -> list[dict[str, Any]]:
  """The runs of a method with all rows that did not diverge."""
  of = (task, name, 'all')
  return [
    row
    for row in found['rows']
    if (row['task'], row['method'], row['rows']) == of
    and row['loss'] is not None
  ]


def _measured(
  found: dict[str, Any], task: str, name: str
) -> dict[str, Any] | None:
  rows = [
    row
    for row in found['steps']
    if (row['task'], row['method']) == (task, name)
  ]
  return rows[-1] if rows else None


def _sizes(row: dict[str, Any], step: dict[str, Any] | None) -> list[str]:
  if 'trained_parameters' not in row:  # Before training.
    return [''] * 4
  trained = f'{row["trained_parameters"] / 1e6:.2f} M'
  state = f'{row["optimizer_state_bytes"] / 2**20:.1f} MiB'
  if step is None:
    return [trained, state, '', '']
  memory = f'{step["step_bytes"] / 2**20:.0f} MiB'
  return [trained, state, memory, median_in_quartiles(step['seconds'])]


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
  """Draws what methods score against the memory of a step."""
  found = record.read(path)
  figure = matplotlib.figure.Figure(figsize=(10, 5.2), layout='constrained')
  _draw(
    *(figure.add_subplot(1, 2, 1), found, 'sst2', 'accuracy', 100),
    'accuracy on the dev set of SST-2, %',
  )
  _draw(
    *(figure.add_subplot(1, 2, 2), found, 'gsm8k', 'test_loss', 1),
    'loss of 300 test solutions of GSM8K',
  )
  figure.savefig(picture, dpi=150)


def _draw(
  axes: Any,
  found: dict[str, Any],
  task: str,
  name: str,
  times: float,
  label: str,
) -> None:
  """One point a method, with its seeds as a bar; the title has the start."""
  for number, method in enumerate(METHODS):
    step = _measured(found, task, method)
    rows = _whole_runs(found, task, method)
    if step is None or not rows:
      continue
    values = [times * row[name] for row in rows]
    x, y = step['step_bytes'] / 2**20, float(np.mean(values))
    half = (max(values) - min(values)) / 2
    looks = {'color': f'C{number % 10}', 'fmt': 'o' if number < 10 else 's'}
    axes.errorbar(x, y, half, capsize=3, label=method, **looks)
  for row in _whole_runs(found, task, 'before'):
    axes.set_title(f'before training: {times * row[name]:.3g}')
  legend(axes, ncols=3, loc='upper center', bbox_to_anchor=(0.5, -0.14))
  axes.set_xlabel('memory of a training step, MiB')
  axes.set_ylabel(label)
  axes.grid(alpha=0.3)


def main() -> None:
  """Runs what is missing; the tables are those of `benchmarks.report`."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  folder: dict[str, Any] = {'type': pathlib.Path, 'metavar': 'FOLDER'}
  add('--model', **folder, help='Hugging Face folder of the model')
  add('--glue', **folder, help="GLUE's files (SST-2/train.tsv, ...)")
  add('--gsm8k', **folder, help='train.jsonl and test.jsonl of GSM8K')
  add('--runs', **folder, default=pathlib.Path('runs/sft_quality'))
  add('--tasks', nargs='+', choices=TASKS, default=TASKS)
  add('--methods', nargs='+', choices=(*METHODS,), default=(*METHODS,))
  add('--limit', type=harness.positive, help='ask so many of the dev set')
  timed = 'only measure so many steps of each, on a machine that is idle'
  add('--timed', type=harness.positive, metavar='STEPS', help=timed)
  harness.add_arguments(parser, OUTPUT, plot=PLOT, has_device=False)
  args = parser.parse_args()
  if args.report:
    report.report('quality.sft')
    return
  for name in ('model', 'glue', 'gsm8k'):
    if getattr(args, name) is None:
      parser.error(f'--{name} is needed.')
  write_data(args)
  jax.config.update('jax_compilation_cache_dir', str(args.runs / 'compiled'))
  none = LayerSamplingOptions()
  found = Rows(args.output, KEYS)
  steps = Rows(args.output, ('task', 'method'), 'steps')
  for task in args.tasks:
    if any(SAMPLINGS.get(n, none).draw == 'scores' for n in args.methods):
      write_scores(args, task)
    if args.timed:
      for name in args.methods:
        steps.keep(measure(args, task, name))
      continue
    start = {'task': task, 'method': 'before', 'rows': 'all'}
    if found.find(start | {'learning_rate': 0.0, 'seed': 0}) is None:
      found.keep(before(args, task))
    for name in args.methods:
      compare(args, task, name, found)


if __name__ == '__main__':
  main()
