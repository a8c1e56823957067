"""Fine-tuning beside PyTorch: both compute the same."""

import json

import pytest

from benchmarks.train import finetune_step


@pytest.mark.slow
def test_fine_tuning_beside_pytorch_computes_the_same(
  tmp_path, monkeypatch, capsys, one_torch_thread
):
  pytest.importorskip('torch')
  output = tmp_path / 'speed.json'
  monkeypatch.setattr(finetune_step, 'DROPOUTS', (0.0,))
  monkeypatch.setattr(finetune_step, 'BATCH_SIZE', 4)
  arguments = ['--rounds', '2', '--turn', '2']
  monkeypatch.setattr(
    'sys.argv', ['finetune_step', *arguments, '--output', str(output)]
  )
  finetune_step.main()
  (row,) = json.loads(output.read_text())['rows']
  assert row['loss_difference'] < 1e-4
  low, middle, high = row['ratio']
  assert 0 < low <= middle <= high
  assert [len(turns) for turns in row['seconds'].values()] == [2, 2]
  assert capsys.readouterr().out == finetune_step.table([row])


def test_table_of_a_known_row():
  row = {
    **{'task': 'mrpc', 'dropout': 0.0, 'ratio': [0.5, 0.6, 0.7]},
    'examples_per_second': {'ours': 47.5, 'pytorch': 69.7},
    **{'compile_seconds': 10.5, 'loss_difference': 1.01e-6},
  }
  lines = finetune_step.table([row, {**row, 'dropout': 0.1}]).splitlines()
  assert lines[2:] == [
    '| mrpc | 0.0 | 48 | 70 | 0.60 [0.50, 0.70] | 10 | 1e-06 |',
    '| mrpc | 0.1 | 48 | 70 | 0.60 [0.50, 0.70] | 10 | - |',
  ]
