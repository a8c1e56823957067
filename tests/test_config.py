"""Configurations: files, the command line, and what users get wrong."""

import dataclasses
import pathlib
import re

import pytest

from gnlorp_jax import config
from gnlorp_jax.config import DataConfig, OptimConfig, TrainConfig

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def message_of(args, capsys):
  """What a person reads who typed `args`."""
  try:
    config.parse(args, 'description')
  except ValueError as error:
    return str(error)
  except SystemExit as stop:
    assert stop.code == 2
    return ' '.join(capsys.readouterr().err.replace('│', ' ').split())
  raise AssertionError(f'{args} was accepted')


@pytest.mark.parametrize(
  'path', sorted(CONFIGS.glob('*.py')), ids=lambda p: p.stem
)
def test_every_configuration_file_loads_and_says_how_to_run_it(path):
  loaded = config.load(path)
  assert isinstance(loaded, TrainConfig)
  command = f'python train_lm.py --config configs/{path.name}'
  assert command in path.read_text()


def test_file_is_the_default_and_options_override_it():
  parsed = config.parse(
    [
      '--config',
      str(CONFIGS / 'llama_9m.py'),
      '--optim.rank=8',
      '--model.num-layers',
      '2',
      '--data.validation-source',
      'v.txt',
      '--optim.clip-global-norm',
      'None',
      '--optim.no-spread-refreshes',
      '--dry-run',
    ],
    '',
  )
  loaded = config.load(CONFIGS / 'llama_9m.py')
  assert parsed == dataclasses.replace(
    loaded,
    dry_run=True,
    model=dataclasses.replace(loaded.model, num_layers=2),
    data=dataclasses.replace(loaded.data, validation_source='v.txt'),
    optim=dataclasses.replace(
      loaded.optim, rank=8, clip_global_norm=None, spread_refreshes=False
    ),
  )


def test_param_labels_can_be_given_on_the_command_line():
  args = ['--optim.param-labels', 'attn', 'low_rank', '.*', 'full']
  assert config.parse(args, '').optim.param_labels == (
    ('attn', 'low_rank'),
    ('.*', 'full'),
  )


def test_help_explains_every_field(capsys):
  with pytest.raises(SystemExit) as stop:
    config.parse(['--help'], 'What this program does.')
  assert stop.value.code == 0
  text = capsys.readouterr().out
  assert 'What this program does.' in text
  flat = ' '.join(text.replace('│', ' ').split())

  def fields(node, prefix=''):
    for field in dataclasses.fields(node):
      value = getattr(node, field.name)
      if dataclasses.is_dataclass(value):
        yield from fields(value, f'{prefix}{field.name}.')
      else:
        yield f'--{prefix}{field.name}'.replace('_', '-')

  options = list(fields(TrainConfig()))
  assert len(options) > 40
  for option in options:
    after = re.split(f'{option},? ', flat, maxsplit=1)
    assert len(after) == 2, option
    # Prose stands between an option and its default.
    explanation = after[1].split('(default', 1)[0]
    assert len(explanation.split()) > 2, option


@pytest.mark.parametrize(
  ('args', 'text'),
  [
    (
      ['--optim.rnak', '3'],
      "OptimConfig has no field 'rnak' (from --optim.rnak). Did you mean "
      "'rank'? Fields: ['name', 'learning_rate',",
    ),
    (
      ['--steps', '3', '--batchsize=4'],
      "TrainConfig has no field 'batchsize' (from --batchsize). Did you mean "
      "'batch_size'? Fields: ['objective',",
    ),
    (
      ['--mdoel.num-layers', '3'],
      "TrainConfig has no field 'mdoel' (from --mdoel.num-layers). Did you "
      "mean 'model'?",
    ),
    (
      ['--learning-rate', '1'],
      "TrainConfig has no field 'learning_rate' (from --learning-rate). Did "
      "you mean 'optim.learning_rate'? Fields: [",
    ),
    (['--config'], '--config needs the path of a configuration file.'),
  ],
)
def test_unknown_field_names_the_nearest(args, text, capsys):
  assert message_of(args, capsys).startswith(text)


@pytest.mark.parametrize(
  ('args', 'text'),
  [
    (['--optim.rank', '0'], 'OptimConfig.rank must be at least 1, got 0.'),
    (['--steps', '0'], 'TrainConfig.steps must be at least 1, got 0.'),
    (
      ['--optim.learning-rate', '-1'],
      'OptimConfig.learning_rate must be positive, got -1.0.',
    ),
    (
      ['--optim.clip-global-norm', '0'],
      'OptimConfig.clip_global_norm must be positive, got 0.0. Use None not to '
      'clip.',
    ),
    (
      ['--optim.warmup-fraction', '1.5'],
      'OptimConfig.warmup_fraction must be in [0, 1], got 1.5.',
    ),
    (
      ['--data.seq-len', '4096'],
      'data.seq_len=4096 is longer than the model accepts: '
      'model.max_seq_len=128. Lower the former or raise the latter.',
    ),
    (
      ['--sample.top-k', '0'],
      'SampleConfig.top_k must be at least 1, got 0.',
    ),
    (
      ['--sample.num-tokens', '-5'],
      'SampleConfig.num_tokens must be in [0, inf], got -5.',
    ),
    (['--eval-batches', '0'], 'TrainConfig.eval_batches must be at least 1'),
    (
      ['--data.validation-fraction', '3'],
      'DataConfig.validation_fraction must lie between 0 and 1, got 3.0.',
    ),
    (
      ['--model.num-heads', '3'],
      'hidden_size=128 must be a multiple of num_heads=3.',
    ),
    (['--optim.name', 'adam'], "invalid choice 'adam'"),
    (['--model.num-layers', 'many'], "int() with base 10: 'many'"),
  ],
)
def test_bad_value_gets_the_value_the_rule_and_the_fix(args, text, capsys):
  assert text in message_of(args, capsys)


def test_missing_file_names_the_nearest(tmp_path):
  (tmp_path / 'llama.py').write_text('')
  with pytest.raises(ValueError) as error:
    config.load(tmp_path / 'lama.py')
  assert str(error.value) == (
    f'No configuration file {str(tmp_path / "lama.py")!r}. Did you mean '
    f'{str(tmp_path / "llama.py")!r}?'
  )
  with pytest.raises(ValueError) as error:
    config.load(tmp_path / 'llama.py')
  assert "it must assign a TrainConfig to the name 'config'" in str(error.value)


@pytest.mark.parametrize(
  'build',
  [
    lambda: TrainConfig(batch_size=0),
    lambda: DataConfig(seq_len=0),
    lambda: OptimConfig(update_proj_gap=0),
    lambda: OptimConfig(final_fraction=2),
  ],
)
def test_configurations_validate_themselves(build):
  with pytest.raises(ValueError, match='must be'):
    build()
