"""GaLore against the public PyTorch package, side by side."""

import jax
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import galore, projections

torch = pytest.importorskip('torch')
projector = pytest.importorskip('galore_torch.galore_projector')
GaLoreAdamW = pytest.importorskip('galore_torch').GaLoreAdamW

RANK, GAP, STEPS = 3, 4, 10
# At a refresh U^T G V is diagonal: off it Adam would divide rounding by
# rounding, were its eps (1e-6 by default) not far above.
EPS = 1e-3
# Their name of a type of projection, and our side for a matrix (out, in).
SIDES = {
  'std': 'short',
  'reverse_std': 'long',
  'left': 'out',
  'right': 'in',
  'full': 'both',
}


def with_positive_signs(basis, axis):
  """Singular vectors along `axis`, the largest entry of each positive."""
  index = basis.abs().argmax(axis, keepdim=True)
  return basis * basis.gather(axis, index).sign()


@pytest.fixture
def normalised_signs(monkeypatch):
  """Their bases with our signs; which ones LAPACK returns is arbitrary."""
  original = projector.GaLoreProjector.get_orthogonal_matrix

  def normalised(self, weights, rank, type):
    found = original(self, weights, rank, type)
    if type == 'full':
      left, right = found
      return [with_positive_signs(left, 0), with_positive_signs(right, 1)]
    return with_positive_signs(found, {'left': 0, 'right': 1}[type])

  monkeypatch.setattr(
    projector.GaLoreProjector, 'get_orthogonal_matrix', normalised
  )


def theirs(w, grads, proj_type):
  param = torch.nn.Parameter(torch.tensor(w))
  group = {
    'params': [param],
    'rank': RANK,
    'update_proj_gap': GAP,
    'scale': 0.25,
    'proj_type': proj_type,
  }
  optimizer = GaLoreAdamW(
    [group],
    lr=0.01,
    eps=EPS,
    weight_decay=0.1,
    no_deprecation_warning=True,
  )
  weights = []
  for grad in grads:
    param.grad = torch.tensor(grad)
    optimizer.step()
    weights.append(param.detach().numpy().copy())
  return np.stack(weights)


def ours(w, grads, proj_type):
  tx = galore(
    0.01,
    RANK,
    GAP,
    0.25,
    projection=projections.get('svd', solver='exact'),
    side=SIDES[proj_type],
    spread_refreshes=False,
    eps=EPS,
    weight_decay=0.1,
  )

  def step(carry, grad):
    params, state = carry
    updates, state = tx.update({'kernel': grad}, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params['kernel']

  @jax.jit
  def train(params, grads):
    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

  return np.asarray(train({'kernel': w.T}, grads.mT)).mT


@pytest.mark.parametrize('shape', [(6, 9), (9, 6), (6, 6)])
@pytest.mark.parametrize('proj_type', SIDES)
def test_weights_follow_galore_torch(proj_type, shape, normalised_signs):
  rng = np.random.default_rng(1)
  w = rng.standard_normal(shape).astype(np.float32)
  grads = rng.standard_normal((STEPS, *shape)).astype(np.float32)
  expected = theirs(w, grads, proj_type)
  found = ours(w, grads, proj_type)
  assert np.abs(expected[-1] - w).max() > 1e-2  # It moved at all.
  # Over three bases, in float32 on both sides.
  np.testing.assert_allclose(found, expected, atol=3e-6, rtol=0)
