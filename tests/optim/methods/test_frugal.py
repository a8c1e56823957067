"""FRUGAL against its formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim import frugal, inspect, projections

RATE, SCALE, SIGN, B1, B2, EPS, GAP = 0.1, 0.5, 0.3, 0.8, 0.9, 1e-8, 3
EXACT = projections.get('svd', solver='exact')


def leading(grad, rank):
  """Left singular vectors with the signs that are agreed on here."""
  basis = np.linalg.svd(grad)[0][:, :rank]
  largest = basis[np.abs(basis).argmax(0), np.arange(rank)]
  return basis * np.sign(largest)


def reference(w, grads, rank):
  """For gradients [m, n], m <= n; Adam begins anew with every basis."""
  w = np.float64(w)
  for step, grad in enumerate(map(np.float64, grads)):
    if step % GAP == 0:
      p, m, v, t = leading(grad, rank), 0.0, 0.0, 0
    low, t = p.T @ grad, t + 1
    m = B1 * m + (1 - B1) * low
    v = B2 * v + (1 - B2) * low**2
    adam = (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
    rest = grad - p @ low
    w = w - RATE * SCALE * (p @ adam + SIGN * np.sign(rest))
  return w


def test_steps_are_those_of_the_formulas(stepped):
  rng = np.random.default_rng(0)
  w, *grads = rng.standard_normal((6, 5, 8)).astype(np.float32)
  tx = frugal(
    RATE,
    2,
    GAP,
    SCALE,
    sign_scale=SIGN,
    b1=B1,
    b2=B2,
    eps=EPS,
    projection=EXACT,
    spread_refreshes=False,
  )
  params, _ = stepped(tx, {'kernel': w}, [{'kernel': g} for g in grads])
  np.testing.assert_allclose(
    params['kernel'], reference(w, grads, 2), rtol=0, atol=2e-6
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_roundings_inside_the_subspace_have_no_sign(dtype):
  rng = np.random.default_rng(1)
  grad = np.outer(rng.standard_normal(6), rng.standard_normal(9))
  grad = {'kernel': jnp.asarray(grad, dtype)}
  tx = frugal(RATE, 2, sign_scale=1e3, update_dtype=jnp.float32)
  updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g), g))(grad)
  assert np.abs(updates['kernel']).max() < 1


def test_entries_without_a_gradient_rest():
  grad = np.random.default_rng(2).standard_normal((6, 9)).astype(np.float32)
  grad[:, 3] = grad[2] = 0
  tx = frugal(RATE, 2)
  updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g), g))({'kernel': grad})
  rest = np.abs(updates['kernel'])
  # What Adam's direction has there comes from a basis that is nearly zero.
  assert rest[:, 3].max() < 0.02 and rest[2].max() < 0.02
  assert np.median(rest) > 0.05


def test_state_is_galores():
  params = {'kernel': jax.ShapeDtypeStruct((3, 24, 16), jnp.float32)}
  (row,) = inspect.report(params, frugal(RATE, 4))
  # Two moments of m r, a basis of n r, four numbers about refreshes, a count.
  assert row.state_bytes == 4 * 3 * (2 * 24 * 4 + 16 * 4 + 4 + 1)


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'sign_scale': -1.0}, 'sign_scale must be in [0, inf), got -1.0.'),
    *(
      (
        {'projection': projection},
        'What a projection whose bases are not orthonormal, such as random '
        'ones, leaves of a gradient is mostly noise, whose sign frugal would '
        "follow. Use 'svd' or 'dct'.",
      )
      for projection in ('random', projections.get('random'))
    ),
  ],
)
def test_bad_option_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    frugal(RATE, **options)
  assert str(error.value) == text
