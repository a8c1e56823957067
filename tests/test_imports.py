"""How the code is laid out: who imports whom, one loop, modules of a size.

The rules are those of docs/architecture.md.
"""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'gnlorp_jax'
WINGS = ('optim', 'models', 'data', 'training', 'merging')
GROUND = 'disk'  # What every wing stands on.
# What is above the package. Benchmarks are folders and modules of one name.
ABOVE = (
  'benchmarks',
  'configs',
  'tests',
  'train_lm',
  'train_glue',
  'train_sft',
)


@functools.cache
def tree_of(path):
  return ast.parse(path.read_text())


def name_of(path):
  """The module of a file, such as ``gnlorp_jax.optim.parts.adam``."""
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob('*.py'))}


@functools.cache
def imported_by(name):
  """The modules of this repository that a module imports, wherever in it."""
  found = set()
  for node in ast.walk(tree_of(FILES[name])):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{name} imports by a relative path.'
      # What is imported from a package may be one of its modules.
      inner = {f'{node.module}.{alias.name}' for alias in node.names}
      found |= {i if i in FILES else node.module for i in inner}
  return {
    module
    for module in found
    if module in FILES or module.split('.')[0] in ABOVE
  }


def inside(module, *folders):
  """Whether a module is one of these folders of the package, or in one."""
  return any(
    f'{module}.'.startswith(f'gnlorp_jax.{folder}.') for folder in folders
  )


def foreign(folder, *allowed):
  """Imports of a folder from elsewhere in the package or above it."""
  names = [name for name in FILES if inside(name, folder)]
  assert names
  return {
    (name, module)
    for name in names
    for module in imported_by(name)
    if not inside(module, folder, *allowed) and module != 'gnlorp_jax'
  }


# Rule 1.


@pytest.mark.parametrize('folder', WINGS)
def test_folder_imports_nothing_of_the_others(folder):
  assert not foreign(folder, GROUND)


def test_the_ground_imports_nothing():
  assert not foreign(GROUND)


def test_merging_needs_jax_and_numpy_alone():
  found = set()
  for name in FILES:
    if inside(name, 'merging'):
      for node in ast.walk(tree_of(FILES[name])):
        if isinstance(node, ast.Import):
          found |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
          found.add(node.module.partition('.')[0])
  allowed = {'gnlorp_jax', 'jax', 'numpy'}
  assert found - set(sys.stdlib_module_names) <= allowed


# Rule 2. Which rooms of `optim` each may import, beside itself.

BELOW = {
  'parts': (),
  'projections': ('parts',),
  'quantized': ('parts',),
  'subspace': ('parts', 'projections', 'quantized'),
  'methods': ('parts', 'projections', 'quantized', 'subspace'),
  'inspect': ('parts', 'projections', 'quantized', 'subspace', 'methods'),
  'advice': ('parts', 'methods', 'inspect'),
}


def test_every_module_of_optim_has_a_room():
  names = {name for name in FILES if inside(name, 'optim')}
  # Faces: they import all that is public.
  names -= {'gnlorp_jax.optim', 'gnlorp_jax.optim.labels'}
  assert {name.split('.')[2] for name in names} == set(BELOW)


@pytest.mark.parametrize('room', BELOW)
def test_room_of_optim_imports_those_below_it(room):
  allowed = [f'optim.{name}' for name in BELOW[room]]
  assert not foreign(f'optim.{room}', *allowed)


# Rule 3.


def test_compose_imports_the_wings_alone():
  assert not foreign('compose', GROUND, *WINGS)


def recipes():
  return sorted(
    {
      name.split('.')[2]
      for name in FILES
      if inside(name, 'recipes') and name.count('.') > 1
    }
  )


@pytest.mark.parametrize('recipe', recipes())
def test_recipe_imports_compose_and_the_wings_and_no_other_recipe(recipe):
  shared = () if recipe == 'grid' else ('recipes.grid',)
  assert not foreign(f'recipes.{recipe}', 'compose', GROUND, *shared, *WINGS)


# Rule 4.


def test_plan_imports_compose_and_recipes():
  assert not foreign('plan', 'compose', 'recipes', 'config', GROUND, *WINGS)


def test_nothing_imports_the_planner_benchmarks_or_scripts():
  assert not {
    (name, module)
    for name in FILES
    for module in imported_by(name)
    if (inside(module, 'plan') and not inside(name, 'plan'))
    or module.split('.')[0] in ABOVE
  }


def test_imports_have_no_circle():
  done, path = set(), []

  def visit(name):
    assert name not in path, [*path[path.index(name) :], name]
    if name in done:
      return
    path.append(name)
    for module in sorted(imported_by(name) & set(FILES)):
      # A module of a package is imported with the package's face, which may
      # import it.
      if module != name and not name.startswith(f'{module}.'):
        visit(module)
    path.pop()
    done.add(name)

  for name in FILES:
    visit(name)


# One loop.


def counts(node):
  """Whether what a loop goes through are numbers: a range, or one by name."""
  return isinstance(node, ast.Name) or called(node) == 'range'


def loops_of_steps(name):
  """Loops over the numbers of steps."""
  return [
    node
    for node in ast.walk(tree_of(FILES[name]))
    if isinstance(node, ast.For)
    and (
      (
        isinstance(node.target, ast.Name)
        and node.target.id == 'number'
        and counts(node.iter)
      )
      or any('train_step' in called(inner) for inner in ast.walk(node))
    )
  ]


def called(node):
  """The name of the function that a node calls."""
  if not isinstance(node, ast.Call):
    return ''
  function = node.func
  if isinstance(function, ast.Attribute):
    return function.attr
  return function.id if isinstance(function, ast.Name) else ''


def test_there_is_one_training_loop():
  found = {name for name in FILES if loops_of_steps(name)}
  assert found == {'gnlorp_jax.training.loop'}
  (loop,) = loops_of_steps('gnlorp_jax.training.loop')
  assert loop.iter.id == 'numbers'


def test_training_steps_are_taken_in_the_loop_alone():
  calls = {
    name
    for name in FILES
    for node in ast.walk(tree_of(FILES[name]))
    if called(node) == 'train_step'
  }
  assert calls == {'gnlorp_jax.training.loop'}


# Sizes.


def test_few_modules_lie_beside_the_folders():
  names = [path.name for path in PACKAGE.glob('*.py')]
  # The package's face, that of configurations, and a door for each command.
  assert len(names) <= 9, names


def test_no_module_is_called_after_nothing():
  assert not [
    name
    for name in FILES
    if name.split('.')[-1] in ('utils', 'util', 'helpers', 'misc', 'common')
  ]


@pytest.mark.parametrize('name', FILES)
def test_module_and_its_functions_are_of_a_size(name):
  assert len(FILES[name].read_text().splitlines()) <= 450
  for node in ast.walk(tree_of(FILES[name])):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      lines = node.end_lineno - node.lineno + 1
      if ast.get_docstring(node) is not None:
        text = node.body[0]
        lines -= text.end_lineno - text.lineno + 1
      assert lines <= 80, f'{node.name} has {lines} lines.'


# What a machine that was lent for a while may lack.
ABSENT = (
  *('grain', 'tyro', 'tensorboardX', 'tensorflow_datasets', 'transformers'),
  *('sklearn', 'jinja2', 'pyarrow'),
)
WITHOUT = """
import importlib.abc
import sys

class Blocked(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name.partition('.')[0] in {absent}:
      raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from gnlorp_jax import config
from gnlorp_jax.recipes.pretrain import recipe

planned = recipe.plan(config.TrainConfig(batch_size=16), 1)
print(len(planned.abstract_batch))
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
