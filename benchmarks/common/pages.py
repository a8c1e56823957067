"""The pages of results, whose tables come from the records.

A page is written by hand but for its tables. Each of these stands between two
lines, ``<!-- table: NAME -->`` and ``<!-- end of table -->``, and whatever was
there is replaced by what the benchmark makes of its record.
"""

import pathlib
import re

_TABLE = re.compile(
  r'(?<=<!-- table: )(?P<name>[^\n]+?) -->\n(?P<text>.*?)(?=<!-- end of table)',
  re.DOTALL,
)


def read(page: pathlib.Path) -> dict[str, str]:
  """The tables of a page, by name."""
  found = _TABLE.finditer(page.read_text())
  return {match['name']: match['text'] for match in found}


def write(page: pathlib.Path, tables: dict[str, str]) -> None:
  """Replaces tables of a page; those of other names stay.

  Args:
    page: A Markdown file with a place for each table.
    tables: Markdown by name.

  Raises:
    ValueError: If the page has no place for a table.
  """
  absent = sorted(set(tables) - set(read(page)))
  if absent:
    raise ValueError(
      f'{page} has no place for {", ".join(absent)}: add the lines '
      f"'<!-- table: {absent[0]} -->' and '<!-- end of table -->'."
    )

  def text(match: re.Match[str]) -> str:
    table = tables.get(match['name'], match['text'])
    return f'{match["name"]} -->\n{table}'

  page.write_text(_TABLE.sub(text, page.read_text()))
