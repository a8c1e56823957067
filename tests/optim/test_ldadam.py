"""LDAdam against its formulas in float64, and what its state promises."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import inspect, ldadam, scale_by_ldadam
from gnlorp_jax.optim.quantization import QuantizedArray, dequantize
from gnlorp_jax.training import sharding

LR, B1, B2, EPS, RHO, DECAY = 0.01, 0.908, 0.99, 1e-8, 0.908, 0.1
SHAPES = [(6, 9), (9, 6), (6, 6)]


def normal(shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def qr(x):
  """QR with a positive diagonal of R."""
  q, r = np.linalg.qr(x)
  return q * np.sign(np.diagonal(r))


class Reference:
  """The published update in float64, in PyTorch's layout (out, in)."""

  def __init__(self, weight, first_basis, error_feedback):
    self.w = np.array(weight, np.float64)
    # Left where out <= in, square ones included.
    self.left = self.w.shape[0] <= self.w.shape[1]
    self.first = np.array(first_basis, np.float64)
    self.feedback = error_feedback
    self.error = np.zeros_like(self.w)
    self.k = 0

  def step(self, grad):
    a = np.array(grad, np.float64) + self.feedback * self.error
    a = a if self.left else a.T
    if self.k == 0:
      p, old = self.first, np.zeros_like(self.first)
      m = v = np.zeros((p.shape[1], a.shape[1]))
    else:
      old, m, v = self.p, self.m, self.v
      b = RHO * old @ m / (1 - B1**self.k) + (1 - RHO) * a
      p = qr(b @ (b.T @ old))
    g, c = p.T @ a, p.T @ old
    rotated = c @ m
    error = a - p @ g + B1 / (1 - B1) * (old @ m - p @ rotated)
    self.error = error if self.left else error.T
    if self.k > 0:
      c1, c2 = 1 - B1**self.k, 1 - B2**self.k
      v = c2 * np.abs(c**2 @ (v / c2 - m**2 / c1**2) + rotated**2 / c1**2)
    self.k += 1
    self.m = B1 * rotated + (1 - B1) * g
    self.v = B2 * v + (1 - B2) * g**2
    self.p = p
    step = (self.m / (1 - B1**self.k)) / (
      np.sqrt(self.v / (1 - B2**self.k)) + EPS
    )
    step = p @ step
    self.w = (1 - LR * DECAY) * self.w
    self.w = self.w - LR * (step if self.left else step.T)


def only_subspace(state):
  is_subspace = lambda node: hasattr(node, 'refresh_count')  # noqa: E731
  leaves = jax.tree.leaves(state, is_leaf=is_subspace)
  (subspace,) = [leaf for leaf in leaves if is_subspace(leaf)]
  return subspace


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('error_feedback', [True, False])
def test_follows_the_published_update(shape, error_feedback):
  w_IO = normal(shape)
  grads = normal((12, *shape), 1)
  tx = ldadam(LR, 3, error_feedback=error_feedback, weight_decay=DECAY)
  params = {'dense': {'kernel': w_IO}}
  state = tx.init(params)
  update = jax.jit(tx.update)
  reference = None
  for grad in grads:
    updates, state = update({'dense': {'kernel': grad}}, state, params)
    params = optax.apply_updates(params, updates)
    if reference is None:
      ((axis, basis),) = only_subspace(state).basis.items()
      assert axis == ('out' if shape[1] <= shape[0] else 'in')
      reference = Reference(w_IO.T, basis, error_feedback)
    reference.step(grad.T)
  np.testing.assert_allclose(
    params['dense']['kernel'], reference.w.T, rtol=0, atol=1e-5
  )
