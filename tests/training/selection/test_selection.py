"""Batches chosen from pools, step by step, on one device and on four."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.training import objectives, parameters, sharding
from gnlorp_jax.training.selection import features, selection
from gnlorp_jax.training.state import TrainState

POOL, BUDGET, T = 16, 8, 12
RULE = selection.Rule(
  pool=POOL,
  budget=BUDGET,
  small=(2,),
  sources=('web', 'code', 'rare'),
  selector='herding',
  ties='lowest',
  features='exact',
  directions=1,
  adam=False,
  sketch=None,
  top=None,
  rows_at_once=8,
  seed=0,
)
RULES = {
  'random': {'selector': 'random', 'features': None},
  'herding': {},
  'sketched': {'sketch': 64},
  'derivatives': {'features': 'spsa', 'directions': 4},
  'facility': {'selector': 'facility', 'adam': True, 'top': 40},
  'released': {
    'selector': 'facility',
    'adam': True,
    'top': 40,
    'features': 'spsa',
    'ties': 'released',
  },
}


def pool(seed, padding=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 64, (POOL, T + 1), dtype=np.int32)
  weights = np.ones((POOL, T), np.float32)
  weights[POOL - padding :] = 0
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': weights,
    'source': rng.choice(3, POOL, p=[0.6, 0.3, 0.1]).astype(np.int32),
    'seeds': np.arange(POOL, dtype=np.uint32),  # Which row is which.
  }


@pytest.fixture(scope='module')
def state(language_model):
  params = language_model.init(jax.random.key(0))
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, zero, params, {})


@pytest.fixture(scope='module')
def tail(language_model, state):
  return features.Tail(
    objectives.language_model(language_model, chunk_tokens=64).pieces,
    parameters.plain(state.params),
    *(('up', 'kernel'), 40, (32, 24), 2),
  )


def mesh_of(devices):
  return sharding.make_mesh(
    data=devices // 2 or 1,
    fsdp=min(devices, 2),
    devices=jax.devices()[:devices],
  )


@pytest.fixture(scope='module')
def run(tail, state):
  """Takes steps; returns memories, picked rows and facts of each."""
  made = {}

  def steps(name, pools, devices=1, memory=None, **changes):
    key = name, devices, tuple(changes.items())
    if key not in made:
      rule = RULE._replace(**(RULES[name] | changes))
      made[key] = selection.make(rule, tail, mesh_of(devices))
    selected, mesh, found = made[key], mesh_of(devices), []
    memory = selected.start() if memory is None else memory
    if not pools:
      return [memory]
    placed_state = jax.device_put(
      state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    for candidates in pools:
      memory, batch, facts = selected.choose(
        memory, placed_state, sharding.put_batch(candidates, mesh), {}
      )
      found.append((memory, batch, facts))
    return found

  return steps


def rows_of(found):
  return [np.asarray(batch['seeds']).tolist() for _, batch, _ in found]


@pytest.mark.parametrize('name', RULES)
def test_batch_holds_picked_rows_whole_and_every_small_source(run, name):
  candidates = pool(3)
  ((memory, batch, facts),) = run(name, [candidates])
  rows = np.asarray(batch['seeds'])
  assert len(set(rows.tolist())) == BUDGET
  assert 'source' not in batch
  for key, array in batch.items():
    np.testing.assert_array_equal(array, candidates[key][rows])
  is_rare = candidates['source'] == 2
  assert 0 < is_rare.sum() < BUDGET
  assert set(np.flatnonzero(is_rare)) <= set(rows.tolist())
  counts = np.bincount(candidates['source'][rows], minlength=3)
  np.testing.assert_array_equal(memory.picked_S, counts)
  assert [facts[f'picked/{n}'] for n in RULE.sources] == counts.tolist()
  assert sum(facts[f'offered/{n}'] for n in RULE.sources) == POOL


@pytest.mark.parametrize('name', RULES)
def test_a_run_that_goes_on_picks_as_one_that_never_stopped(run, name):
  pools = [pool(seed) for seed in range(4)]
  whole = run(name, pools)
  begun = run(name, pools[:2])
  stored = jax.device_get(begun[-1][0])
  gone_on = run(name, pools[2:], memory=jax.device_put(stored))
  assert rows_of(begun) + rows_of(gone_on) == rows_of(whole)
  jax.tree.map(np.testing.assert_array_equal, gone_on[-1][0], whole[-1][0])
  assert int(whole[-1][0].step) == 4


# Finite differences are noise in their last digits, which decides ties.
@pytest.mark.parametrize('name', ['random', 'herding', 'sketched', 'facility'])
def test_four_devices_pick_what_one_does(run, name):
  pools = [pool(seed) for seed in range(3)]
  assert rows_of(run(name, pools, devices=4)) == rows_of(run(name, pools))


def test_random_choice_differs_from_step_to_step_and_seed_to_seed(run):
  pools = [pool(5), pool(5)]
  first, second = rows_of(run('random', pools))
  (other,) = rows_of(run('random', pools[:1], seed=1))
  assert first != second
  assert first != other


@pytest.fixture(scope='module')
def measured(run, tail, state):
  return jax.jit(
    lambda candidates: selection.measure(
      *(RULE, tail, state.params, {}, run('herding', [])[0], candidates)
    )
  )


def test_facility_compares_steps_of_adam_and_learns_what_it_picks(
  run, measured
):
  pools = [pool(seed) for seed in range(3)]
  # All entries: which are the largest signs is for rounding to say.
  steps = run('facility', pools, top=None)
  mu_F = nu_F = 0.0
  for number, (memory, batch, _) in enumerate(steps, start=1):
    candidates = pools[number - 1]
    features_NF = np.float64(measured(candidates)[0]['features'])
    mu_NF = 0.9 * mu_F + 0.1 * features_NF
    nu_NF = 0.999 * nu_F + 0.001 * features_NF**2
    scale_NF = np.sqrt(nu_NF / (1 - 0.999**number)) + 1e-8
    steps_NF = mu_NF / (1 - 0.9**number) / scale_NF
    rows = np.asarray(batch['seeds'])
    picked = rows[candidates['source'][rows] != 2]
    for source in (0, 1):
      members = np.flatnonzero(candidates['source'] == source)
      found = picked[candidates['source'][picked] == source]
      if len(found) < len(members):  # Otherwise nothing was compared.
        check_gains(steps_NF[members], np.searchsorted(members, found))
    mu_F, nu_F = mu_NF[picked].mean(0), nu_NF[picked].mean(0)
    for name, expected_F in (('mu', mu_F), ('nu', nu_F)):
      np.testing.assert_allclose(
        memory.moments[name], expected_F, rtol=1e-3, atol=1e-7
      )


def check_gains(features_NF, picked):
  """Every pick adds as much to facility location as any would."""
  distance_NN = np.abs(features_NF[:, None] - features_NF[None]).sum(-1)
  similarity_NN = distance_NN.max() - distance_NN
  best_N = np.zeros(len(features_NF))
  for j in picked:
    gains = np.maximum(similarity_NN, best_N[:, None]).sum(0) - best_N.sum()
    assert gains[j] >= (1 - 1e-3) * gains.max()
    best_N = np.maximum(best_N, similarity_NN[:, j])


def test_herding_is_nearer_to_the_mean_than_chance(run, measured):
  for seed in range(4):
    candidates = pool(seed)
    seen = jax.device_get(measured(candidates)[1])
    drawn = RULE._replace(selector='random')
    chance = [selection.decide(drawn, seen, n).error for n in range(20)]
    ((_, _, facts),) = run('herding', [candidates])
    assert facts['relative_error'] < min(chance)


@pytest.mark.parametrize('name', ['herding', 'facility', 'random'])
def test_padding_is_not_picked(run, name):
  candidates = pool(4, padding=6)
  ((_, batch, facts),) = run(name, [candidates])
  assert set(np.asarray(batch['seeds']).tolist()) <= set(range(10))
  assert sum(facts[f'offered/{n}'] for n in RULE.sources) == 10
  # With fewer rows than the batch has, what fills it up counts nothing.
  candidates = pool(4, padding=POOL - 3)
  ((memory, batch, _),) = run(name, [candidates])
  assert set(np.asarray(batch['seeds']).tolist()) == {0, 1, 2}
  counted = np.asarray(batch['weights']).any(axis=1)
  assert counted.tolist() == [True] * 3 + [False] * 5
  assert int(memory.picked_S.sum()) == 3


@pytest.mark.parametrize('name', ['herding', 'facility'])
def test_an_example_without_a_finite_feature_is_left_out_and_counted(run, name):
  candidates = pool(6)
  bad = int(np.flatnonzero(candidates['source'] == 0)[0])
  broken = jax.tree.map(np.copy, candidates)
  broken['weights'][bad, 3] = np.inf
  left_out = jax.tree.map(np.copy, candidates)
  left_out['weights'][bad] = 0
  ((memory, batch, facts),) = run(name, [broken])
  assert bad not in np.asarray(batch['seeds'])
  assert int(memory.not_finite) == facts['not_finite'] == 1
  # The others are chosen as if it were not there.
  assert rows_of([(memory, batch, facts)]) == rows_of(run(name, [left_out]))
  assert all(np.isfinite(m).all() for m in memory.moments.values())


def test_small_sources_without_room_are_counted(run):
  candidates = pool(0) | {'source': np.full(POOL, 2, np.int32)}
  ((_, batch, facts),) = run('random', [candidates])
  assert len(set(np.asarray(batch['seeds']).tolist())) == BUDGET
  assert facts['without_room'] == POOL - BUDGET


def test_without_sources_all_is_of_one(run):
  candidates = pool(1)
  del candidates['source']
  ((_, batch, facts),) = run('herding', [candidates], sources=('text',))
  assert len(set(np.asarray(batch['seeds']).tolist())) == BUDGET
  assert facts['picked/text'] == BUDGET
