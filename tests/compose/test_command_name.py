"""What a running command is called."""

import pathlib
import sys
import tomllib
import types

import pytest

from gnlorp_jax.compose import command_name

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'][
  'scripts'
]


@pytest.fixture
def call(monkeypatch):
  """Makes this process one that was called so."""

  def called_by(word, module=None):
    spec = types.SimpleNamespace(name=module) if module else None
    main = types.SimpleNamespace(__spec__=spec)
    monkeypatch.setitem(sys.modules, '__main__', main)
    monkeypatch.setattr(sys, 'argv', [word])

  return called_by


@pytest.mark.parametrize(
  ('word', 'module', 'called', 'installed'),
  [
    (
      *('/opt/bin/gnlorp-train-sft', None),
      *('gnlorp-train-sft', 'gnlorp-train-sft'),
    ),
    ('work/train_sft.py', None, 'train_sft.py', 'gnlorp-train-sft'),
    (
      *('/opt/gnlorp_jax/plan/__main__.py', 'gnlorp_jax.plan.__main__'),
      *('python -m gnlorp_jax.plan', 'gnlorp-plan'),
    ),
    # Programs of others, whose modules may be called as folders of ours are.
    ('/home/data.py', None, 'data.py', 'data.py'),
    ('/home/my/lm.py', 'my.lm', 'python -m my.lm', 'my.lm'),
  ],
)
def test_names(word, module, called, installed, call):
  call(word, module)
  assert command_name.called() == called
  assert command_name.installed() == installed


@pytest.mark.parametrize(('command', 'place'), SCRIPTS.items())
def test_modules_are_installed_under_these_names(command, place, call):
  module = place.partition(':')[0]
  call('/opt/a.py', module)
  assert command_name.called() == (
    f'python -m {module.removesuffix(".__main__")}'
  )
  assert command_name.installed() == command
