import json
import logging

import numpy as np
import pytest

from gnlorp_jax.data import glue

COLA, MRPC, STSB, MNLI, QQP, RTE = (
  glue.TASKS[name] for name in ('cola', 'mrpc', 'stsb', 'mnli', 'qqp', 'rte')
)
MOOD = glue.custom_task('mood', ['text'], 'mood', ['bad', 'good'])


def write(path, *rows):
  """Writes rows of fields, or lines as they are."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [
    row if isinstance(row, bytes) else '\t'.join(row).encode() for row in rows
  ]
  path.write_bytes(b''.join(line + b'\n' for line in lines))
  return path


def stsb_row(*last):
  return ('0', 'g', 'f', 'y', 'o', 's', 's', *last)


STSB_HEADER = (
  *('index', 'genre', 'filename', 'year', 'old_index', 'source1', 'source2'),
  *('sentence1', 'sentence2', 'score'),
)


# Rows and labels as the table of the reference data gives them.
@pytest.mark.parametrize(
  ('name', 'split', 'counts'),
  [
    ('cola', 'train', [2528, 6023]),
    ('cola', 'dev', [322, 721]),
    ('sst2', 'train', [29780, 37569]),
    ('sst2', 'dev', [428, 444]),
    ('mrpc', 'train', [1194, 2474]),
    ('mrpc', 'dev', [129, 279]),
    ('rte', 'train', [1249, 1241]),
    ('rte', 'dev', [146, 131]),
    ('wnli', 'train', [323, 312]),
    ('wnli', 'dev', [40, 31]),
    ('qnli', 'dev', [2702, 2761]),
    ('mnli', 'dev', [3479, 3123, 3213]),
  ],
)
def test_official_files_have_the_official_counts(shared, name, split, counts):
  source = str(shared / 'data' / 'glue')
  examples = glue.read(glue.TASKS[name], source, split)
  assert np.bincount(examples.labels).tolist() == counts
  assert len(examples.texts) == len(examples.ids) == sum(counts)
  assert examples.labels.dtype == np.int32
  assert {len(t) for t in examples.texts} == {
    len(glue.TASKS[name].text_columns)
  }


@pytest.mark.parametrize(
  ('split', 'rows', 'mean'), [('train', 5749, 2.70), ('dev', 1500, 2.36)]
)
def test_official_scores(shared, split, rows, mean):
  labels = glue.read(STSB, str(shared / 'data' / 'glue'), split).labels
  assert (len(labels), labels.dtype) == (rows, np.float32)
  assert np.mean(labels, dtype=np.float64) == pytest.approx(mean, abs=0.005)
  assert 0 <= labels.min() and labels.max() <= 5


def test_official_files_hold_no_test_split(shared):
  source = str(shared / 'data' / 'glue')
  assert glue.has_split(COLA, source, 'dev')
  assert not glue.has_split(COLA, source, 'test')
  assert not glue.has_split(MNLI, source, 'dev_mismatched')
  with pytest.raises(glue.MissingSplitError) as error:
    glue.read(MNLI, source, 'test_mismatched')
  assert str(error.value) == (
    "No split 'test_mismatched' of task 'mnli': looked for test_mismatched.tsv "
    f"in {source}/MNLI and {source}; {source}/MNLI holds ['dev_matched.tsv']."
  )


def test_byte_order_mark_and_quotation_marks(tmp_path):
  path = write(
    tmp_path / 'dev.tsv',
    b'\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String',
    ('1', '7', '8', '" He said', 'it "'),
    ('0', '7', '9', 'a', '"b'),
  )
  examples = glue.read_file(path, MRPC)
  assert examples.texts == [('" He said', 'it "'), ('a', '"b')]
  assert examples.labels.tolist() == [1, 0]
  assert examples.ids == ['0', '1']


def test_cola_has_no_header_but_its_test_file_has(tmp_path):
  write(tmp_path / 'CoLA' / 'dev.tsv', ('gj04', '0', '*', 'Walk he.'))
  write(tmp_path / 'CoLA' / 'test.tsv', ('index', 'sentence'), ('5', 'He w.'))
  dev = glue.read(COLA, str(tmp_path), 'dev')
  assert (dev.texts, dev.labels.tolist()) == ([('Walk he.',)], [0])
  # The task's own folder serves as well.
  test = glue.read(COLA, str(tmp_path / 'CoLA'), 'test')
  assert test == glue.Examples([('He w.',)], None, ['5'])


def test_matched_and_mismatched_files(tmp_path):
  header = ('index', 'sentence1', 'sentence2', 'label1', 'gold_label')
  for kind, label in (('matched', 'neutral'), ('mismatched', 'contradiction')):
    write(
      tmp_path / 'MNLI' / f'dev_{kind}.tsv', header, ('0', 'a', 'b', '', label)
    )
    write(tmp_path / 'MNLI' / f'test_{kind}.tsv', header[:3], ('1', kind, 'b'))
  labels = [
    glue.read(MNLI, str(tmp_path), split).labels.item()
    for split in ('dev', 'dev_mismatched')
  ]
  assert [MNLI.labels[label] for label in labels] == [
    'neutral',
    'contradiction',
  ]
  test = glue.read(MNLI, str(tmp_path), 'test_mismatched')
  assert test.texts == [('mismatched', 'b')]


def test_only_line_feeds_end_a_row(tmp_path):
  # Python's splitlines would split at the others too.
  text = 'a\x0bb\x85c\u2028d\re'
  path = write(tmp_path / 'a.tsv', ('text', 'mood\r'), (text, 'good\r'))
  path.write_bytes(path.read_bytes() + b'\r\n\n')
  examples = glue.read_file(path, MOOD)
  assert (examples.texts, examples.labels.tolist()) == ([(text,)], [1])


def test_malformed_rows_are_named(tmp_path):
  path = write(
    tmp_path / 'train.tsv',
    STSB_HEADER,
    stsb_row('a', 'b', '5.000'),
    stsb_row('a', 'b'),
    stsb_row('a', 'b', '5.1'),
    stsb_row('a', 'b', 'nan'),
    stsb_row('a', ' ', '1'),
    b'\t' * 7 + b'\xff\tb\t1',
    stsb_row('a', 'b', 'x'),
    stsb_row('a', 'b', '0'),
  )
  with pytest.raises(ValueError) as error:
    glue.read_file(path, STSB)
  assert str(error.value) == (
    f'6 of the 8 rows of {path} are malformed:\n'
    f'  {path}:3: 9 columns instead of 10\n'
    f'  {path}:4: score 5.1 is not in [0, 5]\n'
    f"  {path}:5: score 'nan' is not a number\n"
    f"  {path}:6: empty text 'sentence2'\n"
    f"  {path}:7: 'utf-8' codec can't decode byte 0xff in position 7: invalid "
    'start byte\n'
    '  and 1 more\n'
    'Repair or remove them; every row of a fine-tuning set counts.'
  )


def test_unknown_label_is_named(tmp_path):
  path = write(
    tmp_path / 'dev.tsv', ('index', *RTE.text_columns, 'label'), tuple('0ab1')
  )
  with pytest.raises(
    ValueError,
    match=r"dev.tsv:2: unknown label '1'; expected one of \('entailment', 'no",
  ):
    glue.read_file(path, RTE)


def test_broken_rows_of_qqp_are_left_out_with_a_warning(tmp_path, caplog):
  header = ('id', 'qid1', 'qid2', 'question1', 'question2', 'is_duplicate')
  rows = [('7', '1', '2', 'a?', 'b?', '1'), ('8', '3', '4', 'broken')]
  path = write(tmp_path / 'train.tsv', header, *rows)
  examples = glue.read_file(path, QQP)
  assert (examples.ids, examples.labels.tolist()) == (['7'], [1])
  assert f'{path}:3: 4 columns instead of 6' in caplog.text
  write(path, header, rows[0], *rows[1:] * 11)
  with pytest.raises(ValueError, match='11 of the 12 rows'):
    glue.read_file(path, QQP)


def test_every_row_of_a_test_file_must_be_answered(tmp_path):
  header = ('id', 'question1', 'question2')
  path = write(tmp_path / 'test.tsv', header, ('0', 'a?', ''))
  assert glue.read_file(path, QQP).texts == [('a?', '')]
  write(path, header, ('0', 'a?', 'b?'), ('1', 'broken'))
  with pytest.raises(ValueError, match='1 of the 2 rows'):
    glue.read_file(path, QQP)


def test_files_that_cannot_be_read_are_errors(tmp_path):
  with pytest.raises(ValueError, match=f'No file {tmp_path}/a.tsv'):
    glue.read_file(tmp_path / 'a.tsv', MOOD)
  empty = write(tmp_path / 'empty.tsv', ('text', 'mood'))
  with pytest.raises(ValueError, match='empty.tsv holds no rows'):
    glue.read_file(empty, MOOD)
  for name in ('nothing.tsv', 'nothing.jsonl'):
    (tmp_path / name).write_text('\n')
    with pytest.raises(ValueError, match=f'{name} is empty: it holds no rows'):
      glue.read_file(tmp_path / name, MOOD)
  commas = write(tmp_path / 'commas.tsv', ('text,mood',), ('a,good',))
  with pytest.raises(ValueError, match='separated by tabs: are these'):
    glue.read_file(commas, MOOD)
  wrong = write(tmp_path / 'wrong.tsv', ('texts', 'mood'), ('a', 'good'))
  with pytest.raises(
    ValueError, match="no column 'text'; .*'mood'.*Did you mean 'texts'"
  ):
    glue.read_file(wrong, MOOD)
  with pytest.raises(ValueError, match=f"No folder '{tmp_path}/nowhere'; expe"):
    glue.has_split(MOOD, str(tmp_path / 'nowhere'), 'dev')
  with pytest.raises(ValueError, match="Unknown split 'validation'"):
    glue.read(MOOD, str(tmp_path), 'validation')


def test_training_file_without_labels_is_an_error(tmp_path):
  write(tmp_path / 'train.tsv', ('text', 'moods'), ('a', 'good'))
  with pytest.raises(ValueError, match="no labels: there is no column 'mood'"):
    glue.read(MOOD, str(tmp_path), 'train')
  write(tmp_path / 'test.tsv', ('text',), ('a',))
  assert glue.read(MOOD, str(tmp_path), 'test').labels is None


def test_custom_task_reads_json_lines(tmp_path):
  rows = [
    {'text': 'tab\there', 'mood': 'good', 'id': 12},
    {'text': 'né', 'mood': 'bad', 'id': 'x'},
  ]
  lines = [json.dumps(row).encode() for row in rows]
  write(tmp_path / 'mood' / 'dev.jsonl', *lines)
  examples = glue.read(MOOD, str(tmp_path), 'dev')
  assert examples.texts == [('tab\there',), ('né',)]
  assert examples.labels.tolist() == [1, 0]
  assert examples.ids == ['12', 'x']
  numbered = glue.custom_task('n', ['text'], 'n', ['1', 'true'])
  path = write(
    tmp_path / 'n.jsonl',
    b'{"text": "a", "n": true}',
    b'{"text": "a", "n": 1}',
  )
  assert glue.read_file(path, numbered).labels.tolist() == [1, 0]


def test_malformed_json_lines_are_named(tmp_path):
  path = write(
    tmp_path / 'a.jsonl',
    b'{"text": "a", "mood": "good"}',
    b'{"text": 3, "mood": "good"}',
    b'{"text": "a"}',
    b'["a"]',
    b'{"text": "\\ud800", "mood": "good"}',
    b'{"text',
  )
  with pytest.raises(ValueError) as error:
    glue.read_file(path, MOOD)
  for line in (
    "a.jsonl:2: no text 'text'",
    "a.jsonl:3: no label 'mood'",
    'a.jsonl:4: expected a JSON object',
    "a.jsonl:5: 'utf-8' codec can't encode",
    'a.jsonl:6: Unterminated string',
  ):
    assert line in str(error.value)


def test_labels_are_inferred_from_a_file(tmp_path):
  rows = [('a', 'good'), ('b', 'bad'), ('c', 'good'), ('d', 'meh')]
  path = write(tmp_path / 'a.tsv', ('text', 'mood'), *rows)
  assert glue.infer_labels(path, 'mood') == ('bad', 'good', 'meh')
  with pytest.raises(ValueError, match="no column 'moods'.*Did you mean 'mood"):
    glue.infer_labels(path, 'moods')
  write(path, ('text', 'mood'), ('a', 'good'), ('b', ''))
  with pytest.raises(ValueError, match="a.tsv:3: no label 'mood'"):
    glue.infer_labels(path, 'mood')
  write(path, ('text', 'mood'), ('a', 'good'))
  with pytest.raises(ValueError, match=r"holds the labels \['good'\]; a task"):
    glue.infer_labels(path, 'mood')


FEATURES = 'tensorflow_datasets.core.features.'
TEXT = {'pythonClassName': FEATURES + 'text_feature.Text', 'text': {}}
CLASS = {
  'pythonClassName': FEATURES + 'class_label_feature.ClassLabel',
  'classLabel': {'numClasses': '2'},
}


def scalar(dtype):
  tensor = {'shape': {}, 'dtype': dtype, 'encoding': 'none'}
  return {'pythonClassName': FEATURES + 'scalar.Scalar', 'tensor': tensor}


@pytest.fixture
def prepare(tmp_path, monkeypatch):
  """Writes data sets as `tfds build glue/NAME` would."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_generated_pb2

  def prepare(name, features, splits):
    folder = tmp_path / 'glue' / name / '2.0.0'
    folder.mkdir(parents=True)
    for split, rows in splits.items():
      file = folder / f'glue-{split}.array_record-00000-of-00001'
      writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1')
      for row in rows:
        example = tf_example_generated_pb2.Example()
        for key, value in row.items():
          feature = example.features.feature[key]
          if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
          elif isinstance(value, float):
            feature.float_list.value.append(value)
          else:
            feature.int64_list.value.append(value)
        writer.write(example.SerializeToString())
      writer.close()
    (folder / 'features.json').write_text(
      json.dumps(
        {
          'pythonClassName': FEATURES + 'features_dict.FeaturesDict',
          'featuresDict': {'features': features},
        }
      )
    )
    template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    info = {
      'name': 'glue',
      'configName': name,
      'version': '2.0.0',
      'fileFormat': 'array_record',
      'splits': [
        {
          'name': split,
          'shardLengths': [str(len(rows))],
          'numBytes': '1',
          'filepathTemplate': template,
        }
        for split, rows in splits.items()
      ],
    }
    (folder / 'dataset_info.json').write_text(json.dumps(info))

  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  return prepare


def test_tfds_is_read_without_tensorflow(prepare):
  features = {'sentence1': TEXT, 'sentence2': TEXT, 'label': CLASS}

  def row(label, idx):
    texts = {'sentence1': b'"a', 'sentence2': 'né'.encode()}
    return texts | {'label': label, 'idx': idx}

  prepare(
    'mrpc',
    features | {'idx': scalar('int32')},
    {'train': [row(1, 4), row(0, 2)], 'test': [row(-1, 9)]},
  )
  train = glue.read(MRPC, 'tfds', 'train')
  assert train.texts == [('"a', 'né')] * 2
  assert (train.labels.tolist(), train.ids) == ([1, 0], ['4', '2'])
  test = glue.read(MRPC, 'tfds', 'test')
  assert (test.labels, test.ids) == (None, ['9'])
  assert not glue.has_split(MRPC, 'tfds', 'dev')
  with pytest.raises(glue.MissingSplitError, match="holds.*not 'validation'"):
    glue.read(MRPC, 'tfds', 'dev')


def test_tfds_rows_are_checked(prepare, caplog):
  caplog.set_level(logging.WARNING, logger='gnlorp_jax')
  features = {'sentence1': TEXT, 'sentence2': TEXT, 'label': scalar('float32')}
  good = {'sentence1': b'a', 'sentence2': b'b', 'label': 3.2}
  bad = {'sentence1': b'a', 'sentence2': b'\xff', 'label': 3.2}
  prepare('stsb', features, {'train': [good], 'validation': [good, bad]})
  labels = glue.read(STSB, 'tfds', 'train').labels
  np.testing.assert_array_equal(labels, np.float32([3.2]))
  with pytest.raises(ValueError, match='tfds:glue/stsb@validation:1: .utf-8'):
    glue.read(STSB, 'tfds', 'dev')


def test_tfds_that_is_not_prepared_or_not_glue_is_an_error(prepare):
  with pytest.raises(ValueError, match='tfds build glue/cola'):
    glue.has_split(COLA, 'tfds', 'train')
  prepare('cola', {'text': TEXT}, {'train': [{'text': b'a'}]})
  with pytest.raises(ValueError, match=r"lacks .*\['sentence', 'label'\]"):
    glue.read(COLA, 'tfds', 'train')
