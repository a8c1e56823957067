"""What a measurement of layers shows, and leaves behind."""

import json
import pathlib
from typing import Any

import matplotlib.figure
import rich.box
import rich.console
import rich.measure
import rich.table

from gnlorp_jax.compose import command_line

TITLES = {
  'outliers': 'outliers (% of weights)',
  'weight_norm': 'norm of the weights',
  'gradient_norm': 'squared norm of the gradient',
  'hill': 'exponent of the spectra (alpha)',
}
_COLOURS = ('#c6dbef', '#9ecae1', '#6baed6', '#4292c6', '#2171b5', '#08519c')
_OF_SCORES = '#d94801'


def write(path: str, found: dict[str, Any]) -> None:
  """Writes the scores as JSON, for `compose.layer_scores.read_scores`.

  Args:
    path: The file.
    found: What `recipe.measure` returned.
  """
  text = json.dumps(found, indent=2, allow_nan=False) + '\n'
  command_line.write_at_place(path, text)


def show(
  found: dict[str, Any], console: rich.console.Console | None = None
) -> None:
  """Prints all that was measured, a row per layer.

  Args:
    found: What `recipe.measure` returned.
    console: Where to; None is the terminal.
  """
  console = console or rich.console.Console()
  console.print(found['model'], style='italic', markup=False, highlight=False)
  columns = {'layer': [str(i) for i in range(len(found['scores']))]}
  for kind, values in found['all'].items():
    by_name = {kind.replace('_', '\n'): values}
    if kind == 'outliers':
      by_name = {f'%>{name}': shares for name, shares in values.items()}
    for name, numbers in by_name.items():
      columns[name] = [f'{number:.3g}' for number in numbers]
  columns['score'] = [f'{score:.3g}' for score in found['scores']]
  table = rich.table.Table(
    box=rich.box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    collapse_padding=True,
  )
  for name in columns:
    table.add_column(name, justify='right', no_wrap=True)
  for row in zip(*columns.values(), strict=True):
    table.add_row(*row)
  # On a terminal that is too narrow its lines run on: no number is cut.
  endless = console.options.update(max_width=10_000)
  table.width = rich.measure.Measurement.get(console, endless, table).maximum
  console.print(table, crop=False)
  if 'outliers' in found['all']:
    console.print(
      '%>M: percent of weights whose size, times that of what they read, is '
      'more than M times the mean of their layer.',
      highlight=False,
    )
  what = found['kind']
  if what == 'outliers':
    what += f' above {found["threshold"]:g}'
  elif what == 'hill':
    what = '1 / hill'
  console.print(
    f'score: {what}; {found["sequences"]} sequences, {found["tokens"]} tokens.',
    highlight=False,
  )


def plot(png: pathlib.Path, found: dict[str, Any]) -> None:
  """Draws what was measured over the layers, a panel for each kind.

  Args:
    png: The picture to write.
    found: What `recipe.measure` returned.
  """
  measured = found['all']
  figure = matplotlib.figure.Figure(
    figsize=(8, 0.6 + 1.9 * len(measured)), layout='constrained'
  )
  panels = figure.subplots(len(measured), sharex=True, squeeze=False)[:, 0]
  for axes, (kind, values) in zip(panels, measured.items(), strict=True):
    title, is_score = TITLES[kind], kind == found['kind']
    if is_score:
      title += (
        ': the scores are 1 / alpha' if kind == 'hill' else ': the scores'
      )
    axes.set_title(title, loc='left', fontsize='medium')
    if kind == 'outliers':
      _plot_outliers(axes, values, found['threshold'] if is_score else None)
    else:
      colour = _OF_SCORES if is_score else _COLOURS[-1]
      axes.plot(values, color=colour, marker='.')
      # Proportions are seen from 0, which no exponent comes near.
      bottom = 1 if kind == 'hill' else 0
      axes.set_ylim(bottom, bottom + 1.1 * (max(values) - bottom) or 1)
    axes.grid(color='0.9')
    axes.spines[['top', 'right']].set_visible(False)
  panels[-1].set_xlabel('layer')
  panels[-1].xaxis.get_major_locator().set_params(integer=True)
  figure.savefig(png, dpi=150)


def _plot_outliers(
  axes: Any, shares: dict[str, list[float]], threshold: float | None
) -> None:
  """A curve for each threshold; that of the scores in a colour of its own."""
  for name, colour in zip(shares, _COLOURS, strict=False):
    is_score = float(name) == threshold
    axes.plot(
      # There is no logarithm of 0: a gap.
      [share or float('nan') for share in shares[name]],
      color=_OF_SCORES if is_score else colour,
      lw=2 if is_score else 1.2,
      marker='.',
      label=f'M = {name}',
    )
  axes.set_yscale('log')
  # Powers of ten would be set in fonts that few machines have.
  axes.yaxis.set_major_formatter('{x:g}')
  axes.yaxis.set_minor_formatter('')
  axes.legend(
    frameon=False,
    loc='lower right',
    bbox_to_anchor=(1, 1),
    ncols=len(shares),
    fontsize='small',
    borderpad=0,
    columnspacing=1,
    handlelength=1.5,
  )
