"""What GLUE fine-tuning learns from: tasks, examples, tokenizer and model."""

import dataclasses

import numpy as np
import pytest

from gnlorp_jax.data import glue
from gnlorp_jax.models import roberta
from gnlorp_jax.recipes.glue import tasks
from gnlorp_jax.recipes.glue.settings import GlueConfig, TaskDataConfig, parse


def test_tasks_without_examples_are_left_out_of_all(shared, caplog):
  folder = str(shared / 'data' / 'glue')
  settings = GlueConfig(
    task='all', init_from='tiny', data=TaskDataConfig(source=folder)
  )
  names = [task.name for task in tasks.find_tasks(settings)]
  assert set(names) == {'cola', 'sst2', 'mrpc', 'stsb', 'rte', 'wnli'}
  assert 'qqp (no train and dev), mnli (no train)' in caplog.text
  named = dataclasses.replace(settings, task='cola,qqp')
  with pytest.raises(ValueError, match=r"lacks examples of qqp .*\['cola'\]"):
    tasks.find_tasks(named)


def write_rows(path, rows):
  path.write_text(''.join('\t'.join(row) + '\n' for row in rows))
  return str(path)


@pytest.mark.parametrize('regression', [False, True])
def test_a_task_of_ones_own(tmp_path, regression):
  labels = ('0.5', '1.5') if regression else ('bad', 'good')
  rows = [('a', 'b', 'y'), ('the otter', 'sings', labels[0])]
  rows += [('the wizard', 'sings', labels[1])] * 3
  settings = GlueConfig(
    task='mine',
    init_from='tiny',
    tokenizer=write_tokenizer(tmp_path),
    data=TaskDataConfig(
      train=write_rows(tmp_path / 'train.tsv', rows),
      dev=write_rows(tmp_path / 'dev.tsv', rows[:3]),
      text_columns='a,b',
      label_column='y',
      regression=regression,
    ),
  )
  (task,) = tasks.find_tasks(settings)
  assert (task.name, task.is_regression) == ('mine', regression)
  data = tasks.load_task(settings, task)
  assert list(data.evaluated) == ['dev'] and not data.predicted
  words = data.tokenizer.backend.id_to_token
  assert [words(i) for i in data.train.encoded[0]] == [
    *('<s>', 'the', 'otter', '</s>', '</s>', 'sings', '</s>')
  ]
  expected = [0.5, 1.5, 1.5, 1.5] if regression else [0, 1, 1, 1]
  np.testing.assert_array_equal(data.train.labels, expected)
  assert data.architecture.hidden_size == roberta.PRESETS['tiny'].hidden_size
  assert data.buckets == (16, 32, 64, 128, 256, 512)


def write_tokenizer(folder):
  path = folder / 'tokenizer.json'
  glue.generated_tokenizer().save(str(path))
  return str(path)


def test_what_does_not_fit_is_refused(tmp_path, settings, data):
  def load(**changes):
    changed = dataclasses.replace(settings, **changes)
    return tasks.load_task(changed, data.task)

  with pytest.raises(ValueError, match="'tiny' is no folder that brings a"):
    load(init_from='tiny')
  with pytest.raises(ValueError, match=r"'tinny' is neither a folder nor a pr"):
    load(init_from='tinny')
  with pytest.raises(
    ValueError, match='max_length=99 is longer than the model'
  ):
    load(max_length=99)


def test_examples_are_those_that_were_asked_for(settings, data):
  assert len(data.train.encoded) == len(data.train.labels) == 20
  assert len(data.evaluated['dev'].encoded) == 13
  assert len(data.predicted['test'].encoded) == 500
  assert data.max_length == 16 and data.buckets == (16,)
  fewer = dataclasses.replace(
    settings, data=TaskDataConfig(max_train_examples=19, max_dev_examples=13)
  )
  again = tasks.load_task(settings, data.task)
  assert again.fingerprint == data.fingerprint
  assert tasks.load_task(fewer, data.task).fingerprint != data.fingerprint


def test_architecture_takes_dropout_and_dtypes_of_the_run(data):
  def architecture(*words):
    return tasks.architecture(parse(list(words), ''), data.tokenizer)

  rates = ('hidden_dropout', 'attention_dropout', 'classifier_dropout')

  def dropout(config):
    return [getattr(config, name) for name in rates]

  # The demo's model drops nothing; a preset drops as RoBERTa does.
  assert dropout(architecture())[:2] == [0, 0]
  preset = architecture('--init-from', 'tiny')
  assert dropout(preset) == dropout(roberta.PRESETS['tiny'])
  found = architecture('--init-from', 'tiny', '--dropout', '0.3')
  assert dropout(found) == [0.3] * 3
  words = ['--model.param-dtype', 'bfloat16', '--model.remat']
  for start in ([], ['--init-from', 'tiny']):
    found = architecture(*start, *words)
    assert (found.param_dtype, found.remat) == ('bfloat16', True)
    assert found.vocab_size == len(data.tokenizer.backend.get_vocab())


def test_tokens_around_a_text_are_of_the_model_too(settings, data, monkeypatch):
  def encode(*args):
    return [np.array([0, data.architecture.vocab_size])]

  monkeypatch.setattr(tasks.glue, 'encode', encode)
  with pytest.raises(ValueError, match='The tokenizer produces ids up to'):
    tasks.load_task(settings, data.task)
