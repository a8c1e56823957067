"""The other methods against the same oracle, and their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.merging import baselines, methods, thresholds
from tests.merging import golden

LABELS = ('a', 'b', 'c')


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def options(method, **changed):
  return methods.Options(method=method, weights=(1.0,) * 3, **changed)


def run(chosen, tau_N):
  tau_N = np.asarray(tau_N, np.float32)
  found = methods.survey(chosen, ['w'], lambda name: tau_N)
  return methods.update(chosen, found, 'w', LABELS, tau_N)


def test_methods_are_those_of_the_oracle(float64):
  found = golden.arrays()
  tau_NOI = jnp.asarray(found['part/tau'])
  np.testing.assert_allclose(
    baselines.task_arithmetic(tau_NOI, jnp.full(3, 0.3)),
    found['base_ta'],
    rtol=1e-12,
  )
  np.testing.assert_allclose(
    baselines.tsv(tau_NOI, 3), found['base_tsv'], rtol=1e-9, atol=1e-12
  )
  sizes = np.sort(np.abs(found['part/tau']).reshape(3, -1), 1)
  thresholds_N = sizes[:, thresholds.rank(sizes.shape[1], 20)]
  trimmed_N = baselines.trim(tau_NOI, thresholds_N)
  merged = baselines.ties(trimmed_N, jnp.sign(baselines.signs(trimmed_N).sum()))
  np.testing.assert_allclose(
    0.3 * merged.reshape(-1), found['base_ties'], rtol=1e-12
  )


def test_streamed_in_float32_they_agree():
  found = golden.arrays()
  tau_NOI = found['part/tau']
  for method, key, scale in (
    *(('task_arithmetic', 'base_ta', None), ('ties', 'base_ties', 0.3)),
    ('tsv', 'base_tsv', None),
  ):
    merged, _ = run(options(method, scale=scale), tau_NOI)
    wanted = found[key].reshape(merged.shape)
    error = np.linalg.norm(merged - wanted) / np.linalg.norm(wanted)
    assert error < 1e-5, method


def test_a_sum_of_zero_takes_the_majority_sign():
  tau_N = jnp.array([[1.0, 3.0, -2.0], [-1.0, 2.0, -2.0], [0.0, 1.0, 5.0]])
  assert baselines.ties(tau_N, 1.0).tolist() == [1.0, 2.0, 5.0]
  assert baselines.ties(tau_N, -1.0).tolist() == [-1.0, 2.0, 5.0]
  merged, notes = run(options('ties', keep=(100.0,) * 3), tau_N)
  assert merged.tolist() == [1.0, 2.0, 5.0]
  assert notes == {'kept': 1.0}


def test_dare_keeps_the_mean_and_depends_on_names_alone():
  tau = jnp.ones((200, 50))
  key = baselines.key_of(0, 'w', 'a')
  dropped = baselines.dare(tau, 10, key)
  assert set(np.unique(dropped)) == {0, 10}
  assert abs(dropped.mean() - 1) < 0.1
  other = baselines.dare(tau, 10, baselines.key_of(0, 'w', 'b'))
  assert (dropped != other).any()
  tau_N = np.stack([tau, 2 * tau, 4 * tau])
  merged, _ = run(options('dare', scale=1.0), tau_N)
  parts = [
    baselines.dare(
      tau, 10, jax.random.fold_in(baselines.key_of(0, 'w', label), 0)
    )
    for tau, label in zip(tau_N, LABELS, strict=True)
  ]
  np.testing.assert_allclose(merged, sum(parts), rtol=1e-6)


def test_tsv_leaves_out_directions_that_are_not_there():
  rng = np.random.default_rng(0)
  tau_NOI = [
    1e-3 * rng.standard_normal((12, 1)) @ rng.standard_normal((1, 9))
    for _ in range(3)
  ]
  # Whoever is alone comes through whole, though it has one direction of 9.
  alone = np.stack([tau_NOI[0], 0 * tau_NOI[0], 0 * tau_NOI[0]])
  merged, _ = run(options('tsv'), alone)
  np.testing.assert_allclose(merged, tau_NOI[0], atol=1e-8)
  merged, _ = run(options('tsv'), np.stack(tau_NOI))
  assert np.linalg.matrix_rank(merged, 1e-6) == 3


def test_weights_are_not_divided_by_their_sum():
  tau_N = np.ones((3, 4))
  chosen = methods.Options(
    method='task_arithmetic', weights=(1.0, 2.0, 0.0), scale=0.5
  )
  assert run(chosen, tau_N)[0].tolist() == [1.5] * 4


@pytest.mark.parametrize('method', ['ties', 'dare', 'tsv'])
def test_weights_multiply_what_experts_changed(method):
  tau_NOI = 1e-3 * np.random.default_rng(0).standard_normal((3, 6, 9))
  weighted = methods.Options(method=method, weights=(0.0, 3.0, 0.0))
  merged, _ = run(weighted, tau_NOI)
  alone_NOI = tau_NOI * np.array([0, 1, 0])[:, None, None]
  np.testing.assert_allclose(
    merged, 3 * run(options(method), alone_NOI)[0], rtol=1e-4, atol=1e-7
  )


def test_weights_multiply_the_lengths_of_doge():
  tau_NOI = 1e-3 * np.random.default_rng(0).standard_normal((3, 6, 9))
  weighted = methods.Options(
    method='doge', weights=(1.0, 2.0, 0.5), eta=0.07, solver='exact'
  )
  _, notes = run(weighted, tau_NOI)
  lengths = notes['lambda'] * np.linalg.norm(tau_NOI, axis=(1, 2))
  np.testing.assert_allclose(lengths, [0.07, 0.14, 0.035], rtol=1e-5)


@pytest.mark.parametrize('method', ['task_arithmetic', 'ties'])
def test_a_tensor_may_be_merged_in_parts(monkeypatch, method):
  tau_N = np.random.default_rng(0).standard_normal((3, 7, 5))
  whole, _ = run(options(method), tau_N)
  monkeypatch.setattr(methods, '_PART', 8)
  np.testing.assert_allclose(run(options(method), tau_N)[0], whole, rtol=1e-6)


def test_numbers_that_are_not_finite_are_named():
  with pytest.raises(ValueError) as error:
    methods.stack('w', ('a', 'b'), [np.ones(2), np.array([1, np.nan])])
  assert str(error.value) == (
    'w of b differs from the base by numbers that are not finite: one of the '
    'two holds NaN or infinity. Get the folders again, or leave the tensor '
    'alone: --exclude w'
  )
