import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import hf, roberta
from tests.models.small_roberta import (
  HEADS,
  LENGTHS,
  MASKED_LM,
  SMALL,
  abstract,
  build,
  compiled,
  export,
  norm,
  paths,
  sequences,
  with_leaves,
)

TABLES = {MASKED_LM: roberta.HF_TENSORS, 3: roberta.HF_CLASSIFIER_TENSORS}


def test_classifier_without_outputs_is_refused():
  with pytest.raises(ValueError) as error:
    roberta.make_classifier(roberta.RobertaConfig(**SMALL), 0)
  assert str(error.value) == 'num_outputs=0 must be at least 1.'


# Parameters.


@pytest.mark.parametrize('head', HEADS)
def test_layout_is_stacked_plain_dict(head):
  params = abstract(build(head)[0])
  dense = {
    **{f'layers/attn/{x}_proj': (32, 32) for x in 'qkvo'},
    'layers/mlp/up_proj': (32, 44),
    'layers/mlp/down_proj': (44, 32),
  }
  expected = {
    'embed/tokens/embedding': (61, 32),
    'embed/positions/embedding': (20, 32),
    'embed/types/embedding': (2, 32),
    'embed/norm/scale': (32,),
    'embed/norm/bias': (32,),
    **{f'{path}/kernel': (2, *shape) for path, shape in dense.items()},
    **{f'{path}/bias': (2, shape[1]) for path, shape in dense.items()},
    **{
      f'layers/{x}_norm/{leaf}': (2, 32)
      for x in ('attn', 'mlp')
      for leaf in ('scale', 'bias')
    },
  }
  if head == MASKED_LM:
    expected |= {
      'lm_head/dense/kernel': (32, 32),
      'lm_head/dense/bias': (32,),
      'lm_head/norm/scale': (32,),
      'lm_head/norm/bias': (32,),
      'lm_head/bias': (61,),
    }
  else:
    expected |= {
      'classifier/dense/kernel': (32, 32),
      'classifier/dense/bias': (32,),
      'classifier/out/kernel': (32, head),
      'classifier/out/bias': (head,),
    }
  assert {k: v.shape for k, v in paths(params).items()} == expected
  assert type(params) is dict and type(params['layers']['attn']) is dict


def test_init_draws_every_matrix_afresh():
  config = roberta.RobertaConfig(**SMALL, initializer_std=0.5)
  params = jax.jit(roberta.make(config).init)(jax.random.key(0))
  for path, leaf in paths(params).items():
    if path.endswith('scale'):
      np.testing.assert_array_equal(leaf, 1)
    elif path.endswith('bias'):
      np.testing.assert_array_equal(leaf, 0)
    else:
      # Four standard errors.
      assert abs(np.std(leaf) / 0.5 - 1) < 4 / np.sqrt(2 * leaf.size), path
      assert len(np.unique(leaf)) > 0.99 * leaf.size, path


# The function computed.


def targets_of(head, tokens):
  """What to predict; -100 at a position: nothing."""
  rng = np.random.default_rng(2)
  if head == MASKED_LM:
    targets = rng.integers(0, 61, tokens.shape)
    predicted = (rng.random(tokens.shape) < 0.5) & (tokens != SMALL['pad_id'])
    return np.where(predicted, targets, -100)
  return rng.integers(0, head, len(tokens))


def mean_loss(apply, params, tokens, targets):
  """Mean cross-entropy, and the logits."""
  logits = apply(params, tokens)
  log_probs = jax.nn.log_softmax(logits)
  index = jnp.maximum(targets, 0)[..., None]
  picked = jnp.take_along_axis(log_probs, index, axis=-1)[..., 0]
  predicted = targets >= 0
  return -(picked * predicted).sum() / predicted.sum(), logits


@functools.cache
def step(head, **overrides):
  model, _ = build(head, **overrides)
  loss = functools.partial(mean_loss, model.apply)
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def pytorch(folder, head, model, params, targets):
  """The same model in transformers, and its output for `sequences()`."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  export(folder, head, model, params)
  oracle, report = (
    transformers.RobertaForMaskedLM
    if head == MASKED_LM
    else transformers.RobertaForSequenceClassification
  ).from_pretrained(folder, output_loading_info=True)
  assert not any(report.values()), report
  ids = torch.from_numpy(np.array(sequences(), np.int64))
  mask = (ids != SMALL['pad_id']).long()
  labels = torch.from_numpy(np.array(targets))
  return oracle, oracle(ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize('head', [MASKED_LM, 3])
def test_logits_loss_and_gradients_equal_pytorch(head, tmp_path):
  safetensors_torch = pytest.importorskip('safetensors.torch')
  model, params = build(head)
  tokens = sequences()
  targets = targets_of(head, tokens)
  oracle, output = pytorch(tmp_path / 'model', head, model, params, targets)
  output.loss.backward()
  (tmp_path / 'gradient').mkdir()
  safetensors_torch.save_file(
    {name: p.grad for name, p in oracle.named_parameters()},
    tmp_path / 'gradient' / 'model.safetensors',
  )
  expected = paths(hf.load_params(tmp_path / 'gradient', TABLES[head], params))

  (value, logits), gradient = step(head)(params, tokens, jnp.asarray(targets))
  real = np.asarray(tokens != SMALL['pad_id']) if head == MASKED_LM else ...
  want = output.logits.detach().numpy()[real]
  assert logits.dtype == jnp.float32 and want.std() > 0.1
  # float32 on both sides, values of order 1.
  np.testing.assert_allclose(np.asarray(logits)[real], want, atol=1e-5)
  assert abs(value - output.loss.item()) < 1e-5
  gradient = paths(gradient)
  # A key's bias shifts all scores of a query alike: no gradient but rounding.
  del gradient['layers/attn/k_proj/bias']
  assert norm(expected.pop('layers/attn/k_proj/bias')) < 1e-5 * norm(
    *expected.values()
  )
  for path, want in expected.items():
    # 2^-24 at each of some hundred operations, one after the other.
    assert norm(gradient[path] - want) < 1e-5 * norm(want), path
  # The first rows come to no use, and no loss sees the one of padding.
  for positions in (expected, gradient):
    assert not np.any(positions['embed/positions/embedding'][:4])


def test_regression_equals_pytorch(tmp_path):
  model, params = build(1)
  targets = np.float32([0.1, -0.2, 0.3])
  _, output = pytorch(tmp_path / 'model', 1, model, params, targets)
  got = compiled(1)(params, sequences())
  want = output.logits.detach().numpy()
  assert got.shape == (3, 1) and want.std() > 0.02
  np.testing.assert_allclose(got, want, atol=1e-5)
  loss = np.square(got[:, 0] - targets).mean()
  assert abs(output.loss.item() - loss) < 1e-5


def layer_by_layer(model, params, tokens):
  """`Model.apply` by the functions of the layers."""
  fns = model.layer_fns
  rest = {k: v for k, v in params.items() if k != 'layers'}
  x_BTD, mask_BT = fns.embed(rest, tokens), fns.context(tokens)
  for i in range(model.config.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers'])
    x_BTD = fns.block(layer, x_BTD, mask_BT)
  return fns.head(rest, x_BTD)


def test_layer_fns_of_packed_sequences_equal_apply():
  model, params = build()
  tokens = sequences((12, 12, 12))
  assert model.layer_fns.context(tokens) is None
  logits = jax.jit(functools.partial(layer_by_layer, model))(params, tokens)
  np.testing.assert_allclose(logits, compiled()(params, tokens), atol=1e-5)


def test_layer_fns_of_a_classifier_with_padding_equal_apply():
  model, params = build(3)
  tokens = sequences()
  np.testing.assert_array_equal(
    model.layer_fns.context(tokens), np.arange(12) < np.array(LENGTHS)[:, None]
  )
  batch = params, tokens, jnp.asarray([0, 1, 2])
  apply = functools.partial(layer_by_layer, model)
  loss = functools.partial(mean_loss, apply)
  (_, logits), got = jax.jit(jax.value_and_grad(loss, has_aux=True))(*batch)
  (_, expected_logits), expected = step(3)(*batch)
  assert np.std(expected_logits) > 0.02
  np.testing.assert_allclose(logits, expected_logits, atol=1e-6)
  got, expected = paths(got), paths(expected)
  # A key's bias has no gradient but rounding.
  del expected['layers/attn/k_proj/bias']
  for path, want in expected.items():
    # float32 in another order.
    assert norm(got[path] - want) < 1e-5 * norm(want), path


def test_masked_lm_head_is_computed_position_by_position():
  model, params = build()
  x_BTD = np.random.default_rng(0).standard_normal((2, 5, 32))
  x_BTD = x_BTD.astype(np.float32)
  head = jax.jit(model.logits)
  logits = np.asarray(head(params, x_BTD))
  np.testing.assert_allclose(
    head(params, x_BTD[1, 3:]), logits[1, 3:], atol=1e-5
  )
  with_bias = with_leaves(params, **{'lm_head/bias': np.arange(61.0)})
  added = np.asarray(head(with_bias, x_BTD))[1, 4] - logits[1, 4]
  np.testing.assert_allclose(
    added, np.arange(61) - params['lm_head']['bias'], atol=1e-4
  )


def test_padding_changes_no_logit_of_a_token():
  model, params = build()
  tokens = sequences()
  expected = np.asarray(compiled()(params, tokens))
  alone = np.asarray(compiled()(params, np.asarray(tokens)[1:2, :7]))
  np.testing.assert_allclose(alone[0], expected[1, :7], atol=1e-5)
  # Whatever stands at padding, no other position sees it.
  pad_id = SMALL['pad_id']
  row = np.arange(61)[:, None] == pad_id
  changed = with_leaves(
    params,
    **{
      'embed/tokens/embedding': np.where(
        row, 5.0, params['embed']['tokens']['embedding']
      ),
      'embed/positions/embedding': np.where(
        row[:20], -7.0, params['embed']['positions']['embedding']
      ),
    },
  )
  got = np.asarray(compiled()(changed, tokens))
  others = np.arange(61) != pad_id
  for i, length in enumerate(LENGTHS):
    np.testing.assert_array_equal(
      got[i, :length, others], expected[i, :length, others]
    )
  assert np.abs(got[1, 7:, others] - expected[1, 7:, others]).max() > 0.1


def test_row_of_padding_alone_stays_finite():
  model, params = build(3)
  tokens = sequences((12, 7, 0))
  (_, logits), gradient = step(3)(params, tokens, jnp.asarray([0, 1, 2]))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
  assert np.isfinite(logits).all()


def test_longer_sequence_is_refused_when_traced():
  for head in (MASKED_LM, 3):
    model, params = build(head)
    tokens = jax.ShapeDtypeStruct((2, 17), jnp.int32)
    for function in (model.apply, model.hidden):
      with pytest.raises(ValueError) as error:
        jax.eval_shape(function, params, tokens)
      assert str(error.value) == (
        'Sequence of 17 tokens is longer than max_seq_len=16. Use shorter '
        'sequences or raise max_seq_len.'
      )


def test_longest_sequence_uses_the_last_row_of_positions():
  model, params = build()
  tokens = sequences((16,), 16)
  positions = np.array(params['embed']['positions']['embedding'])
  positions[-1] = 9
  without_last = with_leaves(params, **{'embed/positions/embedding': positions})
  embed = jax.jit(model.layer_fns.embed)
  found, expected = (
    np.asarray(embed(p, tokens)) for p in (without_last, params)
  )
  moved = np.any(found != expected, axis=-1)
  np.testing.assert_array_equal(moved[0], np.arange(16) == 15)


def test_bfloat16_stays_close_to_float32():
  model, params = build(compute_dtype='bfloat16', param_dtype='bfloat16')
  tokens = sequences()
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
  assert jax.eval_shape(model.hidden, params, tokens).dtype == jnp.bfloat16
  wide = jax.tree.map(np.float32, params)
  got = compiled(compute_dtype='bfloat16', param_dtype='bfloat16')(
    params, tokens
  )
  assert got.dtype == jnp.float32
  expected = compiled()(wide, tokens)
  # bfloat16 rounds by at most 2^-9 of a value, here at some 40 places one after
  # the other, at random: 2^-9 sqrt(40) = 1.2 %.
  assert 1e-4 < norm(got - expected) / norm(expected) < 0.012


@pytest.mark.parametrize('head', [MASKED_LM, 3])
def test_float32_parameters_compute_in_bfloat16(head):
  model, params = build(head, compute_dtype='bfloat16')
  tokens, key = sequences(), jax.random.key(0)
  for rest in ((), (key,)):
    hidden = jax.eval_shape(model.hidden, params, tokens, *rest)
    assert hidden.dtype == jnp.bfloat16
    logits = jax.eval_shape(model.apply, params, tokens, *rest)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize('head', [MASKED_LM, 3])
def test_mask_is_never_given_to_cudnn(monkeypatch, head):
  used = []
  attention = jax.nn.dot_product_attention

  def spy(*args, mask, implementation):
    used.append((mask is not None, implementation))
    return attention(*args, mask=mask, implementation='xla')

  monkeypatch.setattr(
    'gnlorp_jax.models.attention.implementation_for', lambda *_: 'cudnn'
  )
  monkeypatch.setattr(jax.nn, 'dot_product_attention', spy)
  # Not the model other tests share, whose kernels may be chosen by now.
  model, params = build.__wrapped__(head)
  jax.eval_shape(model.apply, params, sequences())
  assert set(used) == {(True, 'xla')}
  layer = jax.tree.map(lambda leaf: leaf[0], params['layers'])
  x_BTD, mask_BT = jnp.zeros((1, 2, 32)), jnp.ones((1, 2), bool)
  for mask, expected in (((), (False, 'cudnn')), ((mask_BT,), (True, 'xla'))):
    used.clear()
    jax.eval_shape(model.layer_fns.block, layer, x_BTD, *mask)
    assert set(used) == {expected}


def test_remat_recomputes_and_changes_no_value():
  _, params = build(3)
  batch = params, sequences(), jnp.asarray([0, 1, 2])
  (value, _), gradient = step(3)(*batch)
  (value_remat, _), gradient_remat = step(3, remat=True)(*batch)
  assert abs(value - value_remat) < 1e-6
  # The same operations in float32, fused differently.
  difference = jax.tree.map(np.subtract, gradient_remat, gradient)
  assert norm(*jax.tree.leaves(difference)) < 1e-5 * norm(
    *jax.tree.leaves(gradient)
  )


def test_backward_pass_recomputes_products_with_remat_alone():
  _, params = build(3)
  batch = params, sequences(), jnp.asarray([0, 1, 2])

  def counts(**changes):
    text = str(jax.make_jaxpr(step(3, **changes))(*batch))
    return text.count('dot_general['), text.count(' erfc ')

  (plain_dots, plain_erf), (dots, erf) = counts(), counts(remat=True)
  # Six dense layers of the block, computed a second time.
  assert dots == plain_dots + 6
  # GELU, which is no product, is computed twice in any case.
  assert erf == plain_erf == 2
