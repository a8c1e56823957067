"""The pages of results, whose tables come from the records.

Each table stands between two lines, ``<!-- table: NAME -->`` and ``<!-- end of
table -->``; the rest of a page is written by hand.
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
  """Replaces tables of a page by name; those of other names stay.

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
