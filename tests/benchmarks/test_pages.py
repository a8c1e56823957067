"""Pages hold the tables that records give, and records are small."""

import pathlib

import pytest

from benchmarks import report
from benchmarks.common import pages

PAGE = """# A page

<!-- table: first -->
| old |
<!-- end of table -->

Words of a person.

<!-- table: second -->
<!-- end of table -->
"""


@pytest.mark.parametrize('name', report.BENCHMARKS)
def test_pages_hold_the_recorded_tables(name):
  module = report.load(name)
  tables, found = module.tables(), pages.read(module.PAGE)
  assert tables and tables.keys() <= found.keys()
  for table, text in tables.items():
    assert found[table] == text, (
      f'{module.PAGE} does not show the record of {name}: run '
      f'`python -m benchmarks.report {name}`.'
    )


def test_every_table_of_a_page_is_one_of_a_benchmark():
  made = {}
  for name in report.BENCHMARKS:
    module = report.load(name)
    for table in module.tables():
      assert table not in made.setdefault(module.PAGE, [])
      made[module.PAGE].append(table)
  for page, tables in made.items():
    assert set(pages.read(page)) == set(tables)


def test_tables_are_replaced_and_the_rest_stays(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text(PAGE)
  assert pages.read(page) == {'first': '| old |\n', 'second': ''}
  pages.write(page, {'second': '| new |\n| --- |\n'})
  assert page.read_text() == PAGE.replace(
    'second -->\n', 'second -->\n| new |\n| --- |\n'
  )
  pages.write(page, {'first': '', 'second': ''})
  assert page.read_text() == PAGE.replace('| old |\n', '')


def test_a_table_needs_a_place(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text(PAGE)
  with pytest.raises(ValueError) as error:
    pages.write(page, {'first': '', 'third': '', 'other': ''})
  assert str(error.value) == (
    f'{page} has no place for other, third: add the lines '
    "'<!-- table: other -->' and '<!-- end of table -->'."
  )
  assert page.read_text() == PAGE


def test_records_are_small():
  records = pathlib.Path('benchmarks/results').glob('*.json')
  assert sum(path.stat().st_size for path in records) < 600_000


def test_names_of_benchmarks(capsys, monkeypatch):
  monkeypatch.setattr('sys.argv', ['report', 'quality.nothing'])
  with pytest.raises(SystemExit):
    report.main()
  message = "no record 'quality.nothing'; there are quality, refresh, "
  assert message in capsys.readouterr().err
