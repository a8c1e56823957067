"""Rows of a file of results: found again, shared, refused."""

import pytest

from benchmarks.common import record
from benchmarks.common.rows import Rows

FIRST = {'task': 'a', 'seed': 0, 'loss': 1.5}
SECOND = {'task': 'a', 'seed': 1, 'loss': 1.25}


def test_a_row_is_found_by_its_keys_and_replaced(tmp_path):
  path = tmp_path / 'deep' / 'r.json'
  found = Rows(path, ('task', 'seed', 'model'))
  assert found.find(FIRST) is None
  for row in (FIRST, SECOND, FIRST | {'loss': 2.0}):
    found.keep(row)
  again = Rows(path, ('task', 'seed', 'model'))
  assert again.find({'task': 'a', 'seed': 0}) == FIRST | {'loss': 2.0}
  assert again.find({'task': 'a', 'seed': 0, 'model': 'm'}) is None
  assert record.read(path)['rows'] == [SECOND, FIRST | {'loss': 2.0}]
  assert record.read(path)['environment']['commit']


def test_what_two_processes_record_at_once_is_kept(tmp_path):
  path = tmp_path / 'r.json'
  one, two = Rows(path, ('seed',)), Rows(path, ('seed',))
  steps = Rows(path, ('task',), 'steps')
  steps.keep({'task': 'a', 'seconds': 2.0})
  one.keep(FIRST)
  two.keep(SECOND)
  found = record.read(path)
  assert found['steps'] == [{'task': 'a', 'seconds': 2.0}]
  assert found['rows'] == [FIRST, SECOND]


def test_rows_of_other_settings_are_refused(tmp_path):
  path = tmp_path / 'r.json'
  found = Rows(path, ('seed',))
  found.agree({'steps': 4})
  found.keep(FIRST)
  again = Rows(path, ('seed',))
  again.agree({'steps': 4, 'rate': 0.1})
  again.keep(SECOND)
  with pytest.raises(ValueError) as error:
    Rows(path, ('seed',)).agree({'rate': 0.1, 'steps': 5})
  assert str(error.value) == (
    f'{path} holds rows with steps=4, and asked for is 5. Give another '
    '--output.'
  )
