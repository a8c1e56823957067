"""Layer-wise steps beside frozen weights, in full precision and in 8 bits.

Shape suffixes in this file: B sequences, T positions, D features.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gnlorp_jax import optim
from gnlorp_jax.optim.quantized.weights import quantize_weights
from gnlorp_jax.training import (
  layerwise,
  objectives,
  parameters,
  state,
  step,
)


def parted(params, pattern):
  """Parameters whose path holds the pattern train, the others are frozen."""
  parts = {}, {}
  for path, leaf in traverse_util.flatten_dict(params, sep='/').items():
    parts[not re.search(pattern, path)][path] = leaf
  return [traverse_util.unflatten_dict(part, sep='/') for part in parts]


# Parts of a small model.

PARTS = {
  'a kernel': 'layers/up',
  'no kernel': 'layers/norm|embed',
  'outer': 'embed|head',
  'head': 'head',
}
CLIP = 3.0
in_8_bits = jax.jit(quantize_weights)
CLIPPED = {'clip_global_norm': CLIP, 'num_micro_batches': 2}
WAITING, RECOMPUTE = (
  CLIPPED | {'clipping': mode} for mode in ('waiting', 'recompute')
)


def whole_steps(toy, part):
  trained, frozen = parted(toy.init(), PARTS[part])
  tx = toy.optimizer('galore')

  def loss(params, batch, frozen):
    return toy.whole_loss(parameters.join(params, frozen), batch)

  return toy.trajectory(
    lambda params: step.make_train_step(loss, tx, **CLIPPED),
    tx,
    toy.mesh_of(1),
    params=trained,
    frozen=jax.jit(toy.decode)(in_8_bits(frozen)),
  )


@pytest.mark.parametrize(
  ('part', 'ways'),
  [
    # Gradients are used one by one on one device; on four devices, which share
    # the arrays, they wait for their norm.
    pytest.param(
      *('a kernel', [(RECOMPUTE, (1, 1)), (WAITING, (2, 2))]),
      marks=pytest.mark.slow,
    ),
    ('no kernel', [(WAITING, (1, 1))]),
    ('outer', [(RECOMPUTE, (1, 1)), (WAITING, (1, 1))]),
    ('head', [(RECOMPUTE, (1, 1))]),
  ],
)
def test_parts_take_the_whole_steps(toy, part, ways):
  trained, frozen = parted(toy.init(), PARTS[part])
  frozen = in_8_bits(frozen)
  tx = toy.optimizer('galore')
  expected = whole_steps(toy, part)
  if part != 'no kernel':
    assert CLIP < max(metrics['grad_norm'] for _, metrics in expected)
  for options, mesh in ways:
    found = toy.trajectory(
      lambda params, options=options: layerwise.make_train_step(
        toy.PIECES, tx, toy.held(params, frozen), **options
      ),
      tx,
      toy.mesh_of(*mesh),
      params=trained,
      frozen=frozen,
    )
    toy.assert_equal(found, expected)


def test_a_bad_gradient_is_left_out_and_steps_are_counted(toy):
  """What all parameters share is known though none stands outside of layers."""
  trained, frozen = parted(toy.init(), PARTS['a kernel'])
  tx = toy.optimizer('galore')
  now = state.from_params(trained, tx, toy.mesh_of(1))
  train_step = jax.jit(
    layerwise.make_train_step(toy.PIECES, tx, toy.held(trained, frozen)),
  )

  def counts(now):
    found = jax.tree.leaves(now.opt_state)
    return [int(x) for x in found if x.shape == () and x.dtype == jnp.int32]

  after, _ = train_step(now, toy.make_batch(0), frozen)
  assert set(counts(now)) == {0}
  assert set(counts(after)) == {1}
  bad = toy.make_batch(1)
  bad['weights'] *= np.float32('nan')
  left, metrics = train_step(after, bad, frozen)
  assert metrics['skipped_steps'] == 1
  jax.tree.map(np.testing.assert_array_equal, left.params, after.params)
  jax.tree.map(np.testing.assert_array_equal, left.opt_state, after.opt_state)


@pytest.mark.parametrize('kind', ['language_model', 'sequence_classifier'])
def test_dropout_and_masks_reach_the_blocks(request, toy, kind):
  model = request.getfixturevalue(kind)
  trained, frozen = parted(model.init(jax.random.key(0)), 'layers/up')
  tx = optim.adamw(1e-2, eps=1e-3, skip_nonfinite=False)
  if kind == 'language_model':
    objective = objectives.language_model(model, 16, dropout=True)
  else:
    objective = objectives.classifier(model, is_regression=False)

  def batch(seed):
    rng = np.random.default_rng(seed)
    inputs_BT = rng.integers(1, 64, (8, 8), dtype=np.int32)
    inputs_BT[:, 5:] *= rng.integers(0, 2, (8, 3), dtype=np.int32)
    rows = {'inputs': inputs_BT, 'seeds': np.arange(8, dtype=np.uint32) + seed}
    if kind == 'language_model':
      targets_BT = rng.integers(1, 64, (8, 8), dtype=np.int32)
      return rows | {
        'targets': targets_BT,
        'weights': np.ones((8, 8), np.float32),
      }
    labels_B = rng.integers(0, 3, 8, dtype=np.int32)
    return rows | {'labels': labels_B, 'weights': np.ones(8, np.float32)}

  def loss(params, batch, frozen):
    return objective.loss(parameters.join(params, frozen), batch)

  options = {'num_micro_batches': 2, 'clip_global_norm': 0.5}
  found, expected = (
    toy.trajectory(
      make_step,
      tx,
      toy.mesh_of(1),
      steps=4,
      batch=batch,
      params=trained,
      frozen=frozen,
    )
    for make_step in (
      lambda params: layerwise.make_train_step(
        objective.pieces, tx, toy.held(params, frozen), **options
      ),
      lambda params: step.make_train_step(loss, tx, **options),
    )
  )
  toy.assert_equal(found, expected)
