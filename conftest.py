"""Settings that must be in place before jax is imported, and shared fixtures.

Four CPU devices are forced so that every sharding test runs anywhere. On a
machine with few cores independent LAPACK calls of several devices starve one
another and a collective never completes, unless the thread pools are set wide
(NPROC) and BLAS is kept to one thread.
"""

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import signal
import types

# To trace a program makes many small objects: every 700 of them Python looks
# through the new ones for garbage, and every few seconds through all of jax and
# torch. Here every 20,000, and every million through all of the tests' own.
gc.set_threshold(20_000, 10, 5)

JAX_VERSION = tuple(map(int, importlib.metadata.version('jax').split('.')[:2]))

os.environ['NPROC'] = '16'
os.environ['OPENBLAS_NUM_THREADS'] = '1'
os.environ['JAX_PLATFORMS'] = os.environ.get('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=4',
    # Tests compile thousands of small programs, in as many processes as there
    # are cores: a program in one piece is compiled sooner,
    '--xla_cpu_parallel_codegen_split_count=1',
    # and XLA's older code generator takes a third of the time of the newer one,
    # which is the only one from jax 0.11 on. Fusions are the same.
    *(['--xla_cpu_use_fusion_emitters=false'] if JAX_VERSION < (0, 11) else []),
  ]
)
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['MPLBACKEND'] = 'Agg'
ON_CPU = os.environ['JAX_PLATFORMS'] == 'cpu'
# Programs that tests start compile as tests do; see `quick_to_compile`.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = str(ON_CPU)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import (  # noqa: E402
  compilation_cache,
)

jax.config.update('jax_numpy_rank_promotion', 'raise')

ROOT = pathlib.Path(__file__).resolve().parent
SHARED = ROOT.parent / 'shared'
DURATIONS = ROOT / '.ci' / 'durations.json'


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Marks what is slow, and begins with the files that take longest.

  Several processes end together if the short files come last and fill gaps.
  """
  recorded = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
  slow, seconds = recorded.get('slow tests', {}), recorded.get('files', {})
  for item in items:
    if item.nodeid in slow:
      item.add_marker('slow')
  if 'PYTEST_XDIST_WORKER' in os.environ:
    items.sort(
      key=lambda item: -seconds.get(item.path.relative_to(ROOT).as_posix(), 0)
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
  """Leaves what was imported out of the search for garbage."""
  gc.collect()
  gc.freeze()


@pytest.fixture(scope='session')
def shared():
  """Folder of reference data beside the checkout; skips where it is absent."""
  if not SHARED.is_dir():
    pytest.skip(f'reference data folder {SHARED} is not on this machine')
  return SHARED


@pytest.fixture(scope='module', autouse=True)
def programs_are_forgotten():
  """Frees what a module compiled.

  Every program of XLA takes memory maps, of which Linux allows a process
  65,530. With those of the whole suite XLA crashes.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope='module', autouse=True)
def quick_to_compile(request):
  """Halves the time to compile; a few small steps need no fast code.

  On a CPU LLVM alone is told to hurry: XLA's own passes, and with them the plan
  of a program's memory, stay as they are. Modules that run for long are marked
  `fast_code`. A GPU compiles as users' programs do.
  """
  fast = request.node.get_closest_marker('fast_code') is not None
  jax.config.update('jax_disable_most_optimizations', ON_CPU and not fast)


@pytest.fixture(scope='module')
def one_torch_thread():
  """PyTorch's threads wait for each other; a busy machine makes them crawl."""
  from benchmarks.common import harness

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(harness, 'cores', lambda: 1)
    if importlib.util.find_spec('torch') is None:
      yield
      return
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def doctest_imports(doctest_namespace):
  """What the examples in docstrings may use without importing it."""
  doctest_namespace.update(jax=jax, jnp=jnp, np=np, optax=optax)


@pytest.fixture(scope='module')
def compiled_once(tmp_path_factory):
  """Runs of the same model share what XLA compiled, across processes too."""
  cache = tmp_path_factory.mktemp('compiled')
  settings = {
    'jax_compilation_cache_dir': str(cache),
    'jax_persistent_cache_min_compile_time_secs': 0.1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # Tests before this one compiled without.
  yield {name.upper(): str(value) for name, value in settings.items()}
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def _built_from(part):
  """What decides what a part of a program does: equal parts, equal keys."""
  if isinstance(part, functools.partial):
    options = sorted(part.keywords.items())
    return part.func, _built_from(part.args), _built_from(tuple(options))
  if isinstance(part, types.FunctionType) and part.__closure__:
    cells = tuple(cell.cell_contents for cell in part.__closure__)
    return part.__code__, _built_from(cells)
  return tuple(map(_built_from, part)) if type(part) is tuple else part


@pytest.fixture(scope='module')
def built_once():
  """Runs of the same settings share a program, which they would trace again.

  A program follows from settings alone. That another process builds the same
  one is seen where runs are killed: tests/test_resume.py.
  """
  from gnlorp_jax.compose import program

  build, programs = program.build, {}

  def remembered(*parts, **options):
    key = _built_from((*parts, *sorted(options.items())))
    if key not in programs:
      programs[key] = build(*parts, **options)
    return programs[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(program, 'build', remembered)
    yield


@contextlib.contextmanager
def restored_logging():
  """Takes back what `main` does to the loggers of the whole process."""
  root = logging.getLogger()
  before = root.level, list(root.handlers)
  chatty = [logging.getLogger(name) for name in ('absl', 'jax', 'orbax')]
  levels = [logger.level for logger in chatty]
  yield
  root.setLevel(before[0])
  root.handlers[:] = before[1]
  for logger, level in zip(chatty, levels, strict=True):
    logger.setLevel(level)


@pytest.fixture
def logging_as_before():
  """Of tests that run `main`."""
  with restored_logging():
    yield


@pytest.fixture(scope='module', autouse=True)
def logging_is_forgotten():
  """Of fixtures that run `main` once for a module."""
  with restored_logging():
    yield


@pytest.fixture
def stopped_by_a_signal(monkeypatch):
  """Runs ``main(args)`` until a signal comes, when a step's row is written."""
  from gnlorp_jax.training import metrics

  write = metrics.MetricsWriter.write

  def run(main, args, number):
    def stopping(self, step, values):
      if step == number and 'train/loss' in values:
        os.kill(os.getpid(), signal.SIGTERM)
      write(self, step, values)

    with monkeypatch.context() as patched:
      patched.setattr(metrics.MetricsWriter, 'write', stopping)
      with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 128 + signal.SIGTERM

  return run
