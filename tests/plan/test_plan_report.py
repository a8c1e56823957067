"""What the planner prints and writes, its help and its errors."""

import json

import jax
import pytest

from gnlorp_jax import plan
from gnlorp_jax.plan.__main__ import main
from gnlorp_jax.plan.accelerators import ACCELERATORS


def printed(capsys, *words):
  """What the tiny run prints, on one line."""
  options = (
    '--batch-size 8 --data.seq-len 16 --optim.name galore --optim.rank 64 '
    '--model.vocab-size 64 --model.hidden-size 128 '
    '--model.intermediate-size 256 --model.num-layers 2 --model.num-heads 4 '
    '--model.max-seq-len 16'
  )
  main([*options.split(), *words])
  return ' '.join(capsys.readouterr().out.split())


def test_lower_bound_says_so_and_how_to_know(no_wheels, capsys):
  text = printed(capsys)
  assert 'peak, at least' in text
  assert 'It may fit: the lower bound does.' in text
  assert "no GPU is needed: pip install 'gnlorp_jax[cuda]'" in text
  assert 'What one change saves' not in text


def test_nothing_suffices(no_wheels, limited_gpu, capsys):
  limited_gpu(1000)
  text = printed(capsys)
  assert 'It does not fit:' in text
  assert '--optim.moment-bits 8' in text
  assert 'None of them suffices alone: combine some.' in text


def test_json_has_everything(settings, no_wheels, tmp_path, capsys):
  path = tmp_path / 'plan.json'
  printed(capsys, '--device', 'a100', '--devices', '4', '--json', str(path))
  found = json.loads(path.read_text())
  run = settings(devices=4)
  assert found['components'] == plan.lower_bound(run).components
  assert found['peak'] == sum(found['components'].values())
  assert found['peak_is_lower_bound'] is True
  assert found['compiled'] is False
  assert found['fits'] is None
  assert found['device']['name'] == 'a100'
  assert found['device']['memory'] == ACCELERATORS['a100'].memory
  assert found['mesh'] == {'data': 4, 'fsdp': 1}
  assert found['arguments'][-2:] == ['--json', str(path)]
  assert found['config']['optim']['rank'] == 64
  assert found['versions']['jax'] == jax.__version__
  assert found['suggestions'] == []


def test_json_on_standard_output_is_alone_there(no_wheels, capsys):
  assert json.loads(printed(capsys, '--json', '-'))['device']['name'] == 'h100'


def test_help_explains_the_program_and_its_options(capsys):
  with pytest.raises(SystemExit) as stop:
    main(['--help', 'all'])
  assert stop.value.code == 0
  text = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
  assert 'Tells whether a run fits a GPU' in text
  for device in ACCELERATORS:
    assert device in text
  for option in ('--device STR', '--devices INT', '--json', '--optim.rank'):
    assert option in text


@pytest.mark.parametrize(
  ('words', 'text'),
  [
    (
      ['--device', 'rtx4080'],
      "Unknown device 'rtx4080'; expected one of ('rtx4090', 'rtx4060ti', "
      "'rtx3060', 'a100', 'h100', 'h200'). Did you mean 'rtx4090'?",
    ),
    (['--devices', '0'], 'PlanConfig.devices must be at least 1, got 0.'),
    (
      ['--devices', '6', '--mesh.fsdp', '4'],
      'data=-1, fsdp=4 does not fit 6 devices: the product of the sizes must '
      'divide 6.',
    ),
    (
      ['--devices', '3'],
      'batch_size=8 cannot be split over data=3, fsdp=1 and micro_batches=1: '
      'it must be a multiple of data*fsdp*micro_batches=3. Use 6 or 9.',
    ),
    (
      ['--optim.rnak', '3'],
      'There is no option --optim.rnak. Did you mean --optim.rank?',
    ),
  ],
)
def test_mistakes_get_the_value_the_rule_and_the_fix(words, text, capsys):
  with pytest.raises(SystemExit) as stop:
    printed(capsys, *words)
  assert stop.value.code == 2
  assert text in ' '.join(capsys.readouterr().err.replace('│', ' ').split())
