"""Settings of GLUE fine-tuning: the command line, old and new, its errors."""

import dataclasses
import re

import pytest

from gnlorp_jax.compose import methods
from gnlorp_jax.compose.settings import AdapterOptions, StepConfig
from gnlorp_jax.recipes.glue import settings
from gnlorp_jax.recipes.glue.protocol import resolve
from gnlorp_jax.recipes.glue.settings import GlueConfig, TaskDataConfig


def parse(*args):
  return settings.parse(list(args), 'description')


def test_options_override_the_defaults():
  found = parse(
    *('--task', 'rte,cola', '--method=lora', '--init-from', 'folder'),
    *('--optim.rank=4', '--adapter.kind', 'dora', '--adapter.rank=2'),
    *('--step.mode', 'layerwise', '--step.weight-bits=8'),
    *('--data.source', 'glue', '--seeds', '2,0,2'),
    '--learning-rates=1e-4,3e-4',
  )
  default = GlueConfig()
  assert found == GlueConfig(
    task='rte,cola',
    method='lora',
    init_from='folder',
    optim=dataclasses.replace(default.optim, rank=4),
    adapter=AdapterOptions(kind='dora', rank=2),
    step=StepConfig(mode='layerwise', weight_bits=8),
    seeds='2,0,2',
    learning_rates='1e-4,3e-4',
    data=TaskDataConfig(source='glue'),
  )
  assert found.task_names == ('rte', 'cola')
  assert found.seed_numbers == (2, 0)
  assert found.searched_rates == (1e-4, 3e-4)


# Earlier names of options.


# What README and docs have said, and what it is called now.
COMMANDS = [
  ([], []),
  (
    '--task mrpc --method gradnormlorp --model roberta-base/ --data.source g/',
    '--task mrpc --method gradnormlorp --init-from roberta-base/ '
    '--data.source g/',
  ),
  (
    '--task all --method all --model roberta-base/ --data.source glue/ '
    '--seeds 0,1,2 --learning-rates 1e-5,3e-5,1e-4',
    '--task all --method all --init-from roberta-base/ --data.source glue/ '
    '--seeds 0,1,2 --learning-rates 1e-5,3e-5,1e-4',
  ),
  (
    '--task mine --data.train train.tsv --data.dev dev.tsv '
    '--data.text-columns question,answer --data.label-column y --model base/',
    '--task mine --data.train train.tsv --data.dev dev.tsv '
    '--data.text-columns question,answer --data.label-column y '
    '--init-from base/',
  ),
  (
    '--task cola,stsb,mrpc,rte,sst2,wnli --method all '
    '--model runs/roberta_tiny/hf --data.source glue/ --seeds 0,1 '
    '--learning-rates 3e-4,1e-3,3e-3 --max-steps 120 --batch-size 16 '
    '--max-length 128 --eval-every 60 --update-proj-gap 50 '
    '--adapter-dropout 0 --keep none --run-dir runs/glue_tiny',
    '--task cola,stsb,mrpc,rte,sst2,wnli --method all '
    '--init-from runs/roberta_tiny/hf --data.source glue/ --seeds 0,1 '
    '--learning-rates 3e-4,1e-3,3e-3 --steps 120 --batch-size 16 '
    '--max-length 128 --eval-every 60 --optim.update-proj-gap 50 '
    '--adapter.dropout 0 --keep none --run-dir runs/glue_tiny',
  ),
  (
    '--method=lora --rank=4 --learning-rate=1e-3 --scale=2 '
    '--adapter-alpha=32 --weight-decay=0.1 --warmup-fraction=0.06 '
    '--clip-global-norm=1 --param-dtype=bfloat16 --compute-dtype=bfloat16',
    '--method lora --optim.rank 4 --adapter.rank 4 '
    '--optim.learning-rate 1e-3 --optim.scale 2 --adapter.alpha 32 '
    '--optim.weight-decay 0.1 --optim.warmup-fraction 0.06 '
    '--optim.clip-global-norm 1 --model.param-dtype bfloat16 '
    '--model.compute-dtype bfloat16',
  ),
  # A flag has no value, and can be negated.
  ('--remat --max_steps 3', '--model.remat --steps 3'),
  ('--remat --no-remat', '--model.no-remat'),
]


@pytest.mark.parametrize(('earlier', 'today'), COMMANDS)
def test_earlier_names_of_options_give_the_same_settings(earlier, today):
  found, expected = (
    parse(*(words.split() if words else ())) for words in (earlier, today)
  )
  assert found == expected
  for method in ('full', 'gradnormlorp', 'gradnormlorp_adapter'):
    assert resolve(found, 'rte', method) == resolve(expected, 'rte', method)


def test_every_earlier_name_is_an_option_no_more_and_is_told(caplog):
  values = {'model': 'tiny', 'param_dtype': 'bfloat16'}
  values |= {'compute_dtype': 'bfloat16', 'max_steps': '3', 'rank': '3'}
  values |= {'update_proj_gap': '3', 'remat': None}
  fields = {field.name for field in dataclasses.fields(GlueConfig)}
  for name, targets in settings.ALIASES.items():
    assert name not in fields - {'model'}
    option = f'--{name.replace("_", "-")}'
    value = values.get(name, '0.5')
    with caplog.at_level('INFO'):
      found = parse(option, *([] if value is None else [value]))
    for target in targets:
      node = found
      for part in target.split('.'):
        node = getattr(node, part)
      assert str(node) == (value or 'True'), target
      new = target.replace('_', '-')
      assert f'{option} means --' in caplog.text and new in caplog.text


def test_groups_are_no_earlier_names():
  found = parse('--model.hidden-size', '32', '--model.num-heads=2')
  assert (found.model.hidden_size, found.model.num_heads) == (32, 2)
  assert found.init_from is None


def test_all_methods_are_those_that_are_compared():
  assert parse('--method', 'all').method_names == methods.COMPARED


@pytest.mark.parametrize(
  ('args', 'text'),
  [
    (
      ['--epoch', '3'],
      'There is no option --epoch. Did you mean --epochs?',
    ),
    (['--text-columns', 'a'], 'Did you mean --data.text-columns?'),
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
    (
      ['--seeds', '0,-1'],
      'seed=-1 must be a whole number from 0 to',
    ),
    (['--task', ''], "task='' names nothing."),
    (['--method', ','], "method=',' names nothing."),
    (['--learning-rates', ''], "learning_rates='' names nothing."),
    (
      ['--clip-global-norm', '0'],
      'OptimConfig.clip_global_norm must be in (0, inf), got 0.0. Use None',
    ),
    (
      ['--task', 'a/b', '--data.train', 'x', '--data.dev', 'y'],
      "task='a/b' with data.train='x': a task of your own has one name",
    ),
    (
      ['--task', 'mrpc', '--data.train', 'x', '--data.dev', 'y'],
      'that is the name of a task of GLUE, whose averages it would',
    ),
    (['--learning-rates', '1e-3,-1'], 'must be in (0, inf), got -1.0'),
    (
      ['--learning-rate', '1', '--learning-rates', '1'],
      "optim.learning_rate=1.0 and learning_rates='1' exclude each other: give "
      'one rate, or several',
    ),
    (
      ['--optim.learning-rate', '-1'],
      'OptimConfig.learning_rate must be in (0, inf), got -1.0.',
    ),
    (['--seed', '-1'], 'seed=-1 must be a whole number from 0 to 4294967295.'),
    (['--rank', '0'], 'OptimConfig.rank must be at least 1, got 0.'),
    (
      ['--adapter-alpha', '-1'],
      'AdapterOptions.alpha must be in (0, inf), got -1.0.',
    ),
    (
      ['--adapter-dropout', '2'],
      'AdapterOptions.dropout must be in [0, 1), got 2.0.',
    ),
    (
      ['--warmup-fraction', '2'],
      'OptimConfig.warmup_fraction must be in [0, 1], got 2.0.',
    ),
    (['--max-steps', '0'], 'GlueConfig.steps must be at least 1, got 0.'),
    (
      ['--data.max-dev-examples', '0'],
      'TaskDataConfig.max_dev_examples must be at least 1, got 0.',
    ),
    (['--epochs', '0'], 'GlueConfig.epochs must be at least 1, got 0.'),
    (['--dropout', '2'], 'GlueConfig.dropout must be in [0, 1), got 2.0.'),
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


def test_single_run_is_recognised():
  single = GlueConfig(method='lora')
  assert single.is_single
  assert dataclasses.replace(single, seeds='3').is_single
  for change in (
    {'task': 'cola,rte', 'data': TaskDataConfig(source='x'), 'init_from': 'y'},
    {'task': 'all', 'data': TaskDataConfig(source='x'), 'init_from': 'y'},
    {'method': 'lora,full'},
    {'method': 'all'},
    {'seeds': '0,1'},
    {'learning_rates': '1,2'},
  ):
    assert not dataclasses.replace(single, **change).is_single
