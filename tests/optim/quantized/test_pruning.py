"""Moments set to zero: how many, which ones, and in whatever bits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim.quantized.arrays import QuantizedArray, dequantize
from gnlorp_jax.optim.quantized.pruning import (
  fields_beside_moments,
  num_kept,
  prune,
  prune_moments,
)


@pytest.mark.parametrize(
  ('size', 'share', 'kept'),
  [
    (10, 0.9, 1),
    (11, 0.9, 2),
    (10, 0.7, 3),  # In binary 1 - 0.7 is more than 0.3.
    (100, 0.29, 71),
    (7, 0.0, 7),
    (7, 1.0, 0),
  ],
)
def test_number_of_kept_entries_is_rounded_up(size, share, kept):
  assert num_kept(size, share) == kept


def entries(seed=0, shape=(2, 5, 7)):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_magnitude_keeps_the_largest_of_every_matrix():
  x = entries()
  found = np.asarray(prune(x, 'magnitude', 0.8))
  for matrix, before in zip(found, x, strict=True):
    kept = np.argsort(-np.abs(before.ravel()))[: math.ceil(0.2 * 35)]
    expected = np.zeros(35, np.float32)
    expected[kept] = before.ravel()[kept]
    np.testing.assert_array_equal(matrix.ravel(), expected)


@pytest.mark.parametrize('how', ['magnitude', 'random'])
def test_share_is_exact_where_entries_are_equal(how):
  ties = np.full((2, 5, 7), -3.0, np.float32)
  ties[1, 2] = 5.0  # Of these all stay, and none of a quantile's.
  found = np.asarray(prune(ties, how, 0.75, jax.random.key(0)))
  assert [np.count_nonzero(matrix) for matrix in found] == [9, 9]
  assert set(np.unique(found)) <= {-3.0, 0.0, 5.0}
  if how == 'magnitude':
    assert np.count_nonzero(found[1] == 5.0) == 7
    assert np.all(found[0].ravel()[:9] == -3.0)


def test_random_pruning_follows_the_key_and_spares_no_place():
  x = entries(shape=(20, 20))
  draw = jax.jit(functools.partial(prune, x, 'random', 0.5))
  masks = np.stack([draw(jax.random.key(i)) != 0 for i in range(24)])
  assert set(masks.sum(axis=(1, 2))) == {200}
  assert 0 < masks.mean(axis=0).min() and masks.mean(axis=0).max() < 1
  np.testing.assert_array_equal(draw(jax.random.key(3)), x * masks[3])


def test_reset_and_a_share_of_all_keep_nothing():
  for how, share in (('reset', 0.0), ('magnitude', 1.0), ('random', 1.0)):
    assert not np.any(prune(entries(), how, share, jax.random.key(0)))


def test_unknown_pruning_is_told():
  with pytest.raises(ValueError) as error:
    prune(entries(), 'smallest', 0.5)
  assert str(error.value) == (
    "Unknown prune 'smallest'; expected one of ('magnitude', 'random', "
    "'reset')."
  )
  with pytest.raises(ValueError) as error:
    prune(entries(), 'random', 0.5)
  assert str(error.value) == ("prune='random' draws what is kept: give a key.")


# States.

PARAMS = {
  'head': np.ones((64, 64), np.float32),
  'layers': {
    'lora_a': np.ones((2, 64, 64), np.float32),
    'lora_b': np.ones((2, 4, 8), np.float32),
  },
}


def is_factor(path):
  return path.split('/')[-1].startswith('lora_')


def moved(bits):
  """A state after two updates; factors but the smaller one in few bits."""
  tx = optim.adamw(1e-2, moment_bits=bits, skip_nonfinite=False)
  state = jax.jit(tx.init)(PARAMS)
  update = jax.jit(tx.update)
  for seed in range(2):
    grads = jax.tree.map(lambda p, s=seed: entries(s, p.shape), PARAMS)
    _, state = update(grads, state, PARAMS)
  return state


def adam(state):
  """The moments by name, decoded, and the count."""
  found = {}
  for path, node in jax.tree_util.tree_leaves_with_path(
    state, is_leaf=lambda node: isinstance(node, QuantizedArray)
  ):
    fields = [getattr(key, 'name', '') for key in path]
    name = next((f for f in ('mu', 'nu', 'count') if f in fields), None)
    if name is not None:
      keys = [key.key for key in path if hasattr(key, 'key')]
      is_coded = isinstance(node, QuantizedArray)
      found[name, keys[-1]] = np.asarray(dequantize(node) if is_coded else node)
  return found


@pytest.mark.parametrize('bits', [32, 8, 4])
def test_moments_of_factors_are_pruned_as_numbers(bits):
  before = moved(bits)
  after = jax.jit(
    lambda state: prune_moments(
      state, PARAMS, is_factor, 'magnitude', 0.9, jax.random.key(0)
    )
  )(before)
  assert jax.tree.structure(after) == jax.tree.structure(before)
  old, new = adam(before), adam(after)
  assert old.keys() == new.keys()
  for (moment, name), x in old.items():
    y = new[moment, name]
    if not name.startswith('lora_') or moment == 'count':
      np.testing.assert_array_equal(y, x)
      continue
    expected = np.asarray(prune(x, 'magnitude', 0.9))
    is_coded = bits != 32 and name == 'lora_a'
    if not is_coded:
      np.testing.assert_array_equal(y, expected)
      continue
    kept = expected != 0
    assert kept.sum() == 2 * num_kept(64 * 64, 0.9)
    # The codes of a block are of its largest entry, which is kept.
    np.testing.assert_allclose(
      y[kept], x[kept], rtol=0.02 if bits == 8 else 0.5
    )
    if (bits, moment) == (4, 'nu'):  # A code that has no zero.
      assert 0 <= y[~kept].min() and y[~kept].max() <= x.max() / 8
    else:
      assert not np.any(y[~kept])


def test_moments_are_pruned_each_by_itself():
  after = prune_moments(
    moved(32), PARAMS, is_factor, 'random', 0.5, jax.random.key(0)
  )
  found = adam(after)
  masks = [found[m, 'lora_a'] != 0 for m in ('mu', 'nu')]
  assert masks[0].sum() == masks[1].sum() == 64 * 64
  assert np.any(masks[0] != masks[1]) and np.any(masks[0][0] != masks[0][1])


def test_fields_beside_moments_are_named():
  full = optim.adamw(1e-2, skip_nonfinite=False)
  rules = (('lora_', 'low_rank'), ('.*', 'full'))
  low = optim.galore(1e-2, rank=2, param_labels=rules)

  def fields(tx, is_chosen=is_factor):
    state = jax.eval_shape(tx.init, PARAMS)
    return fields_beside_moments(state, PARAMS, is_chosen)

  assert fields(full) == []
  assert fields(low) == ['subspace']
  assert fields(low, lambda path: path == 'head') == []
  other = optim.galore_adafactor(1e-2, rank=2, param_labels=rules)
  assert fields(other) == ['col', 'row', 'subspace']


def test_pruned_moments_stay_on_their_devices_types():
  state = moved(8)
  after = prune_moments(
    state, PARAMS, is_factor, 'reset', 0.0, jax.random.key(0)
  )
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
  assert all(
    not np.any(x)
    for (moment, name), x in adam(after).items()
    if name.startswith('lora_') and moment != 'count'
  )
  assert jnp.any(adam(after)['mu', 'head'] != 0)
