"""Files, and what becomes of the records that are not as they should be."""

import gzip
import json
import logging
import os
import sys

import pytest

from gnlorp_jax.data import chat


def row(i, answer='a'):
  return {'prompt': f'q{i}', 'completion': answer}


def lines(*records):
  return ''.join(
    (r if isinstance(r, str) else json.dumps(r)) + '\n' for r in records
  )


@pytest.fixture
def write(tmp_path):
  def make(name, text):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    return str(path)

  return make


def read_one(path):
  (source,) = chat.read(path)
  return source


def test_tables_and_texts_are_refused_by_name(tmp_path):
  (tmp_path / 'a.csv').write_text('prompt,completion')
  with pytest.raises(ValueError) as error:
    chat.read(str(tmp_path / 'a.csv'))
  assert str(error.value).startswith(
    f'{tmp_path / "a.csv"} is no file of conversations: .json, .jsonl, '
    '.parquet are read'
  )


def test_lists_lines_and_parquet_hold_the_same(write, tmp_path):
  records = [row(i) for i in range(3)]
  paths = [
    write('a.jsonl', lines(*records)),
    write('b.json', json.dumps(records, indent=2)),
    write('c.json', json.dumps(records)),
    write('d.jsonl', '\ufeff' + '\n\n'.join(map(json.dumps, records))),
  ]
  packed = tmp_path / 'e.jsonl.gz'
  packed.write_bytes(gzip.compress(lines(*records).encode()))
  found = [read_one(p).conversations for p in (*paths, str(packed))]
  where = [[c.where.rpartition(':')[2] for c in each] for each in found]
  assert where == [
    ['1', '2', '3'], ['2', '6', '10'], ['1', '1', '1'], ['1', '3', '5'],
    ['1', '2', '3'],
  ]  # fmt: skip
  said = [[c.messages for c in each] for each in found]
  assert all(each == said[0] for each in said)
  assert found[0][2].where == f'{paths[0]}:3'


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  turns = [
    {'role': 'user', 'content': 'q', 'name': None},
    {'role': 'assistant', 'content': 'a', 'name': None},
  ]
  path = tmp_path / 'a.parquet'
  parquet.write_table(pyarrow.table({'messages': [turns, turns]}), path)
  source = read_one(str(path))
  assert source.conversations[1] == chat.Conversation(
    (chat.Message('user', 'q'), chat.Message('assistant', 'a')),
    where=f'{path}:2',
  )
  path.write_bytes(b'PAR1')
  with pytest.raises(ValueError, match=f'^Cannot read {path}: '):
    chat.read(str(path))


def test_parquet_without_pyarrow_says_what_to_install(write, monkeypatch):
  path = write('a.parquet', '')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ValueError, match=r"pip install 'gnlorp_jax\[sft\]'"):
    chat.read(path)


def test_sources_have_names_and_weights(write, tmp_path):
  first = write('one.jsonl', lines(row(1)))
  write('more/two.jsonl', lines(row(2)))
  write('more/three.json', json.dumps([row(3)]))
  write('more/notes.txt', 'not read')
  spec = f'{first}, all={tmp_path}/more@2,{tmp_path}/more/t*.json@0.5'
  found = chat.read(spec)
  assert [(s.name, s.weight, len(s.conversations)) for s in found] == [
    ('one', 1, 1), ('all', 2, 2), ('t*', 0.5, 1),
  ]  # fmt: skip


def test_spec_that_is_wrong_is_refused(write, tmp_path):
  path = write('a.jsonl', lines(row(1)))
  (tmp_path / 'empty').mkdir()
  for spec, text in (
    (f'{path},', "Chat source '' names no file; expected [NAME=]PATH[@WEIGHT]"),
    (
      f'{path}@x',
      "has the weight 'x'; expected a number above 0 and below 1000",
    ),
    (f'{path}@0', "has the weight '0'; expected a number above 0 and below"),
    (f'{path}@nan', "has the weight 'nan'; expected a number above 0 and"),
    (f'{path}.gz', 'no such file, folder or glob. Expected [NAME=]PATH'),
    (f'{path}s', f"joined by commas. Did you mean '{path}'?"),
    ('nowhere/a.json', 'joined by commas. There is no folder nowhere.'),
    (f'{tmp_path}/empty', "no file ending in one of ('.json', '.jsonl', "),
    (f'{path},{path}', "are called 'a', and reports count by name. Name them"),
  ):
    with pytest.raises(ValueError) as error:
      chat.read(spec)
    assert text in str(error.value)


def test_bad_line_is_skipped_and_named(write, caplog):
  records = [row(i) for i in range(1, 31)]
  records[16] = '{"prompt": "q", "completion'
  records[20] = {'prompt': 'q', 'completion': 3}
  records[22] = {'messages': 'q', 'completion': 'a'}
  records[23] = {'chosen': 'x'}
  records[25] = row(26, ' ')
  path = write('a.jsonl', lines(*records))
  del records[22]
  path = write('a.jsonl', lines(*records))
  with caplog.at_level(logging.WARNING):
    source = read_one(path)
  assert source.skipped == {'bad record': 3, 'empty answer': 1}
  assert len(source.conversations) == 25
  shown = [record.getMessage() for record in caplog.records]
  assert shown[0].startswith(
    f'Skipped {path}:17: no JSON object on this line ('
  )
  assert f'Skipped {path}:21: ' in shown[1]
  assert f"{path}:23: a record with the keys ['chosen']" in shown[2]


def test_many_bad_lines_are_refused(write):
  records = [row(i) for i in range(1, 31)] + ['{'] * 11
  path = write('a.jsonl', lines(*records))
  with pytest.raises(ValueError) as error:
    chat.read(path)
  assert str(error.value).startswith(
    "Chat source 'a' has 11 bad records among 41; at most 1 % may be bad, or "
    f'10. The first is {path}:31: no JSON object on this line ('
  )
  assert str(error.value).endswith('. Repair the file or leave it out.')


def test_records_that_teach_nothing_are_counted_however_many(write):
  silent = [row(i, '') for i in range(20)]
  path = write('a.jsonl', lines(row(0), *silent))
  assert read_one(path).skipped == {'empty answer': 20}
  path = write('b.jsonl', lines(*silent))
  with pytest.raises(ValueError, match='holds no conversation: 20 records, sk'):
    chat.read(path)


def test_file_of_no_known_format_is_refused(write):
  path = write('a.jsonl', lines({'chosen': 'x', 'rejected': 'y'}))
  with pytest.raises(ValueError) as error:
    chat.read(path)
  assert str(error.value) == (
    f"{path}:1: a record with the keys ['chosen', 'rejected'] is of no known "
    'format; expected the keys of one of messages: messages; sharegpt: '
    'conversations; alpaca: instruction, output; prompt-completion: prompt, '
    'completion; question-answer: question, answer; text: text. Rename the '
    'keys.'
  )
  with pytest.raises(ValueError, match=r':1: expected an object with fields'):
    chat.read(write('b.json', '["a", "b"]'))


def test_formats_are_not_mixed_in_a_file(write):
  path = write('a.jsonl', lines(row(1), {'text': 'x'}))
  with pytest.raises(ValueError) as error:
    chat.read(path)
  assert str(error.value) == (
    f"{path}:2: a record of format 'text' in a file of format "
    f"'prompt-completion' ({path}:1); a file has one format. Put the records "
    'of each into a file of their own.'
  )


def test_list_that_breaks_off_is_refused_with_its_line(write):
  path = write('a.json', '[{"text": "a"},\n{"text": "b"},\n{"text"')
  with pytest.raises(ValueError, match=f'^{path}:3: the JSON list breaks off'):
    chat.read(path)


def test_file_that_is_empty_or_one_large_object_is_refused(write):
  for text in ('', '[]', '\n\n'):
    with pytest.raises(ValueError, match='holds no conversation: 0 records'):
      chat.read(write('a.json', text))
  text = json.dumps({'data': [row(i) for i in range(9)]}, indent=1)
  with pytest.raises(ValueError, match=r'The first is .*a.json:1: no JSON obj'):
    chat.read(write('a.json', text))
  with pytest.raises(ValueError, match='^Cannot read .*: Not a gzipped file'):
    chat.read(write('a.jsonl.gz', 'x'))


def test_compressed_file_that_is_damaged_is_refused(tmp_path):
  whole = gzip.compress(lines(row(1)).encode())
  path = tmp_path / 'a.jsonl.gz'
  # The end is missing, or what follows the header is no deflate stream.
  for damaged in (whole[:-9], whole[:10] + b'\xff' * 20):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f'^Cannot read {path}: '):
      chat.read(str(path))


def test_long_messages_are_read(write):
  path = write('a.jsonl', lines(row(1, 'long ' * 20_000)))
  (conversation,) = read_one(path).conversations
  assert len(conversation.messages[1].content) == 100_000


def test_what_is_no_file_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / 'a.jsonl')
  for name in ('a.jsonl', '*.jsonl'):
    with pytest.raises(ValueError, match='is no file, but a pipe, a device or'):
      chat.read(str(tmp_path / name))
  pointer = tmp_path / 'b.jsonl'
  pointer.write_text('version https://git-lfs.github.com/spec/v1\n')
  with pytest.raises(ValueError, match=f'{pointer} is a pointer of git-lfs'):
    chat.read(str(pointer))


def test_empty_compressed_file_is_damaged(tmp_path):
  (tmp_path / 'a.jsonl.gz').touch()
  with pytest.raises(ValueError, match=r'Cannot read .*a.jsonl.gz: it is empt'):
    chat.read(str(tmp_path / 'a.jsonl.gz'))
