"""What an evaluation shows, and leaves behind."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import rich.box
import rich.console
import rich.measure
import rich.table
import rich.text

from gnlorp_jax.compose import command_line


def write(path: str, found: dict[str, Any]) -> None:
  """Writes the scores as JSON.

  Args:
    path: The file.
    found: What `recipe.evaluate` returned.
  """
  text = json.dumps(found, indent=2) + '\n'
  command_line.write_at_place(path, text)


def show(
  found: dict[str, Any], console: rich.console.Console | None = None
) -> None:
  """Prints the scores as tables, without those of groups of questions.

  Where a terminal is too narrow for a table its lines run on: no name and no
  number is cut.

  Args:
    found: What `recipe.evaluate` returned.
    console: Where to; None is the terminal.
  """
  console = console or rich.console.Console()
  console.print(found['model'], style='italic', markup=False, highlight=False)
  results = found['results']
  rows = [
    row
    for name, result in results.items()
    if 'tokens' not in result
    for row in _rows(name, result)
  ]
  texts = [
    (_text_name(name, found), metric, _text_number(value), *sizes)
    for name, result in results.items()
    if 'tokens' in result
    for sizes in [(str(result['tokens']), str(result['window']))]
    for metric, value in result['metrics'].items()
  ]
  _print(
    console,
    ('task', 'metric', 'value', 'error', 'majority', 'questions', 'shots'),
    rows,
  )
  _print(console, ('text', 'metric', 'value', 'tokens', 'window'), texts)
  if any(error or majority for _, _, _, error, majority, _, _ in rows):
    console.print(
      'error: standard error of the mean. majority: what always giving the '
      'most frequent answer would score; compare acc with it.',
      highlight=False,
    )


def _print(
  console: rich.console.Console,
  head: Sequence[str],
  rows: Sequence[Sequence[str]],
) -> None:
  """Prints a table, two columns of words before those of numbers, if any."""
  if not rows:
    return
  table = rich.table.Table(
    box=rich.box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    collapse_padding=True,
  )
  for number, name in enumerate(head):
    justify = 'left' if number < 2 else 'right'
    table.add_column(name, no_wrap=True, justify=justify)
  for row in rows:
    table.add_row(*map(rich.text.Text, row))
  # Measured as on a terminal without end.
  endless = console.options.update(max_width=10_000)
  table.width = rich.measure.Measurement.get(console, endless, table).maximum
  console.print()
  console.print(table, crop=False)
  console.print()


def _rows(name: str, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
  if 'tasks' in result:  # Of lm_eval.
    for inner, scores in result['tasks'].items():
      yield from _rows(f'lm_eval:{inner}', scores)
    return
  for metric, score in result['metrics'].items():
    yield (
      name,
      metric,
      _number(score['value']),
      # It is 0 where none or all answers are right, which is no certainty.
      _number(score['stderr'] or None),
      _number(result.get('majority')),
      _number(result.get('questions')),
      _number(result.get('shots')),
    )


def _text_name(name: str, found: dict[str, Any]) -> str:
  """The name of the file of a perplexity, without its folder."""
  file = name.partition(':')[2] or found['settings']['text']
  return pathlib.Path(file).name


def _text_number(value: float | None) -> str:
  return 'no number' if value is None else f'{value:.6g}'


def _number(value: Any) -> str:
  if value is None:
    return ''
  if not isinstance(value, float):
    return str(value)
  return f'{value:.4f}' if 0 <= value <= 1 else f'{value:.6g}'
