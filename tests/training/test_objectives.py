"""A model and its loss: whole, layer by layer, and for evaluation.

Shape suffixes in this file: B sequences, T positions, D features.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.training import losses, objectives, step

B, T, CHUNK = 4, 12, 16


def lm_batch(positions=False):
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(1, 64, (B, T + 1), dtype=np.int32)
  batch = {
    'inputs': tokens_BT[:, :-1],
    'targets': tokens_BT[:, 1:],
    'weights': rng.integers(0, 2, (B, T)).astype(np.float32),
    'seeds': np.arange(7, 7 + B, dtype=np.uint32),
  }
  if positions:
    positions = np.sort(
      rng.permuted(np.tile(np.arange(T), (B, 1)), axis=1)[:, :5]
    )
    batch['positions'] = positions.astype(np.int32)
    batch['targets'] = batch['targets'][:, :5]
    batch['weights'] = np.ones((B, 5), np.float32)
  return batch


def classifier_batch(is_regression):
  rng = np.random.default_rng(1)
  inputs_BT = rng.integers(1, 64, (B, T), dtype=np.int32)
  inputs_BT[:, 8:] = np.where(rng.integers(0, 2, (B, 4)), inputs_BT[:, 8:], 0)
  labels_B = rng.integers(0, 3, B)
  return {
    'inputs': inputs_BT,
    'labels': labels_B.astype(np.float32) if is_regression else labels_B,
    'weights': np.array([1, 1, 1, 0], np.float32),
    'seeds': np.arange(3, 3 + B, dtype=np.uint32),
  }


def layer_by_layer(pieces, params, batch):
  outer = {key: params[key] for key in params if key != 'layers'}
  used = {key: params[key] for key in pieces.embed_keys}
  x_BTD = pieces.embed(used, batch)
  for number in range(2):
    layer = jax.tree.map(lambda w, n=number: w[n], params['layers'])
    x_BTD = pieces.block(layer, x_BTD, batch, jnp.int32(number))
  return pieces.loss(outer, x_BTD, batch)


@pytest.mark.parametrize('positions', [False, True])
@pytest.mark.parametrize('dropout', [False, True])
def test_language_model_is_the_same_layer_by_layer(
  language_model, dropout, positions
):
  params, batch = language_model.init(jax.random.key(0)), lm_batch(positions)
  objective = objectives.language_model(language_model, CHUNK, dropout=dropout)
  expected = objective.loss(params, batch)
  found = layer_by_layer(objective.pieces, params, batch)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  plain = objective.evaluate(params, batch)
  if dropout:
    assert abs(plain[0] - expected[0]) > 1e-4 * expected[0]
  else:
    np.testing.assert_array_equal(plain, expected)


def test_language_model_loss_is_that_of_a_plain_formula(language_model):
  params, batch = language_model.init(jax.random.key(0)), lm_batch(True)
  objective = objectives.language_model(language_model, CHUNK, dropout=True)
  key = step.dropout_key(batch)
  logits_BTV = np.float64(language_model.apply(params, batch['inputs'], key))
  at = np.take_along_axis(logits_BTV, batch['positions'][..., None], axis=1)
  log_z = np.log(np.exp(at).sum(-1))
  chosen = np.take_along_axis(at, batch['targets'][..., None], -1)[..., 0]
  expected = np.sum(batch['weights'] * (log_z - chosen))
  total, count = objective.loss(params, batch)
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  assert count == batch['weights'].sum()


def test_language_model_counts_right_guesses_where_asked(language_model):
  params, batch = language_model.init(jax.random.key(0)), lm_batch(False)
  likeliest_BT = language_model.apply(params, batch['inputs']).argmax(-1)
  batch['targets'] = np.array(batch['targets'])
  batch['targets'][0] = likeliest_BT[0]
  asked = objectives.language_model(language_model, CHUNK, accuracy=True)
  loss, weight, right = asked.evaluate(params, batch)
  np.testing.assert_allclose(
    (loss, weight), asked.loss(params, batch), rtol=1e-6
  )
  is_right_BT = likeliest_BT == batch['targets']
  assert is_right_BT[0].all() and not is_right_BT.all()
  np.testing.assert_allclose(
    right, (batch['weights'] * is_right_BT).sum(), rtol=1e-6
  )


@pytest.mark.parametrize('is_regression', [False, True])
def test_classifier_is_the_same_layer_by_layer(
  sequence_classifier, is_regression
):
  model = sequence_classifier
  if is_regression:
    model = model._replace(
      apply=lambda *args, **key: sequence_classifier.apply(*args, **key)[:, :1],
      layer_fns=model.layer_fns._replace(
        head=lambda *args, **key: sequence_classifier.layer_fns.head(
          *args, **key
        )[:, :1]
      ),
    )
  params = model.init(jax.random.key(0))
  batch = classifier_batch(is_regression)
  objective = objectives.classifier(model, is_regression)
  expected = objective.loss(params, batch)
  found = layer_by_layer(objective.pieces, params, batch)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  outputs_BC = model.apply(params, batch['inputs'], key=step.dropout_key(batch))
  loss_of = losses.squared_error if is_regression else losses.cross_entropy
  by_hand = loss_of(outputs_BC, batch['labels'], batch['weights'])
  np.testing.assert_allclose(expected, by_hand, rtol=1e-6)
  # For evaluation nothing is dropped.
  np.testing.assert_array_equal(
    objective.evaluate(params, batch), model.apply(params, batch['inputs'])
  )


def test_dropout_follows_seeds_and_layers(language_model):
  params, batch = language_model.init(jax.random.key(0)), lm_batch()
  pieces = objectives.language_model(language_model, CHUNK, dropout=True).pieces
  layer = jax.tree.map(lambda w: w[0], params['layers'])
  x_BTD = jnp.ones((B, T, 32))

  def dropped(batch, number):
    return np.asarray(pieces.block(layer, x_BTD, batch, jnp.int32(number)))

  other = batch | {'seeds': batch['seeds'] + np.uint32(1)}
  np.testing.assert_array_equal(dropped(batch, 1), dropped(batch, 1))
  assert np.any(dropped(batch, 1) != dropped(batch, 0))
  assert np.any(dropped(batch, 1) != dropped(other, 1))
