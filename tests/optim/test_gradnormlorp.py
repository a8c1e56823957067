"""Every alias through the same demands, and what makes each of them itself."""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import (
  adamw,
  galore,
  gradnormlorp,
  inspect,
  projections,
  with_low_rank_projection,
)
from gnlorp_jax.optim.subspace import Subspace

EXACT = {
  'projection': projections.get('svd', solver='exact'),
  'spread_refreshes': False,
}
ALIASES = {
  'gradnormlorp': functools.partial(gradnormlorp, rank=4, update_proj_gap=3),
  'gradnormlorp_tracked': functools.partial(
    gradnormlorp, rank=4, update_proj_gap=3, norm_state='tracked'
  ),
  'gradnormlorp_both': functools.partial(
    gradnormlorp, rank=4, update_proj_gap=3, side='both', **EXACT
  ),
  'galore': functools.partial(galore, rank=4, update_proj_gap=3),
  'galore_exact': functools.partial(galore, rank=4, update_proj_gap=3, **EXACT),
  'adamw': adamw,
}
every_alias = pytest.mark.parametrize('name', ALIASES)
# Where a variant's own part plays no role.
main_aliases = pytest.mark.parametrize(
  'name', ['gradnormlorp', 'gradnormlorp_both', 'galore', 'adamw']
)


@functools.cache
def compiled(name):
  """An alias at learning rate 0.01 and its update, compiled once for all."""
  tx = ALIASES[name](1e-2)
  return tx, jax.jit(tx.update)


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


def run(tx, params, steps, grads=grads_at, state=None, update=None):
  state = tx.init(params) if state is None else state
  update = update or jax.jit(tx.update)
  for step in steps:
    updates, state = update(grads(step, params), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def assert_finite(tree):
  assert all(
    np.isfinite(leaf.astype(jnp.float32)).all()
    for leaf in jax.tree.leaves(tree)
  )


@every_alias
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_dtypes_and_structure_are_kept(name, dtype):
  params = make_params(dtype)
  tx, _ = compiled(name)
  state = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype('float32')}
  assert after == state
  new = jax.eval_shape(optax.apply_updates, params, updates)
  assert {p.dtype for p in jax.tree.leaves(new)} == {jnp.dtype(dtype)}


@main_aliases
def test_bfloat16_parameters_train(name):
  params = make_params(jnp.bfloat16)
  new, state = run(compiled(name)[0], params, range(4))
  assert_finite((new, state))
  assert optax.tree.norm(optax.tree.sub(new, params)) > 1e-2


@every_alias
def test_donated_step_compiles_once(name):
  params = make_params()
  tx = ALIASES[name](optax.linear_schedule(1e-2, 0, 10))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.jit(tx.init)(params)
  for i in range(5):  # Across a refresh.
    params, state = step(params, state, grads_at(i, params))
  assert step._cache_size() == 1


@every_alias
def test_buffers_of_an_eager_init_are_distinct_and_can_be_donated(name):
  buffers = jax.tree.leaves(compiled(name)[0].init(make_params()))
  pointers = [buffer.unsafe_buffer_pointer() for buffer in buffers]
  assert len(set(pointers)) == len(pointers)


@every_alias
def test_extra_arguments_are_accepted(name):
  params = make_params()
  tx = optax.with_extra_args_support(ALIASES[name](1e-2))
  jax.eval_shape(
    lambda p: tx.update(p, tx.init(p), p, value=1.0, nobody_knows=2), params
  )


@every_alias
def test_map_params_is_the_identity(name):
  params = make_params()
  tx = ALIASES[name](1e-2)
  state = tx.init(params)
  again = optax.tree.map_params(tx, lambda x: x, state)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, again, state)


@main_aliases
def test_injected_learning_rate_equals_a_fixed_one(name):
  params = make_params()
  alias = ALIASES[name]
  static = [
    field
    for field in ('rank', 'update_proj_gap', 'projection')
    if field in getattr(alias, 'keywords', {})
  ]
  fixed_tx, update = compiled(name)
  fixed, _ = run(fixed_tx, params, range(4), update=update)
  tx = optax.inject_hyperparams(alias, static_args=static)(learning_rate=1e-2)
  injected, state = run(tx, params, range(4))
  assert state.hyperparams['learning_rate'] == np.float32(1e-2)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    injected,
    fixed,
  )


@main_aliases
def test_inside_a_users_chain_with_clipping_and_schedule(name):
  params = make_params()
  tx = optax.chain(
    optax.clip_by_global_norm(0.5),
    ALIASES[name](optax.cosine_decay_schedule(1e-2, 10)),
  )
  new, _ = run(tx, params, range(4))
  assert_finite(new)
  assert optax.tree.norm(optax.tree.sub(new, params)) > 1e-3


@every_alias
@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_nonfinite_gradient_is_skipped_and_counted(name, bad):
  params = make_params()
  tx, update = compiled(name)

  def poisoned(step, params):
    grads = grads_at(step, params)
    if step in (0, 3):  # The first step and a refresh.
      grads['layers']['mlp']['bias'] = params['layers']['mlp']['bias'] * bad
    return grads

  new, state = run(tx, params, range(6), poisoned, update=update)
  assert_finite((new, state))
  assert int(inspect.skipped_steps(state)) == 2
  # As if those steps had never been.
  expected, _ = run(tx, params, (1, 2, 4, 5), update=update)
  jax.tree.map(np.testing.assert_array_equal, new, expected)


@every_alias
def test_zero_and_rank_deficient_gradients_stay_finite(name):
  params = make_params()

  def degenerate(step, params):
    if step == 0:
      return jax.tree.map(jnp.zeros_like, params)
    return jax.tree.map(lambda p: jnp.ones_like(p) * (step % 2) * 1e-3, params)

  tx, update = compiled(name)
  new, state = run(tx, params, range(8), degenerate, update=update)
  assert_finite((new, state))
  moved = optax.tree.sub(new, params)
  assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(moved))


@every_alias
def test_state_that_went_through_the_host_continues_bit_for_bit(name):
  params = make_params()
  tx, update = compiled(name)
  straight, _ = run(tx, params, range(8), update=update)
  half, state = run(tx, params, range(4), update=update)
  half, state = jax.tree.map(np.asarray, (half, state))
  resumed, _ = run(tx, half, range(4, 8), state=state, update=update)
  jax.tree.map(np.testing.assert_array_equal, resumed, straight)


@every_alias
def test_regression_on_matrices_converges(name):
  params = make_params()
  target = grads_at(99, params)
  tx = ALIASES[name](3e-2)

  def loss(params):
    return optax.tree.norm(optax.tree.sub(params, target), squared=True)

  grad = jax.jit(jax.grad(loss))
  new, _ = run(tx, params, range(300), lambda _, p: grad(p))
  assert loss(new) < 0.3 * loss(params)


@every_alias
def test_zero_initialised_kernel_learns(name):
  params = {'kernel': jnp.zeros((8, 6)), 'bias': jnp.zeros(6)}
  target = grads_at(1, params)
  tx = ALIASES[name](1e-2)
  new, _ = run(tx, params, range(20), lambda _, p: optax.tree.sub(p, target))
  assert_finite(new)
  assert (jnp.linalg.norm(new['kernel'], axis=0) > 1e-3).all()


@main_aliases
def test_frozen_parameters_have_no_state_and_stay(name):
  params = make_params()
  rules = [('mlp', 'frozen'), ('kernel', 'low_rank'), ('.*', 'full')]
  tx = ALIASES[name](1e-2, param_labels=rules)
  new, state = run(tx, params, range(3))
  jax.tree.map(
    np.testing.assert_array_equal, new['layers']['mlp'], params['layers']['mlp']
  )
  assert not any(
    'mlp' in jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
  )


@every_alias
def test_weight_decay_shrinks_weights_without_gradient(name):
  params = make_params()
  tx = ALIASES[name](0.1, weight_decay=0.5)
  new, _ = run(
    tx, params, range(1), lambda _, p: jax.tree.map(jnp.zeros_like, p)
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5),
    new,
    jax.tree.map(lambda p: p * 0.95, params),
  )


@main_aliases
def test_a_users_flax_module_trains(name):
  model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(1)])
  x = jax.random.normal(jax.random.key(0), (64, 8))
  y = jnp.sin(x.sum(axis=1, keepdims=True))
  params = model.init(jax.random.key(1), x)
  tx = ALIASES[name](1e-2)

  def loss(params):
    return jnp.mean((model.apply(params, x) - y) ** 2)

  grad = jax.jit(jax.grad(loss))
  new, _ = run(tx, params, range(150), lambda _, p: grad(p))
  assert loss(new) < 0.5 * loss(params)


# --- What makes each of them itself ---


def test_full_rank_projection_of_sgd_changes_nothing():
  # A square basis is a rotation, and SGD does not see rotations.
  params = {'kernel': make_params()['layers']['mlp']['kernel']}
  tx = with_low_rank_projection(optax.sgd(0.1), rank=8)
  updates, _ = jax.jit(tx.update)(params, tx.init(params))
  np.testing.assert_allclose(
    updates['kernel'], -0.1 * params['kernel'], atol=1e-5
  )


def test_galore_follows_the_published_formula():
  # Float64 transcription of the method, bases from NumPy's SVD, until the
  # second refresh (signs of singular vectors are arbitrary from there on).
  w = np.asarray(make_params()['layers']['mlp']['kernel'][0], np.float64)
  params = {'kernel': jnp.asarray(w, jnp.float32)}
  options = {'rank': 3, 'update_proj_gap': 4, 'scale': 0.25}
  tx = galore(1e-2, weight_decay=0.1, **options, **EXACT)
  ours, _ = run(tx, params, range(4))
  m = v = 0.0
  for t in range(1, 5):
    g = np.asarray(grads_at(t - 1, params)['kernel'], np.float64)
    if t == 1:  # 8 x 12 as (in, out): `in` is compressed.
      basis = np.linalg.svd(g.T)[2][:3].T
    low = g.T @ basis
    m = 0.9 * m + 0.1 * low
    v = 0.999 * v + 0.001 * low**2
    direction = (m / (np.sqrt(v) + 1e-6)) @ basis.T
    step = 1e-2 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * 0.25 * direction.T
    w = (w - step) * (1 - 1e-2 * 0.1)
  np.testing.assert_allclose(ours['kernel'], w, atol=1e-6)


def test_gradnormlorp_follows_the_written_formula():
  # The same for the exact form: g and v with their own Adam each.
  w = np.asarray(make_params()['layers']['mlp']['kernel'][0], np.float64)
  params = {'kernel': jnp.asarray(w, jnp.float32)}
  options = {'rank': 3, 'update_proj_gap': 4, 'scale': 0.25}
  ours, _ = run(gradnormlorp(1e-2, **options, **EXACT), params, range(4))
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
    gradnormlorp(1e-2, rank=4).init({'weight': jnp.ones((8, 8))})
  assert caplog.messages == [
    'No parameter is labelled low_rank: rank has no effect, and this is plain '
    'Adam. See param_labels, and report() for the reasons.'
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


def test_rank_above_every_axis_trains(caplog):
  with caplog.at_level(logging.WARNING):
    new, state = run(gradnormlorp(1e-2, rank=999), make_params(), range(4))
  assert_finite((new, state))
  assert 'clipped to 8' in caplog.text


@pytest.mark.parametrize(
  ('build', 'text'),
  [
    (lambda: gradnormlorp(1e-2, rank=0), 'rank must be at least 1, got 0.'),
    (lambda: galore(1e-2, b1=1.0), 'b1 must be in [0, 1), got 1.0.'),
    (lambda: adamw(1e-2, b2=-0.1), 'b2 must be in [0, 1), got -0.1.'),
    (lambda: adamw(1e-2, eps=-1.0), 'eps must be in [0, inf), got -1.0.'),
    (
      lambda: gradnormlorp(1e-2, weight_decay=-1),
      'weight_decay must be in [0, inf), got -1.',
    ),
    (
      lambda: gradnormlorp(1e-2, projection='foo'),
      f"Unknown projection 'foo'; expected one of {projections.names()}.",
    ),
    (
      lambda: galore(1e-2, projection=3),
      f'projection must be a Projection or one of {projections.names()}, got '
      '3.',
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
