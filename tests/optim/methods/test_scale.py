"""SCALE against its formulas in float64, and which kernel is a head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim import inspect, scale
from gnlorp_jax.optim.quantized.arrays import QuantizedArray

RATE, B1, B2, EPS, DECAY, STEPS = 0.1, 0.8, 0.99, 1e-8, 0.02, 4
SHAPES = {
  'embed': {'embedding': (6, 4)},
  'layers': {'up': {'kernel': (2, 4, 5), 'bias': (2, 5)}},
  'lm_head': {'kernel': (4, 6)},
}


def random_tree(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: rng.standard_normal(shape).astype(np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


PARAMS, GRADS = random_tree(0), [random_tree(1 + i) for i in range(STEPS)]


def columns(grad):
  """The paper's C: every column, an output unit, divided by its length."""
  return grad / np.linalg.norm(grad, axis=-2, keepdims=True)


def expected(name, param, grads):
  """A parameter after all steps, in float64, from the paper's algorithm."""
  w, m, v = np.float64(param), 0.0, 0.0
  for t, grad in enumerate(map(np.float64, grads), 1):
    m = B1 * m + (1 - B1) * grad
    v = B2 * v + (1 - B2) * grad**2
    # Columns of length root n_in, as the public code has them.
    if name == 'lm_head/kernel':
      step = np.sqrt(w.shape[-2]) * columns(m)
    elif name == 'layers/up/kernel':
      step = np.sqrt(w.shape[-2]) * columns(grad)
    else:
      step = (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
    w = (1 - RATE * DECAY) * w - RATE * step
  return w


def leaves(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_steps_are_those_of_the_formulas(stepped):
  tx = scale(RATE, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
  params, _ = stepped(tx, PARAMS, GRADS)
  for name, found in leaves(params).items():
    wanted = expected(
      name, leaves(PARAMS)[name], [leaves(grad)[name] for grad in GRADS]
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6, err_msg=name)


def test_state_is_a_heads_moment_and_adams():
  rules = [('kernel', 'low_rank'), ('.*', 'full')]
  for labels in (None, rules):
    tx = scale(RATE, param_labels=labels)
    rows = {r.name: r for r in inspect.report(PARAMS, tx, labels)}
    found = {name: (row.label, row.state_bytes) for name, row in rows.items()}
    # A head has its moment whatever it is labelled, and of float32.
    assert found == {
      'embed/embedding': ('full', 8 * 24),
      'layers/up/bias': ('full', 8 * 10),
      'layers/up/kernel': ('low_rank', 0),
      'lm_head/kernel': ('full' if labels is None else 'low_rank', 4 * 24),
    }
  # Frozen parameters are told from those without a state.
  frozen = [('up/kernel', 'frozen'), ('.*', 'full')]
  (row,) = (
    r
    for r in inspect.report(PARAMS, scale(RATE, param_labels=frozen))
    if r.name == 'layers/up/kernel'
  )
  assert row.label == 'frozen'


def test_both_labels_of_a_head_make_the_same_steps(stepped):
  rules = [('kernel', 'low_rank'), ('.*', 'full')]
  params, _ = stepped(scale(RATE), PARAMS, GRADS)
  again, _ = stepped(scale(RATE, param_labels=rules), PARAMS, GRADS)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_head_of_out_by_in_is_the_same_head(stepped):
  params = {'lm_head': {'kernel': PARAMS['lm_head']['kernel']}}
  grads = [{'lm_head': {'kernel': g['lm_head']['kernel']}} for g in GRADS]

  def turned(tree):
    return {'lm_head': {'weight': tree['lm_head']['kernel'].T}}

  moved, _ = stepped(scale(RATE), params, grads)
  found, _ = stepped(scale(RATE), turned(params), [turned(g) for g in grads])
  np.testing.assert_allclose(
    found['lm_head']['weight'], moved['lm_head']['kernel'].T, rtol=1e-6
  )


def test_moment_of_a_head_may_be_of_8_bits():
  params = {'lm_head': {'kernel': jnp.ones((64, 64))}}
  state = jax.eval_shape(scale(RATE, moment_bits=8).init, params)
  nodes = jax.tree.leaves(
    state, is_leaf=lambda x: isinstance(x, QuantizedArray)
  )
  (codes,) = (x for x in nodes if isinstance(x, QuantizedArray))
  assert codes.shape == (64, 64)


def test_vectors_are_no_kernels():
  with pytest.raises(ValueError, match="'bias' of shape .* Label it 'full'"):
    scale(RATE, param_labels=[('', 'low_rank')]).init({'bias': jnp.ones(3)})
