"""Parameters that cannot be held are refused by arithmetic."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnlorp_jax.compose import memory, settings
from gnlorp_jax.models import llama
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig


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


SMALL = TrainConfig(
  batch_size=8,
  mesh=settings.MeshConfig(data=1),
  optim=settings.OptimConfig(name='adamw'),
  data=DataConfig(seq_len=64),
  model=llama.LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=32,
    num_layers=3,
    num_heads=2,
    max_seq_len=64,
  ),
)


def least(**changes):
  """What is counted of a step, as shapes."""
  config = dataclasses.replace(SMALL, **changes)
  planned = recipe.plan(config)
  found = memory.activations(
    *(planned.program, planned.config.model, config.batch_size),
    *(config.data.seq_len, config.step, config.micro_batches),
  )
  return {
    name: (leaf.shape, leaf.sharding.shard_shape(leaf.shape))
    for name, leaf in found.items()
  }


def test_least_of_a_step_is_what_it_begins_its_way_back_from():
  inputs, scores = (3, 8, 64, 16), (8, 2, 64, 64)
  assert least() == {'inputs': (inputs, inputs), 'scores': (scores, scores)}
  inputs, scores = (3, 2, 64, 16), (2, 2, 64, 64)
  assert least(micro_batches=4) == {
    'inputs': (inputs, inputs),
    'scores': (scores, scores),
  }
  # Layer by layer all of the batch has been through a block before the next.
  layerwise = settings.StepConfig(mode='layerwise')
  found = least(micro_batches=4, step=layerwise)
  assert found['inputs'][0] == (3, 8, 64, 16)
  projected = settings.StepConfig(mode='layerwise', accumulate='projected')
  galore = settings.OptimConfig(name='galore', rank=2)
  found = least(micro_batches=4, step=projected, optim=galore)
  assert found['inputs'][0] == (3, 2, 64, 16)
  # Four devices share it; and of layers that rest nothing is said.
  found = least(mesh=settings.MeshConfig(data=2, fsdp=2))
  assert found['inputs'][1] == (3, 2, 64, 16)
  assert found['scores'][1] == (2, 2, 64, 64)
  drawn = settings.LayerSamplingOptions(draw='uniform', layers=1, every=2)
  assert least(sampling=drawn)['inputs'][0] == (1, 8, 64, 16)


def test_step_is_refused_below_its_least_and_not_at_what_it_takes(monkeypatch):
  """What XLA gives the step is more than what is counted."""
  planned = recipe.plan(SMALL)
  asked = (
    *(planned.program, planned.config.model, 8, 64, SMALL.step),
    SMALL.micro_batches,
  )
  compiled = planned.program.train_step.lower(
    planned.program.abstract_state, planned.abstract_batch, {}
  ).compile()
  stats = compiled.memory_analysis()
  taken = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  monkeypatch.setattr(memory, '_host_memory', lambda: taken)
  memory.check_step(*asked)
  state = sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(planned.program.abstract_state)
  )
  counted = state + 4 * 8 * 64 * (3 * 16 + 2 * 64)
  assert counted < taken
  monkeypatch.setattr(memory, '_host_memory', lambda: counted)
  memory.check_step(*asked)
  monkeypatch.setattr(memory, '_host_memory', lambda: counted - 1)
  with pytest.raises(ValueError) as error:
    memory.check_step(*asked)
  text = str(error.value)
  assert (
    'memory, but weights, optimizer and the least that batch_size=8 with '
    'sequences of 64 tokens and micro_batches=1 keeps of a step alone take '
  ) in text
  assert text.endswith(
    'Use a smaller batch_size, shorter sequences, or more micro_batches; '
    'python -m gnlorp_jax.plan tells what a run needs.'
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
