import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gnlorp_jax.training import sharding


def spec_of(shape, mesh, min_size=1):
  return sharding.shard_largest_axis('fsdp', min_size)(shape, mesh)


@pytest.mark.parametrize(
  ('sizes', 'shape'),
  [
    ({}, (4, 1)),
    ({'fsdp': 2}, (2, 2)),
    ({'data': 1, 'fsdp': -1}, (1, 4)),
    ({'data': 2, 'fsdp': 2}, (2, 2)),
  ],
)
def test_mesh_takes_all_devices(sizes, shape):
  mesh = sharding.make_mesh(**sizes)
  assert mesh.devices.shape == shape
  assert mesh.axis_names == ('data', 'fsdp')
  assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_mesh_uses_first_devices_when_smaller():
  mesh = sharding.make_mesh(1, 2)
  assert set(mesh.devices.flat) == set(jax.devices()[:2])


def test_mesh_uses_given_devices():
  mesh = sharding.make_mesh(devices=jax.devices()[2:])
  assert set(mesh.devices.flat) == set(jax.devices()[2:])


@pytest.mark.parametrize(
  ('data', 'fsdp', 'text'),
  [
    (
      3,
      1,
      'data=3, fsdp=1 does not fit 4 devices: the product of the sizes must '
      'divide 4.',
    ),
    (
      -1,
      3,
      'data=-1, fsdp=3 does not fit 4 devices: the product of the sizes must '
      'divide 4.',
    ),
    (
      8,
      1,
      'data=8, fsdp=1 does not fit 4 devices: the product of the sizes must '
      'divide 4.',
    ),
    (
      -1,
      -1,
      'data=-1, fsdp=-1 is no mesh: sizes must be at least 1, and only one of '
      'them may be -1, the rest of the devices.',
    ),
    (
      0,
      1,
      'data=0, fsdp=1 is no mesh: sizes must be at least 1, and only one of '
      'them may be -1, the rest of the devices.',
    ),
  ],
)
def test_mesh_error_states_the_rule(data, fsdp, text):
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    sharding.make_mesh(data, fsdp)


@pytest.mark.parametrize(
  ('shape', 'spec'),
  [
    ((64, 32), P('fsdp', None)),
    ((32, 64), P(None, 'fsdp')),
    ((32, 32), P(None, 'fsdp')),  # A tie goes to the last axis.
    ((128, 8, 4), P(None, 'fsdp', None)),  # Never the stacked layers.
    ((65, 32), P(None, 'fsdp')),  # The longer axis does not divide.
    ((65, 33), P()),
    ((8,), P('fsdp')),
    ((), P()),
  ],
)
def test_largest_axis_is_sharded(shape, spec):
  assert spec_of(shape, sharding.make_mesh(2, 2)) == spec


def test_small_array_is_replicated():
  mesh = sharding.make_mesh(2, 2)
  assert spec_of((16, 16), mesh, min_size=257) == P()
  assert spec_of((16, 16), mesh, min_size=256) == P(None, 'fsdp')


def test_moments_follow_the_longer_axis_of_their_matrix():
  mesh = sharding.make_mesh(1, 4)
  assert spec_of((2, 512, 128), mesh) == P(None, 'fsdp', None)
  assert spec_of((2, 512, 16), mesh) == P(None, 'fsdp', None)
  assert spec_of((2, 128, 512), mesh) == P(None, None, 'fsdp')
  assert spec_of((2, 16, 512), mesh) == P(None, None, 'fsdp')


def test_first_matching_rule_wins():
  mesh = sharding.make_mesh(2, 2)
  tree = {
    'embed': jax.ShapeDtypeStruct((8, 8), np.float32),
    'block': {'kernel': jax.ShapeDtypeStruct((8, 8), np.float32)},
  }
  rules = (
    ('embed', sharding.replicate),
    ('block/kernel$', lambda shape, mesh: P('data')),
    ('.*', lambda shape, mesh: P('fsdp')),
  )
  shardings = sharding.infer_shardings(tree, mesh, rules)
  assert shardings['embed'].spec == P()
  assert shardings['block']['kernel'].spec == P('data')


def test_uncovered_path_is_an_error():
  mesh = sharding.make_mesh(2, 2)
  tree = {
    'embed': jax.ShapeDtypeStruct((8,), np.float32),
    'block': [jax.ShapeDtypeStruct((8,), np.float32)],
  }
  text = (
    "No sharding rule covers ['block/0']; the rules are ['embed']. End the "
    "table with ('.*', replicate)."
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    sharding.infer_shardings(tree, mesh, (('embed', sharding.replicate),))


def test_batch_is_split_over_all_devices():
  mesh = sharding.make_mesh(2, 2)
  rows = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
  batch = sharding.put_batch({'inputs': rows}, mesh)
  np.testing.assert_array_equal(batch['inputs'], rows)
  shards = batch['inputs'].addressable_shards
  assert len({shard.device for shard in shards}) == 4
  assert {shard.data.shape for shard in shards} == {(2, 3)}


class Owned:
  """A device of another process, as far as a mesh is asked for it."""

  def __init__(self, owner):
    self.process_index = owner


class Mesh:
  """Devices of several processes."""

  def __init__(self, *owners):
    self.devices = np.array([Owned(owner) for owner in owners])
    self.shape = {'data': len(owners), 'fsdp': 1}


def test_each_process_has_its_share_of_a_batch(monkeypatch):
  assert sharding.process_share(sharding.make_mesh(2, 2)) == (0, 1)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  assert sharding.process_share(Mesh(0, 0, 1, 1)) == (1, 2)
  assert sharding.process_share(Mesh(1, 1, 0, 0)) == (0, 2)  # Of a TPU.


@pytest.mark.parametrize('owners', [(0, 0), (0, 1, 0, 1), (0, 0, 0, 1)])
def test_devices_that_give_processes_no_equal_shares_are_an_error(
  owners, monkeypatch
):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  text = (
    f'The devices of a mesh of data={len(owners)} and fsdp=1 belong to '
    f'processes {list(owners)}: each of the 2 processes needs as many, one '
    'beside the other. Let mesh.data and mesh.fsdp take all devices.'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    sharding.process_share(Mesh(*owners))


@pytest.fixture
def cut():
  """Weights of a layer on 4 devices: a kernel in pieces, codes, a vector."""
  mesh = sharding.make_mesh(fsdp=4)
  rng = np.random.default_rng(0)
  layer = {
    'kernel': rng.normal(size=(256, 64)).astype('f'),
    'codes': rng.integers(-9, 9, (64, 256), np.int8),
    'scale': rng.normal(size=64).astype('f'),
  }
  return mesh, jax.device_put(layer, sharding.infer_shardings(layer, mesh))


def test_gathered_weights_are_the_same_on_every_device(cut):
  mesh, layer = cut
  specs = {'kernel': P('fsdp', None), 'codes': P(None, 'fsdp'), 'scale': P()}
  assert {name: x.sharding.spec for name, x in layer.items()} == specs
  whole = jax.jit(lambda layer: sharding.gather(layer, mesh))(layer)
  for name, x in whole.items():
    assert x.sharding.is_fully_replicated
    assert x.dtype == layer[name].dtype
    np.testing.assert_array_equal(x, layer[name])


def test_gradients_of_gathered_weights_lie_as_the_weights_do(cut):
  mesh, layer = cut
  rows_BI = np.random.default_rng(1).normal(size=(8, 256)).astype('f')

  def loss(kernel_IO, x_BI):
    return (x_BI @ sharding.gather(kernel_IO, mesh)).sum()

  placed = sharding.put_batch({'x': rows_BI}, mesh)['x']
  grad = jax.jit(jax.grad(loss))(layer['kernel'], placed)
  assert grad.sharding.is_equivalent_to(layer['kernel'].sharding, 2)
  expected = np.tile(rows_BI.sum(axis=0)[:, None], (1, 64))
  np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)
  # As of sums that were formed otherwise; where nothing is cut they stay.
  again = jax.jit(lambda x: sharding.split(x, mesh))(expected)
  assert again.sharding.is_equivalent_to(layer['kernel'].sharding, 2)
  assert sharding.split(expected, sharding.make_mesh(4)) is expected


def test_rows_of_all_where_those_of_a_process_belong_are_an_error():
  mesh = sharding.make_mesh(2, 2)
  rows = {'inputs': np.zeros((8, 3), np.int32)}
  assert sharding.put_batch(rows, mesh, 8)['inputs'].shape == (8, 3)
  text = (
    "'inputs' has 8 rows in each of 1 processes, and a batch has 4 in all: "
    'each process gives its own rows only.'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    sharding.put_batch(rows, mesh, 4)


@pytest.mark.parametrize(('batch_size', 'micro_batches'), [(8, 2), (4, 1)])
def test_batch_that_splits_is_accepted(batch_size, micro_batches):
  sharding.check_batch(batch_size, micro_batches, sharding.make_mesh(2, 2))


@pytest.mark.parametrize(
  ('batch_size', 'choices'), [(6, '8'), (12, '8 or 16'), (0, '8'), (-8, '8')]
)
def test_batch_that_does_not_split_is_an_error(batch_size, choices):
  text = (
    f'batch_size={batch_size} cannot be split over data=2, fsdp=2 and '
    'micro_batches=2: it must be a multiple of data*fsdp*micro_batches=8. '
    f'Use {choices}.'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    sharding.check_batch(batch_size, 2, sharding.make_mesh(2, 2))
