"""An optimizer in two halves: what each does, and both together."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim.parts.split import SplitTransformation

RANK = {'rank': 4, 'update_proj_gap': 2, 'skip_nonfinite': False}
HALVES = {
  'dct_adamw': functools.partial(optim.dct_adamw, error_bits=None, **RANK),
  'galore': functools.partial(optim.galore, weight_decay=0.1, **RANK),
  'galore_adafactor': functools.partial(optim.galore_adafactor, **RANK),
  'gradnormlorp': functools.partial(
    optim.gradnormlorp, norm_state='tracked', **RANK
  ),
  'heads': functools.partial(
    optim.gradnormlorp, kernel_axes=[('up', 1, 2)], **RANK
  ),
  'both sides': functools.partial(
    optim.gradnormlorp, side='both', moments_on_refresh='reset', **RANK
  ),
  'lazy': functools.partial(
    optim.q_galore,
    basis_bits=32,
    moment_bits=32,
    lazy_refresh=optim.LazyRefresh(threshold=-1.0, queue=1),
    **RANK,
  ),
  'vlorp': functools.partial(optim.vlorp, granularity=2, **RANK),
}
every_half = pytest.mark.parametrize('name', HALVES)


def tree(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    'down': {'kernel': jax.random.normal(keys[0], (3, 12, 8))},
    'norm': {'scale': jax.random.normal(keys[1], (3, 8))},
    'up': {'kernel': jax.random.normal(keys[2], (8, 2, 6))},
  }


def optimizer(name):
  labels = [('norm', 'full'), ('up' if name == 'heads' else 'down', 'low_rank')]
  return HALVES[name](1e-2, param_labels=[*labels, ('.*', 'full')])


@every_half
def test_both_halves_are_the_update(name):
  tx, params = optimizer(name), tree(0)
  assert isinstance(tx, SplitTransformation)
  update, project, apply = map(jax.jit, (tx.update, tx.project, tx.apply))
  whole = halves = tx.init(params)
  for seed in range(1, 6):
    grads = tree(seed)
    expected, whole = update(grads, whole, params)
    projected, halves = project(grads, halves, params)
    updates, halves = apply(projected, halves, params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8)
    jax.tree.map(close, updates, expected)
    jax.tree.map(close, halves, whole)
    params = optax.apply_updates(params, updates)


@every_half
def test_the_first_half_is_linear_once_bases_are_fitted(name):
  tx, params = optimizer(name), tree(0)
  _, state = jax.jit(tx.project)(tree(1), tx.init(params), params)
  later = jax.jit(functools.partial(tx.project, due=False))

  def project(grads):
    projected, after = later(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    return projected

  a, b = tree(2), tree(3)
  both = project(jax.tree.map(lambda x, y: 2 * x - y, a, b))
  jax.tree.map(
    lambda s, x, y: np.testing.assert_allclose(s, 2 * x - y, atol=2e-5),
    both,
    project(a),
    project(b),
  )


def test_bases_are_fitted_to_the_total():
  tx, params = optimizer('galore'), tree(0)
  state = tx.init(params)
  a, b = tree(1), tree(2)
  both = jax.tree.map(jnp.add, a, b)
  _, expected = jax.jit(tx.project)(both, state, params)

  @functools.partial(jax.vmap, axis_name='data')
  def project(grads):
    total = functools.partial(jax.lax.psum, axis_name='data')
    return tx.project(grads, state, params, total=total)

  # Two devices, each with its own gradient.
  _, found = jax.jit(project)(
    jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b)
  )
  for device in range(2):
    jax.tree.map(
      lambda x, y, d=device: np.testing.assert_allclose(x[d], y, atol=1e-5),
      found,
      expected,
    )


def test_it_is_a_pair_of_functions_as_all_of_optax():
  tx, params = optimizer('galore'), tree(0)
  init, update = tx
  assert (init, update) == (tx.init, tx.update)
  assert isinstance(tx, optax.GradientTransformationExtraArgs)
  assert optax.with_extra_args_support(tx) is tx
  # The halves come along with the update, in every copy.
  for same in (copy.copy(tx), tx._replace(init=init), type(tx)(*tx)):
    assert same == tx
    assert same.project_fn is tx.project_fn
    assert same.apply is tx.apply
  injected = optax.inject_hyperparams(
    lambda learning_rate: HALVES['galore'](learning_rate)
  )(learning_rate=1e-2)
  for whole in (tx, optax.chain(optax.identity(), tx), injected):
    state = jax.eval_shape(whole.init, params)
    updates, after = jax.eval_shape(
      whole.update, params, state, params, value=1
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize('name', ['adamw', 'apollo', 'fira', 'ldadam'])
def test_optimizers_that_need_the_gradient_have_no_halves(name):
  tx = getattr(optim, name)(1e-2, skip_nonfinite=False)
  assert not hasattr(tx, 'project')
