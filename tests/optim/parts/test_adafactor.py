"""Adafactor's direction against PyTorch's, in float64, and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import galore_adafactor
from gnlorp_jax.optim.parts.adafactor import scale_by_adafactor
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection

SHAPES = {
  'wide': (5, 12),
  'tall': (12, 5),
  'one': (1, 7),
  'bias': (9,),
}
STEPS = 12


def gradients(shape, seed=0):
  """Gradients whose size changes from step to step and from row to row."""
  rng = np.random.default_rng(seed)
  grads = rng.standard_normal((STEPS, *shape)).astype(np.float32)
  size = 10 ** rng.uniform(-3, 1, STEPS).astype(np.float32)
  rows = 10 ** rng.uniform(-2, 1, shape[0]).astype(np.float32)
  grads *= size.reshape(-1, *[1] * len(shape))
  return grads * rows.reshape(-1, *[1] * (len(shape) - 1))


@functools.cache
def training(name, **options):
  tx = scale_by_adafactor(**options)

  def step(state, grad):
    u, state = tx.update({name: grad}, state)
    return state, u[name]

  @jax.jit
  def train(grads):
    return jax.lax.scan(step, tx.init({name: grads[0]}), grads)[1]

  return train


def directions(grads, name='kernel', **options):
  return np.asarray(training(name, **options)(grads))


def torch_directions(optimizer, grads, **options):
  """What a PyTorch Adafactor subtracts from zero at learning rate 1."""
  torch = pytest.importorskip('torch')
  # Double, so that the difference measures our rounding alone.
  p = torch.nn.Parameter(torch.zeros(grads.shape[1:], dtype=torch.float64))
  opt = optimizer(
    [p], lr=1.0, scale_parameter=False, relative_step=False, **options
  )
  found = []
  for grad in grads:
    p.data.zero_()
    p.grad = torch.tensor(grad, dtype=torch.float64)
    opt.step()
    found.append(-p.detach().numpy())
  return np.stack(found)


@pytest.mark.parametrize('package', ['galore_torch', 'transformers'])
@pytest.mark.parametrize('b1', [None, 0.9])
@pytest.mark.parametrize('name', list(SHAPES))
def test_direction_follows_pytorch(package, b1, name):
  pytest.importorskip('torch')
  if package == 'galore_torch':
    optimizer = pytest.importorskip('galore_torch').GaLoreAdafactor
  else:
    optimizer = pytest.importorskip('transformers.optimization').Adafactor
  grads = gradients(SHAPES[name])
  ours = directions(grads, 'bias' if name == 'bias' else 'kernel', b1=b1)
  theirs = torch_directions(optimizer, grads, beta1=b1)
  # A few roundings of float32; an average may cancel to less than its terms.
  scale = np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-7 * scale)


@pytest.mark.parametrize(
  'options', [{'decay_rate': 0.5}, {'eps': 1e-2}, {'clip_threshold': 0.3}]
)
def test_options_follow_pytorch(options):
  optimizer = pytest.importorskip('transformers.optimization').Adafactor
  grads = gradients((6, 8))
  ours = directions(grads, **options)
  torch_options = dict(options)
  if 'eps' in options:
    torch_options['eps'] = (options['eps'], 1e-3)
  if 'decay_rate' in options:
    torch_options['decay_rate'] = -options['decay_rate']
  theirs = torch_directions(optimizer, grads, **torch_options)
  np.testing.assert_allclose(ours, theirs, rtol=2e-6)
  assert np.abs(ours - directions(grads)).max() > 1e-2  # The option counts.


@pytest.mark.parametrize('name', ['kernel', 'scale'])
def test_stacked_parameters_equal_single_ones(name):
  # Sizes so different that a clip over the leaf would show.
  shape = (6, 8) if name == 'kernel' else (8,)
  parts = [gradients(shape, seed) * 10.0 ** (3 * seed) for seed in range(3)]
  stacked = directions(np.stack(parts, axis=1), name, b1=0.9)
  for i, part in enumerate(parts):
    np.testing.assert_allclose(
      stacked[:, i], directions(part, name, b1=0.9), rtol=1e-6, atol=1e-9
    )


def test_the_path_tells_matrices_from_stacked_vectors():
  params = {
    'kernel': jnp.ones((3, 4)),
    'embedding': jnp.ones((5, 2, 3)),
    'scale': jnp.ones((3, 4)),
    'boxed': {'kernel': {'value': jnp.ones((2, 3))}},
    'flat': {'kernel': jnp.ones(4)},
    'number': jnp.ones([]),
  }
  state = jax.eval_shape(scale_by_adafactor().init, params)
  assert state.mu is None
  shapes = jax.tree.map(jnp.shape, (state.row, state.col, state.nu))
  row, col, nu = shapes
  assert (row['kernel'], col['kernel'], nu['kernel']) == ((3,), (4,), None)
  assert (row['embedding'], col['embedding']) == ((5, 2), (5, 3))
  assert (row['scale'], col['scale'], nu['scale']) == (None, None, (3, 4))
  assert row['boxed']['kernel']['value'] == (2,)
  assert nu['flat']['kernel'] == (4,)
  assert nu['number'] == ()
  by_name = scale_by_adafactor(matrix_names='scale')
  by_name = jax.eval_shape(by_name.init, params)
  assert by_name.row['kernel'] is None
  assert by_name.row['scale'].shape == (3,)


def test_projected_gradients_are_factored_under_the_path_of_their_kernel():
  params = {'kernel': jnp.ones((3, 12, 8))}
  tx = with_low_rank_projection(scale_by_adafactor(), rank=2)
  updates, state = jax.eval_shape(
    lambda grads: tx.update(grads, tx.init(params)), params
  )
  assert updates['kernel'].shape == (3, 12, 8)
  assert state.inner_state.row['kernel'].shape == (3, 12)
  assert state.inner_state.col['kernel'].shape == (3, 2)


def test_optax_finds_what_is_like_the_parameters():
  params = {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)}
  tx = scale_by_adafactor(b1=0.9)
  seen = optax.tree.map_params(
    tx, lambda x: 'found', tx.init(params), transform_non_params=lambda x: None
  )
  assert seen.count is None
  assert seen.mu == {'kernel': 'found', 'bias': 'found'}
  assert seen.row == {'kernel': 'found', 'bias': None}
  assert seen.nu == {'kernel': None, 'bias': 'found'}


def test_a_number_moves_by_the_sign_of_its_gradient():
  tx = scale_by_adafactor()
  grad = np.float32(-3)
  u, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(grad)
  np.testing.assert_allclose(u, -1.0, rtol=1e-6)


def test_zero_gradients_give_zero_directions():
  params = {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)}
  zeros = optax.tree.zeros_like(params)
  tx = scale_by_adafactor(b1=0.9)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for _ in range(3):
    u, state = update(zeros, state)
    jax.tree.map(np.testing.assert_array_equal, u, zeros)


@pytest.mark.parametrize('size', [1e-12, 1.0, 1e12])
def test_zero_rows_and_columns_stay_zero_beside_others(size):
  grad = np.full((4, 6), size, np.float32)
  grad[1] = grad[:, 2] = 0
  found = directions(np.stack([grad] * 3))
  assert np.isfinite(found).all()
  np.testing.assert_array_equal(found == 0, np.stack([grad] * 3) == 0)


def test_bfloat16_gradients_are_computed_in_float32():
  grads = gradients((4, 6)).astype(jnp.bfloat16)
  found = directions(grads, b1=0.9)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(
    found, directions(grads.astype(np.float32), b1=0.9)
  )
  init = scale_by_adafactor(b1=0.9).init
  state = jax.eval_shape(init, {'kernel': jnp.asarray(grads[0])})
  moments = jax.tree.leaves(state._replace(count=None))
  assert all(leaf.dtype == jnp.float32 for leaf in moments)


def test_state_buffers_are_distinct_so_that_they_can_be_donated():
  grads = {'kernel': jnp.ones((4, 4)), 'bias': jnp.ones(4)}
  tx = scale_by_adafactor(b1=0.9)
  state = tx.init(grads)
  jax.jit(tx.update, donate_argnums=1)(grads, state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    (
      {'decay_rate': -0.8},
      'decay_rate must be in (0, inf), got -0.8. The usual value is 0.8.',
    ),
    ({'eps': 0}, 'eps must be in (0, inf), got 0. The usual value is 1e-30.'),
    (
      {'clip_threshold': 0.0},
      'clip_threshold must be in (0, inf), got 0.0. The usual value is 1.0.',
    ),
    ({'b1': 1.0}, 'b1 must be in [0, 1), got 1.0.'),
  ],
)
def test_bad_numbers_are_errors(options, text):
  with pytest.raises(ValueError) as error:
    scale_by_adafactor(**options)
  assert str(error.value) == text


def test_projected_kernels_are_matrices_whatever_their_names():
  tx = galore_adafactor(1e-2, rank=4, param_labels=[('.*', 'low_rank')])
  state = jax.eval_shape(tx.init, {'q': {'w': jnp.zeros((3, 16, 24))}})
  low_rank, _ = state.inner_state.inner_states['low_rank'].inner_state
  row, col = (
    getattr(low_rank.inner_state, f)['q']['w'] for f in ('row', 'col')
  )
  assert (row.shape, col.shape) == ((3, 24), (3, 4))
