"""VLoRP and ProjFactor against their formulas in NumPy's float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.inspect import report, state_bytes
from gnlorp_jax.optim.methods.projfactor import (
  Factors,
  factored_root,
  projfactor,
)
from gnlorp_jax.optim.methods.vlorp import vlorp
from gnlorp_jax.optim.quantized.arrays import QuantizedArray
from gnlorp_jax.optim.subspace.low_rank import LowRankState

ALIASES = {'vlorp': vlorp, 'projfactor': projfactor}
PROJECT = jax.jit(projections.get('random').project)
LR, WD, B1, B2, EPS = 0.01, 0.1, 0.9, 0.999, 1e-6


def normal(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def low_rank_state(opt_state):
  (state,) = (
    node
    for node in jax.tree.leaves(
      opt_state, is_leaf=lambda node: isinstance(node, LowRankState)
    )
    if isinstance(node, LowRankState)
  )
  return state


def random_matrix(opt_state):
  """P of the kernel 'kernel' as it is in the state, float64, [n / c, r]."""
  (basis,) = low_rank_state(opt_state).subspace['kernel'].basis.values()
  basis = dataclasses.replace(basis, length=basis.size)
  eye = np.eye(basis.size, dtype=np.float32)
  return np.asarray(PROJECT(eye, basis), np.float64)


class Oracle:
  """The published step of one turned matrix [m, n]; P comes from outside."""

  def __init__(self, weight_MN, method, granularity, scale):
    self.w = np.array(weight_MN, np.float64)
    self.method, self.granularity, self.scale = method, granularity, scale
    self.m = self.v = self.t = 0
    self.v_r = self.v_c = 0

  def step(self, grad_MN, p):
    m, n = self.w.shape
    c = self.granularity
    back = lambda x: np.reshape(x @ p.T, (m, n))  # noqa: E731
    low = np.reshape(grad_MN.astype(np.float64), (round(m * c), -1)) @ p
    self.t += 1
    self.m = B1 * self.m + (1 - B1) * low
    size = LR * np.sqrt(1 - B2**self.t) / (1 - B1**self.t)
    if self.method == 'vlorp':
      self.v = B2 * self.v + (1 - B2) * low**2
      update = back(self.m / (np.sqrt(self.v) + EPS))
    else:
      square = back(low) ** 2
      self.v_r = B2 * self.v_r + (1 - B2) * square.sum(1)
      self.v_c = B2 * self.v_c + (1 - B2) * square.sum(0)
      v = np.outer(self.v_r, self.v_c) / self.v_r.sum()
      update = back(self.m) / (np.sqrt(v) + EPS)
    self.w = self.w - size * self.scale * update
    self.w = self.w - LR * WD * self.w


@pytest.mark.parametrize(
  ('method', 'shape', 'side', 'granularity', 'rank'),
  [
    ('vlorp', (8, 12), 'in', 4, 1),
    ('vlorp', (8, 12), 'out', 1 / 2, 3),
    ('projfactor', (8, 12), 'in', 4, 1),
    ('projfactor', (12, 8), 'out', 2, 2),
    ('projfactor', (8, 8), 'in', 1 / 4, 5),
  ],
)
def test_steps_equal_the_formulas(method, shape, side, granularity, rank):
  scale = 0.5
  tx = ALIASES[method](
    *(LR, rank, 4, scale),
    granularity=granularity,
    side=side,
    spread_refreshes=False,
    weight_decay=WD,
  )
  params = {'kernel': normal(shape, 1)}
  turn = (lambda x: x) if side == 'out' else np.transpose
  oracle = Oracle(
    turn(np.asarray(params['kernel'])), method, granularity, scale
  )
  state = jax.jit(tx.init)(params)
  update = jax.jit(tx.update)
  matrices = []
  for t in range(10):  # The random matrix changes at steps 1, 5 and 9.
    grad = normal(shape, 10 + t)
    updates, state = update({'kernel': grad}, state, params)
    params = {'kernel': params['kernel'] + updates['kernel']}
    matrices.append(random_matrix(state))
    oracle.step(turn(np.asarray(grad)), matrices[-1])
    np.testing.assert_allclose(
      turn(params['kernel']), oracle.w, rtol=0, atol=2e-6
    )
  changed = (np.diff(matrices, axis=0) != 0).any(axis=(1, 2)).tolist()
  assert changed == [False, False, False, True] * 2 + [False]


def test_formulas_hold_for_every_matrix_of_a_stack():
  # At one seed per matrix; the second moments do not see other matrices.
  tx = projfactor(LR, granularity=4, spread_refreshes=False)
  params = {'kernel': normal((3, 8, 12))}
  updates, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
  state = low_rank_state(state)
  factors = state.recovery['kernel']
  assert factors.row.dtype == factors.col.dtype == jnp.float32
  assert factors.row.shape == (3, 12)
  assert factors.col.shape == (3, 8)
  basis = state.subspace['kernel'].basis['in']
  method = projections.get('random', granularity=4)
  there_and_back = jax.jit(
    lambda grad: method.project_back(method.project(grad, basis), basis)
  )
  back = np.asarray(there_and_back(params['kernel'].mT), np.float64)
  for i in range(3):
    square = back[i] ** 2
    v = np.outer(square.sum(1), square.sum(0)) / square.sum()
    # At the first step both moments lose their averages' factors but for eps.
    expected = -LR * back[i] / (np.sqrt(v) + EPS / np.sqrt(1 - B2))
    np.testing.assert_allclose(
      updates['kernel'][i].T, expected, rtol=1e-4, atol=1e-7
    )


def test_other_parameters_take_adam():
  params = {'bias': np.ones(3, np.float32), 'kernel': normal((4, 4))}
  grads = {**params, 'bias': np.float32([1e-3, 1.0, -2.0])}
  for eps_mode, tx in (
    ('hf', vlorp(LR, granularity=2)),
    ('standard', projfactor(LR, granularity=2)),
  ):
    updates, _ = jax.jit(lambda g, p, tx=tx: tx.update(g, tx.init(p), p))(
      grads, params
    )
    grad = np.asarray(grads['bias'], np.float64)
    eps = EPS / np.sqrt(1 - B2) if eps_mode == 'hf' else EPS
    expected = -LR * grad / (np.abs(grad) + eps)
    np.testing.assert_allclose(updates['bias'], expected, rtol=1e-5)


def test_factored_root_neither_over_nor_underflows():
  for scale in (1e-16, 1.0, 1e16):
    square = np.square(np.asarray(normal((5, 4)), np.float64)) * scale**2
    row, col = square.sum(1), square.sum(0)
    factors = Factors(np.float32(row), np.float32(col))
    expected = np.sqrt(np.outer(row, col) / row.sum())
    actual = jax.jit(factored_root)(factors)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize('name', ALIASES)
def test_zero_gradients_give_zero_updates_and_then_recover(name):
  tx = ALIASES[name](LR, granularity=4)
  params = {'kernel': normal((2, 8, 12))}
  state = jax.jit(tx.init)(params)
  update = jax.jit(tx.update)
  zero, some = jax.tree.map(np.array, (params, params))
  zero['kernel'][0] = 0
  some['kernel'][0, 1:] = some['kernel'][0, :, 1:] = 0
  for _ in range(2):  # All of one matrix, then rows and columns of it.
    updates, state = update(zero, state, params)
    np.testing.assert_array_equal(updates['kernel'][0], 0)
    assert np.isfinite(updates['kernel']).all()
  for _ in range(2):
    updates, state = update(some, state, params)
    assert np.isfinite(updates['kernel']).all()
  assert np.abs(updates['kernel'][0]).max() > 0


@pytest.mark.parametrize('name', ALIASES)
def test_bfloat16_parameters_keep_float32_state(name):
  tx = ALIASES[name](LR, granularity=4)
  params = {'kernel': normal((8, 12)).astype(jnp.bfloat16)}
  updates, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
  assert updates['kernel'].dtype == jnp.bfloat16
  assert np.isfinite(updates['kernel']).all()
  for leaf in jax.tree.leaves(state):
    assert leaf.dtype != jnp.bfloat16


def descend(tx, target, steps):
  def step(_, carry):
    params, state = carry
    grads = {'kernel': params['kernel'] - target}
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  @jax.jit
  def fit(params):
    return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))

  params, state = fit({'kernel': np.zeros_like(target)})
  return float(np.mean((params['kernel'] - target) ** 2)), state


@pytest.mark.parametrize(
  ('name', 'distribution'),
  [('vlorp', 'rademacher'), ('projfactor', 'normal')],
)
def test_regression_descends(name, distribution):
  target = normal((3, 16, 24))
  tx = ALIASES[name](
    *(0.02, 1, 5, 1.0), granularity=4, distribution=distribution
  )
  # One direction out of four at a time, and a new one every five steps.
  loss, _ = descend(tx, target, 800)
  assert loss < 0.02 * float(np.mean(target**2))


@pytest.mark.parametrize('name', ALIASES)
def test_moments_of_eight_bits_descend_alike(name):
  # 64 x 256 / 4 coordinates a matrix: enough for the codes to be used.
  target = normal((64, 256))
  options = {'granularity': 16, 'update_proj_gap': 5, 'scale': 1.0}
  exact, _ = descend(ALIASES[name](0.02, **options), target, 60)
  loss, state = descend(
    ALIASES[name](0.02, moment_bits=8, **options), target, 60
  )
  state = low_rank_state(state)
  mu = state.inner_state.mu['kernel']
  assert isinstance(mu, QuantizedArray)
  assert mu.codes.shape == (256 * 16, 1)
  if name == 'projfactor':
    assert state.recovery['kernel'].row.dtype == jnp.float32
  assert exact < 0.9
  np.testing.assert_allclose(loss, exact, rtol=0.02)


def test_state_has_the_documented_size():
  params = {'kernel': jax.ShapeDtypeStruct((12, 512, 1376), jnp.float32)}
  tx = projfactor(1e-3)
  state = state_bytes(jax.eval_shape(tx.init, params))
  assert state['moments'] == 12 * 4 * (1376 * 64 + 512 + 1376)
  assert state['bases'] == 12 * 4
  (row,) = report(params, tx)
  assert (row.rank, row.side) == (1, 'in')
  state = state_bytes(jax.eval_shape(vlorp(1e-3).init, params))
  assert state['moments'] == 12 * 4 * 2 * 1376 * 64


@pytest.mark.parametrize(
  ('make', 'text'),
  [
    (
      lambda: projfactor(1e-3, side='both'),
      "side='both' leaves no whole axis, along which this method's recovery "
      "compares gradient and coordinates: use 'short', 'long', 'in' or 'out'.",
    ),
    (lambda: projfactor(1e-3, b2=1.0), 'b2 must be in [0, 1), got 1.0.'),
    (lambda: projfactor(1e-3, b1=1.0), 'b1 must be in [0, 1), got 1.0.'),
    (lambda: projfactor(1e-3, eps=-1.0), 'eps must be in [0, inf), got -1.0.'),
    (
      lambda: vlorp(1e-3, granularity=1.5),
      'granularity must be a positive integer or one over an integer, such as '
      '4 or 1/4, got 1.5.',
    ),
  ],
)
def test_bad_option_is_an_error(make, text):
  with pytest.raises(ValueError) as error:
    make()
  assert str(error.value) == text
