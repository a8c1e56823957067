"""APOLLO against its formulas in float64 NumPy, and against PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import apollo, apollo_mini, projections, scale_by_apollo
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.training import sharding

GAP, RANK, LR, DECAY, SCALE = 4, 2, 0.01, 0.1, 3.0
B1, B2, EPS = 0.9, 0.999, 1e-6
SHAPES = [(6, 9), (9, 6), (6, 6)]  # (out, in), as PyTorch has it.
SIZES = [0.3, 1.0, 0.2, 5.0, 0.4, 0.1, 1.1, 2.0, 0.1, 4.0]
SVD = projections.get('svd', solver='exact')
CASES = [
  *((s, 'channel', False, RANK) for s in SHAPES),
  *((s, 'tensor', True, 1) for s in SHAPES),
  ((6, 9), 'channel', True, RANK),
  ((9, 6), 'tensor', False, 1),
]


def problem(shape, seed=0):
  """A weight and gradients, one per step."""
  rng = np.random.default_rng(seed)
  grads = rng.standard_normal((len(SIZES), *shape))
  grads *= np.array(SIZES)[:, None, None]
  w = rng.standard_normal(shape)
  return w.astype(np.float32), grads.astype(np.float32)


def random_bases(shape, rank, seed=1):
  """Matrices of the side to compress, of variance 1 / r; one per step."""
  bases = np.random.default_rng(seed).standard_normal(
    (len(SIZES), min(shape), rank)
  )
  return (bases / np.sqrt(rank)).astype(np.float32)


def reference(w, grads, bases, granularity, front, limit=1.01):
  """Weights after each step, and at which ones the limiter acted."""
  w, grads, bases = (np.asarray(x, np.float64) for x in (w, grads, bases))
  is_right = w.shape[0] >= w.shape[1]  # The basis acts on `in`.
  axis = 1 if is_right else 0  # Of a channel of the long side.

  def norm(x):
    if granularity == 'tensor':
      return np.sqrt((x**2).sum())
    return np.sqrt((x**2).sum(axis, keepdims=True))

  m = v = 0.0
  last = None
  weights, limited = [], []
  for step, g in enumerate(grads):
    p = bases[step // GAP * GAP]
    r = g @ p if is_right else p.T @ g
    m = B1 * m + (1 - B1) * r
    v = B2 * v + (1 - B2) * r**2
    n = m / (np.sqrt(v) + EPS)
    u = g * norm(n) / (norm(r) + 1e-8)
    if front:
      u = u * np.sqrt(SCALE)
    length = np.sqrt((u**2).sum())
    is_over = None not in (last, limit) and length / (last + 1e-8) > limit
    if is_over:
      u = u * limit * (last + 1e-8) / length
    last = np.sqrt((u**2).sum())
    if not front:
      u = u * np.sqrt(SCALE)
    t = step + 1
    w = w - LR * np.sqrt(1 - B2**t) / (1 - B1**t) * u
    w = w * (1 - LR * DECAY)
    weights.append(w)
    limited.append(is_over)
  return np.stack(weights), np.array(limited)


def given_bases(bases_TNR):
  """Projects on bases made elsewhere, one per step."""
  bases_TNR = jnp.asarray(bases_TNR)

  def refresh(grad_MN, basis_NR, count):
    return jnp.broadcast_to(bases_TNR[count], basis_NR.shape)

  return Projection(SVD.init, refresh, SVD.project, SVD.project_back)


def normal(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def inject(bases, granularity, front, limit):
  """The optimizer with given bases."""
  return apollo(
    LR,
    bases.shape[-1],
    GAP,
    SCALE,
    granularity=granularity,
    scale_front=front,
    norm_growth_limit=limit,
    projection=given_bases(bases),
    spread_refreshes=False,
    weight_decay=DECAY,
  )


def steps_of(tx, w, grads):
  """Kernels after each step, and the last state."""

  def step(carry, grad):
    params, state = carry
    updates, state = tx.update({'kernel': grad}, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params['kernel']

  params = {'kernel': w}
  (_, state), kernels = jax.lax.scan(step, (params, tx.init(params)), grads)
  return kernels, state


def run(tx, w, grads):
  kernels, state = jax.jit(functools.partial(steps_of, tx))(w, grads)
  return np.asarray(kernels), state


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def run_on(bases, w, grads, granularity, front, limit=1.01):
  """The same on given bases; other ones need no other program."""
  return steps_of(inject(bases, granularity, front, limit), w, grads)


def low_rank_state(state):
  is_it = lambda node: hasattr(node, 'subspace')  # noqa: E731
  (found,) = filter(is_it, jax.tree.leaves(state, is_leaf=is_it))
  return found


def assert_same_path(kernels, expected):
  """Equal up to what float32 makes of the bias corrections.

  1 - 0.999^t loses digits: its root is off by 1e-5 in the first steps, which
  are as long as 0.5 here. With the corrections in float64 3e-7 would remain.
  """
  np.testing.assert_allclose(kernels, expected, rtol=0, atol=6e-6)


@pytest.mark.parametrize(('shape', 'granularity', 'front', 'rank'), CASES)
def test_follows_the_formulas(shape, granularity, front, rank):
  w, grads = problem(shape)
  bases = random_bases(shape, rank)
  expected, limited = reference(w, grads, bases, granularity, front)
  assert 2 <= limited.sum() <= len(SIZES) - 3
  kernels, _ = run_on(bases, w.T, grads.mT, granularity, front)
  assert_same_path(kernels.mT, expected)


def test_without_a_limit_it_follows_the_formulas_too():
  w, grads = problem((6, 9))
  bases = random_bases((6, 9), RANK)
  expected, limited = reference(w, grads, bases, 'channel', False, None)
  assert not limited.any()
  kernels, state = run_on(bases, w.T, grads.mT, 'channel', False, None)
  assert_same_path(kernels.mT, expected)
  assert not jax.tree.leaves(low_rank_state(state).recovery)


@pytest.mark.parametrize(
  ('shape', 'granularity', 'front', 'rank', 'projection', 'limited'),
  [
    *((*case, 'random', True) for case in CASES),
    *((*case, 'svd', True) for case in CASES[::3]),
    *((*case, 'svd', False) for case in CASES[:1] + CASES[-1:]),
  ],
)
def test_follows_pytorch(shape, granularity, front, rank, projection, limited):
  torch = pytest.importorskip('torch')
  apollo_torch = pytest.importorskip('apollo_torch')
  w, grads = problem(shape)
  weight = torch.nn.Parameter(torch.tensor(w))
  group = {
    'params': [weight],
    'rank': rank,
    'update_proj_gap': GAP,
    'scale': SCALE,
    'proj': projection,
    'proj_type': 'std',
    'scale_type': granularity,
  }
  theirs = apollo_torch.APOLLOAdamW(
    [group],
    lr=LR,
    betas=(B1, B2),
    eps=EPS,
    weight_decay=DECAY,
    scale_front=front,
    disable_nl=not limited,
  )
  expected, bases = [], []
  for grad in grads:
    weight.grad = torch.tensor(grad)
    theirs.step()
    expected.append(weight.detach().numpy().copy())
    basis = theirs.state[weight]['projector'].ortho_matrix.numpy().copy()
    # A basis that acts on `in` is r x n there.
    bases.append(basis.T if shape[0] >= shape[1] else basis)
  bases = np.stack(bases)
  assert np.abs(bases[GAP] - bases[0]).max() > 0.1
  limit = 1.01 if limited else None
  kernels, _ = run_on(bases, w.T, grads.mT, granularity, front, limit)
  assert_same_path(kernels.mT, expected)


def test_a_stack_of_matrices_equals_each_by_itself():
  # With limiters that act at different steps: the norms are per matrix.
  w, grads = problem((9, 6))
  bases = random_bases((9, 6), RANK)
  both = [w, -2 * w], [grads, np.roll(grads, 5, axis=0)]
  stacked, state = run_on(
    bases,
    np.stack(both[0]).mT,
    np.stack(both[1], axis=1).mT,
    'tensor',
    False,
  )
  assert low_rank_state(state).recovery['kernel'].shape == (2,)
  different = []
  for i, (w, grads) in enumerate(zip(*both, strict=True)):
    expected, limited = reference(w, grads, bases, 'tensor', False)
    assert_same_path(stacked[:, i].mT, expected)
    different.append(limited)
  assert (different[0] != different[1]).any()


def test_the_place_of_scale_does_not_matter():
  # A constant cancels from the ratio of norms that is limited.
  w, grads = problem((6, 9))
  bases = random_bases((6, 9), RANK)
  front, behind = (
    run_on(bases, w.T, grads.mT, 'channel', is_front)[0]
    for is_front in (True, False)
  )
  np.testing.assert_allclose(front, behind, rtol=0, atol=1e-6)


def test_scale_enters_by_its_root():
  g = normal((6, 9))
  updates, scaled = (
    jax.jit(lambda g, tx=tx: tx.update(g, tx.init(g))[0])(g)
    for tx in (scale_by_apollo(RANK, GAP, scale) for scale in (1.0, 4.0))
  )
  np.testing.assert_allclose(scaled, 2 * updates, rtol=1e-6)


@pytest.mark.parametrize('rank', [6, 99])
def test_channels_at_full_rank_take_the_length_of_signs(rank):
  # Adam's first direction is the sign, of length root 6 in any rotated basis.
  tx = scale_by_apollo(rank, GAP, projection=SVD)
  g = normal((6, 9), seed=2)  # No coordinate is as small as Adam's eps.
  updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(g)
  unit = g / np.linalg.norm(g, axis=0)
  np.testing.assert_allclose(updates, np.sqrt(6) * unit, rtol=1e-3)


def test_mini_is_apollo_with_one_ratio_per_matrix():
  w, grads = problem((6, 9))
  mini, state = run(apollo_mini(LR), w, grads)
  same = apollo(LR, 1, scale=128.0, granularity='tensor', scale_front=True)
  np.testing.assert_array_equal(mini, run(same, w, grads)[0])
  # Every step is a multiple of the gradient.
  steps = np.diff(mini, axis=0) / grads[1:]
  np.testing.assert_allclose(
    steps, np.broadcast_to(steps[:, :1, :1], steps.shape), rtol=2e-2
  )
  assert low_rank_state(state).inner_state.mu['kernel'].shape == (9, 1)


@pytest.mark.parametrize(
  ('tx', 'rank'), [(scale_by_apollo(4), 4), (apollo_mini(LR), 1)]
)
def test_state_is_two_moments_a_seed_and_a_norm(tx, rank):
  params = {'kernel': jax.ShapeDtypeStruct((5, 24, 16), jnp.bfloat16)}
  state = low_rank_state(jax.eval_shape(tx.init, params))
  assert state.inner_state.mu['kernel'].shape == (5, 24, rank)
  assert state.inner_state.nu['kernel'].shape == (5, 24, rank)
  # One number per matrix each.
  basis = state.subspace['kernel'].basis['out']
  assert [x.shape for x in jax.tree.leaves(basis)] == [(5,)]
  assert state.recovery['kernel'].shape == (5,)
  assert state.recovery['kernel'].dtype == jnp.float32


def test_only_a_first_or_zero_update_is_free_to_grow():
  # A zero first gradient leaves no norm; a later one keeps the last.
  tx = scale_by_apollo(RANK, GAP, norm_growth_limit=1.5)
  g = normal((6, 9))
  state = jax.jit(tx.init)(g)
  update = jax.jit(tx.update)
  norms = []
  # Directions of gradients below eps are short, others have one length.
  for size in (0, 0, 1e-7, 0, 1):
    updates, state = update(np.float32(size) * g, state)
    assert np.isfinite(updates).all()
    norms.append(float(low_rank_state(state).recovery))
  assert norms[:2] == [np.inf, np.inf]
  assert norms[3] == norms[2] > 0
  np.testing.assert_allclose(norms[4], 1.5 * norms[3], rtol=1e-5)


def test_bfloat16_gradients_are_scaled_in_float32():
  w, grads = problem((9, 6))
  bases = random_bases((9, 6), RANK)
  # Numbers that bfloat16 holds, so that only the arithmetic can differ.
  short = [jnp.asarray(x, jnp.bfloat16) for x in (grads, bases)]
  grads, bases = (np.asarray(x.astype(jnp.float32)) for x in short)
  expected, _ = reference(w, grads, bases, 'channel', False)
  kernels, _ = run_on(bases, w.T, short[0].mT, 'channel', False)
  assert_same_path(kernels.mT, expected)


def test_sharding_changes_nothing():
  # Norms are those of whole matrices, and a seed draws one matrix, whatever a
  # device holds of them.
  tx = apollo(LR, 4, GAP, granularity='tensor', weight_decay=DECAY)
  params = {'kernel': normal((2, 16, 32), len(SIZES))}
  mesh = sharding.make_mesh(1, 4)
  rules = (('.*', sharding.shard_largest_axis('fsdp', 1)),)
  state = jax.jit(tx.init)(params)
  placed = [params, state]
  placed = jax.device_put(placed, sharding.infer_shardings(placed, mesh, rules))
  specs = {x.sharding.spec for x in jax.tree.leaves(placed)}
  assert {jax.P(None, None, 'fsdp'), jax.P(None, 'fsdp', None)} <= specs

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for seed, size in enumerate(SIZES):
    grads = {'kernel': np.float32(size) * normal((2, 16, 32), seed)}
    params, state = step(params, state, grads)
    grads = jax.device_put(grads, sharding.infer_shardings(grads, mesh, rules))
    placed = step(*placed, grads)
  np.testing.assert_allclose(
    placed[0]['kernel'], params['kernel'], rtol=0, atol=5e-6
  )
  np.testing.assert_allclose(
    *(low_rank_state(s).recovery['kernel'] for s in (placed[1], state)),
    rtol=2e-5,
  )


@pytest.mark.parametrize(
  'tx',
  [
    apollo(0.05, 3, 5),
    apollo(0.05, 3, 5, norm_growth_limit=None, weight_norm=True),
    apollo(
      0.05,
      3,
      5,
      projection=projections.get('random', distribution='rademacher'),
      side='long',
    ),
    apollo(0.02, 3, 5, projection='svd'),
    apollo_mini(0.05, update_proj_gap=5, scale=10.0),
  ],
  ids=['channel', 'weight_norm', 'signs', 'svd', 'mini'],
)
def test_regression_descends(tx, descended):
  state = descended(tx)
  refreshes = low_rank_state(state).subspace['kernel'].refresh_count
  assert (np.asarray(refreshes) > 25).all()


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    (
      {'granularity': 'matrix'},
      "Unknown granularity 'matrix'; expected one of ('channel', 'tensor').",
    ),
    ({'scale': -1.0}, 'scale must be in [0, inf), got -1.0.'),
    (
      {'norm_growth_limit': 0.5},
      'norm_growth_limit must be in [1, inf), got 0.5.',
    ),
    (
      {'side': 'both'},
      "side='both' leaves no whole axis, along which this method's recovery "
      "compares gradient and coordinates: use 'short', 'long', 'in' or 'out'.",
    ),
  ],
)
def test_bad_option_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    apollo(1e-2, **options)
  assert str(error.value) == text


def test_channels_need_a_projection_that_keeps_them():
  joined = projections.get('random', granularity=2)
  g = np.ones((6, 8), np.float32)
  tx = scale_by_apollo(RANK, projection=joined)
  with pytest.raises(ValueError) as error:
    jax.eval_shape(lambda g: tx.update(g, tx.init(g)), g)
  assert str(error.value) == (
    'The projection makes 16 rows of coordinates of the 8 rows of a gradient, '
    'but each row is scaled by the length of its own. Use a projection that '
    "keeps the rows, such as projections.get('random', granularity=1)."
  )
  tx = scale_by_apollo(RANK, projection=joined, granularity='tensor')
  # A matrix has one length anyway.
  jax.eval_shape(lambda g: tx.update(g, tx.init(g)), g)
