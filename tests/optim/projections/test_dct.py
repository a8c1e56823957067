"""The DCT projection against SciPy and explicit float64 matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.projections import dct as dct_lib
from gnlorp_jax.optim.projections.dct import Columns

# Compiled, a call is one program and not one per operation.
columns = jax.jit(dct_lib.columns, static_argnums=1)
select = jax.jit(dct_lib.select, static_argnums=3)
transformed = jax.jit(dct_lib.transformed, static_argnums=1)

TRANSFORMS = ('dct2', 'dct3')


def matrix(n, transform):
  """The basis vectors as columns, float64, from the written formula."""
  i, j = np.meshgrid(np.arange(n), np.arange(n), indexing='ij')
  c = np.sqrt(2 / n) * np.cos(np.pi * i * (2 * j + 1) / (2 * n))
  c[0] *= np.sqrt(0.5)
  return c if transform == 'dct3' else c.T


def gradient(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def chosen(*indices, n):
  return Columns(np.array(indices, np.int32), n)


@pytest.mark.parametrize('transform', TRANSFORMS)
@pytest.mark.parametrize('n', [1, 5, 8, 172])
def test_columns_are_those_of_the_orthogonal_matrix(transform, n):
  expected = matrix(n, transform)
  np.testing.assert_allclose(expected.T @ expected, np.eye(n), atol=1e-12)
  found = columns(chosen(*range(n), n=n), transform)
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_angles_of_long_axes_are_exact(transform):
  n, picked = 46340, (0, 1, 23170, 46339)
  i = np.arange(n, dtype=np.int64)[:, None]
  j = np.array(picked, np.int64)[None]
  frequency, place = (j, i) if transform == 'dct2' else (i, j)
  angle = frequency * (2 * place + 1) % (4 * n) * (np.pi / (2 * n))
  expected = np.sqrt(np.where(frequency == 0, 1, 2) / n) * np.cos(angle)
  found = columns(chosen(*picked, n=n), transform)
  # Rounding of an angle below 2 pi to float32, times the length sqrt(2 / n).
  np.testing.assert_allclose(found, expected, atol=6e-7 * np.sqrt(2 / n))


@pytest.mark.parametrize('transform', TRANSFORMS)
@pytest.mark.parametrize('n', [7, 32])
def test_fast_transform_is_the_product_with_the_matrix(transform, n):
  grad = gradient((3, 5, n))
  found = transformed(np.float32(grad), transform)
  np.testing.assert_allclose(found, grad @ matrix(n, transform), atol=1e-5)


def test_fast_transform_is_scipys():
  fft = pytest.importorskip('scipy.fft')
  grad = gradient((4, 24))
  dct2 = transformed(np.float32(grad), 'dct2')
  np.testing.assert_allclose(dct2, fft.dct(grad, 2, norm='ortho'), atol=1e-5)
  dct3 = transformed(np.float32(grad), 'dct3')
  np.testing.assert_allclose(dct3, fft.dct(grad, 3, norm='ortho'), atol=1e-5)


@pytest.mark.parametrize('transform', TRANSFORMS)
@pytest.mark.parametrize('norm', [1, 2])
def test_refresh_takes_the_columns_with_the_largest_norms(transform, norm):
  dct = projections.get('dct', transform=transform, norm=norm)
  grads = gradient((3, 6, 16))

  @jax.jit
  def first(grads):
    return dct.refresh(grads, dct.init(grads.shape, 5, 0), 0)

  basis = first(np.float32(grads))
  for grad, found in zip(grads, np.asarray(basis.indices_R), strict=True):
    scores = (np.abs(grad @ matrix(16, transform)) ** norm).sum(axis=0)
    expected = np.sort(np.argsort(scores)[-5:])
    np.testing.assert_array_equal(found, expected)


def test_basis_of_cosines_is_found_exactly():
  q = matrix(32, 'dct2')[:, [3, 8, 30]]
  grad = gradient((9, 3)) @ q.T
  dct = projections.get('dct')

  @jax.jit
  def there_and_back(grad):
    basis = dct.refresh(grad, dct.init((9, 32), 3), 0)
    low = dct.project(grad, basis)
    return basis, low, dct.project_back(low, basis)

  basis, low, back = there_and_back(np.float32(grad))
  assert basis.indices_R.tolist() == [3, 8, 30]
  np.testing.assert_allclose(low, grad @ q, atol=1e-5)
  np.testing.assert_allclose(back, grad, atol=1e-5)


@pytest.mark.parametrize('power', [1, 2])
def test_selection_equals_the_product_with_the_turn(power):
  old, new = (0, 3, 5, 9), (1, 3, 9, 11)
  q = matrix(12, 'dct2')
  turn = q[:, old].T @ q[:, new]
  low = gradient((2, 6, 4))
  found = select(
    np.float32(low),
    chosen(*old, n=12),
    chosen(*new, n=12),
    power,
  )
  np.testing.assert_allclose(found, low @ turn**power, atol=1e-6)
  assert (
    np.asarray(found)[..., [0, 3]] == 0
  ).all()  # Not a rounding error: zero.


def test_refresh_of_a_stack_is_compiled_without_an_n_by_n_matrix():
  dct = projections.get('dct')
  grad = jax.ShapeDtypeStruct((4, 8, 1024), jnp.float32)
  basis = jax.eval_shape(lambda: dct.init(grad.shape, 4))
  step = jax.jit(lambda g, b: dct.project(g, dct.refresh(g, b, 0)))
  memory = step.lower(grad, basis).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 1024 * 1024  # Of 4 MiB for one matrix.


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    (
      {'transform': 'fft'},
      "Unknown transform 'fft'; expected one of ('dct2', 'dct3').",
    ),
    ({'norm': 3}, 'norm must be 1 or 2, got 3.'),
  ],
)
def test_bad_option_is_an_error(options, text):
  with pytest.raises(ValueError) as error:
    projections.get('dct', **options)
  assert str(error.value) == text


def test_too_long_an_axis_is_an_error():
  with pytest.raises(ValueError) as error:
    projections.get('dct').init((50265, 50265), 4)
  assert str(error.value) == (
    'An axis of length 50265 is too long for the exact angles of dct: at most '
    '46340. Use another projection or side for it.'
  )
