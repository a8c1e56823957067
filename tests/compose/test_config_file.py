"""Configuration files: every mistake in one is told with its line."""

import pytest

from gnlorp_jax.compose import config_file
from gnlorp_jax.recipes.pretrain.settings import TrainConfig

HEAD = 'from gnlorp_jax.config import OptimConfig, StepConfig, TrainConfig\n'


def refused(tmp_path, text, name='mine.py'):
  """What is said of a file, without its path."""
  path = tmp_path / name
  path.write_text(text)
  with pytest.raises(ValueError) as error:
    config_file.load(path, TrainConfig)
  return str(error.value).replace(str(path), path.name)


def test_a_good_file_is_read(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(HEAD + 'config = TrainConfig(steps=7, mask_rate=0.5)\n')
  assert config_file.load(path, TrainConfig).steps == 7


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('config = TrainConfig(\n', "mine.py:2: no Python: '(' was never closed."),
    (
      'cfg = TrainConfg()\n',
      "mine.py:2: the name 'TrainConfg' is not defined.",
    ),
    (
      '\nconfig = TrainConfig(optim=OptimConfig(rnak=8))\n',
      "mine.py:3: OptimConfig has no field 'rnak'. Did you mean 'rank'? "
      "Fields: ['name',",
    ),
    ('config = 1 / 0\n', 'mine.py:2: ZeroDivisionError: division by zero'),
    (
      'exit(0)\n',
      'mine.py:2: the file ends the program. Let it assign to config alone.',
    ),
    ('config = "\0"\n', 'mine.py: no Python: source code '),
    ('import gnlorp\n', "mine.py:2: ModuleNotFoundError: No module named 'gnl"),
    (
      'config = TrainConfig(steps=0)\n',
      'mine.py:2: TrainConfig.steps must be at least 1, got 0.',
    ),
    # Other types: where no check of a size meets them, and where one does.
    (
      'config = TrainConfig(\n  optim=OptimConfig(\n    moment_bits=7))\n',
      'mine.py:4: OptimConfig.moment_bits=7 must be one of (32, 8, 4) or None.',
    ),
    (
      "config = TrainConfig(steps='many')\n",
      "mine.py:2: TrainConfig.steps='many' must be a whole number.",
    ),
    (
      'config = TrainConfig(steps=10.5)\n',
      'mine.py:2: TrainConfig.steps=10.5 must be a whole number.',
    ),
    (
      "config = TrainConfig(keep_best='yes')\n",
      "mine.py:2: TrainConfig.keep_best='yes' must be True or False.",
    ),
    (
      "config = TrainConfig(step=dict(mode='whole'))\n",
      "mine.py:2: TrainConfig.step={'mode': 'whole'} must be a StepConfig.",
    ),
    (
      "config = TrainConfig(optim=OptimConfig(param_labels=('a', 'b')))\n",
      "mine.py:2: OptimConfig.param_labels=('a', 'b') must be one of "
      "('blocks', 'all') or a tuple, of each a tuple, of each a text, a text "
      'or None.',
    ),
    (
      'from gnlorp_jax.models.llama import LlamaConfig\n'
      "config = TrainConfig(model=LlamaConfig(vocab_size='9', hidden_size=8,\n"
      '  intermediate_size=8, num_layers=1, num_heads=1, max_seq_len=128))\n',
      "mine.py:3: LlamaConfig.vocab_size='9' must be a whole number.",
    ),
  ],
)
def test_mistake_is_told_with_its_line(tmp_path, text, expected):
  assert refused(tmp_path, HEAD + text).startswith(expected)


@pytest.mark.parametrize('text', ['config = 1 / 0\n', 'config = (\n'])
def test_line_is_told_of_a_path_that_is_not_a_whole_one(
  tmp_path, monkeypatch, text
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'mine.py').write_text(text)
  with pytest.raises(ValueError, match='^configs/mine.py:1: '):
    config_file.load('configs/mine.py', TrainConfig)


def test_a_file_may_have_dataclasses_of_its_own(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from __future__ import annotations\nimport dataclasses\n'
    '@dataclasses.dataclass\nclass Mine:\n  steps: int = 7\n'
    f'{HEAD}config = TrainConfig(steps=Mine().steps)\n'
  )
  assert config_file.load(path, TrainConfig).steps == 7


def test_nearest_name_of_the_file_is_told(tmp_path):
  assert "Did you mean 'TrainConfig'?" in refused(
    tmp_path, HEAD + 'config = TrainConfg()\n'
  )


@pytest.mark.parametrize('name', ['mine.json', 'mine.yaml', 'mine'])
def test_a_file_of_another_kind_is_not_executed(tmp_path, name):
  assert refused(tmp_path, 'raise SystemExit', name) == (
    f'{name!r} is no Python file, and a configuration is one, named *.py: it '
    'assigns a TrainConfig to the name config.'
  )


def test_bytes_that_are_no_text_are_told(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_bytes(b'config = "\xff"\n')
  with pytest.raises(ValueError, match=r'mine\.py:?\d*: no Python'):
    config_file.load(path, TrainConfig)
