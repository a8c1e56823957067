"""JSON files of runs: read whole, or refused with line and mending."""

import pytest

from gnlorp_jax.training import records


def told(function, *args):
  with pytest.raises(ValueError) as error:
    function(*args)
  return str(error.value)


def test_rows_are_read_without_a_last_line_that_was_cut_off(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": 2, "text": "a\u2028b"}\n{"ste')
  assert records.read_rows(path, '') == [
    {'step': 1},
    {'step': 2, 'text': 'a\u2028b'},
  ]
  for text in ('', '{"step": 1'):
    path.write_text(text)
    assert records.read_rows(path, '') == []


@pytest.mark.parametrize(
  ('line', 'fault'),
  [
    ('', 'Expecting value: line 1 column 1 (char 0)'),
    ('{"step": 1', "Expecting ',' delimiter: line 1 column 11 (char 10)"),
    ('[1]', "expected a JSON object, got '[1]'"),
    ('null', "expected a JSON object, got 'None'"),
    ('{"loss": 1}', "it lacks the fields ['step']"),
    ('{"step": "1"}', "its step is '1', no whole number"),
    ('{"step": true}', 'its step is True, no whole number'),
  ],
)
def test_damaged_row_is_told_with_its_line(tmp_path, line, fault):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
  assert told(records.read_rows, path, 'Mend it.') == (
    f'{path}:2: {fault}. Mend it.'
  )


def test_what_cannot_be_read_is_told(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert told(records.read_rows, path, 'Mend it.').startswith(
    f'Cannot read {path}: [Errno 2] No such file or directory'
  )
  path.write_bytes(b'\xff\n')
  assert "can't decode byte 0xff" in told(records.read_rows, path, '')
  path.write_text('[' * 100_000 + '\n')
  assert told(records.read_rows, path, '').startswith(f'{path}:1: ')


def test_object_has_its_fields_or_is_refused(tmp_path):
  path = tmp_path / 'result.json'
  path.write_text('{"a": 1, "b": 2}')
  read = records.read_object
  assert read(path, 'result', ('a',), '') == {'a': 1, 'b': 2}
  assert told(read, path, 'result', ('a', 'c'), 'Remove it.') == (
    f"{path} is no result: it lacks the fields ['c']. Remove it."
  )
