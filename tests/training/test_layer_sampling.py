"""Which layers are drawn, and which slots they take.

Shape suffixes in this file: L layers, S slots.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gnlorp_jax.training import layer_sampling
from gnlorp_jax.training.layer_sampling import LayerSampling

KEY = jax.random.key(3)


def draws(sampling, periods):
  def draw(period):
    return layer_sampling.draw(sampling, KEY, period)

  return np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(periods)))


def probabilities(weights, count):
  """Of each set, drawn one after the other without replacement."""
  found = {}
  for order in itertools.permutations(range(len(weights)), count):
    p, rest = 1.0, sum(weights)
    for layer in order:
      p, rest = p * weights[layer] / rest, rest - weights[layer]
    chosen = tuple(sorted(order))
    found[chosen] = found.get(chosen, 0.0) + p
  return found


@pytest.mark.parametrize('weights', [None, (4.0, 3.0, 2.0, 1.0)])
def test_draws_have_the_probabilities_of_drawing_in_turn(weights):
  sampling = LayerSampling(num_layers=4, layers=2, every=1, weights=weights)
  number = 20_000
  found = [tuple(row) for row in draws(sampling, number)]
  expected = probabilities(weights or (1.0,) * 4, 2)
  counts = [found.count(chosen) for chosen in expected]
  assert sum(counts) == number  # Distinct and in order.
  result = scipy.stats.chisquare(
    counts, [number * p for p in expected.values()]
  )
  assert result.pvalue > 1e-3


def test_layers_without_weight_are_never_drawn():
  sampling = LayerSampling(
    num_layers=4, layers=2, every=1, weights=(1.0, 0.0, 2.0, 0.5)
  )
  assert set(draws(sampling, 500).flat) == {0, 2, 3}


@pytest.mark.parametrize('layers', [1, 2])
def test_shuffled_layers_have_their_turn_once_a_round(layers):
  sampling = LayerSampling(
    num_layers=6, layers=layers, every=1, draw='shuffled'
  )
  rounds = draws(sampling, 60).reshape(-1, 6)
  np.testing.assert_array_equal(
    np.sort(rounds), np.tile(range(6), (10 * layers, 1))
  )
  assert len({tuple(row) for row in rounds}) > 5


def test_periods_begin_every_so_many_steps():
  plain = LayerSampling(num_layers=2, layers=1, every=3)
  short = LayerSampling(
    num_layers=2, layers=1, every=3, first_period_short=True
  )
  steps = np.arange(7)
  assert plain.period(steps).tolist() == [0, 0, 0, 1, 1, 1, 2]
  assert short.period(steps).tolist() == [0, 0, 1, 1, 1, 2, 2]
  assert np.asarray(plain.step_in_period(steps)).tolist() == [
    0,
    1,
    2,
    0,
    1,
    2,
    0,
  ]
  assert np.asarray(short.step_in_period(steps)).tolist() == [
    0,
    1,
    0,
    1,
    2,
    0,
    1,
  ]


def test_layers_that_stay_keep_their_slots():
  def seat(now, drawn):
    found = layer_sampling.seat(jnp.array(now), jnp.array(drawn), 6)
    return [x.tolist() for x in found]

  assert seat([-1, -1, -1], [1, 3, 5]) == [[1, 3, 5], [False] * 3]
  assert seat([1, 3, 5], [0, 3, 4]) == [[0, 3, 4], [False, True, False]]
  assert seat([5, 0, 2], [0, 1, 2]) == [[1, 0, 2], [False, True, True]]
  assert seat([2, 0, 1], [0, 1, 2]) == [[2, 0, 1], [True] * 3]
  slots_L = layer_sampling.slot_of_layer(jnp.array([5, 0, 2]), 6)
  assert slots_L.tolist() == [1, -1, 2, -1, -1, 0]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'layers': 0}, 'layers=0 cannot be drawn of 4'),
    ({'layers': 5}, 'give a number from 1 to 4'),
    ({'every': 0}, 'every=0 is the number of steps of a period'),
    ({'every': 1, 'first_period_short': True}, 'give at least 2'),
    (
      {'warmup_steps': 5},
      'warmup_steps=5 must be shorter than a period, every=5',
    ),
    ({'draw': 'upwards'}, "draw='upwards' must be one of"),
    ({'on_leave': 'sell'}, "on_leave='sell' must be one of"),
    ({'layers': 3, 'draw': 'shuffled'}, 'layers=3 does not divide 4 layers'),
    ({'draw': 'shuffled', 'weights': (1.0,) * 4}, 'weights have no effect'),
    ({'weights': (1.0,) * 3}, '3 weights do not fit 4 layers'),
    ({'weights': (1.0, -1.0, 1.0, 1.0)}, 'finite and not negative'),
    ({'weights': (1.0, 0.0, 0.0, 0.0)}, 'to be drawn, and 1 have a weight'),
  ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    LayerSampling(**{'num_layers': 4, 'layers': 2, 'every': 5} | options)
