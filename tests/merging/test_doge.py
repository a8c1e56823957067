"""DOGE against its oracle, and the properties that define it.

Shape suffixes in this file: N experts, O and I outputs and inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.merging import doge, methods, thresholds
from tests.merging import golden

UP = 'encoder.layers.0.up.weight'
ETA = 0.07


@pytest.fixture(scope='module', autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def options(**changed):
  return methods.Options(method='doge', weights=(1.0,) * 3, eta=ETA, **changed)


def modification(tau_NOI, eta=ETA, **changed):
  lambda_N = doge.coefficients(tau_NOI, eta)
  return doge.modification(
    jnp.asarray(tau_NOI), lambda_N, num_experts=len(tau_NOI), **changed
  )


def drawn(count=3, shape=(12, 8), scale=2e-3, seed=0):
  return scale * np.random.default_rng(seed).standard_normal((count, *shape))


@pytest.mark.parametrize('variant', golden.VARIANTS)
def test_merged_is_that_of_the_oracle(variant):
  found, taus = golden.arrays(), golden.taus()
  masks = found['code/masks']
  flat = np.concatenate([taus[n].reshape(3, -1) for n in golden.MATRICES], 1)
  # The smallest entry that the oracle keeps is the threshold.
  thresholds_N = np.where(masks, np.abs(flat), np.inf).min(1)
  for name, tau_NOI in taus.items():
    made = modification(tau_NOI, **golden.VARIANTS[variant])
    np.testing.assert_allclose(
      made.delta_OI, found[f'{variant}/delta/{name}'], rtol=1e-6, atol=1e-12
    )
    merged = golden.base()[name] + doge.combine(
      tau_NOI, made.delta_OI, doge.coefficients(tau_NOI, ETA), thresholds_N
    )
    np.testing.assert_allclose(
      merged, found[f'{variant}/merged/{name}'], rtol=1e-9, atol=1e-12
    )


def test_parts_are_those_of_the_oracle():
  found = golden.arrays()
  tau_NOI = jnp.asarray(found['part/tau'])
  lambda_N = doge.coefficients(tau_NOI, ETA)
  np.testing.assert_allclose(lambda_N, found['part/lambda'], rtol=1e-12)
  basis_OR = doge.shared_basis(tau_NOI, 6, 3)
  np.testing.assert_allclose(
    basis_OR @ basis_OR.T, found['part/projector'], atol=1e-12
  )
  loss, gradient_OI = doge.loss_and_gradient(
    tau_NOI, 0 * tau_NOI[0], lambda_N, 'row'
  )
  np.testing.assert_allclose(loss, found['part/loss0'], rtol=1e-12)
  np.testing.assert_allclose(gradient_OI, found['part/gradient0'], rtol=1e-10)
  np.testing.assert_allclose(
    doge.exact(tau_NOI, lambda_N), found['part/exact'], rtol=1e-6, atol=1e-12
  )


@pytest.mark.parametrize('inner', ['row', 'full'])
def test_gradient_is_that_of_jax(inner):
  tau_NOI = jnp.asarray(drawn())
  lambda_N = doge.coefficients(tau_NOI, ETA)
  delta_OI = jnp.asarray(drawn(1, seed=1)[0])

  def loss(delta_OI):
    return doge.loss_and_gradient(tau_NOI, delta_OI, lambda_N, inner)[0]

  np.testing.assert_allclose(
    doge.loss_and_gradient(tau_NOI, delta_OI, lambda_N, inner)[1],
    jax.grad(loss)(delta_OI),
    rtol=1e-9,
  )


@pytest.mark.parametrize('inner', ['row', 'full'])
def test_exact_has_no_loss_and_lies_in_the_span_of_the_task_vectors(inner):
  tau_NOI = drawn()
  made = modification(tau_NOI, solver='exact', project='none', inner=inner)
  assert made.loss_after < 1e-18 * made.loss_before
  for row in range(3):
    rows = tau_NOI[:, row]
    outside = made.delta_OI[row] - np.linalg.pinv(rows) @ (
      rows @ made.delta_OI[row]
    )
    assert np.abs(outside).max() < 1e-12


@pytest.mark.parametrize('project', ['complement', 'subspace'])
def test_conjugate_gradients_find_the_minimum_in_their_part(project):
  tau_NOI = jnp.asarray(drawn())
  made = modification(tau_NOI, solver='exact', project=project, subspace=4)
  lambda_N = doge.coefficients(tau_NOI, ETA)
  basis_OR = doge.shared_basis(tau_NOI, 4, 3)
  inside_OI = basis_OR @ (basis_OR.T @ made.delta_OI)
  gradient_OI = doge.loss_and_gradient(tau_NOI, made.delta_OI, lambda_N, 'row')[
    1
  ]
  start_OI = doge.loss_and_gradient(
    tau_NOI, 0 * made.delta_OI, lambda_N, 'row'
  )[1]
  projected_OI = basis_OR @ (basis_OR.T @ gradient_OI)
  if project == 'complement':
    projected_OI = gradient_OI - projected_OI
    assert jnp.abs(inside_OI).max() < 1e-12
  else:
    np.testing.assert_allclose(inside_OI, made.delta_OI, atol=1e-12)
  assert jnp.abs(projected_OI).max() < 1e-6 * jnp.abs(start_OI).max()
  assert made.loss_after < made.loss_before


def test_without_projection_many_steps_lose_the_loss():
  made = modification(drawn(), project='none', steps=2000)
  assert made.loss_after < 1e-6 * made.loss_before


def test_equal_and_single_experts_are_finite():
  single = drawn(1)
  for tau_NOI in (single, np.repeat(single, 3, 0)):
    for solver in ('adam', 'exact'):
      for project in ('complement', 'none'):
        made = modification(tau_NOI, solver=solver, project=project, steps=20)
        assert jnp.isfinite(made.delta_OI).all()
        assert made.loss_after <= made.loss_before


def test_scaling_task_vectors_eta_and_rate_scales_the_modification():
  tau_NOI, c = drawn(scale=1e-1), 8.0
  one = modification(tau_NOI, 0.3, steps=50, rate=1e-4)
  other = modification(c * tau_NOI, c * 0.3, steps=50, rate=c * 1e-4)
  np.testing.assert_allclose(
    other.delta_OI, c * one.delta_OI, rtol=1e-3, atol=1e-6
  )


def test_an_unchanged_expert_has_no_coefficient_and_the_rest_no_nan():
  tau_NOI = np.array(drawn(), np.float32)
  tau_NOI[1] = 0
  found = methods.survey(options(), ['w'], lambda name: tau_NOI)
  merged, notes = methods.update(
    options(), found, 'w', ['a', 'b', 'c'], tau_NOI
  )
  assert np.isfinite(merged).all()
  assert notes['lambda'][1] == 0
  assert notes['lambda'][0] > 0


@pytest.mark.parametrize('keep', [100.0, 99.9, 30.0, 1.0])
def test_thresholds_are_those_of_a_sort(keep):
  rng = np.random.default_rng(0)
  taus = {
    name: (rng.standard_normal((2, size)) * 10.0**power).astype(np.float32)
    for name, size, power in (('a', 700, -3), ('b', 1, 4), ('c', 299, -38))
  }
  found = methods.survey(
    methods.Options(method='doge', weights=(1.0, 1.0), keep=(keep, 30.0)),
    list(taus),
    taus.__getitem__,
  )
  flat = np.abs(np.concatenate(list(taus.values()), 1))
  for index, percent in enumerate((keep, 30.0)):
    rank = thresholds.rank(1000, percent)
    wanted = 0 if rank is None else np.sort(flat[index])[rank]
    assert found.thresholds_N[index] == wanted
    count = np.count_nonzero(flat[index] >= found.thresholds_N[index])
    assert count == min(1000, int(1000 * percent / 100) + 1)


def test_eta_auto_is_relative_to_the_task_vectors():
  taus = {
    name: np.array(drawn(scale=scale), np.float32)
    for name, scale in (('a', 1e-3), ('b', 2e-3), ('c', 1.0))
  }
  taus['d'] = np.zeros_like(taus['a'])
  auto = methods.Options(method='doge', weights=(1.0,) * 3)
  found = methods.survey(auto, list(taus), taus.__getitem__)
  assert found.eta == pytest.approx(0.3 * found.norms['b'].mean())
