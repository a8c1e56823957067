"""Muon against its formulas in float64, and against Optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib

from gnlorp_jax.optim import inspect, muon, scale_by_muon
from gnlorp_jax.optim.methods.muon import orthogonalise

BETA, RATE, STEPS = 0.8, 0.1, 4


def newton_schulz(matrix):
  """Five steps of the published iteration, on the shorter side."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = matrix / np.linalg.norm(matrix)
  x = x.T if len(x) > len(x.T) else x
  for _ in range(5):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.fixture(scope='module')
def kernels():
  """A wide stack and a tall matrix, and gradients of some steps."""
  rng = np.random.default_rng(0)
  shapes = {'up': (2, 5, 8), 'down': (8, 5)}

  def tree(*steps):
    return {
      name: {'kernel': rng.standard_normal((*steps, *shape)).astype(np.float32)}
      for name, shape in shapes.items()
    }

  stacked = tree(STEPS)
  return tree(), [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(4)]


@pytest.mark.parametrize('nesterov', [True, False])
def test_steps_are_those_of_the_formulas(kernels, nesterov, stepped):
  params, grads = kernels
  tx = muon(RATE, beta=BETA, nesterov=nesterov, weight_decay=0.1)
  moved, _ = stepped(tx, params, grads)
  for name, start in params.items():
    stack = start['kernel'].reshape(-1, *start['kernel'].shape[-2:])
    found = moved[name]['kernel'].reshape(stack.shape)
    for index, matrix in enumerate(np.float64(stack)):
      w, m = matrix, 0.0
      for t, grad in enumerate(grads, 1):
        g = np.float64(grad[name]['kernel'].reshape(stack.shape)[index])
        m = BETA * m + (1 - BETA) * g
        mean = m
        if nesterov:
          mean = BETA * m / (1 - BETA ** (t + 1))
          mean = mean + (1 - BETA) * g / (1 - BETA**t)
        # Elements of root mean square 0.2: sqrt(5) singular values of one.
        step = 0.2 * np.sqrt(8) * newton_schulz(mean)
        w = (1 - RATE * 0.1) * w - RATE * step
      np.testing.assert_allclose(found[index], w, rtol=0, atol=2e-6)


@pytest.mark.parametrize('consistent_rms', [None, 0.2])
def test_optax_takes_the_same_steps(kernels, consistent_rms, stepped):
  params, grads = kernels
  numbers = {  # Optax sees a stack where it is told of one.
    'up': {'kernel': contrib.MuonDimensionNumbers(1, 2)},
    'down': {'kernel': contrib.MuonDimensionNumbers(0, 1)},
  }
  theirs = contrib.muon(
    RATE,
    beta=BETA,
    consistent_rms=consistent_rms,
    muon_weight_dimension_numbers=numbers,
  )
  ours = muon(RATE, beta=BETA, consistent_rms=consistent_rms)
  moved, _ = stepped(ours, params, grads)
  expected, _ = stepped(theirs, params, grads)
  for name in params:
    np.testing.assert_allclose(
      moved[name]['kernel'], expected[name]['kernel'], rtol=0, atol=1e-5
    )


def test_singular_values_become_about_one():
  rng = np.random.default_rng(1)
  x = (
    rng.standard_normal((3, 20, 6))
    * 10.0 ** np.array([-3, 0, 3])[:, None, None]
  )
  values = np.linalg.svd(orthogonalise(jnp.float32(x)), compute_uv=False)
  assert 0.6 < values.min() and values.max() < 1.3
  np.testing.assert_array_equal(orthogonalise(jnp.zeros((2, 3))), 0)


def test_state_is_one_moment_of_the_bits_that_are_asked_for():
  params = {'up': {'kernel': jax.ShapeDtypeStruct((2, 64, 128), jnp.float32)}}
  size = 2 * 64 * 128
  found = {
    bits: inspect.report(params, muon(RATE, moment_bits=bits))[0].state_bytes
    for bits in (32, 8, 4)
  }
  # Codes, and a scale of four bytes for each block of 256 or 128.
  assert found == {
    32: 4 * size,
    8: size + size // 64,
    4: size // 2 + size // 32,
  }


@pytest.mark.parametrize(
  ('options', 'text'),
  [
    ({'beta': 1.0}, 'beta must be in [0, 1), got 1.0.'),
    ({'ns_steps': 0}, 'ns_steps must be at least 1, got 0.'),
    ({'consistent_rms': -1.0}, 'consistent_rms must be in [0, inf), got -1.0.'),
  ],
)
def test_bad_numbers_are_told(options, text):
  with pytest.raises(ValueError) as error:
    muon(RATE, **options)
  assert str(error.value) == text


def test_vectors_are_no_kernels():
  with pytest.raises(ValueError, match="Label it 'full'"):
    scale_by_muon().init({'bias': jnp.ones(3)})
