"""The SVD projection against NumPy's float64 SVD, on easy and hard matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.projections.svd import random_basis

SOLVERS = ('exact', 'eigh', 'power')


def matrix(kind, m=48, n=32):
  """Test gradients, scaled to a largest entry of 1 as a refresh does."""
  rng = np.random.default_rng(1)
  u, _ = np.linalg.qr(rng.standard_normal((m, min(m, n))))
  v, _ = np.linalg.qr(rng.standard_normal((n, min(m, n))))
  index = np.arange(1, min(m, n) + 1)
  spectra = {
    'slow': index**-0.5,
    'fast': index**-2.0,
    'steep': index**-8.0,
    'rank 3': (index <= 3) * 1.0,
    'rank 1': (index <= 1) * 1.0,
    'zero': index * 0.0,
    'equal': np.ones(len(index)),
  }
  if kind == 'dead rows':
    a = rng.standard_normal((m, n))
    a[::2] = 0
    a[:, :20] = 0
  elif kind == 'copies':
    a = np.repeat(rng.standard_normal((m, 2)), n // 2, axis=1)
  elif kind == 'one entry':
    a = np.zeros((m, n))
    a[3, 5] = 1
  else:
    a = (u * spectra[kind]) @ v.T
  return a / max(np.abs(a).max(), 1e-30)


KINDS = 'slow fast steep equal copies zero'.split() + [
  'rank 3',
  'rank 1',
  'dead rows',
  'one entry',
]


@functools.cache
def refresh_of(solver, **options):
  return jax.jit(projections.get('svd', solver=solver, **options).refresh)


# The same for all solvers.
first_basis = jax.jit(projections.get('svd').init, static_argnums=(0, 1))


def refreshed(solver, a_MN, rank, rounds=1, **options):
  basis = first_basis(a_MN.shape, rank)
  for count in range(rounds):
    basis = refresh_of(solver, **options)(np.float32(a_MN), basis, count)
  return np.asarray(basis)


def captured(a_MN, basis_NR):
  """Share of the best rank-r energy that a basis captures."""
  s = np.linalg.svd(a_MN, compute_uv=False)
  best = np.sum(s[: basis_NR.shape[-1]] ** 2)
  return np.sum((a_MN @ basis_NR.astype(np.float64)) ** 2) / max(best, 1e-30)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('solver', [*SOLVERS, 'sampled', 'grassmann'])
def test_basis_is_orthonormal_for_every_gradient(solver, kind):
  basis_NR = refreshed(solver, matrix(kind), rank=8, rounds=3)
  np.testing.assert_allclose(basis_NR.T @ basis_NR, np.eye(8), atol=1e-5)


@pytest.mark.parametrize('shape', [(48, 32), (32, 48), (32, 32)])
@pytest.mark.parametrize('solver', ['exact', 'eigh'])
def test_basis_reaches_the_best_energy(solver, shape):
  for kind in ('slow', 'fast', 'steep', 'rank 3', 'copies', 'dead rows'):
    a_MN = matrix(kind, *shape)
    assert captured(a_MN, refreshed(solver, a_MN, 8)) > 1 - 1e-5, kind


def test_power_iteration_converges_from_a_warm_start():
  a_MN = matrix('slow')
  shares = [
    captured(a_MN, refreshed('power', a_MN, 8, rounds)) for rounds in (1, 5, 40)
  ]
  assert shares[0] > 0.85  # From a random start, on a slowly falling spectrum.
  assert shares[0] < shares[1] < shares[2]
  assert shares[2] > 0.999


def test_power_iteration_captures_a_decaying_gradient_at_once():
  a_MN = matrix('fast')
  assert captured(a_MN, refreshed('power', a_MN, 8)) > 0.993


def test_power_iterations_add_up():
  a_MN = matrix('slow')
  once = refreshed('power', a_MN, 8, rounds=3)
  thrice = refreshed('power', a_MN, 8, iterations=3)
  np.testing.assert_allclose(once, thrice, atol=1e-5)


def test_power_iteration_keeps_signs_from_refresh_to_refresh():
  a_MN = matrix('fast')
  before = refreshed('power', a_MN, 8, rounds=20)
  after = refreshed('power', -a_MN, 8, rounds=21)
  # The subspace of -A is that of A; had the signs flipped, moments would meet
  # a mirrored basis.
  start = refresh_of('power')(np.float32(-a_MN), before, 0)
  assert np.diag(before.T @ start).min() > 0.99
  assert captured(a_MN, after) > 0.9999


def test_undetermined_directions_keep_the_old_basis():
  a_MN = matrix('rank 3')
  old = first_basis(a_MN.shape, 8)
  new = refresh_of('power')(np.float32(a_MN), old, 0)
  assert captured(a_MN, np.asarray(new)) > 1 - 1e-5
  zero = refresh_of('power')(np.zeros(a_MN.shape, np.float32), old, 0)
  np.testing.assert_allclose(zero, old, atol=1e-5)


@pytest.mark.parametrize('kind', ['slow', 'rank 3', 'zero', 'one entry'])
@pytest.mark.parametrize('solver', ['exact', 'power'])
def test_switched_basis_is_leading_columns_and_others_of_the_complement(
  solver, kind
):
  a_MN = matrix(kind)
  old = refreshed(solver, a_MN, 8, rounds=40)
  new = np.asarray(refresh_of(solver, leading=3)(np.float32(a_MN), old, 7))
  np.testing.assert_allclose(new.T @ new, np.eye(8), atol=1e-5)
  # Outside of all eight columns that were fitted, not of the three alone.
  fitted = np.asarray(refresh_of(solver)(np.float32(a_MN), old, 7))
  np.testing.assert_allclose(fitted.T @ new[:, 3:], 0, atol=1e-5)
  other = np.asarray(refresh_of(solver, leading=3)(np.float32(a_MN), old, 8))
  shared = new[:, 3:].T @ other[:, 3:]
  assert np.linalg.norm(shared) < 0.9 * np.sqrt(5)
  np.testing.assert_allclose(new[:, :3], other[:, :3], atol=1e-5)
  if kind == 'slow':  # The leading three, in order.
    vt = np.linalg.svd(a_MN)[2][:3]
    cosines = np.abs(np.sum(vt.T * new[:, :3], axis=0))
    assert cosines.min() > (0.99 if solver == 'power' else 0.99999)


def test_switching_draws_as_many_columns_as_there_is_room_for():
  a_MN = matrix('slow', 12, 6)
  for rank, drawn in ((6, 0), (5, 1), (2, 0)):
    basis = np.asarray(refreshed('exact', a_MN, rank, leading=2))
    kept = rank - drawn
    vt = np.linalg.svd(a_MN)[2][:kept]
    np.testing.assert_allclose(
      np.linalg.norm(vt @ basis[:, :kept]), kept**0.5, rtol=1e-5
    )
    if drawn:
      last = np.linalg.svd(a_MN)[2][5:]
      np.testing.assert_allclose(np.abs(last @ basis[:, 5:]), 1, rtol=1e-5)


def test_directions_are_drawn_by_their_singular_values():
  values = np.array([4.0, 2.0, 1.0, 1.0, 0.0])
  rng = np.random.default_rng(2)
  u, _ = np.linalg.qr(rng.standard_normal((5, 5)))
  v, _ = np.linalg.qr(rng.standard_normal((5, 5)))
  draw = projections.get('svd', solver='sampled').refresh
  many = jax.jit(jax.vmap(draw, in_axes=(None, None, 0)))
  bases = many(
    np.float32((u * values) @ v.T),
    np.zeros((5, 2), np.float32),
    np.arange(4000),
  )
  cosines = np.abs(np.einsum('kn,cnr->ckr', v.T, bases))
  # The third and the fourth value are equal: their vectors may be mixed.
  first = cosines[:, 0].max(axis=-1) > 0.999
  second = cosines[:, 1].max(axis=-1) > 0.999
  p, q = 4 / 8, 2 / 8
  both = p * q / (1 - p) + q * p / (1 - q)
  others = 2 * (1 / 8)
  alone = p * others / (1 - p) + 2 * (1 / 8) * p / (1 - 1 / 8)
  # Four standard deviations of a share of 4000 draws.
  margin = 4 * 0.5 / 4000**0.5
  assert abs((first & second).mean() - both) < margin
  assert abs(first.mean() - both - alone) < margin
  assert cosines[:, 4].max() < 0.02  # What has no size is never drawn.
  # Drawn again after as many updates, it is the same.
  np.testing.assert_array_equal(
    many(
      np.float32((u * values) @ v.T), np.zeros((5, 2), np.float32), np.arange(3)
    ),
    bases[:3],
  )


def test_tracked_basis_is_fitted_to_what_it_remembers():
  beta = 0.6
  svd = projections.get('svd', solver='exact', tracking=beta)
  a_MN, before = matrix('slow', 12, 8), matrix('equal', 12, 8)[::-1]
  basis = svd.refresh(np.float32(before), svd.init((12, 8), 3, 0), 0)
  q_NR, moment = np.float64(basis.columns_NR), np.zeros((3, 3))
  for size in (3.0, 0.5):
    low = svd.project(np.float32(size * before), basis)
    basis = svd.remember(low, basis)
    moment = beta * moment + (1 - beta) * size**2 * (
      q_NR.T @ before.T @ before @ q_NR
    )
  np.testing.assert_allclose(basis.moment_RR, moment, rtol=1e-4, atol=1e-5)
  new = np.asarray(svd.refresh(np.float32(a_MN), basis, 1).columns_NR)
  wanted = beta * q_NR @ moment @ q_NR.T + (1 - beta) * a_MN.T @ a_MN
  vectors = np.linalg.eigh(wanted)[1][:, ::-1][:, :3]
  np.testing.assert_allclose(np.abs(np.diag(vectors.T @ new)), 1, rtol=1e-4)


@pytest.mark.parametrize('shape', [(12, 8), (8, 12)])
def test_drawn_directions_are_right_singular_vectors(shape):
  a_MN = matrix('slow', *shape)
  basis_NR = np.float64(refreshed('sampled', a_MN, 4))
  vt = np.linalg.svd(a_MN)[2][:8]
  cosines = np.abs(vt @ basis_NR)
  np.testing.assert_allclose(np.sort(cosines.max(axis=1))[4:], 1, atol=1e-3)
  assert (np.diff(cosines.argmax(axis=0)) > 0).all()  # In their order.


def geodesic(a_MN, q_NR, step_size):
  """Theorem 3.6 of SubTrack++ for the leading part of the tangent."""
  low = a_MN @ q_NR
  tangent = 2 * (a_MN - low @ q_NR.T).T @ low  # Of the descent.
  u, sigma, vt = np.linalg.svd(tangent, full_matrices=False)
  u, v = u[:, :1], vt[:1].T
  angle = step_size * sigma[0] / np.sum(a_MN**2)
  turned = (q_NR @ v * np.cos(angle) + u * np.sin(angle)) @ v.T
  return turned + q_NR @ (np.eye(len(v)) - v @ v.T)


def test_subspace_turns_along_a_geodesic():
  a_MN, before = matrix('slow', 12, 8), matrix('fast', 12, 8)
  step = refresh_of('grassmann', step_size=0.7)
  # What was never fitted is the leading subspace of the first gradient.
  first = np.asarray(step(np.float32(before), first_basis((12, 8), 3), 5))
  assert captured(before, first) > 1 - 1e-5
  new = np.asarray(step(np.float32(a_MN), first, 6))
  expected = geodesic(a_MN, np.float64(first), 0.7)
  np.testing.assert_allclose(new, expected, atol=1e-5)
  # Each step captures more.
  shares = [captured(a_MN, first)]
  for count in range(40):
    first = step(np.float32(a_MN), first, count)
    shares.append(captured(a_MN, np.asarray(first)))
  assert (np.diff(shares) > -1e-6).all() and shares[-1] > 0.99


@pytest.mark.parametrize('solver', SOLVERS)
def test_full_rank_basis_loses_nothing(solver):
  a_MN = matrix('slow', 48, 16)
  basis_NR = refreshed(solver, a_MN, 16)
  np.testing.assert_allclose(a_MN @ basis_NR @ basis_NR.T, a_MN, atol=1e-5)


@pytest.mark.parametrize('solver', [*SOLVERS, 'grassmann'])
def test_stacked_matrices_equal_single_ones(solver):
  stack = np.stack([matrix(k) for k in ('slow', 'fast', 'rank 3')])
  stacked = refreshed(solver, stack[None], 4)
  for i, a_MN in enumerate(stack):
    found, single = stacked[0, i], refreshed(solver, a_MN, 4)
    if i == 2:
      # Its three singular values are equal: they determine a subspace, and
      # which vectors span it, in which order, is up to rounding. Beyond the
      # rank exact solvers choose freely.
      found, single = (q[:, :3] @ q[:, :3].T for q in (found, single))
    np.testing.assert_allclose(found, single, atol=2e-4)


@pytest.mark.parametrize('solver', ['exact', 'eigh'])
def test_exact_solvers_find_numpys_singular_vectors(solver):
  a_MN = matrix('fast')
  vt = np.linalg.svd(a_MN)[2][:4]
  sign = np.sign(vt[np.arange(4), np.abs(vt).argmax(1)])
  basis_NR = refreshed(solver, a_MN, 4)
  np.testing.assert_allclose(basis_NR, (vt * sign[:, None]).T, atol=1e-4)


def test_projecting_back_and_forth_is_the_identity_on_coordinates():
  svd = projections.get('svd')
  low_MR = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32)

  @jax.jit
  def back_and_forth(low_MR):
    basis_NR = random_basis((6, 5), 3)
    return svd.project(svd.project_back(low_MR, basis_NR), basis_NR)

  again = back_and_forth(low_MR)
  np.testing.assert_allclose(again, low_MR, atol=1e-5)


def test_projection_of_bfloat16_is_accumulated_in_float32():
  a_MN = jnp.asarray(matrix('slow'), jnp.bfloat16)
  basis_NR = jax.jit(random_basis, static_argnums=(0, 1))(a_MN.shape, 4)
  low_MR = jax.jit(projections.get('svd').project)(a_MN, basis_NR)
  exact = np.asarray(a_MN, np.float64) @ np.asarray(
    np.asarray(basis_NR).astype(jnp.bfloat16), np.float64
  )
  assert low_MR.dtype == jnp.float32
  np.testing.assert_allclose(low_MR, exact, atol=1e-5)


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    (
      {'solver': 'qr'},
      "Unknown solver 'qr'; expected one of ('power', 'eigh', 'exact', "
      "'sampled', 'grassmann').",
    ),
    ({'iterations': 0}, 'iterations must be at least 1, got 0.'),
    ({'leading': 0}, 'leading must be at least 1, got 0.'),
    ({'tracking': 1.0}, 'tracking must be in [0, 1), got 1.0.'),
    (
      {'tracking': 0.5, 'solver': 'grassmann'},
      'tracking=0.5 remembers earlier gradients for a basis that solver='
      "'grassmann' does not fit: use another solver, or tracking=0.",
    ),
    (
      {'step_size': 0.0, 'solver': 'grassmann'},
      'step_size must be in (0, inf), got 0.0.',
    ),
    (
      {'step_size': 0.5, 'solver': 'eigh'},
      "step_size=0.5 is an option of solver='grassmann', which solver='eigh' "
      "has no use for: use solver='grassmann', or step_size=None.",
    ),
    (
      {'iterations': 1, 'solver': 'exact'},
      "iterations=1 is an option of solver='power', which solver='exact' has "
      "no use for: use solver='power', or iterations=None.",
    ),
    (
      {'leading': 3, 'solver': 'sampled'},
      'leading=3 keeps leading singular vectors, which '
      "solver='sampled' does not look for: use 'power', 'eigh' or 'exact', or "
      'leading=None.',
    ),
  ],
)
def test_bad_option_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    projections.get('svd', **options)
  assert str(error.value) == text


def test_unknown_projection_is_an_error():
  with pytest.raises(ValueError) as error:
    projections.get('foo')
  text = f"Unknown projection 'foo'; expected one of {projections.names()}."
  assert str(error.value) == text
