"""Adapters that restart: when they do, what that changes, and what it costs.

Shape suffixes in this file: B rows, D features.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax import optim
from gnlorp_jax.models import adapters
from gnlorp_jax.optim.quantized import weights
from gnlorp_jax.training import parameters, restarts, state, step

LAYERS, FEATURES, RANK = 3, 64, 2
ADAPTER = adapters.AdapterConfig(kind='lora', rank=RANK, alpha=4.0)
PATH = ('layers', 'dense')


def weights_of(layers):
  """What trains, and the base, at random."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(0.15 * rng.normal(size=shape), jnp.float32)

  trained = {
    'head': {'scale': draw(FEATURES)},
    'layers': {
      'dense': {
        'lora_a': draw(layers, FEATURES, RANK),
        'lora_b': jnp.zeros((layers, RANK, FEATURES)),
      }
    },
  }
  base = {'layers': {'dense': {'kernel': draw(layers, FEATURES, FEATURES)}}}
  return trained, base


def outputs(held, params, x_BD):
  params = held.decode(params)
  dense = params['layers']['dense']
  for i in range(dense['kernel'].shape[0]):
    change = (x_BD @ dense['lora_a'][i]) @ dense['lora_b'][i]
    x_BD = x_BD @ dense['kernel'][i] + ADAPTER.scale * change
  return x_BD * params['head']['scale'][None]


def batch(number):
  rng = np.random.default_rng(number)
  return {
    'x': rng.normal(size=(4, FEATURES)).astype(np.float32),
    'y': rng.normal(size=(4, FEATURES)).astype(np.float32),
    'weights': np.ones(4, np.float32),
  }


@functools.cache
def case(bits=None, layers=LAYERS):
  """The weights, the optimizer, and an ordinary step."""
  trained, base = weights_of(layers)
  held = parameters.plain(trained, base)
  if bits is not None:
    base = jax.jit(weights.quantize_weights)(base)
    held = held._replace(
      frozen=base,
      start=lambda key: (trained, base),
      decode=lambda tree: weights.dequantize_weights(tree, 'float32'),
      decode_exact=lambda tree: weights.dequantize_weights(tree, 'float32'),
      store=lambda new, old, number, first: weights.requantize_weights(
        new,
        old,
        jax.random.fold_in(
          jax.random.fold_in(jax.random.key(9), number), first
        ),
      ),
    )

  def loss(trained, batch, base):
    error_BD = outputs(held, held.join(trained, base), batch['x']) - batch['y']
    weight = jnp.sum(batch['weights'])
    return jnp.sum(error_BD**2 * batch['weights'][:, None]), weight

  tx = optim.adamw(1e-2, skip_nonfinite=False)
  return held, tx, step.make_train_step(loss, tx)


def is_factor(path):
  return path.split('/')[-1].startswith('lora_')


def restarting(every, steps, bits=None, how='reset', share=0.9, layers=LAYERS):
  """Restarts, and a state that they can begin with."""
  held, tx, ordinary = case(bits, layers)
  found = restarts.Restarts(
    every=every,
    steps=steps,
    parameters=held,
    layers=(PATH,),
    restart=functools.partial(adapters.restart, ADAPTER),
    prune=lambda opt_state, key: optim.pruning.prune_moments(
      opt_state, held.trained, is_factor, how, share, key
    ),
    seed=5,
  )
  params, nothing = found.held.start(jax.random.key(0))
  assert nothing == {} and found.held.frozen == {}
  params = jax.tree.map(jnp.copy, params)
  zero = jnp.zeros((), jnp.int32)
  opt_state = jax.jit(tx.init)(found.split(params)[0])
  now = state.TrainState(zero, jnp.copy(zero), params, opt_state)
  take = jax.jit(restarts.with_restarts(ordinary, found), donate_argnums=0)
  return found, now, take


def moments(now):
  """The moments of the factors and of the rest."""
  found = {True: [], False: []}
  for path, leaf in jax.tree_util.tree_leaves_with_path(now.opt_state):
    names = [getattr(key, 'name', getattr(key, 'key', '')) for key in path]
    if {'mu', 'nu'} & {*names}:
      found[is_factor(names[-1])].append(np.asarray(leaf))
  assert len(found[True]) == 4 and len(found[False]) == 2
  return found


def to_host(tree):
  return jax.tree.map(np.array, tree)


@functools.cache
def trajectory(bits=None):
  """Seven steps, a restart after every third, on the host."""
  found, now, take = restarting(3, 7, bits)
  states, counts = [to_host(now)], []
  for number in range(1, 8):
    now, metrics = take(now, batch(number), {})
    states.append(to_host(now))
    counts.append(int(metrics['restarts']))
  assert take._cache_size() == 1  # However many restarts there were.
  return found, states, counts


def test_restarts_come_after_every_so_many_updates_but_not_the_last():
  found, states, counts = trajectory()
  assert counts == [0, 0, 1, 1, 1, 2, 2]
  kernels = [s.params['layers']['dense']['kernel'] for s in states]
  moved = [np.any(a != b) for a, b in zip(kernels, kernels[1:], strict=False)]
  assert moved == [False, False, True, False, False, True, False]
  _, now, take = restarting(3, 6)
  for number in range(1, 7):
    now, metrics = take(now, batch(number), {})
  assert int(metrics['restarts']) == 1
  assert np.any(now.params['layers']['dense']['lora_b'])


def test_factors_get_gradients_from_the_first_step():
  """The second one at once, and the first as soon as that is not zero."""
  _, states, _ = trajectory()
  for first in (0, 3, 6):
    a, b = (
      [s.params['layers']['dense'][name] for s in states[first:]]
      for name in ('lora_a', 'lora_b')
    )
    assert not np.any(b[0]) and np.all(np.any(b[1], axis=(1, 2)))
    if first < 6:
      assert np.all(np.any(a[2] != a[1], axis=(1, 2)))


@pytest.mark.parametrize('bits', [None, 8])
def test_function_is_preserved_and_factors_are_new(bits):
  found, states, _ = trajectory(bits)
  held = found.parameters
  # The update alone, which the same step takes that never restarts.
  _, now, take = restarting(100, 200, bits)
  for number in range(1, 4):
    now, _ = take(now, batch(number), {})
  before, after = to_host(now.params), states[3].params
  dense, new = before['layers']['dense'], after['layers']['dense']
  assert not np.any(new['lora_b'])
  drawn = [
    dense['lora_a'],
    new['lora_a'],
    states[6].params['layers']['dense']['lora_a'],
  ]
  assert np.abs(new['lora_a']).max() <= FEATURES**-0.5
  assert all(np.any(x != y) for x, y in zip(drawn, drawn[1:], strict=False))
  assert np.any(new['lora_a'][0] != new['lora_a'][1])
  np.testing.assert_array_equal(after['head']['scale'], before['head']['scale'])
  kernels = [np.asarray(held.decode(x)['kernel']) for x in (dense, new)]
  change = ADAPTER.scale * dense['lora_a'] @ dense['lora_b']
  if bits is None:
    np.testing.assert_allclose(kernels[1], kernels[0] + change, atol=1e-6)
    x_BD = batch(20)['x']
    np.testing.assert_allclose(
      outputs(held, after, x_BD), outputs(held, before, x_BD), atol=1e-5
    )
  else:
    # Rounded at random, by less than a step of the codes; not all one way.
    error = kernels[1] - (kernels[0] + change)
    unit = np.ptp(kernels[1]) / 255
    assert np.abs(error).max() <= 1.01 * unit
    assert np.abs(error.mean()) < 0.1 * unit < np.abs(change).max()


def test_moments_of_factors_are_pruned_and_no_others():
  _, states, _ = trajectory()
  for number in (3, 6):
    found = moments(states[number])
    assert not any(np.any(x) for x in found[True])
    assert all(np.all(x) for x in found[False])
  assert all(np.any(x) for x in moments(states[2])[True])
  counts = [
    int(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(states[6].opt_state)
    if getattr(path[-1], 'name', '') == 'count'
  ]
  assert counts and set(counts) == {6}  # They go on.


def test_share_of_the_moments_that_is_kept_is_exact():
  _, now, take = restarting(1, 3, how='magnitude', share=0.75)
  now, _ = take(now, batch(1), {})
  for x in moments(now)[True]:
    per_matrix = [np.count_nonzero(matrix) for matrix in x]
    # A got no gradient yet.
    assert per_matrix in ([FEATURES * RANK // 4] * LAYERS, [0] * LAYERS)


def test_step_that_is_left_out_neither_restarts_nor_counts():
  _, now, take = restarting(2, 9)
  bad = {**batch(0), 'y': np.full((4, FEATURES), np.nan, np.float32)}
  restarts_so_far, kernels = [], []
  for number in (1, None, 2, None, 3, 4):
    now, metrics = take(now, bad if number is None else batch(number), {})
    restarts_so_far.append(int(metrics['restarts']))
    kernels.append(np.array(now.params['layers']['dense']['kernel']))
  assert restarts_so_far == [0, 0, 1, 1, 1, 2]
  assert np.array_equal(kernels[2], kernels[3])  # Once, not twice.
  assert int(now.skipped) == 2


@pytest.mark.parametrize('bits', [None, 8])
def test_base_is_moved_in_its_place(bits):
  """No copy of a stack, not even of a layer's share in one."""

  def memory(layers):
    found, now, take = restarting(5, 1000, bits, layers=layers)
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(found.parameters.frozen))
    return take.lower(now, batch(0), {}).compile().memory_analysis(), base

  def usual(layers):
    held, tx, ordinary = case(bits, layers)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(tx.init, held.trained)
    now = state.TrainState(scalar, scalar, held.trained, opt_state)
    step = jax.jit(ordinary, donate_argnums=0)
    return step.lower(now, batch(0), held.frozen).compile().memory_analysis()

  (few, base), (many, _) = memory(3), memory(9)
  few_usual, many_usual = usual(3), usual(9)
  # All that is given is given back, where it was.
  assert few.alias_size_in_bytes >= few_usual.alias_size_in_bytes + base
  grown = many.temp_size_in_bytes - few.temp_size_in_bytes
  grown -= many_usual.temp_size_in_bytes - few_usual.temp_size_in_bytes
  # New factors wait for their place; kernels do not, even in 8 bits.
  assert grown / 6 < FEATURES**2 / 2
