"""The results of many fine-tuning runs: one file, one table, one picture.

A result is a dict, as a finished run writes it to its ``result.json``. A metric
that is no number there (a correlation of constant predictions, a model that
diverged) is None, and worse than any number.
"""

import json
import logging
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import rich.console
import rich.table

from gnlorp_jax.compose.methods import METHODS
from gnlorp_jax.disk import writing
from gnlorp_jax.optim.inspect import format_bytes
from gnlorp_jax.recipes.grid import Result, best_learning_rate, read_results

_logger = logging.getLogger(__name__)

# The eight tasks of the papers' averages; WNLI is the ninth.
EIGHT_TASKS = ('cola', 'stsb', 'mrpc', 'rte', 'sst2', 'mnli', 'qnli', 'qqp')
NINE_TASKS = (*EIGHT_TASKS, 'wnli')

_SIZES = ('trainable_parameters', 'optimizer_state_bytes')
# Metrics as tables name them, where that differs.
_SHORT = {'matthews_correlation': 'Matthews', 'f1': 'F1', 'pearson': 'Pearson'}


def differences(results: Iterable[Result]) -> list[str]:
  """What differs between runs that the table takes for the same, but may not.

  Runs of one task and one method are compared by their learning rates and
  averaged over their seeds; with other epochs or examples they are not alike.

  Args:
    results: Finished runs.

  Returns:
    A sentence for each task and method whose runs have several settings.
  """
  groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for result in results:
    key = result['task'], result['method']
    groups.setdefault(key, []).append(result['settings'])
  sentences = []
  for (task, method), settings in groups.items():
    values = {
      name: {json.dumps(one.get(name)) for one in settings}
      for name in sorted(
        set().union(*settings) - {'seed', 'optim.learning_rate'}
      )
    }
    unlike = [
      f'{name} ({", ".join(sorted(found))})'
      for name, found in values.items()
      if len(found) > 1
    ]
    if unlike:
      sentences.append(
        f'The runs of {task}, {method} differ in {", ".join(unlike)}: they '
        'cannot be compared or averaged. Use a run directory for each setting.'
      )
  return sentences


class Cell(NamedTuple):
  """The main metric of one method on one task, over its seeds, times 100."""

  mean: float | None  # None if any seed has no number.
  deviation: float | None  # Of a sample (n - 1); None for a single seed.
  seeds: int
  learning_rate: float
  metric: str


class Row(NamedTuple):
  """One method of the table."""

  method: str
  cells: dict[str, Cell]  # By task.
  averages: dict[str, float | None]  # By name; None if a task is missing.
  trainable_parameters: int  # The largest of its tasks, as for the bytes.
  optimizer_state_bytes: int
  seconds_per_step: float | None  # Median over its runs of their medians.


class Table(NamedTuple):
  """Methods by tasks."""

  tasks: tuple[str, ...]
  rows: list[Row]
  at: str  # Which evaluation: 'best' or 'last'.


def tabulate(results: Iterable[Result], at: str = 'best') -> Table:
  """Means and deviations over seeds, and averages over tasks.

  Args:
    results: Finished runs. Where a method ran with several learning rates on a
      task, those with the best one count (`best_learning_rate`).
    at: ``best``, the evaluation with the best main metric of each run, or
      ``last``.

  Returns:
    The table. Tasks are in the order of the papers' tables, methods in that of
    `methods.METHODS`. The average of eight tasks, and that of nine with WNLI,
    are there if the results have all of them; otherwise the average is over the
    tasks used, and named so.
  """
  results = list(results)
  found = list(dict.fromkeys(result['task'] for result in results))
  tasks = tuple(task for task in NINE_TASKS if task in found)
  tasks += tuple(task for task in found if task not in tasks)
  rows = []
  for method in sorted(
    {result['method'] for result in results}, key=list(METHODS).index
  ):
    own = [result for result in results if result['method'] == method]
    chosen, cells = [], {}
    for task in tasks:
      runs = [result for result in own if result['task'] == task]
      if runs:
        rate = best_learning_rate(runs)
        runs = [result for result in runs if result['learning_rate'] == rate]
        cells[task] = _cell(runs, at)
        chosen += runs
    times = [r['seconds_per_step'] for r in chosen if r['seconds_per_step']]
    rows.append(
      Row(
        method,
        cells,
        _averages(tasks, cells),
        max(result['trainable_parameters'] for result in chosen),
        max(result['optimizer_state_bytes'] for result in chosen),
        statistics.median(times) if times else None,
      )
    )
  return Table(tasks, rows, at)


def _cell(runs: Sequence[Result], at: str) -> Cell:
  values = [result[at][result['main_metric']] for result in runs]
  metric = runs[0]['main_metric']
  metric = _SHORT.get(metric, metric)
  rate = runs[0]['learning_rate']
  if any(value is None for value in values):
    return Cell(None, None, len(values), rate, metric)
  values = [100 * value for value in values]
  deviation = statistics.stdev(values) if len(values) > 1 else None
  return Cell(statistics.fmean(values), deviation, len(values), rate, metric)


def _averages(
  tasks: tuple[str, ...], cells: dict[str, Cell]
) -> dict[str, float | None]:
  """The averages that the tasks allow, by name."""
  named = {
    '8 tasks': EIGHT_TASKS,
    '9 tasks': NINE_TASKS,
  }
  sets = {n: part for n, part in named.items() if set(part) <= set(tasks)}
  if not sets and len(tasks) > 1:
    sets = {f'these {len(tasks)} tasks': tasks}
  averages: dict[str, float | None] = {}
  for name, part in sets.items():
    means = [cells[task].mean if task in cells else None for task in part]
    complete = [mean for mean in means if mean is not None]
    is_complete = len(complete) == len(part)
    averages[name] = statistics.fmean(complete) if is_complete else None
  return averages


def columns(table: Table) -> tuple[list[str], list[list[str]]]:
  """The table as text: its header, and the words of every row."""
  averages = list(table.rows[0].averages) if table.rows else []
  metric = {
    task: row.cells[task].metric
    for row in table.rows
    for task in table.tasks
    if task in row.cells
  }
  header = ['method', *(f'{task} ({metric[task]})' for task in table.tasks)]
  header += [f'average of {name}' for name in averages]
  header += ['trained parameters', 'optimizer state', 'ms per step']
  body = []
  for row in table.rows:
    seconds = row.seconds_per_step
    body.append(
      [
        row.method,
        *(_format_cell(row.cells.get(task)) for task in table.tasks),
        *(_format(row.averages[name]) for name in averages),
        f'{row.trainable_parameters:,}',
        format_bytes(row.optimizer_state_bytes),
        '-' if seconds is None else f'{1000 * seconds:.1f}',
      ]
    )
  return header, body


def _format(value: float | None) -> str:
  return '-' if value is None else f'{value:.2f}'


def _format_cell(cell: Cell | None) -> str:
  if cell is None:
    return '-'
  if cell.mean is None:
    return 'no number'
  if cell.deviation is None:
    return f'{cell.mean:.2f}'
  return f'{cell.mean:.2f} ± {cell.deviation:.2f}'


_LEGEND = (
  'Dev metrics times 100: mean ± standard deviation over seeds. Trained '
  'parameters and optimizer state are those of the largest task; the time of a '
  'step is the median, without compilation.'
)
_WHEN = {
  'best': 'At the best evaluation of each run',
  'last': 'At the last evaluation of each run',
}


def to_markdown(results: Sequence[Result]) -> str:
  """Two Markdown tables: at the best evaluations, and at the last ones."""
  parts = ['# Results\n', f'{_LEGEND}\n']
  for at, title in _WHEN.items():
    header, body = columns(tabulate(results, at))
    rule = ['---', *['---:'] * (len(header) - 1)]
    lines = [f'| {" | ".join(words)} |' for words in (header, rule, *body)]
    parts.append(f'## {title}\n\n' + '\n'.join(lines) + '\n')
  parts.append(f'## Runs\n\n{_runs(results)}\n')
  parts += [f'{sentence}\n' for sentence in differences(results)]
  return '\n'.join(parts)


def _runs(results: Sequence[Result]) -> str:
  """How the table came about: seeds and learning rates of every cell."""
  table = tabulate(results)
  lines = ['| task | method | learning rate | tried | seeds |']
  lines.append('| --- | --- | ---: | --- | ---: |')
  for task in table.tasks:
    for row in table.rows:
      if (cell := row.cells.get(task)) is None:
        continue
      tried = {
        result['learning_rate']
        for result in results
        if (result['task'], result['method']) == (task, row.method)
      }
      rates = ', '.join(f'{rate:g}' for rate in sorted(tried))
      lines.append(
        f'| {task} | {row.method} | {cell.learning_rate:g} | {rates} '
        f'| {cell.seeds} |'
      )
  return '\n'.join(lines)


def show(results: Sequence[Result]) -> None:
  """Prints the table for the person who waited for it.

  A method is a column: there are fewer of them than of tasks.
  """
  console = rich.console.Console()
  if not console.is_terminal:
    console.width = 200  # Nothing is cut off in a file.
  header, body = columns(tabulate(results))
  table = rich.table.Table(title=_WHEN['best'], title_justify='left')
  for name in (header[0], *(words[0] for words in body)):
    table.add_column(name, justify='left' if name == header[0] else 'right')
  for words in list(zip(header, *body, strict=True))[1:]:
    table.add_row(*words)
  console.print(table)
  for sentence in differences(results):
    _logger.warning('%s', sentence)


# Eight colours that also differ in grey and for colour-blind eyes (Okabe, Ito).
_COLOURS = (
  '#0072b2',
  '#e69f00',
  '#009e73',
  '#d55e00',
  '#56b4e9',
  '#cc79a7',
  '#000000',
  '#f0e442',
)


_TASKS_PER_ROW = 5


def plot(results: Sequence[Result], png: str | pathlib.Path) -> None:
  """Draws the main metrics as bars, one group per task, one bar per method.

  Args:
    results: Finished runs.
    png: The picture to write; of many tasks it has several rows.
  """
  table = tabulate(results)
  rows = [
    table.tasks[i : i + _TASKS_PER_ROW]
    for i in range(0, len(table.tasks), _TASKS_PER_ROW)
  ]
  width = 2 + 0.36 * len(table.rows) * len(rows[0])
  figure = matplotlib.figure.Figure(
    figsize=(max(width, 6), 0.6 + 3.6 * len(rows)), layout='constrained'
  )
  all_axes = figure.subplots(len(rows), sharey=True, squeeze=False)[:, 0]
  for axes, tasks in zip(all_axes, rows, strict=True):
    _plot_tasks(axes, table.rows, tasks)
    # As many slots in each row, so that bars are equally wide.
    axes.set_xlim(-0.5, len(rows[0]) - 0.5)
  figure.supylabel('dev metric x 100, best evaluation', fontsize='medium')
  figure.legend(
    *all_axes[0].get_legend_handles_labels(),
    loc='outside upper center',
    ncols=3 if width < 8 else 6,
    frameon=False,
  )
  with writing.written(pathlib.Path(png)) as draft:
    figure.savefig(draft, format='png', dpi=150)


def _plot_tasks(axes: Any, rows: Sequence[Row], tasks: Sequence[str]) -> None:
  slots = np.arange(len(tasks))
  for i, row in enumerate(rows):
    at = slots + (i - (len(rows) - 1) / 2) * 0.84 / len(rows)
    cells = [row.cells.get(task) for task in tasks]
    means = [np.nan if c is None or c.mean is None else c.mean for c in cells]
    spread = [np.nan if c is None else c.deviation or np.nan for c in cells]
    bars = axes.bar(
      at,
      means,
      0.8 / len(rows),
      yerr=None if np.all(np.isnan(spread)) else spread,
      color=_COLOURS[i % len(_COLOURS)],
      error_kw={'elinewidth': 1, 'capsize': 2},
      label=row.method,
    )
    labels = ['' if np.isnan(mean) else f'{mean:.1f}' for mean in means]
    axes.bar_label(bars, labels, padding=3, fontsize=7, rotation=90)
  metric = {task: c.metric for row in rows for task, c in row.cells.items()}
  axes.set_xticks(slots, [f'{task} ({metric[task]})' for task in tasks])
  axes.margins(y=0.15)
  axes.grid(axis='y', color='0.9')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def write(run_dir: str | pathlib.Path, *, picture: bool = True) -> list[Result]:
  """Writes ``results.json``, ``results.md`` and ``results.png`` anew.

  Args:
    run_dir: Where the runs are.
    picture: Whether to draw the last of them too, which takes a second.

  Returns:
    All results there.
  """
  run_dir = pathlib.Path(run_dir)
  results = read_results(run_dir, '*/*/*', ('task', 'method', *_SIZES))
  writing.write_text(
    run_dir / 'results.json',
    json.dumps(results, indent=2, allow_nan=False) + '\n',
  )
  if results:
    writing.write_text(run_dir / 'results.md', to_markdown(results))
  if results and picture:
    plot(results, run_dir / 'results.png')
  return results
