"""Pictures of results."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure


class Bars(NamedTuple):
  """Methods side by side.

  Attributes:
    title: Of the panel.
    label: What the bars are.
    quartiles: (low, median, high) by method.
    colors: By method.
  """

  title: str
  label: str
  quartiles: dict[str, Sequence[float]]
  colors: dict[str, str]


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
