"""Files of results: what they were measured with, and how they are written."""

import json
import math
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np

from gnlorp_jax.disk import writing

POINTS = 30  # Of a recorded curve, at most.


def commit() -> str | None:
  """The commit of the working tree, with ``-dirty`` if it was changed."""
  git = subprocess.run(
    ['git', 'describe', '--always', '--dirty', '--abbrev=12'],
    capture_output=True,
    text=True,
    check=False,
  )
  return git.stdout.strip() or None


def read(path: pathlib.Path) -> Any:
  """What a file of results holds."""
  return json.loads(path.read_text())


def write(path: pathlib.Path, record: Any) -> None:
  """Writes a record so that a reader never meets half of it.

  A row, which is a dict in a list, takes one line.

  Raises:
    ValueError: If a number is not finite, which JSON cannot say.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  writing.write_text(path, _text(record) + '\n')


def _has_rows(node: Any) -> bool:
  """Whether a list of rows is in it."""
  if isinstance(node, list):
    return any(isinstance(item, dict) for item in node)
  return isinstance(node, dict) and any(map(_has_rows, node.values()))


def _text(node: Any) -> str:
  if not _has_rows(node):
    return json.dumps(node, allow_nan=False)
  if isinstance(node, list):
    return '[\n' + ',\n'.join(map(_text, node)) + '\n]'
  items = (f'{json.dumps(key)}: {_text(item)}' for key, item in node.items())
  return '{\n' + ',\n'.join(items) + '\n}'


def finite(value: float) -> float | None:
  """The number, or None, which JSON has, for one that is not finite."""
  return value if math.isfinite(value) else None


def curve(values: Sequence[float]) -> list[list[float | None]]:
  """A curve of one value a step, thinned to about `POINTS` points.

  These are means of equal windows of steps, each behind the last step of its
  window. A rest of steps that fills no window is left out.
  """
  window = max(len(values) // POINTS, 1)
  return [
    [end, finite(float(np.mean(values[end - window : end])))]
    for end in range(window, len(values) + 1, window)
  ]
