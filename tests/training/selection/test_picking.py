"""Facility location, herding and what frames them.

Shape suffixes: N examples, D entries of a feature.
"""

import importlib.util
import itertools

import numpy as np
import pytest

from gnlorp_jax.training.selection import picking

GOLDEN = np.load('tests/golden/colm.npz')


def l1(features_ND):
  return np.abs(features_ND[:, None] - features_ND[None]).sum(-1)


def value(similarity_NN, picked):
  return similarity_NN[:, list(picked)].max(1).sum() if len(picked) else 0.0


def cases():
  rng = np.random.default_rng(0)
  for _ in range(20):
    n = int(rng.integers(5, 30))
    yield l1(rng.normal(size=(n, 3))), int(rng.integers(1, n))


# Facility location.


def test_picks_are_those_of_the_oracle():
  picked = picking.facility(l1(GOLDEN['fl/X']), 4)
  np.testing.assert_array_equal(picked, GOLDEN['fl/picks'])
  for ties, name in (('lowest', 'low'), ('released', 'high')):
    picked = picking.facility(l1(GOLDEN['ties/X']), 3, ties)
    np.testing.assert_array_equal(picked, GOLDEN[f'ties/{name}'])


def assert_every_pick_gains_most(similarity_NN, picked):
  for i, j in enumerate(picked):
    before = list(picked[:i])
    gains = [
      value(similarity_NN, [*before, k]) - value(similarity_NN, before)
      for k in range(len(similarity_NN))
    ]
    assert gains[j] >= max(gains) - 1e-9 * max(gains)


@pytest.mark.parametrize('ties', ['lowest', 'released'])
def test_every_pick_attains_the_largest_gain(ties):
  for distance_NN, count in cases():
    picked = picking.facility(distance_NN, count, ties)
    assert len(set(picked)) == count
    assert_every_pick_gains_most(distance_NN.max() - distance_NN, picked)


def test_value_is_near_that_of_the_best_subset():
  rng = np.random.default_rng(1)
  for _ in range(5):
    distance_NN = l1(rng.normal(size=(9, 2)))
    similarity_NN = distance_NN.max() - distance_NN
    best = max(
      value(similarity_NN, subset)
      for subset in itertools.combinations(range(9), 3)
    )
    found = value(similarity_NN, picking.facility(distance_NN, 3))
    assert (1 - 1 / np.e) * best <= found <= best + 1e-9


def picks_of_submodlib(similarity_NN, count):
  from submodlib.functions.facilityLocation import FacilityLocationFunction

  found = FacilityLocationFunction(
    n=len(similarity_NN), mode='dense', sijs=similarity_NN, separate_rep=False
  ).maximize(budget=count, optimizer='LazyGreedy', show_progress=False)
  return [j for j, _ in found]


def picks_of_apricot(similarity_NN, count):
  from apricot import FacilityLocationSelection

  found = FacilityLocationSelection(count, 'precomputed', optimizer='naive')
  return found.fit(similarity_NN).ranking.tolist()


# submodlib is the library of the release.
@pytest.mark.parametrize(
  ('library', 'picks'),
  [('submodlib', picks_of_submodlib), ('apricot', picks_of_apricot)],
)
def test_picks_of_libraries_are_greedy_too_and_worth_the_same(library, picks):
  if importlib.util.find_spec(library) is None:
    pytest.skip(f'{library} is not installed')
  for distance_NN, count in cases():
    similarity_NN = distance_NN.max() - distance_NN
    theirs = picks(similarity_NN, count)
    assert_every_pick_gains_most(similarity_NN, theirs)
    ours = picking.facility(distance_NN, count, 'released')
    found = value(similarity_NN, ours)
    np.testing.assert_allclose(found, value(similarity_NN, theirs), rtol=1e-3)


# The frame.


def frame(source_N, can_N, small=(), budget=4, seed=0):
  rng = np.random.default_rng(seed)
  return picking.frame(
    *(np.array(source_N), np.array(can_N, bool), small, budget, 3, rng)
  )


def test_small_sources_are_kept_and_the_rest_is_shared_out():
  found = frame([0, 1, 1, 2, 1, 0, 1, 0, 0], [1] * 9, small=(2,), budget=5)
  np.testing.assert_array_equal(found.kept, [3])
  np.testing.assert_array_equal(found.quotas_S, [2, 2, 0])
  assert found.surplus == 0


def test_what_cannot_be_picked_has_no_share():
  found = frame([0, 0, 0, 1, 1, 2], [1, 1, 1, 0, 0, 0], small=(2,))
  assert not len(found.kept)
  np.testing.assert_array_equal(found.quotas_S, [3, 0, 0])


def test_too_many_kept_examples_are_drawn_among():
  drawn = {
    tuple(frame([2] * 6 + [0], [1] * 7, (2,), 4, seed).kept)
    for seed in range(20)
  }
  assert len(drawn) > 5
  assert all(len(set(kept)) == 4 and 6 not in kept for kept in drawn)
  found = frame([2] * 6 + [0], [1] * 7, (2,), 4)
  assert found.surplus == 2
  assert not found.quotas_S.any()


def test_one_example_of_a_source():
  found = frame([0, 1, 2], [1, 1, 1], budget=2)
  picked = picking.by_source(
    *(found, np.array([0, 1, 2]), np.ones(3, bool)),
    lambda members, quota: members[:quota],
  )
  assert len(picked) == found.quotas_S.sum() == 2


# Herding.


def mean_error(features_ND, taken, pool):
  mean_D = features_ND[pool].mean(0)
  difference_D = features_ND[list(taken)].mean(0) - mean_D
  return np.linalg.norm(difference_D) / np.linalg.norm(mean_D)


def drawn(seed, n=24):
  rng = np.random.default_rng(seed)
  features_ND = rng.normal(size=(n, 6)) + 0.3
  source_N = rng.choice(3, n, p=[0.5, 0.35, 0.15])
  can_N = rng.random(n) < 0.9
  return features_ND, source_N, can_N


@pytest.mark.parametrize('seed', range(5))
def test_every_pick_brings_the_mean_nearest(seed):
  features_ND, source_N, can_N = drawn(seed)
  found = frame(source_N, can_N, small=(2,), budget=10)
  picked = picking.herding(features_ND @ features_ND.T, source_N, can_N, found)
  counts_S = np.bincount(source_N[picked], minlength=3)
  np.testing.assert_array_equal(counts_S, found.quotas_S)
  taken, left_S = list(found.kept), found.quotas_S.copy()
  for j in picked:
    allowed = [
      k for k in np.flatnonzero(can_N) if left_S[source_N[k]] and k not in taken
    ]
    errors = [mean_error(features_ND, [*taken, k], can_N) for k in allowed]
    assert j == allowed[int(np.argmin(errors))]
    taken.append(j)
    left_S[source_N[j]] -= 1


def test_herding_matches_better_than_chance_and_facility_location():
  errors = {'herding': [], 'random': [], 'facility': []}
  for seed in range(8):
    features_ND, source_N, _ = drawn(seed, 60)
    can_N, gram_NN = np.ones(60, bool), features_ND @ features_ND.T
    found = frame(source_N, can_N, budget=30)
    rng = np.random.default_rng(seed)
    taken = {
      'herding': picking.herding(gram_NN, source_N, can_N, found),
      'random': picking.by_source(
        *(found, source_N, can_N),
        lambda members, quota, rng=rng: picking.at_random(members, quota, rng),
      ),
      'facility': picking.by_source(
        *(found, source_N, can_N),
        lambda members, quota, x=features_ND: members[
          picking.facility(l1(x[members]), quota)
        ],
      ),
    }
    for name, picked in taken.items():
      error = picking.relative_error(gram_NN, can_N, picked)
      expected = mean_error(features_ND, picked, can_N)
      np.testing.assert_allclose(error, expected, rtol=1e-6)
      errors[name].append(error)
  means = {name: np.mean(found) for name, found in errors.items()}
  assert means['herding'] < 0.5 * min(means['random'], means['facility'])
