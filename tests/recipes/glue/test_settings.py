"""Settings of fine-tuning: the command line, its errors, and the numbers."""

import dataclasses
import re

import pytest

from gnlorp_jax import config, methods, optim
from gnlorp_jax.finetune_config import FinetuneConfig, TaskDataConfig


def parse(*args):
  return config.override(FinetuneConfig(), list(args), 'description')


def test_options_override_the_defaults():
  settings = parse(
    *('--task', 'rte,cola', '--method=lora', '--model', 'folder', '--rank=4'),
    *(
      '--data.source',
      'glue',
      '--seeds',
      '2,0,2',
      '--learning-rates=1e-4,3e-4',
    ),
  )
  assert settings == FinetuneConfig(
    task='rte,cola',
    method='lora',
    model='folder',
    rank=4,
    seeds='2,0,2',
    learning_rates='1e-4,3e-4',
    data=TaskDataConfig(source='glue'),
  )
  assert settings.task_names == ('rte', 'cola')
  assert settings.seed_numbers == (2, 0)
  assert settings.searched_rates == (1e-4, 3e-4)


def test_all_methods_are_those_that_are_compared():
  assert parse('--method', 'all').method_names == methods.COMPARED


@pytest.mark.parametrize(
  ('args', 'text'),
  [
    (
      ['--epoch', '3'],
      "no field 'epoch' (from --epoch). Did you mean 'epochs'?",
    ),
    (['--text-columns', 'a'], "Did you mean 'data.text_columns'?"),
    (['--method', 'loar'], "Unknown method 'loar'. Did you mean 'lora'?"),
    (['--task', 'rte'], "task='rte' needs data.source: a folder"),
    (['--task', 'mine'], 'your own needs data.train and data.dev'),
    (['--task', 'rte', '--data.source', 'x'], "task='rte' needs a model"),
    (['--data.train', 'x'], 'A task of your own needs data.train and data.dev'),
    (
      ['--data.train', 'x', '--data.dev', 'y', '--data.source', 'glue'],
      'give one of them',
    ),
    (['--seeds', '0,x'], "seeds='0,x' must be numbers joined by commas"),
    (['--seeds', ','], "seeds=',' names nothing. Give one or more"),
    (['--seeds', '0,-1'], "seeds='0,-1': a seed must not be less than 0."),
    (['--task', ''], "task='' names nothing."),
    (['--method', ','], "method=',' names nothing."),
    (['--learning-rates', ''], "learning_rates='' names nothing."),
    (
      ['--clip-global-norm', '0'],
      'FinetuneConfig.clip_global_norm must be positive, got 0.0. Use None',
    ),
    (
      ['--task', 'a/b', '--data.train', 'x', '--data.dev', 'y'],
      "task='a/b' with data.train='x': a task of your own has one name",
    ),
    (
      ['--task', 'mrpc', '--data.train', 'x', '--data.dev', 'y'],
      'that is the name of a task of GLUE, whose averages it would',
    ),
    (['--learning-rates', '1e-3,-1'], 'must be positive, got -1.0'),
    (
      ['--learning-rate', '1', '--learning-rates', '1'],
      'exclude each other: give one rate, or several',
    ),
    (['--epochs', '0'], 'FinetuneConfig.epochs must be at least 1, got 0.'),
    (['--dropout', '2'], 'FinetuneConfig.dropout must be in [0, 1], got 2.0.'),
  ],
)
def test_mistakes_are_named_with_their_mending(args, text, capsys):
  try:
    parse(*args)
  except ValueError as error:
    message = str(error)
  except SystemExit as stop:  # tyro found it.
    assert stop.code == 2
    message = ' '.join(capsys.readouterr().err.replace('│', ' ').split())
  else:
    raise AssertionError(f'{args} was accepted')
  assert re.search(re.escape(text), message), message


def test_every_method_has_an_optimizer_of_the_family():
  assert set(methods.COMPARED) <= set(methods.METHODS)
  for method in methods.METHODS.values():
    assert callable(getattr(optim, method.optimizer))


def test_published_numbers_are_those_of_the_papers():
  numbers = methods.hyperparameters
  assert numbers('mrpc', 'galore', 4).learning_rate == 3e-5
  assert numbers('mrpc', 'galore', 8).learning_rate == 2e-5
  assert (
    numbers('rte', 'galore', 4).scale,
    numbers('rte', 'galore').scale,
  ) == (
    4,
    2,
  )
  assert numbers('cola', 'lora').learning_rate == 4e-4
  assert numbers('qqp', 'gradnormlorp').learning_rate == 3e-5
  assert numbers('qqp', 'gradnormlorp').scale == 4
  shared = {'epochs': 30, 'max_length': 512, 'update_proj_gap': 500}
  for task, batch_size in (('cola', 32), ('mnli', 16)):
    found = dataclasses.asdict(numbers(task, 'full'))
    assert found['batch_size'] == batch_size
    assert shared.items() <= found.items()
    assert found['weight_decay'] == found['warmup_fraction'] == 0


def test_settings_come_before_the_table():
  settings = FinetuneConfig(rank=4, learning_rate=0.5, weight_decay=0.1)
  found = settings.hyperparameters('rte', 'galore')
  assert (found.rank, found.learning_rate, found.weight_decay) == (4, 0.5, 0.1)
  assert found.scale == 4 and found.epochs == 30


def test_single_run_is_recognised():
  single = FinetuneConfig(method='lora')
  assert single.is_single
  for change in (
    {'method': 'all'},
    {'seeds': '0,1'},
    {'learning_rates': '1,2'},
  ):
    assert not dataclasses.replace(single, **change).is_single
