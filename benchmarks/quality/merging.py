r"""Merges experts of one model by every method, and scores what comes out.

Encoder: MiniLM is tuned on MRPC, RTE, CoLA and a part of SST-2, three seeds;
the experts of a seed are merged, and each task's own head stands on the merged
encoder. Language model: one is tuned on Python sources, on Wikipedia and on
dialogue; the perplexity of every merge is taken on texts of all three that none
was tuned on. --seeds are those of both.

Runs of training are kept in --runs, those of other --steps or --examples apart,
and go on where they stopped; merges are made again, and what is in the JSON
file is not scored again. It refuses rows of other settings.

  python -m benchmarks.quality.merging --encoder MINILM_FOLDER \
    --glue GLUE_FOLDER --runs runs/merging
  python -m benchmarks.quality.merging --model SMOLLM2_FOLDER \
    --text python=TRAIN.txt,SCORED.txt --text wikipedia=TRAIN.txt,SCORED.txt \
    --text dialogue=TRAIN.txt,SCORED.txt

A text is named with what to train on and a file to score, such as those of
`benchmarks.quality.texts`.
"""

import argparse
import contextlib
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.common import harness, record
from benchmarks.common.rows import Rows
from benchmarks.common.tables import markdown
from gnlorp_jax import train_glue, train_lm
from gnlorp_jax.compose import pretrained, scores
from gnlorp_jax.recipes.glue import evaluation, recipe, tasks
from gnlorp_jax.recipes.glue.settings import GlueConfig, TaskDataConfig
from gnlorp_jax.recipes.merge import recipe as merging
from gnlorp_jax.recipes.merge.settings import MergeConfig

OUTPUT = pathlib.Path('benchmarks/results/merging.json')
TASKS = ('mrpc', 'rte', 'sst2', 'cola')
SEEDS = (0, 1, 2)
EXAMPLES = 8000
KEYS = ('experiment', 'seed', 'method', 'task')  # Of a score.
# Options of the command by the name of a row.
MERGES: dict[str, dict[str, Any]] = {
  'average': {'method': 'average'},
  'task_arithmetic .3': {'method': 'task_arithmetic'},
  'task_arithmetic .5': {'method': 'task_arithmetic', 'scale': 0.5},
  'ties': {'method': 'ties'},
  'dare': {'method': 'dare'},
  'tsv': {'method': 'tsv'},
  'doge .07': {'method': 'doge', 'eta': 0.07},
  'doge auto': {'method': 'doge'},
  'doge exact': {'method': 'doge', 'solver': 'exact'},
  'doge exact, free': {
    'method': 'doge',
    'solver': 'exact',
    'project': 'none',
  },
}
ROWS = ('before', 'alone', *MERGES)
_TEXT = re.compile(r'[^=,]+=[^,]+,[^,]+')


@contextlib.contextmanager
def _silent(title: str) -> Iterator[Any]:
  yield lambda done, total: None


def merged(
  runs: pathlib.Path,
  base: pathlib.Path,
  experts: Sequence[pathlib.Path],
  name: str,
) -> pathlib.Path:
  """A merge, made again."""
  out = runs / 'merged'
  shutil.rmtree(out, ignore_errors=True)
  config = MergeConfig(
    base=str(base),
    experts=tuple(map(str, experts)),
    out=str(out),
    # Classifiers of tasks have no pooler.
    exclude='pooler',
    **MERGES[name],
  )
  merging.merge(config, _silent)
  return out


def folders(
  name: str,
  of_task: int,
  runs: pathlib.Path,
  base: pathlib.Path,
  experts: Sequence[pathlib.Path],
) -> pathlib.Path:
  """What a row of the table scores in a task."""
  if name == 'before':
    return base
  return experts[of_task] if name == 'alone' else runs / 'merged'


def _of_seed(args: argparse.Namespace, seed: int) -> str:
  """Names runs of a seed; those that only try the script stand apart."""
  name = f'seed{seed}'
  if args.steps is not None:
    name += f'_steps{args.steps}'
  if args.examples != EXAMPLES:
    name += f'_examples{args.examples}'
  return name


# The encoder.


def glue_words(
  args: argparse.Namespace, task: str, seed: int
) -> tuple[list[str], pathlib.Path]:
  """The command that tunes an expert, and the folder that it leaves."""
  run_dir = args.runs / _of_seed(args, seed)
  words = ['--task', task, '--method', 'full', '--seed', str(seed)]
  words += ['--init-from', str(args.encoder), '--data.source', str(args.glue)]
  words += ['--run-dir', str(run_dir), '--keep', 'none', '--export', 'True']
  words += ['--epochs', '3', '--max-length', '128', '--batch-size', '32']
  words += ['--optim.learning-rate', '5e-5']
  if args.steps is not None:
    words += ['--steps', str(args.steps)]
  words += ['--data.max-train-examples', str(args.examples)]
  words += ['--data.max-dev-examples', str(args.limit)]
  return words, run_dir / task / 'full' / f'lr5e-05_seed{seed}' / 'hf'


def score_task(
  args: argparse.Namespace, task: str, folder: pathlib.Path, expert: Any
) -> float:
  """The task's metric of an encoder under the head of an expert."""

  def loaded(init_from: pathlib.Path) -> Any:
    config = GlueConfig(
      task=task,
      method='full',
      init_from=str(init_from),
      tokenizer=str(args.encoder),
      max_length=128,
      data=TaskDataConfig(
        source=str(args.glue),
        max_train_examples=args.examples,
        max_dev_examples=args.limit,
      ),
    )
    (found,) = tasks.find_tasks(config)
    data = tasks.load_task(config, found)
    built = recipe.prepare(config, data, 'full').program
    return data, built, *built.parameters.start(jax.random.key(0))

  data, built, params, frozen = loaded(folder)
  _, _, with_head, _ = loaded(expert)
  params = {**params, 'classifier': with_head['classifier']}
  found = evaluation.evaluate(built, data, 32, params, frozen)
  return float(found[data.task.main_metric])


def encoder(args: argparse.Namespace, found: Rows) -> None:
  """Tunes, merges and scores the encoder."""
  names = ('examples', 'limit', 'steps')
  settings = {name: getattr(args, name) for name in names}
  found.agree({'encoder': settings | {'encoder': args.encoder.name}})
  for seed in args.seeds:
    experts = []
    for task in TASKS:
      words, folder = glue_words(args, task, seed)
      if not folder.exists():
        train_glue.main(words)
      experts.append(folder)
    _score(
      args,
      found,
      {'experiment': 'encoder', 'seed': seed},
      args.encoder,
      experts,
      TASKS,
      lambda index, folder, experts=experts: score_task(
        args, TASKS[index], folder, experts[index]
      ),
    )


# The language model.


def perplexity(
  args: argparse.Namespace, folder: pathlib.Path, file: str
) -> float:
  """The perplexity per token of the beginning of a file."""
  loaded = pretrained.find(str(folder), dtype='float32')
  text = pathlib.Path(file).read_text(encoding='utf-8')[: args.characters]
  made = scores.text_perplexity(
    loaded.model, loaded.read(), loaded.tokenizer, text, max_length=512
  )
  return float(made['metrics']['perplexity']['value'])


def lm_words(
  args: argparse.Namespace, name: str, file: str, seed: int
) -> tuple[list[str], pathlib.Path]:
  """The command that tunes an expert, and the folder that it leaves."""
  run_dir = args.runs / f'lm_{name}_{_of_seed(args, seed)}'
  words = ['--init-from', str(args.model), '--run-dir', str(run_dir)]
  words += ['--data.source', file, '--batch-size', '4', '--seed', str(seed)]
  words += ['--data.tokenizer', str(args.model), '--data.seq-len', '256']
  words += ['--steps', str(args.steps or 100), '--optim.name', 'adamw']
  words += ['--optim.learning-rate', '2e-5', '--sample.num-tokens', '0']
  words += ['--eval-batches', '4']
  return words, run_dir / 'hf'


def language_model(args: argparse.Namespace, found: Rows) -> None:
  """Tunes, merges and scores the language model."""
  texts = {
    name: files.split(',')
    for name, _, files in (text.partition('=') for text in args.text)
  }
  settings = {'model': args.model.name, 'steps': args.steps or 100}
  settings |= {'characters': args.characters, 'texts': list(texts)}
  found.agree({'language model': settings})
  for seed in args.seeds:
    experts = []
    for name, (file, _) in texts.items():
      words, folder = lm_words(args, name, file, seed)
      if not folder.exists():
        train_lm.main(words)
      experts.append(folder)
    scored = [file for _, file in texts.values()]
    _score(
      args,
      found,
      {'experiment': 'language model', 'seed': seed},
      args.model,
      experts,
      list(texts),
      lambda index, folder, scored=scored: perplexity(
        args, folder, scored[index]
      ),
    )


def _score(args, found, of, base, experts, names, score) -> None:
  """Every row of the table in every task, but for what is recorded."""
  for method in args.methods:
    rows = [of | {'method': method, 'task': name} for name in names]
    if all(map(found.find, rows)):
      continue
    if method in MERGES:
      merged(args.runs, base, experts, method)
    for index, row in enumerate(rows):
      if found.find(row) is None:
        folder = folders(method, index, args.runs, base, experts)
        row |= {'value': score(index, folder)}
        found.keep(row)
        harness.progress(f'  {row}')


def tables(path: pathlib.Path = OUTPUT) -> dict[str, str]:
  """A table of each experiment: means over seeds, and deviations."""
  rows = record.read(path)['rows']
  made = {}
  for experiment in ('encoder', 'language model'):
    mine = [row for row in rows if row['experiment'] == experiment]
    names = list(dict.fromkeys(row['task'] for row in mine))
    lines = []
    for method in ROWS:
      cells = [
        _cell(
          [
            row['value']
            for row in mine
            if (row['method'], row['task']) == (method, name)
          ]
        )
        for name in names
      ]
      if any(cells):
        lines.append([method, *cells])
    key = f'merging_{experiment.replace(" ", "_")}'
    made[key] = markdown(['method', *names], lines)
  return made


def _cell(values: Sequence[float]) -> str:
  if not values:
    return ''
  text = f'{np.mean(values):.4g}'
  if len(values) == 1:
    return text
  return f'{text} ± {np.std(values, ddof=1):.2g}'


def main() -> None:
  """Runs what is missing."""
  parser = harness.parser(__doc__)
  add = parser.add_argument
  folder: dict[str, Any] = {'type': pathlib.Path, 'metavar': 'FOLDER'}
  add('--encoder', **folder, help='Hugging Face folder of the encoder')
  add('--glue', **folder, help="GLUE's files (MRPC/train.tsv, ...)")
  add('--model', **folder, help='Hugging Face folder of the language model')
  add('--text', action='append', default=[], metavar='NAME=TRAIN,SCORED')
  add('--runs', **folder, default=pathlib.Path('runs/merging'))
  add('--seeds', nargs='+', type=int, default=SEEDS)
  add('--methods', nargs='+', choices=ROWS, default=ROWS)
  add('--examples', type=harness.positive, default=EXAMPLES)
  add('--limit', type=harness.positive, default=2000)
  add('--steps', type=harness.positive, help='of tuning, to try the script')
  add('--characters', type=harness.positive, default=200_000)
  add('--output', type=pathlib.Path, default=OUTPUT)
  args = parser.parse_args()
  if (args.encoder is None) != (args.glue is None):
    parser.error('--encoder and --glue are needed together.')
  wrong = [text for text in args.text if not _TEXT.fullmatch(text)]
  if wrong or (args.model is not None and len(args.text) < 2):
    parser.error(
      f'--text {wrong or args.text}: --model needs two at least, each '
      'NAME=TRAIN,SCORED.'
    )
  found = Rows(args.output, KEYS)
  try:
    if args.encoder is not None:
      encoder(args, found)
    if args.model is not None:
      language_model(args, found)
    for name, table in tables(args.output).items():
      sys.stdout.write(f'{name}\n{table}\n')
  except ValueError as error:
    parser.error(str(error))


if __name__ == '__main__':
  main()
