"""Tables in Markdown, and the numbers in their cells."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

MB = 1e-6  # Of a byte, in numbers of megabytes.
NOTHING = '-'


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table."""
  lines = [heads, ['---'] * len(heads), *rows]
  return ''.join('| ' + ' | '.join(line) + ' |\n' for line in lines)


def of_columns(
  rows: Iterable[Any], columns: Mapping[str, Callable[[Any], str]]
) -> str:
  """A Markdown table of rows; a column has a head and the cell of a row."""
  lines = ([cell(row) for cell in columns.values()] for row in rows)
  return markdown(list(columns), lines)


def number(value: float | None, form: str, scale: float = 1) -> str:
  """A number in a format such as ``.2f``, `NOTHING` where there is none."""
  return NOTHING if value is None else format(value * scale, form)


def median_in_quartiles(
  quartiles: Sequence[float], form: str = '.2f', scale: float = 1
) -> str:
  """``median [lower, upper]`` of the three quartiles."""
  low, middle, high = (format(value * scale, form) for value in quartiles)
  return f'{middle} [{low}, {high}]'
