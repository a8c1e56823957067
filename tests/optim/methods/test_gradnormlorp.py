"""What makes GradNormLoRP itself; see also test_conformance."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import adamw, gradnormlorp, inspect, projections
from gnlorp_jax.optim.subspace.sides import Subspace

EXACT = {
  'projection': projections.get('svd', solver='exact'),
  'spread_refreshes': False,
}


def make_params(dtype=jnp.float32):
  shapes = {
    'embed': {'embedding': (20, 8)},
    'layers': {
      'attn': {'kernel': (3, 8, 8)},
      'mlp': {'kernel': (3, 8, 12), 'bias': (3, 12)},
    },
  }
  leaves, treedef = jax.tree.flatten(
    shapes, is_leaf=lambda s: isinstance(s, tuple)
  )
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return treedef.unflatten(
    [jax.random.normal(k, s, dtype) for k, s in zip(keys, leaves, strict=True)]
  )


def grads_at(step, params):
  key = jax.random.fold_in(jax.random.key(7), step)
  return jax.tree.map(
    lambda p: jax.random.normal(
      jax.random.fold_in(key, p.size), p.shape, p.dtype
    ),
    params,
  )


def run(tx, params, steps, grads=grads_at):
  state = tx.init(params)
  update = jax.jit(tx.update)
  for step in steps:
    updates, state = update(grads(step, params), state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_gradnormlorp_follows_the_written_formula():
  # Float64 transcription of the exact form, bases from NumPy's SVD, until the
  # second refresh: g and v have an Adam each.
  w = np.asarray(make_params()['layers']['mlp']['kernel'][0], np.float64)
  params = {'kernel': jnp.asarray(w, jnp.float32)}
  options = {'rank': 3, 'update_proj_gap': 4, 'scale': 0.25}
  ours = run(gradnormlorp(1e-2, **options, **EXACT), params, range(4))
  m = v = mg = vg = 0.0
  for t in range(1, 5):
    grad = np.asarray(grads_at(t - 1, params)['kernel'], np.float64)
    g = np.linalg.norm(w, axis=0, keepdims=True)
    u = w / g
    dg = (grad * u).sum(axis=0, keepdims=True)
    dv = grad - u * dg
    if t == 1:
      basis = np.linalg.svd(dv.T)[2][:3].T
    low = dv.T @ basis
    m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
    mg, vg = 0.9 * mg + 0.1 * dg, 0.999 * vg + 0.001 * dg**2
    rate = 1e-2 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    new_v = w - rate * 0.25 * ((m / (np.sqrt(v) + 1e-6)) @ basis.T).T
    new_g = g - rate * mg / (np.sqrt(vg) + 1e-6)
    w = new_g * new_v / np.linalg.norm(new_v, axis=0, keepdims=True)
  np.testing.assert_allclose(ours['kernel'], w, atol=1e-6)


def test_a_users_flax_module_trains():
  model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(1)])
  x = jax.random.normal(jax.random.key(0), (64, 8))
  y = jnp.sin(x.sum(axis=1, keepdims=True))
  params = model.init(jax.random.key(1), x)
  tx = gradnormlorp(1e-2, rank=4, update_proj_gap=3)

  def loss(params):
    return jnp.mean((model.apply(params, x) - y) ** 2)

  grad = jax.jit(jax.grad(loss))
  new = run(tx, params, range(150), lambda _, p: grad(p))
  assert loss(new) < 0.5 * loss(params)


def test_gradnormlorp_holds_less_state_than_adamw():
  params = {'kernel': jnp.zeros((4, 256, 512))}
  size = {
    name: inspect.tree_bytes(jax.eval_shape(tx.init, params))
    for name, tx in {
      'adamw': adamw(1e-3),
      'ours': gradnormlorp(1e-3, rank=32),
    }.items()
  }
  # 2 n r moments and m r basis of 2 m n, plus two vectors per matrix.
  assert size['ours'] < 0.17 * size['adamw']


def test_rank_that_projects_nothing_is_a_warning(caplog):
  with caplog.at_level(logging.WARNING):
    gradnormlorp(1e-2, rank=4).init({'table': jnp.ones((8, 8))})
  assert caplog.messages == [
    'No parameter is labelled low_rank: none is treated as a kernel, and what '
    'is said of kernels (such as rank) has no effect. See param_labels, and '
    'report() for the reasons.'
  ]


def test_state_takes_shardings_of_the_parameters_by_map_params():
  # As in the guide: what the labels leave out has no parameter to go with.
  params = make_params()
  tx = gradnormlorp(1e-2, rank=4)
  names = jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path), params
  )
  state = optax.tree.map_params(
    tx,
    lambda part, name: name,
    tx.init(params),
    names,
    transform_non_params=lambda _: None,
    is_leaf=lambda x: isinstance(x, (optax.MaskedNode, Subspace)),
  )
  low_rank = state.inner_state.inner_states['low_rank'].inner_state
  projected = low_rank.direction[0]
  expected = names['layers']['attn']['kernel']
  for tree in (projected.subspace, projected.inner_state.mu):
    assert tree['layers']['attn']['kernel'] == expected


@pytest.mark.parametrize(
  ('build', 'text'),
  [
    (lambda: gradnormlorp(1e-2, rank=0), 'rank must be at least 1, got 0.'),
    (lambda: gradnormlorp(1e-2, b1=1.0), 'b1 must be in [0, 1), got 1.0.'),
    (
      lambda: gradnormlorp(1e-2, weight_decay=-1),
      'weight_decay must be in [0, inf), got -1.',
    ),
    (
      lambda: gradnormlorp(1e-2, projection='foo'),
      f"Unknown projection 'foo'; expected one of {projections.names()}.",
    ),
  ],
)
def test_bad_argument_is_an_error(build, text):
  with pytest.raises(ValueError) as error:
    build()
  assert str(error.value) == text


def test_injecting_rank_says_how_to_keep_it_static():
  tx = optax.inject_hyperparams(gradnormlorp)(learning_rate=1e-2, rank=4)
  with pytest.raises(ValueError, match=r"static_args=\('rank'"):
    jax.jit(tx.init)(make_params())


@pytest.mark.parametrize('bits', ['basis_bits', 'moment_bits'])
def test_injecting_bits_says_how_to_keep_them_static(bits):
  static = {'rank', 'update_proj_gap', 'basis_bits', 'moment_bits'} - {bits}
  tx = optax.inject_hyperparams(gradnormlorp, static_args=static)(1e-2)
  with pytest.raises(ValueError) as error:
    jax.jit(tx.init)(make_params())
  assert str(error.value).startswith(f'gradnormlorp: {bits} must be known')
  # The whole list, to be copied.
  assert (
    str(error.value)
    .split('\n')[0]
    .endswith(
      "static_args=('rank', 'update_proj_gap', 'basis_bits', 'moment_bits')."
    )
  )
