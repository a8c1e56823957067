"""The comparison of methods of merging: what it records and shows."""

import argparse
import pathlib

import pytest

from benchmarks.quality import merging


def test_scores_are_kept_and_shown(tmp_path):
  path = tmp_path / 'r.json'
  found = merging.Record(path)
  row = {'experiment': 'encoder', 'method': 'average', 'task': 'rte'}
  for seed, value in ((0, 0.6), (1, 0.7)):
    assert found.lacks(row | {'seed': seed})
    found.keep(row | {'seed': seed, 'value': value})
  again = merging.Record(path)
  assert not again.lacks(row | {'seed': 1})
  assert again.lacks(row | {'seed': 2})
  tables = merging.tables(path)
  assert tables['merging_encoder'] == (
    '| method | rte |\n| --- | --- |\n| average | 0.65 ± 0.05 |\n'
  )


def test_scores_of_other_settings_are_refused(tmp_path):
  path = tmp_path / 'r.json'
  found = merging.Record(path)
  found.agree('encoder', {'steps': 5})
  found.keep(dict.fromkeys(merging.Record.KEYS, 0) | {'experiment': 'encoder'})
  again = merging.Record(path)
  again.agree('encoder', {'steps': 5})
  again.agree('language model', {'steps': 100})
  with pytest.raises(ValueError) as error:
    again.agree('encoder', {'steps': None})
  assert str(error.value) == (
    f"{path} holds scores of the encoder with the settings {{'steps': 5}}, and "
    "asked for are {'steps': None}. Give another --output."
  )


def test_experts_of_a_trial_are_not_those_of_a_run():
  def folders(steps, examples, seed):
    args = argparse.Namespace(
      **{'steps': steps, 'examples': examples, 'limit': 9},
      runs=pathlib.Path('runs'),
      **dict.fromkeys(('encoder', 'glue', 'model'), pathlib.Path('x')),
    )
    return (
      merging.glue_words(args, 'rte', seed)[1],
      merging.lm_words(args, 'python', 'a.txt', seed)[1],
    )

  asked = [(None, 8000, 0), (None, 8000, 1), (5, 8000, 0), (None, 64, 0)]
  found = [folder for one in asked for folder in folders(*one)]
  assert len(set(found)) == len(found)
