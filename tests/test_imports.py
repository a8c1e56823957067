"""Imports point one way: optim, models, data and training stay apart."""

import ast
import pathlib

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
