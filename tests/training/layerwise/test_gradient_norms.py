"""Norms of gradients layer by layer against jax.grad of the whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.training.layerwise import gradient_norms


@pytest.fixture(scope='module')
def squared_norms(toy):
  return jax.jit(lambda *args: gradient_norms.squared_norms(toy.PIECES, *args))


def test_norms_are_those_of_the_whole_gradient(toy, squared_norms):
  params = toy.init(layers=2)
  norms = params['layers'].pop('norm')
  trained = {'layers': params.pop('layers')}
  frozen = {**params, 'layers': {'norm': norms}}
  batch = toy.make_batch(1)

  @jax.grad
  def gradient(trained):
    total, weight = toy.whole_loss(trained, batch, frozen, layers=2)
    return total / weight

  grads = jax.jit(gradient)(trained)['layers']
  found = squared_norms(trained, frozen, batch)
  assert found.dtype == jnp.float32
  for layer in range(2):
    arrays = [np.asarray(g[layer], np.float64) for g in jax.tree.leaves(grads)]
    assert len(arrays) == 2
    wanted = sum(np.sum(array**2) for array in arrays)
    np.testing.assert_allclose(found[layer], wanted, rtol=1e-5)
  # A batch that counts nothing has no gradient.
  batch['weights'] *= 0
  np.testing.assert_array_equal(squared_norms(trained, frozen, batch), 0)
