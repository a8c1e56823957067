"""The released optimizer against trajectories recorded from PyTorch."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.methods.released import released_gradnormlorp
from gnlorp_jax.optim.projections import Projection

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden'
MATRICES = ('wide', 'tall', 'square', 'wide_reverse', 'decay')


def recorded_projection(basis_TNR, gap):
  """SVD's products with the bases that PyTorch found, one per refresh."""
  basis_TNR = jnp.asarray(basis_TNR)
  svd = projections.get('svd')

  def refresh(grad_MN, basis, count):
    return jnp.broadcast_to(basis_TNR[count // gap * gap], basis.shape)

  return Projection(svd.init, refresh, svd.project, svd.project_back)


def run(case):
  """Weights after each step, in PyTorch's layout."""
  z = np.load(GOLDEN / f'gradnormlorp_released_{case}.npz')
  is_matrix = z['w0'].ndim == 2
  name = 'kernel' if is_matrix else 'scale'
  gap = int(z['hp_gap'])
  rank = int(z['hp_rank']) if case in MATRICES else 1
  options = {}
  if case in MATRICES:
    basis_TNR = z['projector']
    if basis_TNR.shape[1] < basis_TNR.shape[2]:  # A right basis is r x n.
      basis_TNR = basis_TNR.transpose(0, 2, 1)
    options = {
      'projection': recorded_projection(basis_TNR, gap),
      'side': {'std': 'short', 'reverse_std': 'long'}[str(z['hp_proj'])],
    }
  label = 'low_rank' if case in MATRICES else 'full'
  tx = released_gradnormlorp(
    float(z['hp_lr']),
    rank,
    gap,
    float(z['hp_scale']),
    weight_decay=float(z['hp_wd']),
    param_labels=[('.*', label)],
    **options,
  )

  def step(carry, grad):
    params, state = carry
    updates, state = tx.update({name: grad}, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params[name]

  @jax.jit
  def train(params, grads):
    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

  turned = (lambda x: x.mT) if is_matrix else np.asarray
  weights = train({name: z['w0'].T}, turned(z['grads']))
  return turned(np.asarray(weights)), z['weights']


@pytest.mark.parametrize('case', [*MATRICES, 'full_rank', 'vector'])
def test_released_follows_pytorch_over_two_refreshes(case):
  ours, theirs = run(case)
  assert np.abs(theirs[-1] - theirs[0]).max() > 1e-2  # It moved at all.
  np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


def test_released_undoes_changes_made_to_the_weights():
  tx = released_gradnormlorp(0.0, rank=2)
  kernel = np.random.default_rng(0).standard_normal((6, 4))
  params = {'kernel': kernel.astype(np.float32)}

  @jax.jit
  def restore(params):
    state = tx.init(params)
    touched = {'kernel': params['kernel'] * 2}
    updates, _ = tx.update(params, state, touched)
    return optax.apply_updates(touched, updates)['kernel']

  restored = restore(params)
  np.testing.assert_allclose(restored, params['kernel'], rtol=1e-6)


def test_released_turns_a_zero_parameter_into_nan():
  tx = released_gradnormlorp(1e-2, rank=2)
  params, grads = ({'bias': np.full(4, x, np.float32)} for x in (0, 1))
  updates, _ = jax.jit(lambda p, g: tx.update(g, tx.init(p), p))(params, grads)
  assert np.isnan(updates['bias']).all()
