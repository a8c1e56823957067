"""The table of fine-tuning results, against numbers worked out by hand."""

import json

import pytest

from gnlorp_jax.recipes import grid
from gnlorp_jax.recipes.glue import table


def result(task, method, seed, value, *, rate=1e-3, last=None, **others):
  return {
    'task': task,
    'method': method,
    'seed': seed,
    'learning_rate': rate,
    'main_metric': 'accuracy',
    'best': {'step': 5, 'accuracy': value},
    'last': {'step': 9, 'accuracy': value if last is None else last},
    'trainable_parameters': 1000,
    'optimizer_state_bytes': 2048,
    'seconds_per_step': 0.25,
    'settings': {'seed': seed, 'optim.learning_rate': rate, 'epochs': 3},
    **others,
  }


def only_row(results, **options):
  (row,) = table.tabulate(results, **options).rows
  return row


def test_mean_and_deviation_over_seeds():
  results = [result('rte', 'lora', s, v) for s, v in enumerate((0.7, 0.8, 0.6))]
  cell = only_row(results).cells['rte']
  # The mean of 60, 70, 80 is 70; (100 + 0 + 100) / (3 - 1) = 100, its root 10.
  assert cell.mean == pytest.approx(70)
  assert cell.deviation == pytest.approx(10)
  assert cell.seeds == 3


def test_one_seed_has_no_deviation():
  header, body = table.columns(table.tabulate([result('rte', 'full', 0, 0.5)]))
  assert header == [
    'method',
    'rte (accuracy)',
    'trained parameters',
    'optimizer state',
    'ms per step',
  ]
  assert body == [['full', '50.00', '1,000', '2.0 KiB', '250.0']]


def test_best_and_last_evaluation_are_told_apart():
  results = [result('rte', 'full', 0, 0.9, last=0.4)]
  assert only_row(results).cells['rte'].mean == pytest.approx(90)
  assert only_row(results, at='last').cells['rte'].mean == pytest.approx(40)
  text = table.to_markdown(results)
  assert text.index('| full | 90.00 |') < text.index('| full | 40.00 |')


def test_averages_of_eight_and_nine_tasks():
  values = [0.6, 0.9, 0.9, 0.8, 0.9, 0.8, 0.9, 0.9, 0.5]
  results = [
    result(task, 'galore', 0, value)
    for task, value in zip(table.NINE_TASKS, values, strict=True)
  ]
  averages = only_row(results).averages
  assert averages == {
    '8 tasks': pytest.approx(670 / 8),  # WNLI is not among them.
    '9 tasks': pytest.approx(720 / 9),
  }
  assert list(only_row(results[:8]).averages) == ['8 tasks']


def test_an_average_over_fewer_tasks_says_so():
  results = [result('rte', 'full', 0, 0.5), result('cola', 'full', 0, 0.7)]
  results += [result('rte', 'lora', 0, 0.6)]
  found = table.tabulate(results)
  assert found.tasks == ('cola', 'rte')
  full, lora = found.rows
  assert full.averages == {'these 2 tasks': pytest.approx(60)}
  assert lora.averages == {'these 2 tasks': None}  # It lacks cola.
  assert '| lora | - | 60.00 | - |' in table.to_markdown(results)


def test_learning_rate_is_chosen_on_the_seeds_that_ran_with_all():
  results = [
    result('rte', 'full', 0, 0.7, rate=1e-4),
    result('rte', 'full', 0, 0.8, rate=1e-3),
    # A bad second seed of the chosen rate must not unchoose it.
    result('rte', 'full', 1, 0.2, rate=1e-3),
  ]
  assert grid.best_learning_rate(results) == 1e-3
  cell = only_row(results).cells['rte']
  assert (cell.learning_rate, cell.seeds) == (1e-3, 2)
  assert cell.mean == pytest.approx(50)
  runs = table.to_markdown(results).split('## Runs')[1]
  assert '| rte | full | 0.001 | 0.0001, 0.001 | 2 |' in runs


def test_cell_of_a_seed_without_number_has_none():
  results = [result('stsb', 'full', 0, None), result('stsb', 'full', 1, 0.5)]
  assert only_row(results).cells['stsb'].mean is None
  assert '| full | no number |' in table.to_markdown(results)


def test_costs_are_of_the_largest_task_and_the_median_run():
  results = [
    result('rte', 'full', 0, 0.5, trainable_parameters=10),
    result('mnli', 'full', 0, 0.5, trainable_parameters=20),
    result('mnli', 'full', 1, 0.5, seconds_per_step=0.75),
    result('mnli', 'full', 2, 0.5, seconds_per_step=None),
  ]
  row = only_row(results)
  assert row.trainable_parameters == 1000
  assert row.seconds_per_step == 0.25


def test_runs_of_other_settings_are_named(caplog):
  alike = [result('rte', 'full', s, 0.5, rate=r) for s, r in ((0, 1), (1, 2))]
  assert table.differences(alike) == []
  longer = {'seed': 2, 'optim.learning_rate': 1, 'epochs': 10}
  unlike = [*alike, result('rte', 'full', 2, 0.9, rate=1, settings=longer)]
  # Another method may have what suits it.
  unlike += [result('rte', 'lora', 0, 0.9, settings=longer)]
  sentence = 'The runs of rte, full differ in epochs (10, 3): they cannot'
  (found,) = table.differences(unlike)
  assert found.startswith(sentence)
  assert found in table.to_markdown(unlike)
  table.show(unlike)
  assert found in caplog.text


def test_methods_stand_in_the_order_of_their_table():
  results = [result('rte', m, 0, 0.5) for m in ('fira', 'lora', 'full')]
  rows = table.tabulate(results).rows
  assert [row.method for row in rows] == ['full', 'lora', 'fira']


def test_files_are_written_from_all_finished_runs(tmp_path):
  values = {0: 0.5, 1: None}
  for seed, value in values.items():
    folder = tmp_path / 'rte' / 'lora' / f'lr0.001_seed{seed}'
    folder.mkdir(parents=True)
    run = result('rte', 'lora', seed, value)
    (folder / 'result.json').write_text(json.dumps(run))
  unfinished = tmp_path / 'rte' / 'lora' / 'lr0.001_seed2'
  unfinished.mkdir()
  results = table.write(tmp_path)
  assert [r['seed'] for r in results] == [0, 1]
  assert json.loads((tmp_path / 'results.json').read_text()) == results
  assert 'no number' in (tmp_path / 'results.md').read_text()
  assert (tmp_path / 'results.png').read_bytes().startswith(b'\x89PNG')
  assert not list(tmp_path.glob('*.tmp'))


def test_nothing_finished_is_an_empty_file(tmp_path):
  assert table.write(tmp_path) == []
  assert json.loads((tmp_path / 'results.json').read_text()) == []
