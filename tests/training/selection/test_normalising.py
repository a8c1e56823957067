"""Adam's steps, the largest entries and distances, in float64.

Shape suffixes: N examples, D entries of a feature.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.training.selection import normalising, picking

GOLDEN = np.load('tests/golden/colm.npz')


@pytest.fixture
def exact():
  with jax.enable_x64(True):
    yield


@pytest.mark.usefixtures('exact')
@pytest.mark.parametrize('name', ['exact', 'spsa4', 'raw'])
def test_three_steps_are_those_of_the_oracle(name):
  mu_D = nu_D = jnp.zeros(30)
  top, budget = int(GOLDEN['h']), int(GOLDEN['budget'])
  for step in (1, 2, 3):
    x, delta, source_N = (
      GOLDEN[f'exact/{step}/{key}'] for key in ('x', 'delta', 'source')
    )
    features_ND = np.einsum('nti,nto->nio', x, delta).reshape(40, -1)
    if name == 'spsa4':
      features_ND = features_ND @ GOLDEN['z'].T @ GOLDEN['z'] / 4
    frame = picking.frame(
      *(source_N, np.ones(40, bool), GOLDEN['small'], budget, 6),
      np.random.default_rng(0),
    )
    found_ND = jnp.asarray(features_ND)
    if name != 'raw':
      found_ND = normalising.adam(found_ND, mu_D, nu_D, jnp.int32(step))
    large_N = ~np.isin(source_N, GOLDEN['small'])
    found_NH = normalising.sparsify(
      found_ND, jnp.asarray(source_N), jnp.asarray(large_N), 6, top
    )
    assert found_NH.shape == (40, top)
    distance_NN = np.asarray(normalising.distances(found_NH))
    picked = picking.by_source(
      *(frame, source_N, np.ones(40, bool)),
      lambda members, quota, d=distance_NN: members[
        picking.facility(d[np.ix_(members, members)], quota)
      ],
    )
    picks = np.concatenate([frame.kept, picked])
    np.testing.assert_array_equal(picks, GOLDEN[f'{name}/{step}/picks'])
    if name == 'raw':
      continue
    learns_N = np.isin(np.arange(40), picked)
    mu_D, nu_D = normalising.moments(
      jnp.asarray(features_ND), mu_D, nu_D, jnp.asarray(learns_N)
    )
    for moment_D, key in ((mu_D, 'm'), (nu_D, 'v')):
      expected = GOLDEN[f'{name}/{step}/{key}']
      np.testing.assert_allclose(moment_D, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.usefixtures('exact')
def test_one_example_moves_as_adam():
  rng = np.random.default_rng(0)
  tx = optax.scale_by_adam()
  state = tx.init(jnp.zeros(5))
  mu_D = nu_D = jnp.zeros(5)
  for step in range(1, 5):
    g_D = jnp.asarray(rng.normal(size=5))
    found_1D = normalising.adam(g_D[None], mu_D, nu_D, jnp.int32(step))
    expected_D, state = tx.update(g_D, state)
    np.testing.assert_allclose(found_1D[0], expected_D, rtol=1e-12)
    mu_D, nu_D = normalising.moments(g_D[None], mu_D, nu_D, jnp.ones(1, bool))


def test_moments_stay_where_nothing_was_learned():
  g_ND, old_D = jnp.ones((3, 4)), jnp.arange(4.0)
  found = normalising.moments(g_ND, old_D, 2 * old_D, jnp.zeros(3, bool))
  np.testing.assert_array_equal(found[0], old_D)
  np.testing.assert_array_equal(found[1], 2 * old_D)


def test_each_source_compares_its_own_entries():
  features_ND = jnp.array([[3.0, 0, 1], [3, 0, -1], [0, 2, 9], [1, 2, -9]])
  found = normalising.sparsify(
    features_ND, jnp.array([0, 0, 1, 1]), jnp.ones(4, bool), 2, 1
  )
  np.testing.assert_array_equal(found[:, 0], [3, 3, 2, 2])
  # The last example does not count in its source's mean.
  found = normalising.sparsify(
    features_ND, jnp.array([0, 0, 1, 1]), jnp.array([1, 1, 1, 0], bool), 2, 1
  )
  np.testing.assert_array_equal(found[:, 0], [3, 3, 9, -9])
