"""What a user gets: a wheel with types, public names, and few imports."""

import ast
import importlib.util
import pathlib
import shutil
import subprocess
import sys

import pytest

import gnlorp_jax
from gnlorp_jax import optim, plan

ROOT = pathlib.Path(__file__).parents[1]


def run(*words, **options):
  """What a Python program says."""
  return subprocess.run(
    [sys.executable, *words],
    capture_output=True,
    text=True,
    check=False,
    **options,
  )


# The names.


@pytest.mark.parametrize('module', [gnlorp_jax, optim])
def test_all_names_what_is_there(module):
  tree = ast.parse(pathlib.Path(module.__file__).read_text())
  imported = [
    alias.asname or alias.name
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom)
    and node.module.startswith('gnlorp_jax.')
    for alias in node.names
  ]
  assert module.__all__ == sorted(set(imported))
  assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize('module', [gnlorp_jax, plan])
def test_names_that_are_looked_up_late_are_all_there(module):
  assert set(module.__all__) <= set(dir(module))
  assert all(getattr(module, name) is not None for name in module.__all__)
  with pytest.raises(AttributeError, match=r"'gnlorp_jax.*' has no attribute"):
    _ = module.absent


def test_the_face_of_the_package_is_a_part_of_the_optimizers():
  assert set(gnlorp_jax.__all__) <= set(optim.__all__)
  assert set(optim.methods.names()) <= set(gnlorp_jax.__all__)


# The imports.

SMALL = """
import sys
import jax
from gnlorp_jax import optim

params = {'kernel': jax.ShapeDtypeStruct((64, 128), 'float32')}
for name in optim.methods.names():
  jax.eval_shape(optim.methods.get(name)(1e-3).init, params)
print({name.partition('.')[0] for name in sys.modules} & set(sys.argv[1:]))
"""


@pytest.mark.slow
def test_optimizers_are_built_of_jax_and_optax_alone():
  heavy = ('flax', 'matplotlib', 'orbax', 'sklearn', 'transformers', 'tyro')
  found = run('-c', SMALL, *heavy, cwd=ROOT)
  assert (found.stdout, found.returncode) == ('set()\n', 0), found.stderr


# The wheel.

USER = """
import gnlorp_jax

tx = gnlorp_jax.gradnormlorp(1e-3, rank=8, side='both', moment_bits=8)
reveal_type(gnlorp_jax.format_report(gnlorp_jax.report({}, tx)))
gnlorp_jax.gradnormlorp(1e-3, rnak=8)
gnlorp_jax.fira(1e-3, side='both')
"""
# Optax has no types yet: all that is known of an optimizer is its arguments.
EXPECTED = [
  'user.py:5: note: Revealed type is "str"',
  'user.py:6: error: Unexpected keyword argument "rnak" for "gradnormlorp"',
  'user.py:6: note: "gradnormlorp" defined in',
  'user.py:7: error: Argument "side" to "fira" has incompatible type',
]


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """A folder with the wheel installed, as pip does it."""
  for name in ('pip', 'setuptools'):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f'{name}, which builds the wheel, is not installed')
  # Of a copy: setuptools writes beside what it packs.
  copy = tmp_path_factory.mktemp('copy')
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, copy)
  shutil.copytree(ROOT / 'gnlorp_jax', copy / 'gnlorp_jax')
  wheels, site = (
    tmp_path_factory.mktemp('wheels'),
    tmp_path_factory.mktemp('site'),
  )
  pip = ('-m', 'pip', '--disable-pip-version-check')
  built = run(
    *(*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', wheels, copy)
  )
  assert built.returncode == 0, built.stderr
  (wheel,) = wheels.iterdir()
  done = run(*pip, 'install', '--no-deps', '--no-index', '-t', site, wheel)
  assert done.returncode == 0, done.stderr
  return site


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(installed):
  modules = {
    path.relative_to(ROOT) for path in (ROOT / 'gnlorp_jax').rglob('*.py')
  }
  # A link in the sources: rglob follows none.
  modules |= {
    pathlib.Path('gnlorp_jax', 'configs', path.name)
    for path in (ROOT / 'configs').glob('*.py')
  }
  found = {path.relative_to(installed) for path in installed.rglob('*.py')}
  assert found == modules
  assert (installed / 'gnlorp_jax' / 'py.typed').is_file()
  rows = pathlib.Path('gnlorp_jax', 'optim', 'measured.json')
  assert (installed / rows).read_bytes() == (ROOT / rows).read_bytes()


@pytest.mark.slow
def test_a_users_types_are_checked(installed, tmp_path):
  (tmp_path / 'user.py').write_text(USER)
  found = run(
    *('-m', 'mypy', '--strict', '--hide-error-context', 'user.py'),
    cwd=tmp_path,
    # Where installed packages are; anything else is source code to mypy.
    env={'PYTHONPATH': str(installed), 'PATH': ''},
  )
  said = [line for line in found.stdout.splitlines() if 'user.py' in line]
  assert len(said) == len(EXPECTED), found
  for line, beginning in zip(said, EXPECTED, strict=True):
    assert line.startswith(beginning)
