"""Imports point one way: optim, models, data and training stay apart."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'gnlorp_jax'
FOLDERS = ('optim', 'models', 'data', 'training')


def imported_modules(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('folder', FOLDERS)
def test_folder_imports_nothing_of_the_others(folder):
  files = sorted((PACKAGE / folder).rglob('*.py'))
  assert files
  allowed = f'gnlorp_jax.{folder}'
  foreign = {
    (path.name, module)
    for path in files
    for module in imported_modules(path)
    if module.startswith('gnlorp_jax')
    and f'{module}.' != 'gnlorp_jax.'
    and not f'{module}.'.startswith(f'{allowed}.')
  }
  assert not foreign


# What a machine that was lent for a while may lack.
ABSENT = (
  *('grain', 'tyro', 'tensorboardX', 'tensorflow_datasets', 'transformers'),
  'sklearn',
)
WITHOUT = """
import importlib.abc
import sys

class Blocked(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name.partition('.')[0] in {absent}:
      raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import gnlorp_jax.build
from gnlorp_jax import config

program = gnlorp_jax.build.program(config.TrainConfig(batch_size=16), 1)
print(len(program.abstract_batch))
"""


def test_a_program_is_built_without_what_only_data_and_command_lines_need():
  found = subprocess.run(
    [sys.executable, '-c', WITHOUT.replace('{absent}', str(ABSENT))],
    cwd=PACKAGE.parent,
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.returncode == 0, found.stderr
  assert found.stdout == '3\n'
