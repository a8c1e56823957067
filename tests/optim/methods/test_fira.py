"""Fira against a transcription of its formulas in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import fira, projections, report, scale_by_fira
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.training import sharding

GAP, RANK, LR, DECAY, SCALE = 4, 2, 0.01, 0.1, 0.25
B1, B2, EPS = 0.9, 0.999, 1e-6
SHAPES = [(6, 9), (9, 6), (6, 6)]  # (out, in), as PyTorch has it.
# Sizes of the gradients: growth and falls, with a zero between refreshes.
SIZES = [0.3, 1.0, 0.2, 5.0, 0.4, 0.1, 0.0, 2.0, 0.1, 4.0, 0.05, 0.1]
EXACT = projections.get('svd', solver='exact')


def normal(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


def problem(shape, seed=0):
  """A weight, gradients and bases of the side to compress, one per step."""
  rng = np.random.default_rng(seed)
  short = min(shape)
  bases = rng.standard_normal((len(SIZES), short, short))
  bases = np.stack([np.linalg.qr(b)[0][:, :RANK] for b in bases])
  grads = rng.standard_normal((len(SIZES), *shape))
  grads *= np.array(SIZES)[:, None, None]
  return (
    rng.standard_normal(shape).astype(np.float32),
    grads.astype(np.float32),
    bases.astype(np.float32),
  )


def reference(w, grads, bases, placement='unscaled', limit=1.01):
  """Weights after each step, and at which ones the limiter acted."""
  w, grads, bases = (np.asarray(x, np.float64) for x in (w, grads, bases))
  is_right = w.shape[0] >= w.shape[1]  # The basis acts on `in`.
  axis = 1 if is_right else 0  # Of a channel of the long side.
  m = v = 0.0
  last = None
  weights, limited = [], []
  for step, g in enumerate(grads):
    p = bases[step // GAP * GAP]
    r = g @ p if is_right else p.T @ g
    m = B1 * m + (1 - B1) * r
    v = B2 * v + (1 - B2) * r**2
    n = m / (np.sqrt(v) + EPS)
    back = (lambda x, p=p: x @ p.T) if is_right else (lambda x, p=p: p @ x)
    k = np.sqrt((n**2).sum(axis, keepdims=True)) / (
      np.sqrt((r**2).sum(axis, keepdims=True)) + 1e-8
    )
    share = 1.0 if placement == 'scaled' else SCALE
    s = k * (g - share * back(r))
    norm = np.sqrt((s**2).sum())
    is_over = None not in (last, limit) and norm / (last + 1e-8) > limit
    if is_over:
      s *= limit * (last + 1e-8) / norm
    if norm > 0:  # Ours: what is zero leaves the last norm on record.
      last = np.sqrt((s**2).sum())
    u = SCALE * (back(n) + s) if placement == 'scaled' else SCALE * back(n) + s
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

  return Projection(EXACT.init, refresh, EXACT.project, EXACT.project_back)


@functools.partial(jax.jit, static_argnums=(3, 4))
def run(bases, w, grads, placement='unscaled', limit=1.01):
  """Kernels after each step on given bases, and the last state."""
  tx = inject(bases, scale_placement=placement, norm_growth_limit=limit)

  def step(carry, grad):
    params, state = carry
    updates, state = tx.update({'kernel': grad}, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params['kernel']

  params = {'kernel': w}
  (_, state), kernels = jax.lax.scan(step, (params, tx.init(params)), grads)
  return kernels, state


def low_rank_state(state):
  is_it = lambda node: hasattr(node, 'subspace')  # noqa: E731
  (found,) = filter(is_it, jax.tree.leaves(state, is_leaf=is_it))
  return found


def inject(bases, **options):
  """The optimizer with given bases."""
  return fira(
    LR,
    RANK,
    GAP,
    SCALE,
    projection=given_bases(bases),
    spread_refreshes=False,
    weight_decay=DECAY,
    **options,
  )


@pytest.mark.parametrize(
  ('shape', 'placement', 'limit'),
  [
    *((s, p, 1.01) for s in SHAPES for p in ('unscaled', 'scaled')),
    ((6, 9), 'unscaled', 1.5),
    ((9, 6), 'scaled', None),
  ],
)
def test_follows_the_formulas(shape, placement, limit):
  w, grads, bases = problem(shape)
  expected, limited = reference(w, grads, bases, placement, limit)
  if limit:
    assert 2 <= limited.sum() <= len(SIZES) - 3
  kernels, _ = run(bases, w.T, grads.mT, placement, limit)
  np.testing.assert_allclose(kernels.mT, expected, rtol=0, atol=2e-6)


def test_a_stack_of_matrices_equals_each_by_itself():
  # With limiters that act at different steps: the norms are per matrix.
  w, grads, bases = problem((9, 6))
  others = [w, -2 * w], [grads, np.roll(grads, 5, axis=0)]
  stacked, state = run(
    bases, np.stack(others[0]).mT, np.stack(others[1], axis=1).mT
  )
  assert low_rank_state(state).recovery['kernel'].shape == (2,)
  different = []
  for i, (w, grads) in enumerate(zip(*others, strict=True)):
    expected, limited = reference(w, grads, bases)
    np.testing.assert_allclose(stacked[:, i].mT, expected, rtol=0, atol=2e-6)
    different.append(limited)
  assert (different[0] != different[1]).any()


def test_only_a_first_or_zero_rest_is_free_to_grow():
  # A zero first gradient leaves no norm; a later one keeps the last.
  tx = scale_by_fira(RANK, GAP, projection=EXACT, norm_growth_limit=1.5)
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


@pytest.mark.parametrize('rank', [6, 99])
def test_nothing_is_left_at_full_rank(rank):
  # The rest in the paper's form is zero, so the update is Adam's, rotated.
  tx = scale_by_fira(rank, GAP, 1.0, scale_placement='scaled', projection=EXACT)
  g = normal((6, 9), seed=2)  # No coordinate is as small as Adam's eps.
  updates, state = jax.jit(lambda g: tx.update(g, tx.init(g)))(g)
  assert low_rank_state(state).recovery < 1e-3 * np.linalg.norm(updates)
  u, s, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
  low = s[:, None] * vt  # The first direction of Adam is the sign.
  np.testing.assert_allclose(updates, u @ np.sign(low), rtol=0, atol=2e-3)


def test_update_has_full_rank_where_galores_has_not():
  g = normal((6, 9))
  tx = scale_by_fira(RANK, GAP)
  updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(g)
  assert np.linalg.matrix_rank(updates) == 6


def test_state_is_galores_and_one_norm_per_matrix():
  # Two moments of n r, a basis of m r, one scalar.
  params = {'kernel': jax.ShapeDtypeStruct((5, 24, 16), jnp.bfloat16)}
  state = low_rank_state(jax.eval_shape(scale_by_fira(4).init, params))
  sizes = jax.tree.map(jnp.shape, state)
  assert sizes.inner_state.mu['kernel'] == (5, 24, 4)
  assert sizes.inner_state.nu['kernel'] == (5, 24, 4)
  assert sizes.subspace['kernel'].basis == {'out': (5, 16, 4)}
  assert sizes.recovery == {'kernel': (5,)}
  assert state.recovery['kernel'].dtype == jnp.float32
  free = scale_by_fira(4, norm_growth_limit=None)
  free_state = low_rank_state(jax.eval_shape(free.init, params))
  assert not jax.tree.leaves(free_state.recovery)


def test_bfloat16_gradients_are_scaled_in_float32():
  w, grads, bases = problem((9, 6))
  # Numbers that bfloat16 holds, so that only the arithmetic can differ.
  short = [jnp.asarray(x, jnp.bfloat16) for x in (grads, bases)]
  grads, bases = (np.asarray(x.astype(jnp.float32)) for x in short)
  expected, _ = reference(w, grads, bases)
  kernels, _ = run(bases, w.T, short[0].mT)
  np.testing.assert_allclose(kernels.mT, expected, rtol=0, atol=2e-6)


def test_sharding_changes_nothing():
  # Norms are those of whole matrices, whatever a device holds of them.
  _, _, bases = problem((16, 16))
  tx = inject(bases)
  params = {'kernel': normal((2, 16, 32), len(SIZES))}
  mesh = sharding.make_mesh(1, 4)
  rules = (('.*', sharding.shard_largest_axis('fsdp', 1)),)
  state = jax.jit(tx.init)(params)
  placed = [params, state]
  placed = jax.device_put(placed, sharding.infer_shardings(placed, mesh, rules))
  specs = {x.sharding.spec for x in jax.tree.leaves(placed)}
  assert jax.P(None, None, 'fsdp') in specs

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
  'options',
  [
    {},
    {'scale_placement': 'scaled', 'scale': 1.0, 'norm_growth_limit': None},
    {'weight_norm': True},
    {'side': 'long'},
  ],
  ids=str,
)
def test_regression_descends(options, descended):
  tx = fira(0.02, 3, 5, **{'scale': 0.25, **options})
  state = descended(tx)
  refreshes = low_rank_state(state).subspace['kernel'].refresh_count
  assert (np.asarray(refreshes) > 25).all()


def test_report_knows_the_kernel():
  params = {'mlp': {'kernel': jnp.ones((3, 16, 8))}}
  (row,) = report(params, fira(1e-2, rank=4))
  assert row.label == 'low_rank'


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    (
      {'scale_placement': 'front'},
      "Unknown scale_placement 'front'; expected one of ('unscaled', "
      "'scaled').",
    ),
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
    fira(1e-2, **options)
  assert str(error.value) == text


def test_projection_that_joins_rows_is_an_error():
  # Coordinates [m / 2, r], as a random projection of granularity 1/2 makes.
  joined = EXACT._replace(
    project=lambda g, basis: (g @ basis)[..., ::2, :],
    turn=lambda old, new: old.mT @ new,
  )
  tx = scale_by_fira(RANK, projection=joined)
  g = jnp.ones((6, 8))
  with pytest.raises(ValueError) as error:
    jax.eval_shape(lambda g: tx.update(g, tx.init(g)), g)
  assert str(error.value) == (
    'The projection makes 4 rows of coordinates of the 8 rows of a gradient, '
    'but each row is scaled by the length of its own. Use a projection that '
    "keeps the rows, such as projections.get('random', granularity=1)."
  )
