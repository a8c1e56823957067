"""From a folder and text to scores."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import layer_scores
from gnlorp_jax.recipes.layer_scores import data, recipe
from gnlorp_jax.recipes.layer_scores.settings import (
  THRESHOLDS,
  LayerScoresConfig,
)
from gnlorp_jax.training import objectives
from tests.compose import small_lm

TEXT = 'A model of two layers reads these words, and nothing is trained.\n' * 3


@pytest.fixture(scope='module')
def make(tmp_path_factory):
  """The settings of a measurement of the small model."""
  path = tmp_path_factory.mktemp('files')
  folder = small_lm.write(path / 'small')
  (path / 'words.txt').write_text(TEXT)

  def config(**options):
    return LayerScoresConfig(
      folder=folder,
      data=str(path / 'words.txt'),
      cache_dir=str(path / 'cache'),
      **{'length': 16, 'sequences': 3, 'batch_size': 2, **options},
    )

  return config


@pytest.fixture(scope='module')
def params():
  return small_lm.model()[1]


@contextlib.contextmanager
def silent(title):
  yield lambda done, total: None


@pytest.fixture(scope='module')
def found(make):
  titles = []

  @contextlib.contextmanager
  def progress(title):
    calls = []
    yield lambda *call: calls.append(call)
    titles.append((title, calls))

  config = make(measure='outliers,gradient_norm')
  found = recipe.measure(config, progress)
  assert titles == [
    ('Inputs of the matrices', [(0, 2), (1, 2), (2, 2)]),
    ('Gradients', [(0, 2), (1, 2), (2, 2)]),
  ]
  return found


@pytest.fixture(scope='module')
def batches(make):
  tokenizer = small_lm.tokenizer()
  return data.load(make(), tokenizer, 16, small_lm.CONFIG.vocab_size).batches


@pytest.fixture(scope='module')
def exact(batches, params):
  """Outliers of all sequences in one batch."""
  model, _ = small_lm.model()
  rows = np.concatenate([b['inputs'][b['is_token'].any(1)] for b in batches])
  squares = jax.jit(
    lambda *args: layer_scores.input_squares(model, params, *args)
  )(rows, np.ones(rows.shape, bool))
  kernels = layer_scores.kernels_of(params)
  return layer_scores.outlier_shares(kernels, squares, THRESHOLDS)


def test_scores_are_the_outliers_of_all_batches(found, exact):
  shares = found['all']['outliers']
  assert list(shares) == ['3', '5', '7', '10', '13']
  # As many weights, one more or less for a rounding at the threshold.
  np.testing.assert_allclose(list(shares.values()), exact[0], atol=0.02)
  assert found['scores'] == tuple(shares['5'])
  assert any(found['scores'])
  assert found['kind'] == 'outliers'
  assert (found['sequences'], found['length'], found['tokens']) == (3, 16, 48)
  assert list(found['all']) == ['outliers', 'gradient_norm']


def test_gradients_are_those_of_the_mean_loss_of_a_batch(
  found, batches, params
):
  loss = objectives.language_model(small_lm.model()[0], 1024).loss

  @jax.jit
  @jax.grad
  def gradient(params, batch):
    total, weight = loss(params, batch)
    return total / weight

  squares = []
  for batch in batches:
    kept = {k: jnp.asarray(batch[k]) for k in ('inputs', 'targets', 'weights')}
    grads = layer_scores.kernels_of(gradient(params, kept))
    squares.append(
      sum(
        np.sum(np.asarray(g, np.float64) ** 2, (1, 2)) for g in grads.values()
      )
    )
  np.testing.assert_allclose(
    found['all']['gradient_norm'], np.mean(squares, axis=0), rtol=1e-4
  )


def test_a_threshold_that_finds_nothing_is_refused(make, found, exact):
  config = make(measure='outliers', threshold=1e6)
  with pytest.raises(ValueError) as error:
    recipe.measure(config, silent)
  shares = {k: np.array(v) for k, v in found['all']['outliers'].items()}
  best = [name for name, values in shares.items() if values.any()][-1]
  assert str(error.value) == (
    'threshold=1e+06 finds no weight that stands out in any layer: all scores '
    'would be 0, and no layer could be drawn. The largest is '
    f'{exact[1].max():.3g} times the mean of its layer. Use a smaller '
    f'--threshold, such as {best}, which finds some in '
    f'{(shares[best] > 0).sum()} layers.'
  )


def test_scores_of_spectra_are_one_over_their_exponents(make, params):
  found = recipe.measure(make(kind='hill', measure='weight_norm'), silent)
  assert list(found['all']) == ['weight_norm', 'hill']
  kernels = layer_scores.kernels_of(params)
  np.testing.assert_allclose(
    found['all']['hill'], layer_scores.hill_exponents(kernels), rtol=1e-5
  )
  np.testing.assert_allclose(
    found['scores'], 1 / np.array(found['all']['hill'])
  )


def test_what_the_model_cannot_read_is_refused(make):
  with pytest.raises(ValueError) as error:
    recipe.measure(make(length=129), silent)
  assert str(error.value) == (
    'length=129 must be in [2, 128], what the model accepts.'
  )


def test_measures_that_are_no_numbers_are_refused(make, monkeypatch):
  values = np.array([1.0, np.inf])
  monkeypatch.setattr(recipe.layer_scores, 'weight_norms', lambda _: values)
  with pytest.raises(ValueError) as error:
    recipe.measure(make(kind='weight_norm', measure=''), silent)
  assert str(error.value) == (
    'The weight_norm of layer 1 is inf, which is no score: its weights, or '
    'what they read, are not finite, or a matrix of it is 0. Check the model, '
    'or name what to measure by --measure.'
  )


def test_layers_that_are_never_drawn_are_named(make, monkeypatch, caplog):
  values = np.array([1.0, 0.0])
  monkeypatch.setattr(recipe.layer_scores, 'weight_norms', lambda _: values)
  recipe.measure(make(kind='weight_norm', measure=''), silent)
  assert caplog.messages == [
    'The layers [1] have the score 0: they will never be drawn.'
  ]
