"""What to install where a program lacks a package."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from gnlorp_jax.disk import extras

ROOT = pathlib.Path(__file__).parents[2]
# How what is installed is imported, where that differs.
IMPORTED = {
  'orbax-checkpoint': 'orbax',
  'pyyaml': 'yaml',
  'scikit-learn': 'sklearn',
  'tensorflow-datasets': 'tensorflow_datasets',
}
# JAX needs them: they are there.
CORE = ('ml_dtypes', 'scipy')
BLOCKED = """
import importlib.abc, importlib, sys

class Blocked(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name.partition('.')[0] == sys.argv[2]:
      raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
importlib.import_module(sys.argv[1])
"""


def test_modules_are_those_of_the_extras():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  found = {
    (IMPORTED.get(name, name), extra)
    for extra in ('train', 'sft', 'glue', 'tfds')
    for line in project['optional-dependencies'][extra]
    for name in re.findall(r'^[\w-]+', line)
    if name not in (*CORE, 'gnlorp_jax', 'importlib_resources', 'tensorflow')
  }
  assert found == set(extras.MODULES.items())


def test_what_no_extra_brings_is_no_word_of_ours():
  assert extras.missing(ModuleNotFoundError(name='pandas')) is None
  assert extras.missing(ImportError('broken', name='flax')) is None
  assert extras.missing(ModuleNotFoundError('nameless')) is None
  found = extras.missing(ModuleNotFoundError(name='flax'))
  assert found == (
    'The package flax is not installed, and this needs it: pip install '
    "'gnlorp_jax[train]', or in a checkout pip install '.[train]'"
  )


@pytest.mark.parametrize(
  ('program', 'module', 'extra'),
  [('train_lm', 'flax', 'train'), ('train_glue', 'sklearn', 'glue')],
)
def test_a_program_without_its_extra_names_it(program, module, extra):
  found = subprocess.run(
    [sys.executable, '-c', BLOCKED, f'gnlorp_jax.{program}', module],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.returncode == 2, found.stderr
  assert found.stderr == (
    f'error: The package {module} is not installed, and this needs it: '
    f'{extras.install(extra)}\n'
  )
