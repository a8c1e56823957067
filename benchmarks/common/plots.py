"""Pictures of results."""

import pathlib

from matplotlib.figure import Figure


def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes a picture, and the folder that it needs."""
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130)
