"""What an evaluation shows, and leaves behind."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
import rich.progress
import rich.table


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
  """A progress bar on the terminal; its value takes what is done, and is there.

  Args:
    title: What is under way.
  """
  columns = (
    rich.progress.TextColumn('{task.description}', markup=False),
    rich.progress.BarColumn(bar_width=None),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn('ETA'),
    rich.progress.TimeRemainingColumn(),
  )
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(*columns, console=console, expand=True) as shown:
    task = shown.add_task(title, total=None)
    yield lambda done, total: shown.update(task, completed=done, total=total)


def write(path: str, found: dict[str, Any]) -> None:
  """Writes the scores as JSON.

  Args:
    path: The file.
    found: What `recipe.evaluate` returned.
  """
  text = json.dumps(found, indent=2) + '\n'
  pathlib.Path(path).expanduser().write_text(text, encoding='utf-8')


def show(
  found: dict[str, Any], console: rich.console.Console | None = None
) -> None:
  """Prints the scores as a table, without those of groups of questions.

  Args:
    found: What `recipe.evaluate` returned.
    console: Where to; None is the terminal.
  """
  table = rich.table.Table(title=found['model'], title_justify='left')
  table.add_column('task', overflow='fold')
  table.add_column('metric', no_wrap=True)
  for name in ('value', 'error', 'majority', 'questions', 'shots'):
    table.add_column(name, justify='right')
  for name, result in found['results'].items():
    for row in _rows(name, result):
      table.add_row(*row)
  console = console or rich.console.Console()
  console.print(table)
  console.print(
    'error: standard error of the mean of as many independent questions. '
    'majority: share of the most frequent answer, which is no skill.',
    highlight=False,
  )


def _rows(name: str, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
  if 'tasks' in result:  # Of lm_eval.
    for inner, scores in result['tasks'].items():
      yield from _rows(f'lm_eval:{inner}', scores)
    return
  for metric, score in result['metrics'].items():
    if not isinstance(score, dict):  # Of a text: no mean over questions.
      value = 'no number' if score is None else _number(score)
      yield name, metric, value, '', '', f'{result["tokens"]} tokens', ''
      continue
    yield (
      name,
      metric,
      _number(score['value']),
      _number(score['stderr']),
      _number(result.get('majority')),
      _number(result.get('questions')),
      _number(result.get('shots')),
    )


def _number(value: Any) -> str:
  if value is None:
    return ''
  return f'{value:.4f}' if isinstance(value, float) else str(value)
