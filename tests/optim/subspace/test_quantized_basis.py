"""Bases in fewer bits: storage, closeness to float32, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim import gradnormlorp, projections
from gnlorp_jax.optim.inspect import tree_bytes
from gnlorp_jax.optim.subspace.quantized_basis import quantize_basis

SHAPE = (2, 48, 64)


def refreshed(bits, solver='exact'):
  method = quantize_basis(projections.get('svd', solver=solver), bits)
  grad = jax.random.normal(jax.random.key(0), SHAPE)
  basis = method.refresh(grad, method.init(SHAPE, 16, 0), 0)
  return method, grad, basis


@pytest.mark.parametrize(
  ('bits', 'size', 'scales'), [(32, 4, 0), (16, 2, 0), (8, 1, 8), (4, 0.5, 8)]
)
def test_storage(bits, size, scales):
  _, _, basis = refreshed(bits)
  # 64 x 16 entries; scale and zero in float32 for every 256 of them.
  assert tree_bytes(basis) == 2 * (1024 * size + 4 * scales)


@pytest.mark.parametrize(
  # The largest error of a code is half a step of its block: bfloat16 keeps 8
  # bits of an entry, affine codes 8 or 4 of a block's range.
  ('bits', 'error'),
  [(16, 2**-8), (8, 1 / 255), (4, 1 / 15)],
)
def test_stored_basis_is_near_the_exact_one(bits, error):
  _, _, exact = refreshed(32)
  method, _, basis = refreshed(bits)
  found = method.project_back(jnp.eye(16)[None], basis).mT
  assert 0 < jnp.abs(found - exact).max() < error
  gram = found.mT @ found
  np.testing.assert_allclose(
    gram, np.broadcast_to(np.eye(16), gram.shape), atol=4 * error
  )


@pytest.mark.parametrize('bits', [16, 8, 4])
def test_projecting_uses_the_stored_basis_both_ways(bits):
  method, grad, basis = refreshed(bits)
  stored = method.project_back(jnp.eye(16)[None], basis).mT
  low = method.project(grad, basis)
  np.testing.assert_allclose(low, grad @ stored, atol=1e-4)
  np.testing.assert_allclose(
    method.project_back(low, basis), low @ stored.mT, atol=1e-4
  )


def test_power_iteration_goes_on_from_a_stored_basis():
  method = quantize_basis(projections.get('svd'), 4)
  grad = jax.random.normal(jax.random.key(0), SHAPE)
  basis = method.init(SHAPE, 16, 0)
  for count in range(30):
    basis = method.refresh(grad, basis, count)
  best = jnp.linalg.svd(grad, compute_uv=False)[..., :16]
  captured = jnp.sum(method.project(grad, basis) ** 2, axis=(-2, -1))
  assert (captured / jnp.sum(best**2, axis=-1) > 0.97).all()


def test_basis_without_floats_is_an_error():
  tx = gradnormlorp(1e-3, rank=4, projection='dct', basis_bits=4)
  with pytest.raises(ValueError) as error:
    tx.init({'kernel': jnp.zeros((16, 24))})
  assert str(error.value) == (
    "basis_bits=4 has nothing to quantise: this projection keeps ['int32']. "
    'Use basis_bits=32.'
  )


def test_unknown_bits_are_an_error():
  with pytest.raises(ValueError) as error:
    gradnormlorp(1e-3, basis_bits=2)
  assert str(error.value) == 'basis_bits must be 32, 16, 8 or 4, got 2.'
