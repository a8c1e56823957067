"""The comparison of methods of merging: what it records and shows."""

import argparse
import pathlib

from benchmarks.common.rows import Rows
from benchmarks.quality import merging


def test_scores_are_kept_and_shown(tmp_path):
  path = tmp_path / 'r.json'
  found = Rows(path, merging.KEYS)
  row = {'experiment': 'encoder', 'method': 'average', 'task': 'rte'}
  for seed, value in ((0, 0.6), (1, 0.7)):
    assert found.find(row | {'seed': seed}) is None
    found.keep(row | {'seed': seed, 'value': value})
  tables = merging.tables(path)
  assert tables['merging_encoder'] == (
    '| method | rte |\n| --- | --- |\n| average | 0.65 ± 0.071 |\n'
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
