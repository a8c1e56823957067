"""Parameters without elements beside others."""

import jax
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim.parts.empty import skip_empty
from gnlorp_jax.optim.parts.split import SplitTransformation

METHODS = {
  'dct_adamw': lambda: optim.dct_adamw(1e-2, rank=2, error_bits=8),
  'fira': lambda: optim.fira(1e-2, rank=2),
  'galore': lambda: optim.galore(1e-2, rank=2, weight_norm=True),
  'galore_adafactor': lambda: optim.galore_adafactor(1e-2, rank=2),
  'ldadam': lambda: optim.ldadam(1e-2, rank=2),
}


EMPTY = {
  name: {'kernel': np.zeros(shape, np.float32)}
  for name, shape in {'m': (0, 9), 'n': (3, 4, 0)}.items()
}


def tree(seed):
  rng = np.random.default_rng(seed)
  shapes = {'a': {'kernel': (6, 9)}, 'z': {'kernel': (2, 8, 5)}}
  return jax.tree.map(
    lambda shape: rng.standard_normal(shape).astype(np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


@pytest.mark.parametrize('name', METHODS)
def test_they_change_nothing_for_the_others(name, caplog):
  tx = METHODS[name]()

  @jax.jit
  def run(params, grads):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), updates

    carry = params, tx.init(params)
    _, updates = jax.lax.scan(step, carry, length=2)
    return jax.tree.map(lambda u: u[-1], updates)

  found = run(tree(0) | EMPTY, tree(1) | EMPTY)
  expected = run(tree(0), tree(1))
  for key in expected:
    np.testing.assert_array_equal(found[key]['kernel'], expected[key]['kernel'])
  for key in EMPTY:
    np.testing.assert_array_equal(found[key]['kernel'], EMPTY[key]['kernel'])
  assert not caplog.messages  # Their rank is no one's concern.


def test_halves_stay_halves():
  params = {'a': {'kernel': np.ones((6, 9))}, 'm': {'kernel': np.ones((0, 9))}}
  tx = optim.galore(1e-2, rank=2, skip_nonfinite=False)
  assert isinstance(tx, SplitTransformation)
  state = jax.eval_shape(tx.init, params)
  projected, state = jax.eval_shape(tx.project, params, state, params)
  assert projected['low_rank']['m']['kernel'].shape == (0, 9)
  updates, _ = jax.eval_shape(tx.apply, projected, state, params)
  assert jax.tree.map(np.shape, updates) == jax.tree.map(np.shape, params)
  plain = skip_empty(optax.scale_by_adam())
  assert not isinstance(plain, SplitTransformation)
