"""Parameters that cannot be held are refused by arithmetic."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnlorp_jax.compose import memory
from gnlorp_jax.models import llama


def shapes_of(**changes):
  sizes = {
    'vocab_size': 40,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_layers': 3,
    'num_heads': 4,
    'max_seq_len': 16,
  }
  model = llama.make(llama.LlamaConfig(**(sizes | changes)))
  return jax.eval_shape(model.init, jax.random.key(0))


def test_model_of_terabytes_is_refused_by_arithmetic():
  memory.check(shapes_of())
  with pytest.raises(ValueError) as error:
    memory.check(shapes_of(num_layers=10**9))
  text = str(error.value)
  # 8,768 parameters a layer, four bytes each.
  assert ' of memory, but the parameters alone take 31.9 TiB of it. ' in text
  assert text.startswith('The host has ')
  assert text.endswith(
    "Choose a smaller model, or param_dtype='bfloat16', or more devices that "
    'share it (mesh.fsdp).'
  )


def placed(spec):
  mesh = Mesh(np.array(jax.devices()[:4]), ('fsdp',))
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  return {'x': jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=sharding)}


@pytest.mark.parametrize(('spec', 'takes'), [(('fsdp',), 8192), ((), 4 * 8192)])
def test_devices_of_the_host_share_its_memory(monkeypatch, spec, takes):
  monkeypatch.setattr(memory, '_host_memory', lambda: takes)
  memory.check(placed(spec))
  monkeypatch.setattr(memory, '_host_memory', lambda: takes - 1)
  with pytest.raises(
    ValueError, match=f'alone take {takes // 1024}.0 KiB of it'
  ):
    memory.check(placed(spec))
  # Where nobody knows, nothing is refused.
  monkeypatch.setattr(memory, '_host_memory', lambda: None)
  memory.check(placed(spec))


def test_state_of_the_optimizer_counts(monkeypatch):
  def leaf(size):
    return jax.ShapeDtypeStruct((size,), jnp.float32)

  parameters = types.SimpleNamespace(frozen={'w': leaf(256)})
  built = types.SimpleNamespace(
    abstract_state={'params': leaf(256), 'mu': leaf(256)}, parameters=parameters
  )
  monkeypatch.setattr(memory, '_host_memory', lambda: 3 * 1024)
  memory.check_run(built)
  monkeypatch.setattr(memory, '_host_memory', lambda: 3 * 1024 - 1)
  with pytest.raises(ValueError) as error:
    memory.check_run(built)
  assert str(error.value).startswith(
    'The host has 3.0 KiB of memory, but the weights and the state of the '
    'optimizer alone take 3.0 KiB of it. Choose a smaller model,'
  )


def test_limit_of_a_container_is_what_there_is(monkeypatch, tmp_path):
  limits = tmp_path / 'memory.max', tmp_path / 'absent'
  monkeypatch.setattr(memory, '_CGROUP_LIMITS', limits)
  limits[0].write_text('max\n')
  whole = memory._host_memory()
  assert whole > 2**20
  limits[0].write_text('1048576\n')
  assert memory._host_memory() == 2**20


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
def test_accelerator_has_memory_of_its_own():
  with pytest.raises(ValueError, match='^Each .* GiB of memory, but the'):
    memory.check(shapes_of(num_layers=10**9))
  memory.check(shapes_of())
