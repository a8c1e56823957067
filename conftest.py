"""Settings that must be in place before jax is imported, and shared fixtures.

Four CPU devices are forced so that every sharding test runs anywhere. On a
machine with few cores independent LAPACK calls of several devices starve one
another and a collective never completes, unless the thread pools are set wide
(NPROC) and BLAS is kept to one thread.
"""

import os
import pathlib

os.environ['NPROC'] = '16'
os.environ['OPENBLAS_NUM_THREADS'] = '1'
os.environ['JAX_PLATFORMS'] = os.environ.get('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
)
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['MPLBACKEND'] = 'Agg'

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

SHARED = pathlib.Path(__file__).resolve().parents[1] / 'shared'


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


@pytest.fixture(autouse=True)
def doctest_imports(doctest_namespace):
  """What the examples in docstrings may use without importing it."""
  doctest_namespace.update(jax=jax, jnp=jnp, np=np, optax=optax)
