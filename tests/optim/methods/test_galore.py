"""GaLore against its formulas; see also test_galore_torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import galore, projections

EXACT = {
  'projection': projections.get('svd', solver='exact'),
  'spread_refreshes': False,
}


def test_galore_follows_the_published_formula():
  # Float64 transcription of the method, bases from NumPy's SVD, until the
  # second refresh (signs of singular vectors are arbitrary from there on).
  rng = np.random.default_rng(0)
  w, *grads = rng.normal(size=(5, 8, 12)).astype(np.float32)
  params = {'kernel': jnp.asarray(w)}
  options = {'rank': 3, 'update_proj_gap': 4, 'scale': 0.25}
  tx = galore(1e-2, weight_decay=0.1, **options, **EXACT)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for grad in grads:
    updates, state = update({'kernel': jnp.asarray(grad)}, state, params)
    params = optax.apply_updates(params, updates)
  w = w.astype(np.float64)
  m = v = 0.0
  for t in range(1, 5):
    g = grads[t - 1].astype(np.float64)
    if t == 1:  # 8 x 12 as (in, out): `in` is compressed.
      basis = np.linalg.svd(g.T)[2][:3].T
    low = g.T @ basis
    m = 0.9 * m + 0.1 * low
    v = 0.999 * v + 0.001 * low**2
    direction = (m / (np.sqrt(v) + 1e-6)) @ basis.T
    step = 1e-2 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * 0.25 * direction.T
    w = (w - step) * (1 - 1e-2 * 0.1)
  np.testing.assert_allclose(params['kernel'], w, atol=1e-6)


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'b1': 1.0}, 'b1 must be in [0, 1), got 1.0.'),
    (
      {'projection': 3},
      f'projection must be a Projection or one of {projections.names()}, got '
      '3.',
    ),
  ],
)
def test_bad_argument_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    galore(1e-2, **options)
  assert str(error.value) == text
