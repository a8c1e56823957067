import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gnlorp_jax.training import sharding
from gnlorp_jax.training.losses import (
  chunked_cross_entropy,
  chunked_guesses,
  cross_entropy,
  squared_error,
)

# Shape suffixes: B sequences, T positions, D features, V vocabulary.
B, T, D, V = 4, 12, 8, 50


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)
  return {
    'x_BTD': rng.normal(size=(B, T, D)).astype(np.float32),
    'head_DV': rng.normal(size=(D, V)).astype(np.float32),
    'targets_BT': rng.integers(0, V, (B, T), dtype=np.int32),
    'weights_BT': rng.uniform(0, 2, (B, T)).astype(np.float32),
  }


def chunked(x_BTD, head_DV, targets_BT, weights_BT, chunk_tokens):
  def logits_fn(x_BCD):
    return (x_BCD @ head_DV).astype(jnp.float32)

  return chunked_cross_entropy(
    logits_fn, x_BTD, targets_BT, weights_BT, chunk_tokens=chunk_tokens
  )


chunked_jit = jax.jit(chunked, static_argnames='chunk_tokens')


def float64_oracle(x_BTD, head_DV, targets_BT, weights_BT):
  """Loss sum, and its gradients with respect to features and head."""
  x_BTD, head_DV = x_BTD.astype(np.float64), head_DV.astype(np.float64)
  logits_BTV = x_BTD @ head_DV
  logits_BTV -= logits_BTV.max(-1, keepdims=True)
  probs_BTV = np.exp(logits_BTV)
  probs_BTV /= probs_BTV.sum(-1, keepdims=True)
  one_hot_BTV = np.eye(V)[targets_BT]
  loss = -np.sum(weights_BT * np.log(np.sum(probs_BTV * one_hot_BTV, -1)))
  grad_BTV = weights_BT[..., None] * (probs_BTV - one_hot_BTV)
  grad_head_DV = np.einsum('BTD,BTV->DV', x_BTD, grad_BTV)
  return loss, grad_BTV @ head_DV.T, grad_head_DV


@pytest.mark.parametrize('chunk_tokens', [1, 5 * B + 3, 10**6])
def test_guesses_add_up_to_the_loss_and_to_those_that_are_right(
  problem, chunk_tokens
):
  x_BTD, head_DV, targets_BT, weights_BT = problem.values()
  likeliest_BT = (np.float64(x_BTD) @ head_DV).argmax(-1)
  # Every third guess is right.
  is_right_BT = np.arange(B * T).reshape(B, T) % 3 == 0
  targets_BT = np.where(is_right_BT, likeliest_BT, (likeliest_BT + 1) % V)
  loss, weight, right = chunked_guesses(
    lambda x_BCD: x_BCD @ head_DV,
    x_BTD,
    targets_BT,
    weights_BT,
    chunk_tokens=chunk_tokens,
  )
  expected, *_ = float64_oracle(x_BTD, head_DV, targets_BT, weights_BT)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(weight, weights_BT.sum(), rtol=1e-6)
  expected = (weights_BT * is_right_BT).sum()
  np.testing.assert_allclose(right, expected, rtol=1e-6)


@pytest.mark.parametrize(
  # One position each, which is the least; equal parts; a shorter last one; all.
  'chunk_tokens',
  [1, 3 * B, 5 * B + 3, B * T, 10**6],
)
def test_loss_and_gradients_equal_plain_formula(problem, chunk_tokens):
  def loss_fn(x_BTD, head_DV):
    loss, weight = chunked(
      x_BTD,
      head_DV,
      problem['targets_BT'],
      problem['weights_BT'],
      chunk_tokens,
    )
    return loss, weight

  (loss, weight), grads = jax.jit(
    jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
  )(problem['x_BTD'], problem['head_DV'])
  oracle_loss, *oracle_grads = float64_oracle(**problem)
  np.testing.assert_allclose(loss, oracle_loss, rtol=1e-6)
  np.testing.assert_allclose(weight, problem['weights_BT'].sum(), rtol=1e-6)
  for grad, oracle_grad in zip(grads, oracle_grads, strict=True):
    # 1e-6 of the largest entry: small entries are differences of large ones.
    np.testing.assert_allclose(
      grad, oracle_grad, rtol=1e-6, atol=1e-6 * np.abs(oracle_grad).max()
    )


def test_loss_equals_torch(problem):
  torch = pytest.importorskip('torch')
  loss, _ = chunked_jit(**problem, chunk_tokens=5 * B)
  logits = torch.from_numpy(problem['x_BTD'] @ problem['head_DV'])
  losses = torch.nn.functional.cross_entropy(
    logits.reshape(-1, V),
    torch.from_numpy(problem['targets_BT']).long().reshape(-1),
    reduction='none',
  )
  weights = torch.from_numpy(problem['weights_BT']).reshape(-1)
  np.testing.assert_allclose(loss, (losses * weights).sum(), rtol=1e-6)


def test_results_are_float32_for_bfloat16_features(problem):
  bfloat16 = problem | {
    'x_BTD': jnp.asarray(problem['x_BTD'], jnp.bfloat16),
    'head_DV': jnp.asarray(problem['head_DV'], jnp.bfloat16),
  }
  loss, weight = chunked_jit(**bfloat16, chunk_tokens=3 * B)
  assert loss.dtype == weight.dtype == jnp.float32
  # bfloat16 keeps 8 bits: each product is off by up to 2**-8.
  np.testing.assert_allclose(loss, float64_oracle(**problem)[0], rtol=2**-8)


@functools.cache
def of_features():
  """The loss and its gradient with respect to the features, compiled."""

  def loss_fn(x_BTD, rest):
    return chunked(x_BTD, **rest, chunk_tokens=3 * B)[0]

  grad_fn = jax.jit(jax.value_and_grad(loss_fn))

  def run(problem):
    rest = dict(problem)
    return grad_fn(rest.pop('x_BTD'), rest)

  return run


@pytest.mark.parametrize('scale', [1e4, 1e30])
def test_large_logits_are_safe(problem, scale):
  scaled = problem | {'head_DV': problem['head_DV'] * np.float32(scale)}
  loss, grad = of_features()(scaled)
  logits = problem['x_BTD'] @ scaled['head_DV'].astype(np.float64)
  target = np.take_along_axis(logits, problem['targets_BT'][..., None], -1)
  # So far apart, the logarithm of the sum of exponentials is the maximum.
  oracle = np.sum(problem['weights_BT'] * (logits.max(-1) - target[..., 0]))
  np.testing.assert_allclose(loss, oracle, rtol=1e-4)
  assert np.all(np.isfinite(grad))


def test_zero_weight_leaves_a_position_out(problem):
  weights_BT = problem['weights_BT'].copy()
  weights_BT[:, 7:] = 0
  short = {
    name: value[:, :7] for name, value in problem.items() if name != 'head_DV'
  }
  full = problem | {'weights_BT': weights_BT}
  loss, weight = chunked_jit(**full, chunk_tokens=5 * B)
  short_loss, short_weight = chunked_jit(
    **short, head_DV=problem['head_DV'], chunk_tokens=5 * B
  )
  np.testing.assert_allclose(loss, short_loss, rtol=1e-6)
  np.testing.assert_allclose(weight, short_weight, rtol=1e-6)


def test_all_weights_zero_gives_zero_loss_and_gradient(problem):
  zero = problem | {'weights_BT': np.zeros((B, T), np.float32)}

  def loss_fn(head_DV):
    return chunked(**(zero | {'head_DV': head_DV}), chunk_tokens=5 * B)

  grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  (loss, weight), grad = grad_fn(problem['head_DV'])
  assert (loss, weight) == (0, 0)
  np.testing.assert_array_equal(grad, 0)


def compiled_gradient(chunk_tokens, mesh=None, batch=8):
  positions, features, vocabulary = 64, 16, 4096
  replicated = mesh and NamedSharding(mesh, P())
  split = mesh and sharding.batch_sharding(mesh)

  def shape(sharding, dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

  def loss_fn(head_DV, *args):
    return chunked(args[0], head_DV, *args[1:], chunk_tokens)[0]

  return (
    jax.jit(jax.grad(loss_fn, argnums=(0, 1)))
    .lower(
      shape(replicated, jnp.float32, features, vocabulary),
      shape(split, jnp.float32, batch, positions, features),
      shape(split, jnp.int32, batch, positions),
      shape(split, jnp.float32, batch, positions),
    )
    .compile()
  )


def test_logits_never_exist_at_once():
  all_logits = 8 * 64 * 4096 * 4
  whole = compiled_gradient(8 * 64).memory_analysis()
  chunks = compiled_gradient(8 * 4).memory_analysis()
  assert whole.temp_size_in_bytes >= all_logits
  # A chunk is a sixteenth of the tokens; its logits, their gradient and the
  # gradient of the head are held together.
  assert chunks.temp_size_in_bytes < all_logits / 4


def test_chunks_keep_the_sharding_of_the_batch():
  mesh = sharding.make_mesh(2, 2)
  chunks = compiled_gradient(8 * 4, mesh)
  one_device = compiled_gradient(8 * 4, batch=2)
  # Each device works on its two sequences as if they were alone ...
  assert chunks.memory_analysis().temp_size_in_bytes <= (
    1.1 * one_device.memory_analysis().temp_size_in_bytes
  )
  # ... and only sums are exchanged.
  text = chunks.as_text()
  assert 'all-reduce' in text
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text


def test_sharded_loss_equals_unsharded(problem):
  mesh = sharding.make_mesh(2, 2)
  split = sharding.batch_sharding(mesh)
  sharded = problem | {
    name: jax.device_put(problem[name], split)
    for name in ('x_BTD', 'targets_BT', 'weights_BT')
  }
  loss, _ = chunked_jit(**sharded, chunk_tokens=3 * B)
  expected, _ = chunked_jit(**problem, chunk_tokens=3 * B)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_chunk_of_no_tokens_is_an_error(problem):
  with pytest.raises(ValueError, match='^chunk_tokens=0 must be at least 1.$'):
    chunked(**problem, chunk_tokens=0)


def test_classifier_loss_leaves_out_what_has_no_weight():
  rng = np.random.default_rng(0)
  logits_BK = rng.normal(size=(4, 3)).astype(np.float32)
  labels_B, weights_B = np.array([0, 2, 1, 2]), np.array([1.0, 0.5, 0, 2])
  found = jax.jit(cross_entropy)(logits_BK, labels_B, weights_B)
  exact = logits_BK.astype(np.float64)
  losses_B = np.log(np.exp(exact).sum(axis=1)) - exact[range(4), labels_B]
  np.testing.assert_allclose(found, [losses_B @ weights_B, 3.5], rtol=1e-6)
  assert {value.dtype for value in found} == {jnp.dtype('float32')}


def test_squared_error_is_not_halved():
  outputs_B1 = np.array([[1.0], [3.0], [9.0]], np.float32)
  targets_B = np.array([0.5, 5.0, 0.0], np.float32)
  weights_B = np.array([2.0, 1.0, 0.0], np.float32)
  # 2 * 0.5 ** 2 + 2 ** 2 = 4.5
  found = jax.jit(squared_error)(outputs_B1, targets_B, weights_B)
  np.testing.assert_allclose(found, [4.5, 3.0])


def gradient_shapes(jaxpr):
  """Shapes of all sums that a loop carries, and of what it stacks."""
  (scan,) = (e for e in jaxpr.eqns if e.primitive.name == 'scan')
  return [x.aval.shape for x in scan.outvars]


def test_no_gradient_of_what_is_not_differentiated(problem):
  chunk_tokens = 3 * B  # Four chunks of three positions.

  def loss_fn(x_BTD, head_DV, bias_V, weights_BT):
    return chunked_cross_entropy(
      lambda x_BCD: x_BCD @ head_DV + bias_V[None, None],
      *(x_BTD, problem['targets_BT'], weights_BT),
      chunk_tokens=chunk_tokens,
    )[0]

  args = (
    *(problem['x_BTD'], problem['head_DV'], np.zeros(V, np.float32)),
    problem['weights_BT'],
  )
  of_x, of_head, of_bias, of_weights = (4, B, 3, D), (D, V), (V,), (4, B, 3)
  every = (0, 1, 2, 3)
  expected = jax.jit(jax.grad(loss_fn, argnums=every))(*args)
  for argnums, shapes in [
    ((0,), [of_x]),
    ((0, 2), [of_bias, of_x]),
    ((1,), [of_head]),
    ((3,), [of_weights]),
    (every, [of_head, of_bias, of_x, of_weights]),
  ]:
    grad_fn = jax.jit(jax.grad(loss_fn, argnums=argnums))
    (program,) = jax.make_jaxpr(grad_fn)(*args).eqns
    found = gradient_shapes(program.params['jaxpr'].jaxpr)
    assert sorted(found[1:]) == sorted(shapes), argnums
    if argnums == every:
      continue  # These are expected of the others.
    for number, grad in zip(argnums, grad_fn(*args), strict=True):
      np.testing.assert_allclose(grad, expected[number], rtol=1e-6, atol=1e-6)


def test_a_loss_that_is_not_used_has_gradient_zero(problem):
  def weight_sum(x_BTD):
    return chunked(**(problem | {'x_BTD': x_BTD}), chunk_tokens=3 * B)[1]

  grad = jax.jit(jax.grad(weight_sum))(problem['x_BTD'])
  np.testing.assert_array_equal(grad, 0)
