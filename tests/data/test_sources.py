import gzip
import json
import logging
import os
import pathlib
import sysconfig

import numpy as np
import pytest

from gnlorp_jax.data import sources


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  data = content if isinstance(content, bytes) else content.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def json_lines(*texts):
  return ''.join(json.dumps({'text': t, 'url': 'u'}) + '\n' for t in texts)


def read(source):
  tally = sources.Tally()
  return list(sources.documents(str(source), tally)), tally


@pytest.mark.parametrize('name', ['a.txt', 'a.md', 'wiki.tokens', 'a.txt.gz'])
def test_text_file_is_one_document_with_its_line_ends(tmp_path, name):
  text = ' = Title = \n\nné à\r\nlast'
  assert read(write(tmp_path / name, text))[0] == [text]


@pytest.mark.parametrize(
  'name', ['a.jsonl', 'a.json', 'a.jsonl.gz', 'x.00000-of-00002.json.gz']
)
def test_json_lines_are_one_document_each(tmp_path, name):
  path = write(tmp_path / name, json_lines('one\ntwo', 'né') + '\n')
  docs, tally = read(path)
  assert docs == ['one\ntwo', 'né']
  assert (tally.records, tally.bad, tally.damaged) == (3, 0, 0)
  assert tally.fraction == 1.0
  assert tally.bytes == len(json_lines('one\ntwo', 'né')) + 1


def test_byte_order_mark_is_removed(tmp_path):
  text = write(tmp_path / 'a.txt', '\ufeffx')
  lines = write(tmp_path / 'a.jsonl', '\ufeff' + json_lines('y'))
  assert read(f'{text},{lines}')[0] == ['x', 'y']


def test_documents_of_white_space_are_left_out(tmp_path):
  path = write(tmp_path / 'a.jsonl', json_lines('', ' \n\t', 'x'))
  docs, tally = read(path)
  assert docs == ['x']
  assert tally.bad == 0


@pytest.fixture
def folder(tmp_path):
  write(tmp_path / 'b.txt', 'b')
  write(tmp_path / 'a.jsonl.gz', json_lines('a1', 'a2'))
  write(tmp_path / 'sub' / 'deep' / 'c.md', 'c')
  write(tmp_path / 'sub' / 'ignored.png', 'png')
  write(tmp_path / '.hidden' / 'd.txt', 'hidden')
  return tmp_path


def test_folder_is_read_recursively_in_sorted_order(folder):
  assert read(folder)[0] == ['a1', 'a2', 'b', 'c']


def test_glob_is_read_in_sorted_order(folder):
  write(folder / 'a.txt', 'a')
  assert read(folder / '*.txt')[0] == ['a', 'b']
  assert read(folder / '**' / '*.md')[0] == ['c']
  assert read(folder / 's*')[0] == ['c']


def test_comma_list_is_read_in_the_order_given(folder):
  source = f'{folder}/sub, {folder}/b.txt,{folder}/a.*'
  assert read(source)[0] == ['c', 'b', 'a1', 'a2']


def test_home_folder_is_expanded(folder, monkeypatch):
  monkeypatch.setenv('HOME', str(folder))
  monkeypatch.setenv('USERPROFILE', str(folder))
  assert read('~/b.txt')[0] == ['b']


@pytest.mark.parametrize(
  ('line', 'fault'),
  [
    (b'{"text": "cut"', "Expecting ',' delimiter"),
    (b'{"content": "x"}', 'a string field "text"'),
    (b'{"text": 3}', 'a string field "text"'),
    (b'["text"]', 'a string field "text"'),
    (b'{"text": "\xff"}', "can't decode byte 0xff"),
    (b'{"text": "\\ud800"}', 'surrogates not allowed'),
    (b'[' * 100_000, 'recursion'),
  ],
)
def test_bad_line_is_skipped_and_named(tmp_path, caplog, line, fault):
  good = json_lines('good').encode()
  path = write(tmp_path / 'a.jsonl', good + line + b'\n' + good)
  docs, tally = read(path)
  assert docs == ['good', 'good']
  assert (tally.records, tally.bad) == (3, 1)
  assert tally.first_bad.startswith(f'{path}:2: ')
  assert fault in tally.first_bad
  assert [r.getMessage() for r in caplog.records] == [
    f'Skipped {tally.first_bad}'
  ]


def test_undecodable_line_of_text_file_is_skipped_and_named(tmp_path, caplog):
  path = write(tmp_path / 'a.txt', b'one\nt\xffo\nthree\n')
  docs, tally = read(path)
  assert docs == ['one\nthree\n']
  assert tally.bad == 1
  assert f'Skipped {path}:2: ' in caplog.text


def break_off(path):
  """A file of two members, of which the second breaks off."""
  first = gzip.compress(json_lines('one', 'two').encode())
  second = gzip.compress(json_lines('x' * 500).encode())
  path.write_bytes(first + second[: len(second) // 2])
  return path


def test_file_that_breaks_off_is_refused(tmp_path, caplog):
  path = break_off(tmp_path / 'a.json.gz')
  with pytest.raises(ValueError) as error:
    read(path)
  assert str(error.value).startswith(
    f"Data source '{path}' has 1 damaged of 1 files; at most 1 % may be. The "
    f'first is {path}:3: Compressed file ended'
  )
  assert str(error.value).endswith('Get them again, or leave them out.')


def test_one_of_many_files_may_break_off_and_is_told(tmp_path, caplog):
  for number in range(99):
    write(tmp_path / f'b{number:02}.txt', 'good')
  path = break_off(tmp_path / 'a.json.gz')
  docs, tally = read(tmp_path)
  assert docs == ['one', 'two', *['good'] * 99]
  assert (tally.damaged, tally.bad) == (1, 0)
  assert f'Damaged: {path}:3: Compressed file ended' in caplog.text
  # Most documents of a set may be in few files: these are what is counted.
  write(tmp_path / 'c.jsonl.gz', '').write_bytes(b'')
  with pytest.raises(ValueError, match='has 2 damaged of 101 files; at most 1'):
    read(tmp_path)


@pytest.mark.parametrize(
  ('content', 'fault'),
  [
    (b'plain', ":1: Not a gzipped file \\(b'pl'\\)"),
    (b'', ': it is empty'),
    (gzip.compress(b'x' * 9)[:-12] + b'?' * 12, ':1: '),
  ],
  # Not by the content: a gzip file holds the time, which makes two names of one
  # test where two processes collect it in different seconds.
  ids=['plain', 'empty', 'damaged'],
)
def test_file_that_is_not_gzip_is_an_error_naming_it(tmp_path, content, fault):
  path = tmp_path / 'a.txt.gz'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=rf'The first is {path}{fault}'):
    read(path)


def test_few_bad_lines_that_hold_most_bytes_are_too_many(tmp_path):
  good = json_lines(*['good'] * 2000)
  bad = json_lines('lost' * 10_000)[:-2] + '\n'
  path = write(tmp_path / 'a.jsonl', good + bad * 3)
  with pytest.raises(ValueError) as error:
    read(path)
  assert (
    f'has 3 bad records among the first 2003 ({3 * len(bad):,} of '
    f'{len(good) + 3 * len(bad):,} bytes); at most 1 % may be bad.'
  ) in str(error.value)


# What is no file of text.


@pytest.mark.parametrize('make', ['pipe', 'device', 'link', 'pointer'])
@pytest.mark.parametrize('asked', ['by name', 'by glob', 'in a folder'])
def test_what_is_no_file_is_not_opened(tmp_path, make, asked):
  path = tmp_path / 'a.txt'
  if make == 'pipe':
    os.mkfifo(path)
  elif make == 'device':
    path.symlink_to('/dev/zero')
  elif make == 'link':
    path.symlink_to(tmp_path / 'nowhere')
  else:
    path.write_text(
      'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'
    )
  text = {
    'pipe': f'{path} is no file, but a pipe, a device or the like.',
    'device': f'{path} is no file, but a pipe, a device or the like.',
    'link': f'{path} is a link to {tmp_path}/nowhere, which is not there.',
    'pointer': f'{path} is a pointer of git-lfs, not the file itself: get that',
  }
  name = {'by name': path, 'by glob': tmp_path / '*.txt'}.get(asked, tmp_path)
  with pytest.raises(ValueError) as error:
    sources.documents(str(name))
  assert str(error.value).startswith(text[make])


@pytest.mark.parametrize(
  ('name', 'fix'),
  [
    ('a.jsonl.zst', 'Decompress it (unzstd), or compress it by gzip.'),
    ('a.txt.XZ', 'Decompress it (unxz), or compress it by gzip.'),
    ('a.zip', 'Unpack it and name the folder.'),
    ('a.arrow', 'Write it as JSON lines, Parquet or plain text.'),
  ],
)
def test_files_of_other_kinds_are_refused_by_their_names(tmp_path, name, fix):
  path = tmp_path / name
  path.write_bytes(b'x')
  with pytest.raises(ValueError) as error:
    sources.documents(str(path))
  assert str(error.value) == (
    f'{path}: files ending in {path.suffix} are not read. {fix}'
  )


def test_compressed_text_of_a_folder_is_not_left_out_unnoticed(folder):
  (folder / 'sub' / 'c.jsonl.zst').write_bytes(b'x')
  with pytest.raises(ValueError, match=r'c\.jsonl\.zst: files ending in \.zst'):
    sources.documents(str(folder))


# Tables, and columns of another name.


def test_tables_are_read(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  path = tmp_path / 'a.parquet'
  table = {
    'text': ['one', None, 'two'],
    'body': ['b1', 'b2', ' '],
  }
  parquet.write_table(pyarrow.table(table), path)
  docs, tally = read(tmp_path)
  assert docs == ['one', 'two']
  assert (tally.records, tally.bad) == (3, 1)
  assert tally.first_bad.startswith(f'{path}:2: expected a record with a str')
  fractions = [tally.fraction for _ in sources.documents(str(path), tally)]
  assert fractions == pytest.approx([1 / 3, 1])
  assert list(sources.documents(str(path), column='body')) == ['b1', 'b2']
  with pytest.raises(ValueError, match=r"the columns \['text', 'body'\], a"):
    list(sources.documents(str(path), column='txt'))
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ValueError, match=f'Cannot read {path}: '):
    read(path)


def test_text_may_be_in_another_column(tmp_path):
  line = json.dumps({'text': 'no', 'content': 'yes'}) + '\n'
  path = str(write(tmp_path / 'a.jsonl', line))
  assert list(sources.documents(path, column='content')) == ['yes']
  with pytest.raises(ValueError, match='with a string field "body"'):
    list(sources.documents(path, column='body'))
  default = sources.fingerprint(path)
  assert sources.fingerprint(path, 'text') == default
  assert sources.fingerprint(path, 'content') != default


def test_ten_bad_lines_are_tolerated_but_not_eleven_of_a_thousand(tmp_path):
  good = json_lines(*['good'] * 989)
  path = write(tmp_path / 'a.jsonl', 'bad\n' * 10 + good)
  assert read(path)[1].bad == 10
  path = write(tmp_path / 'a.jsonl', 'bad\n' * 11 + good)
  with pytest.raises(ValueError) as error:
    read(path)
  assert str(error.value) == (
    f"Data source '{path}' has 11 bad records among the first 1000 (44 of "
    f'{44 + len(good):,} bytes); at most 1 % may be bad. The first is '
    f'{path}:1: Expecting value: line 1 column 1 (char 0). Repair the file '
    'or leave it out.'
  )


def test_one_percent_of_bad_lines_is_tolerated_and_few_are_shown(
  tmp_path, caplog
):
  path = write(
    tmp_path / 'a.jsonl', 'bad\n' * 20 + json_lines(*['good'] * 1980)
  )
  assert read(path)[1].bad == 20
  messages = [r.getMessage() for r in caplog.records]
  assert len(messages) == 2
  assert messages[0].startswith(f'Skipped {path}:1: ')
  assert messages[1] == f'Skipped {path}:2: the same. More of it is counted.'


def test_ten_kinds_of_bad_lines_are_shown(caplog):
  tally = sources.Tally()
  for number in range(20):
    tally.report(f'here:{number}', ValueError(f'fault {number}'))
  messages = [r.getMessage() for r in caplog.records]
  assert messages[:1] == ['Skipped here:0: fault 0']
  assert len(messages) == 11
  assert messages[10] == 'Further faults are counted but not shown.'
  assert tally.bad == 20


def test_unknown_source_error_names_the_nearest_choice(folder):
  with pytest.raises(ValueError) as error:
    sources.documents(f'{folder}/b.text')
  assert str(error.value) == (
    f"Unknown data source '{folder}/b.text': no such file, folder or glob, and "
    "not 'stdlib', 'tfds:NAME' or 'hf:OWNER/NAME[:N]'. Did you mean "
    f"'{folder}/b.txt'?"
  )
  with pytest.raises(ValueError, match="Did you mean 'stdlib'?"):
    sources.documents('stdlb')
  with pytest.raises(ValueError) as error:
    sources.documents(f'{folder}/nowhere/*.qqq')
  assert str(error.value).endswith(
    f"'hf:OWNER/NAME[:N]'. There is no folder {folder}/nowhere."
  )
  with pytest.raises(ValueError, match=r"'hf:OWNER/NAME\[:N\]'.$"):
    sources.documents(f'{folder}/*.qqq')


def test_empty_sources_are_errors(tmp_path):
  with pytest.raises(ValueError, match='is a folder without text files; exp'):
    sources.documents(str(tmp_path))
  path = write(tmp_path / 'a.txt', '')
  with pytest.raises(ValueError, match='holds no text. Bad records: 0.$'):
    list(sources.documents(str(path)))
  with pytest.raises(ValueError, match="'a.txt,,b' has an empty name"):
    sources.documents('a.txt,,b')


def test_file_without_permission_is_an_error(tmp_path, monkeypatch):
  path = write(tmp_path / 'a.txt', 'x')
  # The person who runs the tests may be allowed to read everything.
  monkeypatch.setattr(os, 'access', lambda file, mode: file != path)
  with pytest.raises(ValueError, match=f'no permission to open {path}'):
    sources.documents(str(path))


def test_fraction_follows_the_position_in_compressed_files(tmp_path):
  # Random, so that position on disk and in the text agree; long beside the
  # 128 KiB that Python 3.12 reads ahead.
  rng = np.random.default_rng(0)
  texts = [rng.bytes(400_000).hex() for _ in range(5)]
  a = write(tmp_path / 'a.jsonl.gz', json_lines(*texts))
  b = write(tmp_path / 'b.txt', 'x')
  tally = sources.Tally()
  fractions = [tally.fraction for _ in sources.documents(f'{a},{b}', tally)]
  assert fractions[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.05)
  assert fractions[5:] == [1.0]


def test_fingerprint_changes_with_size_time_order_and_nothing_else(tmp_path):
  a, b = write(tmp_path / 'a.txt', 'a'), write(tmp_path / 'b.txt', 'b')
  both = sources.fingerprint(f'{a},{b}')
  assert sources.fingerprint(str(tmp_path)) == both
  assert sources.fingerprint(f'{b},{a}') != both
  stat = a.stat()
  write(a, 'longer')
  os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  resized = sources.fingerprint(f'{a},{b}')
  assert resized != both
  os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
  assert sources.fingerprint(f'{a},{b}') not in (both, resized)


def test_stdlib_is_a_bounded_sample_without_tests_or_packages():
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  files = [part.path for part in sources._resolve('stdlib')]
  assert files == [part.path for part in sources._resolve('stdlib')]
  parts = {p for f in files for p in f.relative_to(root).parts}
  assert not parts & {'test', 'tests', 'site-packages', '__pycache__'}
  # Spread over the library: both ends of the alphabet are there.
  tops = sorted(f.relative_to(root).parts[0] for f in files)
  assert tops[0] < 'b' and tops[-1] > 'w'
  docs, tally = read('stdlib')
  assert 2e6 < sum(map(len, docs)) < 6e6
  assert tally.bad == 0


def test_real_c4_documents_are_all_read(shared):
  docs, tally = read(shared / 'data' / 'text' / 'c4' / '*.json.gz')
  assert len(docs) == tally.records == 485
  assert sum(len(d.encode()) for d in docs) == 1_057_744


@pytest.fixture
def prepared(tmp_path, monkeypatch):
  """A TFDS folder with a data set written as `tfds build` would."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_generated_pb2

  def write_set(name, feature, values):
    folder = tmp_path / name / '1.0.0'
    folder.mkdir(parents=True)
    writer = array_record_module.ArrayRecordWriter(
      str(folder / f'{name}-train.array_record-00000-of-00001'), 'group_size:1'
    )
    for value in values:
      example = tf_example_generated_pb2.Example()
      example.features.feature[feature].bytes_list.value.append(value)
      writer.write(example.SerializeToString())
    writer.close()
    module = 'tensorflow_datasets.core.features.'
    template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    write(
      folder / 'features.json',
      json.dumps(
        {
          'pythonClassName': module + 'features_dict.FeaturesDict',
          'featuresDict': {
            'features': {
              feature: {
                'pythonClassName': module + 'text_feature.Text',
                'text': {},
              }
            }
          },
        }
      ),
    )
    write(
      folder / 'dataset_info.json',
      json.dumps(
        {
          'name': name,
          'version': '1.0.0',
          'fileFormat': 'array_record',
          'splits': [
            {
              'name': 'train',
              'shardLengths': [str(len(values))],
              'numBytes': '1',
              'filepathTemplate': template,
            }
          ],
        }
      ),
    )

  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  write_set('tiny', 'text', [b'zero', 'né'.encode(), b'\xff', b'three'])
  write_set('captions', 'caption', [b'x'])
  return tmp_path


def test_prepared_tfds_set_is_read_without_tensorflow(prepared, caplog):
  caplog.set_level(logging.WARNING, logger='gnlorp_jax')
  docs, tally = read('tfds:tiny')
  assert docs == ['zero', 'né', 'three']
  assert (tally.records, tally.bad) == (4, 1)
  assert 'Skipped tfds:tiny:2: ' in caplog.text
  assert read('tfds:tiny:1.0.0@train[:50%]')[0] == ['zero', 'né']
  assert sources.fingerprint('tfds:tiny') != sources.fingerprint(
    'tfds:tiny@train[:50%]'
  )


def test_unprepared_tfds_set_error_says_how_to_prepare_it(prepared):
  with pytest.raises(ValueError) as error:
    sources.documents('tfds:c4/en@validation')
  assert str(error.value).startswith(
    f"Cannot read 'tfds:c4/en@validation' (TFDS_DATA_DIR='{prepared}'): Could "
    'not find dataset files for: c4/en.'
  )
  assert str(error.value).endswith(
    "needs TensorFlow: pip install 'gnlorp_jax[tfds]', or in a checkout pip "
    "install '.[tfds]'; then tfds build c4/en "
    '--file_format=array_record --data_dir=DIR, and set TFDS_DATA_DIR=DIR.'
  )


def test_tfds_set_in_another_format_is_an_error(prepared):
  info = prepared / 'tiny' / '1.0.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(ValueError, match='TFRECORD is not supported.*tfds build'):
    sources.documents('tfds:tiny')


def test_tfds_set_without_split_or_text_is_an_error(prepared):
  with pytest.raises(ValueError, match="Unknown split 'test'"):
    sources.documents('tfds:tiny@test')
  with pytest.raises(ValueError, match=r"its features are \['caption'\]"):
    sources.documents('tfds:captions')
