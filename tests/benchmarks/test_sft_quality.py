"""The comparison of methods of instruction tuning."""

import argparse
import json

import pytest

from benchmarks.common import record
from benchmarks.common.rows import Rows
from benchmarks.quality import sft


def row(method, rate, seed, loss, rows='all', **scores):
  return {
    'task': 'sst2',
    'method': method,
    'rows': rows,
    'learning_rate': rate,
    'seed': seed,
    'loss': loss,
    'trained_parameters': 1_500_000,
    'optimizer_state_bytes': 3 * 2**20,
    **scores,
  }


def scored(accuracy):
  return {
    'accuracy': accuracy,
    'accuracy_stderr': 0.011,
    'written_accuracy': accuracy - 0.01,
  }


BEFORE = row('before', 0.0, 0, 2.0, **scored(0.5))
BEFORE.pop('trained_parameters')
ROWS = [
  BEFORE,
  row('lora', 1e-3, 0, 0.2, 'part'),
  row('lora', 1e-3, 0, 0.21, **scored(0.88)),
  row('lora', 1e-3, 1, 0.23, **scored(0.9)),
  row('full', 1e-5, 0, None),
]
STEPS = [
  {
    'task': 'sst2',
    'method': 'lora',
    'step_bytes': 2**30,
    'seconds': [1.0, 1.1, 1.2],
  }
]


def test_tables_hold_whole_runs_with_both_seeds(tmp_path):
  path = tmp_path / 'r.json'
  record.write(path, {'environment': {}, 'rows': ROWS, 'steps': STEPS})
  assert sft.tables(path)['sft_sst2'] == (
    '| method | rate | trained | state | step | seconds a step | loss | '
    'accuracy | written |\n'
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n'
    '| before |  |  |  |  |  | 2.0000 | 50.0 (standard error 1.1) | 49.0 |\n'
    '| lora | 0.001 | 1.50 M | 3.0 MiB | 1024 MiB | 1.10 [1.00, 1.20] | '
    '0.2200 ± 0.0100 | 89.0 ± 1.0 (standard error 1.1) | 88.0 ± 1.0 |\n'
  )
  sft.plots(path, tmp_path / 'r.png')
  assert (tmp_path / 'r.png').read_bytes().startswith(b'\x89PNG')


def test_every_run_is_found_by_its_keys(tmp_path):
  found = Rows(tmp_path / 'r.json', sft.KEYS)
  for row in ROWS:
    assert found.find(row) is None
    found.keep(row)


@pytest.fixture
def searched(monkeypatch):
  """Runs whose loss is lowest at one rate; those that were taken."""
  taken = []

  def run(args, row, prepared, stop):
    rate, limit = row['learning_rate'], prepared
    taken.append((row['rows'], rate, row['seed']))
    assert limit == (None if row['rows'] == 'all' else 600)
    return row | {'loss': None if rate > 0.1 else abs(rate - 0.009)}

  monkeypatch.setattr(sft, 'run', run)
  monkeypatch.setattr(sft, 'configure', lambda args, task, name, limit: limit)
  monkeypatch.setattr(sft.recipe, 'prepare', lambda limit: limit)
  return taken


def test_rates_are_tried_until_the_best_is_not_at_an_end(tmp_path, searched):
  args = argparse.Namespace()
  record_of = Rows(tmp_path / 'r.json', sft.KEYS)
  sft.compare(args, 'sst2', 'lora', record_of)
  rates = [rate for rows, rate, _ in searched if rows == 'part']
  assert rates == [3e-4, 9e-4, 1e-4, 2.7e-3, 8.1e-3, 0.024]
  assert searched[-2:] == [('all', 8.1e-3, 0), ('all', 8.1e-3, 1)]
  count = len(searched)
  sft.compare(args, 'sst2', 'lora', record_of)  # Nothing is run again.
  assert len(searched) == count


def test_conversations_are_files(tmp_path):
  folder = tmp_path / 'SST-2'
  folder.mkdir()
  lines = ['sentence\tlabel', *(f'film {n} "is\t{n % 2}' for n in range(9))]
  for part in ('train', 'dev'):
    (folder / f'{part}.tsv').write_text('\n'.join(lines))
  row = {'question': '1 + 1?', 'answer': '#### 2'}
  for part in ('train', 'test'):
    (tmp_path / f'{part}.jsonl').write_text(json.dumps(row))
  args = argparse.Namespace(
    glue=tmp_path, gsm8k=tmp_path, runs=tmp_path / 'runs'
  )
  sft.write_data(args)
  first = (args.runs / 'sst2_dev.jsonl').read_text().splitlines()[1]
  assert json.loads(first) == {
    'prompt': 'Review: film 1 "is\nSentiment:',
    'completion': ' positive',
  }
  assert json.loads((args.runs / 'gsm8k_test.jsonl').read_text()) == {
    'prompt': 'Question: 1 + 1?\nAnswer:',
    'completion': ' #### 2',
  }
