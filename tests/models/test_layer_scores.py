"""Scores of layers against NumPy in float64.

Shape suffixes in this file:
  B, T  sequences, positions
  D     width of the residual stream
  I, O  input and output of a kernel
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import interface, layer_scores, llama
from gnlorp_jax.models.families import gemma3_text, phi3, qwen3

CONFIG = llama.LlamaConfig(
  vocab_size=11,
  hidden_size=8,
  intermediate_size=12,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  max_seq_len=16,
  initializer_std=0.5,
)
LENGTHS = (6, 4, 0)
THRESHOLDS = (1.5, 3.0)


@pytest.fixture(scope='module')
def model():
  return llama.make(CONFIG)


@pytest.fixture(scope='module')
def params(model):
  return model.init(jax.random.key(0))


@pytest.fixture(scope='module')
def tokens_BT():
  return np.random.default_rng(0).integers(0, 11, (3, 6)).astype(np.int32)


@pytest.fixture(scope='module')
def squares_of(model, params):
  is_token_BT = np.arange(6)[None] < np.array(LENGTHS)[:, None]
  read = jax.jit(lambda *args: layer_scores.input_squares(model, *args))
  return lambda tokens_BT: read(params, tokens_BT, is_token_BT)


@pytest.fixture(scope='module')
def squares(squares_of, tokens_BT):
  return squares_of(tokens_BT)


@pytest.fixture(scope='module')
def kernels(params):
  return layer_scores.kernels_of(params)


def norm(x_TD, scale_D):
  mean_T1 = np.mean(x_TD**2, axis=-1, keepdims=True)
  return x_TD / np.sqrt(mean_T1 + CONFIG.rms_norm_eps) * scale_D


def rotate(x_TH):
  angles = np.outer(np.arange(len(x_TH)), 10000.0 ** -np.array([0, 0.5]))
  first, second = np.split(x_TH, 2, axis=-1)
  cos, sin = np.cos(angles), np.sin(angles)
  return np.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


def forward(params, row_T):
  """Logits of one sequence, and by layer what each kernel reads."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x_TD = params['embed']['embedding'][row_T]
  inputs = []
  for number in range(2):
    layer = jax.tree.map(lambda x, i=number: x[i], params['layers'])
    read = {}

    def apply(name, x_TI, layer=layer, read=read):
      read[name] = x_TI
      room, kernel = name.split('/')
      return x_TI @ layer[room][kernel]['kernel']

    y_TD = norm(x_TD, layer['attn_norm']['scale'])
    q, k, v = (apply(f'attn/{name}_proj', y_TD) for name in 'qkv')
    heads = []
    for q_TH in np.split(q, 2, axis=-1):
      scores_TS = rotate(q_TH) @ rotate(k).T / 2
      weights_TS = np.exp(scores_TS) * np.tri(len(row_T))
      heads.append(weights_TS / weights_TS.sum(-1, keepdims=True) @ v)
    x_TD = x_TD + apply('attn/o_proj', np.concatenate(heads, axis=-1))
    y_TD = norm(x_TD, layer['mlp_norm']['scale'])
    gate = apply('mlp/gate_proj', y_TD)
    hidden = gate / (1 + np.exp(-gate)) * apply('mlp/up_proj', y_TD)
    x_TD = x_TD + apply('mlp/down_proj', hidden)
    inputs.append(read)
  x_TD = norm(x_TD, params['norm']['scale'])
  return x_TD @ params['lm_head']['kernel'], inputs


def entries(kernels, squares, layer):
  """A of a layer, all its kernels in one array."""
  return np.concatenate(
    [
      (
        np.abs(np.asarray(kernel[layer], np.float64))
        * np.sqrt(np.asarray(squares[name][layer], np.float64))[:, None]
      ).ravel()
      for name, kernel in kernels.items()
    ]
  )


def test_inputs_are_those_of_a_forward_pass_in_numpy(
  model, params, tokens_BT, squares
):
  # Each sequence by itself, without what pads it.
  rows = [row[:n] for row, n in zip(tokens_BT, LENGTHS, strict=True) if n]
  found = [forward(params, row) for row in rows]
  expected = [np.asarray(model.apply(params, row[None])[0]) for row in rows[:1]]
  np.testing.assert_allclose(found[0][0], expected[0], rtol=1e-4, atol=1e-5)
  assert len(squares) == 7
  for name, square_LI in squares.items():
    for layer in range(2):
      wanted = sum((read[layer][name] ** 2).sum(0) for _, read in found)
      np.testing.assert_allclose(square_LI[layer], wanted, rtol=2e-5)


@pytest.mark.parametrize('family', [gemma3_text, phi3, qwen3])
def test_every_matrix_of_other_families_is_met(family):
  config = interface.first_layers(next(iter(family.PRESETS.values())), 2)
  model = family.make(config)
  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens_BT = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  is_token_BT = jax.ShapeDtypeStruct((1, 4), bool)
  found = jax.eval_shape(
    lambda *args: layer_scores.input_squares(model, *args),
    *(params, tokens_BT, is_token_BT),
  )
  kernels = layer_scores.kernels_of(params)
  assert {name: leaf.shape for name, leaf in found.items()} == {
    name: leaf.shape[:2] for name, leaf in kernels.items()
  }
  assert all(leaf.dtype == jnp.float32 for leaf in found.values())


def test_padding_counts_nothing(squares_of, squares, tokens_BT):
  others_BT = tokens_BT.copy()
  others_BT[1, 4:] += 1
  others_BT[2] = 0
  others_BT %= 11
  assert (others_BT != tokens_BT).sum() > 4
  jax.tree.map(np.testing.assert_array_equal, squares_of(others_BT), squares)


def test_outliers_are_those_of_the_formula(kernels, squares):
  shares_ML, times_L = layer_scores.outlier_shares(kernels, squares, THRESHOLDS)
  assert shares_ML.shape == (2, 2)
  for layer in range(2):
    sizes = entries(kernels, squares, layer)
    assert len(sizes) == 8 * (8 + 4 + 4 + 8) + 3 * 8 * 12
    wanted = [100 * np.mean(sizes > m * sizes.mean()) for m in THRESHOLDS]
    np.testing.assert_allclose(shares_ML[:, layer], wanted, rtol=1e-6)
    assert 0 < wanted[1] < wanted[0]
    np.testing.assert_allclose(
      times_L[layer], sizes.max() / sizes.mean(), rtol=1e-5
    )


def test_a_factor_of_a_whole_layer_changes_nothing(kernels, squares):
  before = layer_scores.outlier_shares(kernels, squares, THRESHOLDS)
  factor_L = np.array([4.0, 0.5], np.float32)
  longer = {
    name: square_LI * factor_L[:, None] for name, square_LI in squares.items()
  }
  after = layer_scores.outlier_shares(kernels, longer, THRESHOLDS)
  np.testing.assert_array_equal(before[0], after[0])
  larger = {
    name: kernel * factor_L[:, None, None] for name, kernel in kernels.items()
  }
  after = layer_scores.outlier_shares(larger, squares, THRESHOLDS)
  np.testing.assert_array_equal(before[0], after[0])


def test_a_factor_of_one_matrix_changes_its_layer_alone(kernels, squares):
  before = layer_scores.outlier_shares(kernels, squares, THRESHOLDS)[0]
  name = 'mlp/up_proj'
  larger = kernels | {name: kernels[name].at[1].multiply(8)}
  after = layer_scores.outlier_shares(larger, squares, THRESHOLDS)[0]
  np.testing.assert_array_equal(before[:, 0], after[:, 0])
  assert (np.abs(before - after)[:, 1] > 1).all()


def test_inputs_scale_rows_and_what_equals_the_threshold_is_no_outlier():
  # A is [[1, 3], [2, 2]], of mean 2; of columns it would be [[1, 6], [1, 2]].
  kernels = {'a': jnp.array([[[1.0, -3.0], [1.0, 1.0]]])}
  squares = {'a': jnp.array([[1.0, 4.0]])}
  shares_ML, times_L = layer_scores.outlier_shares(
    kernels, squares, (0.75, 1.0, 1.5)
  )
  np.testing.assert_array_equal(shares_ML[:, 0], [75, 25, 0])
  np.testing.assert_array_equal(times_L, [1.5])


def test_a_layer_of_zeros_has_no_outliers():
  zeros = {'a': jnp.zeros((1, 2, 2))}
  squares = {'a': jnp.ones((1, 2))}
  found = layer_scores.outlier_shares(zeros, squares, (0.75, 1.0, 1.5))
  assert not any(np.any(x) for x in found)


def test_weight_norms_are_those_of_all_matrices(kernels):
  found = layer_scores.weight_norms(kernels)
  for layer in range(2):
    arrays = [
      np.asarray(k[layer], np.float64).ravel() for k in kernels.values()
    ]
    wanted = np.sqrt(np.sum(np.concatenate(arrays) ** 2))
    np.testing.assert_allclose(found[layer], wanted, rtol=1e-6)


def hill(w_IO):
  """Of ascending eigenvalues, counted from 1 as the formula does."""
  small = w_IO if w_IO.shape[1] <= w_IO.shape[0] else w_IO.T
  values = np.linalg.eigvalsh(small.T @ small)
  n = len(values)
  k = n // 2
  at = {i: values[i - 1] for i in range(1, n + 1)}
  logs = [np.log(at[n - i + 1] / at[n - k]) for i in range(1, k + 1)]
  return 1 + k / sum(logs)


def test_hill_exponents_are_those_of_eigenvalues_in_numpy(kernels):
  chosen = {name: kernels[name] for name in ('attn/k_proj', 'mlp/down_proj')}
  found = layer_scores.hill_exponents(chosen)
  for layer in range(2):
    wanted = [hill(np.asarray(k[layer], np.float64)) for k in chosen.values()]
    np.testing.assert_allclose(found[layer], np.mean(wanted), rtol=1e-4)


def test_a_heavier_tail_has_a_smaller_exponent():
  light = np.diag([1.0, 1.1, 1.2, 1.3])
  heavy = np.diag([1.0, 2.0, 4.0, 8.0])
  kernels = {'a': jnp.asarray(np.stack([light, heavy]), jnp.float32)}
  found = layer_scores.hill_exponents(kernels)
  # k = 2, above the second eigenvalue.
  logs = 2 * np.log([1.2 / 1.1, 1.3 / 1.1]), 2 * np.log([2.0, 4.0])
  wanted = [1 + 2 / log.sum() for log in logs]
  np.testing.assert_allclose(found, wanted, rtol=1e-4)
  assert found[1] < found[0]
