"""The benchmarks on tiny weights: options, and a comparison."""

import json

import pytest

from benchmarks.common import methods
from benchmarks.train import finetune_step


def test_options_that_a_method_lacks():
  with pytest.raises(methods.AbsentError, match='^adamw has no option side$'):
    methods.build('adamw', {'side': 'both'}, learning_rate=1.0)
  methods.build('adamw', {'side': 'short'}, learning_rate=1.0, rank=4)
  with pytest.raises(methods.AbsentError) as error:
    methods.build('galore', {'side': 'up'}, learning_rate=1.0)
  assert str(error.value).startswith(
    "galore refuses {'side': 'up'}: Unknown side 'up'; expected one of"
  )


def test_fine_tuning_beside_pytorch_computes_the_same(tmp_path, monkeypatch):
  pytest.importorskip('torch')
  output = tmp_path / 'speed.json'
  arguments = ['--rounds', '2', '--turn', '2', '--dropout', '0.0']
  monkeypatch.setattr(
    'sys.argv', ['finetune_step', *arguments, '--output', str(output)]
  )
  finetune_step.main()
  (row,) = json.loads(output.read_text())['rows']
  assert row['loss_difference'] < 1e-4
  low, middle, high = row['ratio']
  assert 0 < low <= middle <= high
  assert [len(turns) for turns in row['seconds'].values()] == [2, 2]
