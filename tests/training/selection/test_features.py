"""Features of examples against a loop of gradients and finite differences.

Shape suffixes: N rows, T positions, D features, F entries of a feature.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.training import objectives, parameters
from gnlorp_jax.training.selection import features

ROWS, T, LAYERS = 4, 12, 2
PATH = ('up', 'kernel')


@pytest.fixture(scope='module')
def params(language_model):
  return language_model.init(jax.random.key(0))


@pytest.fixture(scope='module')
def tail(language_model, params):
  # Many chunks, so that they are tested too.
  pieces = objectives.language_model(language_model, chunk_tokens=8).pieces
  return features.Tail(
    pieces=pieces,
    parameters=parameters.plain(params),
    path=PATH,
    start=40,
    shape=(32, 24),
    num_layers=LAYERS,
  )


def draw(seed, lengths, width=T):
  """Rows of so many learned tokens, then padding of random tokens."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 64, (len(lengths), width + 1), dtype=np.int32)
  weights = np.arange(width)[None] < np.array(lengths)[:, None]
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': weights.astype(np.float32),
  }


BATCH = draw(0, [12, 5, 0, 1])


def input_of(tail, params, batch):
  weights = features.weights_of(tail, params)
  return weights, features.before_last(tail, params, weights, batch)


@pytest.fixture(scope='module')
def exact(tail):
  @jax.jit
  def gradients(params, batch, sketch=None):
    weights, x_BTD = input_of(tail, params, batch)
    return features.exact_gradients(tail, weights, x_BTD, batch, sketch)

  return gradients


@pytest.fixture(scope='module')
def one_by_one(language_model):
  """The gradient of the plain loss of one row by the whole matrix."""

  @jax.jit
  def gradient(params, inputs_T, targets_T, weights_T):
    def loss(kernel):
      up = {'kernel': kernel}
      new = {**params, 'layers': {**params['layers'], 'up': up}}
      logits_TV = language_model.apply(new, inputs_T[None])[0]
      losses_T = jax.nn.logsumexp(logits_TV, axis=-1) - jnp.take_along_axis(
        logits_TV, targets_T[:, None], axis=-1
      ).squeeze(-1)
      return (losses_T * weights_T).sum() / jnp.maximum(weights_T.sum(), 1)

    return jax.grad(loss)(params['layers']['up']['kernel'])

  def of_rows(params, batch):
    rows = zip(
      *(batch[name] for name in ('inputs', 'targets', 'weights')), strict=True
    )
    return np.stack([gradient(params, *row) for row in rows])

  return of_rows


def test_features_are_a_loop_of_gradients(exact, params, one_by_one):
  found_NF = exact(params, BATCH)
  expected = one_by_one(params, BATCH)[:, -1, :, 40:].reshape(ROWS, -1)
  np.testing.assert_allclose(found_NF, expected, rtol=1e-4, atol=1e-7)
  assert not found_NF[2].any()
  assert np.abs(found_NF[3]).max() > 1e-3


def test_features_depend_neither_on_neighbours_nor_on_padding(exact, params):
  found_NF = exact(params, BATCH)
  swapped = jax.tree.map(lambda x: x[::-1], BATCH)
  np.testing.assert_allclose(
    exact(params, swapped)[::-1], found_NF, rtol=1e-5, atol=1e-8
  )
  # Other tokens, and none, behind what is learned.
  other = draw(9, [12, 5, 0, 1], width=T + 4)
  for name in ('inputs', 'targets'):
    for row, length in enumerate([12, 5, 0, 1]):
      other[name][row, :length] = BATCH[name][row, :length]
  np.testing.assert_allclose(
    exact(params, other), found_NF, rtol=1e-4, atol=1e-7
  )


def test_positions_are_where_features_come_from(exact, params):
  order = np.argsort(BATCH['weights'] == 0, axis=1, kind='stable')
  chosen = {
    name: np.take_along_axis(BATCH[name], order, axis=1)
    for name in ('targets', 'weights')
  }
  positions = {'positions': order.astype(np.int32)}
  np.testing.assert_allclose(
    exact(params, BATCH | chosen | positions),
    exact(params, BATCH),
    rtol=1e-4,
    atol=1e-7,
  )


def test_derivatives_are_those_along_the_directions(tail, exact, params):
  key = jax.random.key(1)

  @jax.jit
  def slopes(params):
    weights, x_BTD = input_of(tail, params, BATCH)
    return features.derivatives(tail, weights, x_BTD, BATCH, key, 3)

  found_NM = slopes(params)
  z_MF = np.stack(
    [features.direction(tail, key, jnp.int32(j)).ravel() for j in range(3)]
  )
  expected = exact(params, BATCH) @ z_MF.T
  # Losses of 4 with seven digits, 2 eps apart.
  np.testing.assert_allclose(found_NM, expected, atol=3e-3)
  assert np.abs(expected).max() > 0.1
  found_NF = features.reconstructed(tail, found_NM, key)
  np.testing.assert_allclose(found_NF, found_NM @ z_MF / 3, atol=1e-6)


def test_sketch_is_the_product_with_two_random_matrices(tail, exact, params):
  sketch = features.sketch_of(tail, 64, jax.random.key(2))
  assert [side.shape for side in sketch] == [(32, 8), (24, 8)]
  gradients = exact(params, BATCH).reshape(ROWS, 32, 24)
  expected = np.einsum('ij,nio,ok->njk', sketch[0], gradients, sketch[1])
  found_NF = exact(params, BATCH, sketch)
  np.testing.assert_allclose(
    found_NF, expected.reshape(ROWS, -1), rtol=1e-4, atol=1e-6
  )


def test_inner_products_of_sketches_are_right_on_average(tail):
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 32, 24)) + 0.5
  found = []
  for seed in range(200):
    left, right = features.sketch_of(tail, 256, jax.random.key(seed))
    found.append(np.sum((left.T @ a @ right) * (left.T @ b @ right)))
  error = np.std(found) / 200**0.5
  assert abs(np.mean(found) - np.sum(a * b)) < 4 * error
  assert error < 0.05 * np.sum(a * b)


def test_sketch_that_saves_nothing_is_the_gradient(tail, exact, params):
  sketch = features.sketch_of(tail, 10**6, jax.random.key(0))
  np.testing.assert_allclose(
    exact(params, BATCH, sketch), exact(params, BATCH), rtol=1e-5
  )
