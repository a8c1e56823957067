import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gnlorp_jax.models import attention, hf, llama

SMALL = {
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 44,
  'num_layers': 2,
  'num_heads': 4,
  'num_kv_heads': 2,
  'max_seq_len': 16,
}


@functools.cache
def build(std=0.1, **overrides):
  """A small model, random parameters and a batch of tokens.

  The parameters are drawn by NumPy, since compiling init takes seconds, and
  widely, so that no part of the network is close to linear.
  """
  model = llama.make(llama.LlamaConfig(**{**SMALL, **overrides}))
  rng = np.random.default_rng(0)
  norms = {'attn_norm', 'mlp_norm', 'norm'}

  def draw(path, leaf):
    values = rng.normal(scale=std, size=leaf.shape)
    values += any(key.key in norms for key in path)
    return jnp.asarray(values, leaf.dtype)

  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map_with_path(draw, shapes)
  return model, params, jnp.asarray(rng.integers(0, 61, (2, 12)), jnp.int32)


@functools.cache
def compiled(tied=False):
  """`Model.apply` of the small model."""
  return jax.jit(build(tie_embeddings=tied)[0].apply)


def mean_loss(model, params, tokens):
  """Mean cross-entropy of the next token."""
  log_probs = jax.nn.log_softmax(model.apply(params, tokens[:, :-1]))
  picked = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)
  return -picked.mean()


def paths(params):
  return traverse_util.flatten_dict(params, sep='/')


def relative_error(got, expected):
  got, expected = (
    np.concatenate([np.float32(x).ravel() for x in jax.tree.leaves(t)])
    for t in (got, expected)
  )
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


# Parameters.


@pytest.mark.parametrize('tied', [False, True])
def test_layout_is_stacked_plain_dict(tied):
  config = llama.LlamaConfig(**SMALL, tie_embeddings=tied)
  params = jax.eval_shape(llama.make(config).init, jax.random.key(0))
  expected = {
    'embed/embedding': (61, 32),
    'layers/attn/q_proj/kernel': (2, 32, 32),
    'layers/attn/k_proj/kernel': (2, 32, 16),
    'layers/attn/v_proj/kernel': (2, 32, 16),
    'layers/attn/o_proj/kernel': (2, 32, 32),
    'layers/mlp/gate_proj/kernel': (2, 32, 44),
    'layers/mlp/up_proj/kernel': (2, 32, 44),
    'layers/mlp/down_proj/kernel': (2, 44, 32),
    'layers/attn_norm/scale': (2, 32),
    'layers/mlp_norm/scale': (2, 32),
    'norm/scale': (32,),
  }
  if not tied:
    expected['lm_head/kernel'] = (32, 61)
  assert {k: v.shape for k, v in paths(params).items()} == expected
  assert type(params) is dict and type(params['layers']['attn']) is dict


def test_init_draws_every_matrix_afresh():
  sizes = {**SMALL, 'num_layers': 3}
  config = llama.LlamaConfig(**sizes, initializer_std=0.5)
  params = jax.jit(llama.make(config).init)(jax.random.key(0))
  for path, leaf in paths(params).items():
    if path.endswith('scale'):
      np.testing.assert_array_equal(leaf, 1)
    else:
      # The smallest array has 1536 values: 7 % is four standard errors.
      assert abs(np.std(leaf) / 0.5 - 1) < 0.07, path
      assert len(np.unique(leaf)) > 0.99 * leaf.size, path


# The function computed.


@pytest.mark.parametrize('tied', [False, True])
def test_loss_and_gradients_equal_pytorch(tied, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  safetensors_torch = pytest.importorskip('safetensors.torch')
  model, params, tokens = build(std=0.3, tie_embeddings=tied)
  hf.export(
    tmp_path / 'model',
    params,
    llama.HF_TENSORS,
    llama.config_to_hf(model.config),
  )
  oracle = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'model')
  ids = torch.from_numpy(np.array(tokens, np.int64))
  loss = oracle(ids, labels=ids).loss
  loss.backward()
  (tmp_path / 'gradient').mkdir()
  safetensors_torch.save_file(
    {name: p.grad for name, p in oracle.named_parameters()},
    tmp_path / 'gradient' / 'model.safetensors',
  )
  expected = hf.load_params(tmp_path / 'gradient', llama.HF_TENSORS, params)

  value, gradient = jax.jit(
    jax.value_and_grad(functools.partial(mean_loss, model))
  )(params, tokens)
  assert abs(value - loss.item()) < 1e-5
  for path, want in paths(expected).items():
    # Both sides work in float32: 2^-24 at each of some hundred operations, one
    # after the other, is 6e-6 at worst.
    assert relative_error(paths(gradient)[path], want) < 6e-6, path


def through_blocks(model, params, x_BTD):
  """Applies the blocks in a Python loop."""
  for i in range(model.config.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers'])
    x_BTD = model.layer_fns.block(layer, x_BTD)
  return x_BTD


def test_gradient_reaches_only_positions_up_to_the_token():
  model, params, tokens = build()

  @jax.jit
  @jax.grad
  def gradient(x_BTD, position):
    x_BTD = through_blocks(model, params, x_BTD)
    return jnp.square(model.layer_fns.head(params, x_BTD[0, position])).sum()

  embed = jax.jit(model.layer_fns.embed)
  for position in (0, 5, 11):
    reached = gradient(embed(params, tokens), position)
    reached = np.any(np.asarray(reached) != 0, axis=-1)
    np.testing.assert_array_equal(reached[0], np.arange(12) <= position)
    assert not reached[1].any()


@pytest.mark.parametrize('tied', [False, True])
def test_layer_fns_in_a_loop_equal_apply(tied):
  model, params, tokens = build(tie_embeddings=tied)

  @jax.jit
  def logits(params):
    rest = {k: v for k, v in params.items() if k != 'layers'}
    x_BTD = model.layer_fns.embed(rest, tokens)
    x_BTD = through_blocks(model, params, x_BTD)
    return model.layer_fns.head(rest, x_BTD)

  expected = compiled(tied)(params, tokens)
  assert np.std(expected) > 0.05
  np.testing.assert_allclose(logits(params), expected, atol=2e-6)


def test_without_adapters_a_dropout_key_changes_nothing():
  model, params, tokens = build()
  key = jax.random.key(0)
  for fn in (model.apply, model.hidden, model.layer_fns.embed):
    with_key, without = jax.jit(
      lambda p, fn=fn: (fn(p, tokens, key), fn(p, tokens, None))
    )(params)
    np.testing.assert_array_equal(with_key, without)


@pytest.mark.parametrize('tied', [False, True])
def test_logits_of_pieces_of_hidden_equal_apply(tied):
  model, params, tokens = build(tie_embeddings=tied)

  @jax.jit
  def pieces(params):
    x_BTD = model.hidden(params, tokens)
    return model.logits(params, x_BTD), model.logits(params, x_BTD[1, 3:5])

  whole, piece = pieces(params)
  expected = np.asarray(compiled(tied)(params, tokens))
  np.testing.assert_allclose(whole, expected, atol=2e-6)
  np.testing.assert_allclose(piece, expected[1, 3:5], atol=2e-6)


def test_remat_changes_memory_but_no_value():
  # Wide and long enough for activations to matter beside the parameters.
  sizes = {'intermediate_size': 256, 'num_layers': 6, 'max_seq_len': 64}
  tokens = np.random.default_rng(1).integers(0, 61, (4, 64))
  results, temporary = [], []
  for remat in (False, True):
    model, params, _ = build(remat=remat, **sizes)
    step = jax.jit(jax.value_and_grad(functools.partial(mean_loss, model)))
    compiled = step.lower(params, tokens).compile()
    results.append(compiled(params, tokens))
    temporary.append(compiled.memory_analysis().temp_size_in_bytes)
  assert abs(results[0][0] - results[1][0]) < 1e-6
  # The same operations in float32, fused differently, which depends on the
  # processor too: a gradient is a sum over all tokens, in another order.
  # Rounding errors of n additions grow with the root of n. 1.02e-6 was seen
  # where XLA has no AVX-512.
  bound = np.finfo(np.float32).eps * np.sqrt(tokens.size)
  assert relative_error(results[1][1], results[0][1]) < bound
  assert temporary[1] < 0.6 * temporary[0]


def test_bfloat16_stays_close_to_float32():
  model, params, tokens = build(
    compute_dtype='bfloat16', param_dtype='bfloat16'
  )
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
  assert jax.eval_shape(model.hidden, params, tokens).dtype == jnp.bfloat16
  exact, _, _ = build()
  wide = jax.tree.map(np.float32, params)

  def gradient(model, params):
    def loss(params):
      logits = model.apply(params, tokens)
      return jnp.square(logits).mean(), logits

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  got, logits = gradient(model, params)
  expected, exact_logits = gradient(exact, wide)
  assert logits.dtype == jnp.float32
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got))
  # bfloat16 rounds by at most 2^-9 of a value, here at some 40 places one after
  # the other, at random: 2^-9 sqrt(40) = 1.2 %. Backward as many again.
  assert 1e-4 < relative_error(logits, exact_logits) < 0.012
  assert 1e-4 < relative_error(got, expected) < 0.017


def test_float32_parameters_compute_in_bfloat16():
  model, params, tokens = build(compute_dtype='bfloat16')
  assert jax.eval_shape(model.hidden, params, tokens).dtype == jnp.bfloat16
  gradient = jax.eval_shape(
    jax.grad(functools.partial(mean_loss, model)), params, tokens
  )
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradient))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
def test_cudnn_attention_equals_xla_on_gpu(monkeypatch):
  sizes = {'hidden_size': 256, 'max_seq_len': 128, 'compute_dtype': 'bfloat16'}
  tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, 61)
  gradients = []
  for implementation in ('cudnn', 'xla'):
    monkeypatch.setattr(
      attention, 'implementation_for', lambda *_, i=implementation: i
    )
    # Not the model that other tests share and may have traced.
    model, params, _ = build.__wrapped__(**sizes)
    step = jax.jit(jax.grad(lambda *a, m=model: mean_loss(m, *a)))
    compiled = step.lower(params, tokens).compile()
    assert ('fmha' in compiled.as_text()) == (implementation == 'cudnn')
    gradients.append(compiled(params, tokens))
  # Both round to bfloat16, as in the tests above.
  assert relative_error(*gradients) < 0.017


def test_longer_sequence_is_refused_when_traced():
  model, params, _ = build()
  tokens = jax.ShapeDtypeStruct((2, 17), jnp.int32)
  for function in (model.apply, model.hidden, model.layer_fns.embed):
    with pytest.raises(ValueError) as error:
      jax.eval_shape(function, params, tokens)
    assert str(error.value) == (
      'Sequence of 17 tokens is longer than max_seq_len=16. Use shorter '
      'sequences or raise max_seq_len.'
    )
