"""Pictures of results."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def panels(
  number: int, size: tuple[float, float]
) -> tuple[Figure, Sequence[Axes]]:
  """A picture of panels side by side, `size` inches in all."""
  figure = Figure(figsize=size, layout='constrained')
  return figure, figure.subplots(1, number, squeeze=False)[0]


def legend(axes: Axes, **options: Any) -> bool:
  """Names the curves of a panel; False if it has none with a name."""
  if not axes.get_legend_handles_labels()[0]:
    return False
  axes.legend(**options)
  return True


class Bars(NamedTuple):
  """Methods side by side."""

  title: str  # Of the panel.
  label: str  # What the bars are.
  quartiles: dict[str, Sequence[float]]  # (low, median, high) by method.
  colors: dict[str, str]  # By method.


def bars(panels: Sequence[Bars], path: pathlib.Path) -> None:
  """Draws panels of bars, one below the other; of none nothing is written."""
  heights = [1 + len(panel.quartiles) / 4 for panel in panels]
  if not heights:
    return
  figure = Figure(figsize=(8, sum(heights)), layout='constrained')
  all_axes = figure.subplots(
    len(panels), squeeze=False, height_ratios=heights
  ).flatten()
  for axes, panel in zip(all_axes, panels, strict=True):
    names = list(panel.quartiles)
    low, middle, high = np.array(list(panel.quartiles.values())).T
    axes.barh(
      names,
      middle,
      xerr=[middle - low, high - middle],
      color=[panel.colors[name] for name in names],
    )
    axes.axvline(1, color='0.3', lw=0.8)
    axes.invert_yaxis()
    axes.set(title=panel.title, xlabel=panel.label)
  save(figure, path)


def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes a picture, and the folder that it needs."""
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130)
