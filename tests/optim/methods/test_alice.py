"""Alice and Alice-0 against their algorithms in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import alice, alice0, inspect, projections, scale_by_alice
from gnlorp_jax.optim.projections import Projection

GAP, RANK, RATE, SCALE, COMPENSATION = 4, 2, 0.1, 0.3, 0.4
B1, B2, EPS, LIMIT = 0.8, 0.9, 1e-8, 1.05
# Sizes of the gradients: growth, falls, and a zero between refreshes.
SIZES = [0.3, 1.0, 0.2, 5.0, 0.4, 2.0, 0.0, 0.1]
EXACT = projections.get('svd', solver='exact')


def problem(m, n):
  """A weight, gradients and bases of the shorter side m, one per step."""
  rng = np.random.default_rng(0)
  bases = rng.standard_normal((len(SIZES), m, m))
  bases = np.stack([np.linalg.qr(b)[0][:, :RANK] for b in bases])
  grads = rng.standard_normal((len(SIZES), m, n))
  grads *= np.array(SIZES)[:, None, None]
  w = rng.standard_normal((m, n))
  return tuple(np.float32(x) for x in (w, grads, bases))


def leading_vectors(matrix):
  """Eigenvectors of the largest values, with the signs agreed on here."""
  basis = np.linalg.eigh(matrix)[1][:, ::-1][:, :RANK]
  largest = basis[np.abs(basis).argmax(0), np.arange(RANK)]
  return basis * np.sign(largest)


def algorithm_4(w, grads, bases=None, b3=0.0):
  """The paper's, for m <= n, with bases that are given or without switching."""
  w, grads = map(np.float64, (w, grads))
  m, v, p, phi, shrunk = 0.0, 0.0, 0.0, 0.0, 0
  u, tracked = np.zeros((len(w), RANK)), np.zeros((RANK, RANK))
  for step, g in enumerate(grads):
    if bases is not None:
      u = np.float64(bases[step // GAP * GAP])
    elif step % GAP == 0:
      u = leading_vectors(b3 * u @ tracked @ u.T + (1 - b3) * g @ g.T)
    sigma = u.T @ g
    tracked = b3 * tracked + (1 - b3) * sigma @ sigma.T
    m = B1 * m + (1 - B1) * sigma
    v = B2 * v + (1 - B2) * sigma**2
    omega = m / (np.sqrt(v) + EPS)
    # Algorithm 3.
    p = B1 * p + (1 - B1) * (np.sum(g**2, axis=0) - np.sum(sigma**2, axis=0))
    c = np.sqrt(len(g) - RANK) * (g - u @ u.T @ g) @ np.diag(p**-0.5)
    norm = np.linalg.norm(c)
    eta = LIMIT / max(norm / phi, LIMIT) if phi > 0 else 1.0
    shrunk += eta < 1
    if norm > 0:  # Ours: what is zero leaves the last norm on record.
      phi = eta * norm
    w = w - RATE * SCALE * (u @ omega + COMPENSATION * eta * c)
  return w, shrunk


def given_bases(bases_TNR):
  """Projects on bases made elsewhere, one per step."""

  def refresh(grad_MN, basis_NR, count):
    return jnp.broadcast_to(bases_TNR[count], basis_NR.shape)

  return Projection(EXACT.init, refresh, EXACT.project, EXACT.project_back)


@pytest.mark.parametrize('is_tall', [False, True])
def test_steps_are_those_of_the_algorithms(is_tall):
  w, grads, bases = problem(6, 9)
  expected, shrunk = algorithm_4(w, grads, bases)
  assert 0 < shrunk < len(SIZES)
  turn = (lambda x: x.mT) if is_tall else (lambda x: x)
  tx = optax.chain(
    scale_by_alice(
      RANK,
      GAP,
      SCALE,
      compensation_scale=COMPENSATION,
      norm_growth_limit=LIMIT,
      projection=given_bases(jnp.asarray(bases)),
      spread_refreshes=False,
      b1=B1,
      b2=B2,
      eps=EPS,
    ),
    optax.scale_by_learning_rate(RATE),
  )

  @jax.jit
  def run(w, grads):
    def step(carry, grad):
      params, state = carry
      updates, state = tx.update({'kernel': grad}, state, params)
      return (optax.apply_updates(params, updates), state), None

    params = {'kernel': w}
    return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

  # A stack of two, of which one is the other's opposite.
  moved = run(
    np.stack([turn(w), -turn(w)]), np.stack([turn(grads), -turn(grads)], axis=1)
  )
  np.testing.assert_allclose(
    turn(moved['kernel'][0]), expected, rtol=0, atol=2e-6
  )
  np.testing.assert_allclose(
    turn(moved['kernel'][1]), -expected, rtol=0, atol=2e-6
  )


@pytest.mark.parametrize('b3', [0.0, 0.7])
def test_bases_are_fitted_to_what_is_tracked(b3, stepped):
  w, grads, _ = problem(6, 9)
  expected, _ = algorithm_4(w, grads, b3=b3)
  tx = alice(
    RATE,
    RANK,
    GAP,
    SCALE,
    b3=b3,
    leading=RANK,
    solver='exact',
    compensation_scale=COMPENSATION,
    norm_growth_limit=LIMIT,
    spread_refreshes=False,
    b1=B1,
    b2=B2,
    eps=EPS,
  )
  params, _ = stepped(tx, {'kernel': w}, [{'kernel': g} for g in grads])
  np.testing.assert_allclose(params['kernel'], expected, rtol=0, atol=1e-5)


def test_nothing_is_left_at_full_rank():
  g = np.random.default_rng(1).standard_normal((4, 9)).astype(np.float32)
  tx = scale_by_alice(4, compensation_scale=1e6, norm_growth_limit=None)
  updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(g)
  assert np.abs(updates).max() < 2


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_roundings_of_a_gradient_in_the_subspace_are_no_update(dtype):
  """Divided by their own energy they would be as large as any."""
  rng = np.random.default_rng(2)
  g = rng.standard_normal((24, 2)) @ rng.standard_normal((2, 36))
  g = jnp.asarray(g, jnp.float32).astype(dtype)
  tx = scale_by_alice(8, compensation_scale=1e3, norm_growth_limit=None)
  updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g)))(g)
  assert np.abs(updates).max() < 2


@pytest.mark.parametrize(('rank', 'leading'), [(8, 2), (128, 40), (2, 1)])
def test_five_of_sixteen_columns_lead_unless_it_is_said(rank, leading):
  g = jnp.asarray(np.random.default_rng(3).standard_normal((160, 200)), 'f')
  params = {'kernel': g}
  bases = []
  for options in ({}, {'leading': leading}):
    tx = alice0(RATE, rank, **options)
    _, state = jax.jit(lambda g, tx=tx: tx.update(g, tx.init(g), g))(params)
    (subspace,) = inspect.subspaces(state).values()
    bases.append(subspace.basis)
  jax.tree.map(np.testing.assert_array_equal, *bases)


def test_a_part_of_a_basis_is_new_at_every_refresh(descended):
  (subspace,) = inspect.subspaces(
    descended(alice0(0.05, 4, 5, scale=1.0, leading=2))
  ).values()
  # Of a gradient that hardly turns two of four columns stay, and of the others
  # 2 / 8 in the mean: those are drawn from the complement of the last basis.
  assert (np.asarray(subspace.overlap) < 0.9).all()
  assert (np.asarray(subspace.refresh_count) > 25).all()


def test_state_is_galores_and_an_energy_for_each_row():
  params = {'kernel': jax.ShapeDtypeStruct((3, 24, 16), jnp.float32)}
  (row,) = inspect.report(params, alice0(RATE, 4))
  # Two moments of m r, a basis of n r, energies of m, one norm; and of each
  # matrix four numbers about its refreshes.
  size = 2 * 24 * 4 + 16 * 4 + 24 + 1 + 4
  assert row.state_bytes == 4 * 3 * size
  (row,) = inspect.report(params, alice(RATE, 4))
  assert (row.rank, row.side) == (4, 'out')
  assert row.state_bytes == 4 * 3 * (size + 4 * 4)  # What a basis remembers.


def test_adam_of_all_else_keeps_its_own_decay():
  params = {'bias': jnp.ones(3)}
  tx = alice0(RATE, b1=0.0, b2=0.5, eps=0.0)
  state = tx.init(params)
  for grad in (1.0, 3.0):
    updates, state = tx.update({'bias': jnp.full(3, grad)}, state, params)
  nu = (0.999 * 0.001 + 0.001 * 9) / (1 - 0.999**2)
  np.testing.assert_allclose(updates['bias'], -RATE * 3 / nu**0.5, rtol=1e-4)


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'b3': 1.0}, 'b3 must be in [0, 1), got 1.0.'),
    ({'leading': 0}, 'leading must be at least 1, got 0.'),
    (
      {'solver': 'sampled'},
      "solver='sampled' finds no leading vectors beside which alice could draw "
      "others. Use 'power', 'eigh' or 'exact'.",
    ),
    (
      {'compensation_scale': -1.0},
      'compensation_scale must be in [0, inf), got -1.0.',
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
    alice(RATE, **options)
  assert str(error.value) == text
