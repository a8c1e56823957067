import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from jax.extend.core import jaxprs_in_params

from gnlorp_jax.models import hf, layers, roberta

SMALL = {
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 44,
  'num_layers': 2,
  'num_heads': 4,
  'max_seq_len': 16,
  'num_types': 2,
  'pad_id': 3,
}
LENGTHS = (12, 7, 1)
# A head is this or a number of outputs.
MASKED_LM = 'masked LM'
HEADS = (MASKED_LM, 3, 1)
TABLES = {MASKED_LM: roberta.HF_TENSORS, 3: roberta.HF_CLASSIFIER_TENSORS}
LABELS = {3: ('no', 'yes', 'perhaps'), 1: ()}


@functools.cache
def build(head=MASKED_LM, std=0.2, **overrides):
  """A small model and random parameters.

  The parameters are drawn by NumPy, since compiling init takes seconds, and
  widely, so that no part of the network is close to linear.
  """
  config = roberta.RobertaConfig(**{**SMALL, **overrides})
  if head == MASKED_LM:
    model = roberta.make(config)
  else:
    model = roberta.make_classifier(config, head)
  rng = np.random.default_rng(0)
  params = jax.tree.map_with_path(
    lambda path, leaf: jnp.asarray(
      rng.normal(scale=std, size=leaf.shape) + (path[-1].key == 'scale'),
      leaf.dtype,
    ),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  return model, params


@functools.cache
def compiled(head=MASKED_LM, **overrides):
  """`Model.apply`; jit compiles it anew with and without a key."""
  return jax.jit(build(head, **overrides)[0].apply)


def sequences(lengths=LENGTHS, width=12, pad_id=SMALL['pad_id']):
  """Random tokens, padded to the right."""
  rng = np.random.default_rng(1)
  tokens = (pad_id + rng.integers(1, 61, (len(lengths), width))) % 61
  padded = np.arange(width) >= np.array(lengths)[:, None]
  return jnp.asarray(np.where(padded, pad_id, tokens), jnp.int32)


def paths(params):
  return traverse_util.flatten_dict(params, sep='/')


def abstract(model):
  return jax.eval_shape(model.init, jax.random.key(0))


def with_leaves(params, **leaves):
  """The parameters with some leaves filled with a value, by path."""
  flat = paths(params)
  for path, value in leaves.items():
    flat[path] = jnp.asarray(jnp.broadcast_to(value, flat[path].shape))
  return traverse_util.unflatten_dict(flat, sep='/')


def norm(*leaves):
  return np.sqrt(sum(np.square(np.asarray(x, float)).sum() for x in leaves))


def assert_trees_equal(got, expected):
  got, expected = paths(got), paths(expected)
  assert got.keys() == expected.keys()
  for path in expected:
    assert got[path].dtype == expected[path].dtype, path
    np.testing.assert_array_equal(got[path], expected[path], err_msg=path)


def export(folder, head, model, params):
  if head == MASKED_LM:
    config = roberta.config_to_hf(model.config)
    hf.export(folder, params, roberta.HF_TENSORS, config)
  else:
    roberta.export_classifier(folder, model.config, params, LABELS[head])


# Configuration.


@pytest.mark.parametrize(
  'change, text',
  [
    ({'num_layers': 0}, 'num_layers=0 must be positive.'),
    ({'layer_norm_eps': -1.0}, 'layer_norm_eps=-1.0 must be positive.'),
    ({'num_types': 0}, 'num_types=0 must be positive.'),
    ({'hidden_size': 30}, 'hidden_size=30 must be a multiple of num_heads=4.'),
    ({'pad_id': 61}, 'pad_id=61 must be in [0, vocab_size=61).'),
    ({'pad_id': -1}, 'pad_id=-1 must be in [0, vocab_size=61).'),
    ({'hidden_dropout': 1.0}, 'hidden_dropout=1.0 must be in [0, 1).'),
    ({'attention_dropout': -0.1}, 'attention_dropout=-0.1 must be in [0, 1).'),
    ({'classifier_dropout': 2.0}, 'classifier_dropout=2.0 must be in [0, 1).'),
    (
      {'param_dtype': 'float16'},
      "Unknown param_dtype 'float16'; expected one of ('bfloat16', 'float32').",
    ),
    (
      {'compute_dtype': 'int8'},
      "Unknown compute_dtype 'int8'; expected one of ('bfloat16', 'float32').",
    ),
  ],
)
def test_config_refuses_impossible_values(change, text):
  with pytest.raises(ValueError) as error:
    roberta.RobertaConfig(**{**SMALL, **change})
  assert str(error.value) == text


def test_classifier_without_outputs_is_refused():
  with pytest.raises(ValueError) as error:
    roberta.make_classifier(roberta.RobertaConfig(**SMALL), 0)
  assert str(error.value) == 'num_outputs=0 must be at least 1.'


# Of the published `roberta-base` and `roberta-large`.
@pytest.mark.parametrize(
  'name, count', [('base', 124_697_433), ('large', 355_412_057)]
)
def test_preset_has_published_size(name, count):
  assert roberta.num_params(roberta.preset(name)) == count


@pytest.mark.parametrize('name', roberta.PRESETS)
def test_num_params_equals_that_of_transformers(name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = roberta.preset(name)
  with torch.device('meta'):
    oracle = transformers.RobertaForMaskedLM(
      transformers.RobertaConfig(**roberta.config_to_hf(config))
    )
  assert roberta.num_params(config) == oracle.num_parameters()


def test_preset_overrides_fields():
  config = roberta.preset('base', remat=True, num_types=2)
  assert (config.remat, config.num_types, config.hidden_size) == (True, 2, 768)
  assert (config.max_seq_len, config.num_positions) == (512, 514)


def test_preset_names_choices_and_nearest():
  with pytest.raises(ValueError) as error:
    roberta.preset('Bse')
  assert str(error.value) == (
    "Unknown model 'Bse'; expected one of ('tiny', 'mini', 'small', 'base', "
    "'large'). Did you mean 'base'?"
  )


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
  params = roberta.make(config).init(jax.random.key(0))
  for path, leaf in paths(params).items():
    if path.endswith('scale'):
      np.testing.assert_array_equal(leaf, 1)
    elif path.endswith('bias'):
      np.testing.assert_array_equal(leaf, 0)
    else:
      # Four standard errors.
      assert abs(np.std(leaf) / 0.5 - 1) < 4 / np.sqrt(2 * leaf.size), path
      assert len(np.unique(leaf)) > 0.99 * leaf.size, path


@pytest.mark.parametrize('head', [MASKED_LM, 3])
def test_label_rules_project_the_matrices_of_the_blocks(head):
  labels = {
    path: next(
      label for rule, label in roberta.LABEL_RULES if re.search(rule, path)
    )
    for path in paths(build(head)[1])
  }
  low_rank = {path for path, label in labels.items() if label == 'low_rank'}
  assert low_rank == {
    *(f'layers/attn/{x}_proj/kernel' for x in 'qkvo'),
    *(f'layers/mlp/{x}_proj/kernel' for x in ('up', 'down')),
  }
  assert set(labels.values()) == {'low_rank', 'full'}


# The function computed.


def targets_of(head, tokens):
  """What to predict; -100 at a position: nothing."""
  rng = np.random.default_rng(2)
  if head == MASKED_LM:
    targets = rng.integers(0, 61, tokens.shape)
    predicted = (rng.random(tokens.shape) < 0.5) & (tokens != SMALL['pad_id'])
    return np.where(predicted, targets, -100)
  return rng.integers(0, head, len(tokens))


def mean_loss(model, params, tokens, targets):
  """Mean cross-entropy, and the logits."""
  logits = model.apply(params, tokens)
  log_probs = jax.nn.log_softmax(logits)
  index = jnp.maximum(targets, 0)[..., None]
  picked = jnp.take_along_axis(log_probs, index, axis=-1)[..., 0]
  predicted = targets >= 0
  return -(picked * predicted).sum() / predicted.sum(), logits


@functools.cache
def step(head, **overrides):
  model, _ = build(head, **overrides)
  loss = functools.partial(mean_loss, model)
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
  np.testing.assert_allclose(logits[real], want, atol=1e-5)
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


def test_layer_fns_in_a_loop_equal_apply():
  model, params = build()
  tokens = sequences((12, 12, 12))
  rest = {k: v for k, v in params.items() if k != 'layers'}

  @jax.jit
  def logits(rest, stacked):
    x_BTD = model.layer_fns.embed(rest, tokens)
    for i in range(model.config.num_layers):
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
      x_BTD = model.layer_fns.block(layer, x_BTD)
    return model.layer_fns.head(rest, x_BTD)

  np.testing.assert_allclose(
    logits(rest, params['layers']), compiled()(params, tokens), atol=1e-5
  )


def test_masked_lm_head_is_computed_position_by_position():
  model, params = build()
  x_BTD = jax.random.normal(jax.random.key(0), (2, 5, 32))
  head = jax.jit(model.logits)
  logits = head(params, x_BTD)
  np.testing.assert_allclose(
    head(params, x_BTD[1, 3:]), logits[1, 3:], atol=1e-5
  )
  with_bias = with_leaves(params, **{'lm_head/bias': jnp.arange(61.0)})
  added = head(with_bias, x_BTD)[1, 4] - logits[1, 4]
  np.testing.assert_allclose(
    added, np.arange(61) - params['lm_head']['bias'], atol=1e-4
  )


def test_padding_changes_no_logit_of_a_token():
  model, params = build()
  tokens = sequences()
  expected = compiled()(params, tokens)
  alone = jax.jit(model.apply)(params, tokens[1:2, :7])
  np.testing.assert_allclose(alone[0], expected[1, :7], atol=1e-5)
  # Whatever stands at padding, no other position sees it.
  pad_id = SMALL['pad_id']
  row = np.arange(61)[:, None] == pad_id
  changed = with_leaves(
    params,
    **{
      'embed/tokens/embedding': jnp.where(
        row, 5.0, params['embed']['tokens']['embedding']
      ),
      'embed/positions/embedding': jnp.where(
        row[:20], -7.0, params['embed']['positions']['embedding']
      ),
    },
  )
  got = compiled()(changed, tokens)
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
  without_last = with_leaves(
    params,
    **{
      'embed/positions/embedding': params['embed']['positions']['embedding']
      .at[-1]
      .set(9.0)
    },
  )
  embed = jax.jit(model.layer_fns.embed)
  moved = np.any(embed(without_last, tokens) != embed(params, tokens), axis=-1)
  np.testing.assert_array_equal(moved[0], np.arange(16) == 15)


def test_bfloat16_stays_close_to_float32():
  model, params = build(compute_dtype='bfloat16', param_dtype='bfloat16')
  tokens = sequences()
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
  assert jax.eval_shape(model.hidden, params, tokens).dtype == jnp.bfloat16
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
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

  monkeypatch.setattr(layers, 'attention_implementation', lambda *_: 'cudnn')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', spy)
  model, params = build(head, layer_norm_eps=1e-4)
  jax.eval_shape(model.apply, params, sequences())
  assert set(used) == {(True, 'xla')}
  if head == MASKED_LM:
    used.clear()
    layer = jax.tree.map(lambda leaf: leaf[0], params['layers'])
    jax.eval_shape(model.layer_fns.block, layer, jnp.zeros((1, 2, 32)))
    assert set(used) == {(False, 'cudnn')}


def test_remat_recomputes_and_changes_no_value():
  _, params = build(3)
  batch = params, sequences(), jnp.asarray([0, 1, 2])
  (value, _), gradient = step(3)(*batch)
  (value_remat, _), gradient_remat = step(3, remat=True)(*batch)
  assert abs(value - value_remat) < 1e-6
  # The same operations in float32, fused differently.
  difference = jax.tree.map(jnp.subtract, gradient_remat, gradient)
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


@pytest.mark.parametrize('predicted', [1.0, 0.25])
def test_flops_per_token_equal_those_of_the_traced_step(
  matmul_flops, predicted
):
  model, params = build()
  tokens = sequences((8, 8), 8)

  def loss(params):
    x_BTD = model.hidden(params, tokens)
    picked = x_BTD[:, : int(8 * predicted)]
    return jnp.square(model.logits(params, picked)).sum()

  counted = matmul_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
  # Attention's two products are computed a second time, which is not counted.
  again = 2 * 2 * model.config.num_layers * 8 * model.config.hidden_size
  per_token = roberta.flops_per_token(model.config, 8, predicted) + again
  assert counted == 2 * 8 * per_token


# Dropout.


def dropout_key(seed=0):
  # Of the kinds of keys, the one that compiles fastest.
  return jax.random.key(seed, impl='unsafe_rbg')


def test_dropout_is_active_with_a_key_alone():
  _, params = build(3)
  tokens, apply = sequences(), compiled(3)
  plain = apply(params, tokens)
  dropped = apply(params, tokens, dropout_key(0))
  np.testing.assert_array_equal(dropped, apply(params, tokens, dropout_key(0)))
  for reference in (plain, apply(params, tokens, dropout_key(1))):
    assert norm(dropped - reference) > 0.05 * norm(reference)


def shapes_drawn(jaxpr):
  """Shapes of the random arrays of a jaxpr, one for each place."""
  shapes = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'random_bits':
      shapes.append(equation.outvars[0].aval.shape)
    for inner in jaxprs_in_params(equation.params):
      shapes += shapes_drawn(inner)
  return shapes


@pytest.mark.parametrize('head', [MASKED_LM, 3])
def test_every_place_of_dropout_draws_where_its_rate_is_not_zero(head):
  # After the embeddings, the attention and the feed-forward layer.
  hidden = 3 * [(3, 12, 32)]
  attention = [(3, 4, 12, 12)]
  classifier = [] if head == MASKED_LM else 2 * [(3, 32)]
  for rates, expected in (
    ((0.1, 0.1, None), hidden + attention + classifier),
    ((0.1, 0.0, 0.0), hidden),
    ((0.0, 0.1, None), attention),
    ((0.0, 0.0, 0.1), classifier),
  ):
    names = ('hidden_dropout', 'attention_dropout', 'classifier_dropout')
    model, params = build(head, **dict(zip(names, rates, strict=True)))
    program = jax.make_jaxpr(model.apply)(params, sequences(), dropout_key())
    assert sorted(shapes_drawn(program.jaxpr)) == sorted(expected)


def test_attention_dropout_is_of_the_weights_of_the_other_path():
  # Of some thousand weights, none is dropped at this rate.
  rates = {'hidden_dropout': 0.0, 'attention_dropout': 1e-7}
  _, params = build()
  tokens, key = sequences(), dropout_key()
  real = np.asarray(tokens != SMALL['pad_id'])
  np.testing.assert_allclose(
    compiled(**rates)(params, tokens, key)[real],
    compiled()(params, tokens)[real],
    atol=1e-5,
  )


def test_attention_dropout_differs_between_sequences_and_positions():
  rates = {'hidden_dropout': 0.0, 'attention_dropout': 0.5}
  _, params = build()
  tokens = jnp.full((3, 12), 5, jnp.int32)
  # Without positions, and without dropout, all outputs are equal.
  params = with_leaves(params, **{'embed/positions/embedding': 0.0})
  plain = compiled()(params, tokens)
  np.testing.assert_allclose(
    plain, jnp.broadcast_to(plain[0, 0], plain.shape), atol=1e-5
  )
  dropped = compiled(**rates)(params, tokens, dropout_key())
  dropped = np.asarray(dropped).reshape(36, -1)
  distance = np.linalg.norm(dropped[:, None] - dropped, axis=-1)
  assert np.min(distance + 9 * np.eye(36)) > 0.1


def test_layers_drop_independently_at_the_configured_rate():
  """Outputs that show which features two layers kept.

  The embeddings are zero, and so are all sublayers but for the biases of the
  attentions' outputs. After the first layer the features kept have one value
  and those dropped a lower one; the second layer's bias then raises those it
  keeps by far more. LayerNorm keeps the order: four levels, one for each case.
  """
  rates = {'hidden_dropout': 0.5, 'attention_dropout': 0.0}
  _, params = build()
  model, _ = build(**rates)
  zeros = jax.tree.map(jnp.zeros_like, params)
  bias_LD = jnp.broadcast_to(jnp.array([[1.0], [10.0]]), (2, 32))
  params = with_leaves(
    zeros,
    **{
      'layers/attn/o_proj/bias': bias_LD,
      'layers/attn_norm/scale': 1.0,
      'layers/mlp_norm/scale': 1.0,
    },
  )
  x_BTD = jax.jit(model.hidden)(params, sequences(), dropout_key(1))
  cases = np.zeros(4)
  for features in np.asarray(x_BTD).reshape(-1, 32):
    levels, counts = np.unique(np.round(features, 3), return_counts=True)
    assert len(levels) == 4
    cases += counts
  # 1152 features: the standard error is 1.3 %.
  np.testing.assert_allclose(cases / cases.sum(), 0.25, atol=0.05)


def test_classifier_dropout_has_the_mean_and_variance_of_its_rate():
  model, params = build(3, classifier_dropout=0.25)
  # The first layer gives its bias whatever is dropped before it.
  params = with_leaves(params, **{'classifier/dense/kernel': 0.0})
  x_BTD = jnp.ones((4000, 1, 32))
  draws = jax.jit(model.logits)(params, x_BTD, jax.random.key(0))
  head = params['classifier']
  terms = np.tanh(head['dense']['bias'])[:, None] * head['out']['kernel']
  mean = terms.sum(0) + head['out']['bias']
  variance = 0.25 / 0.75 * np.square(terms).sum(0)
  np.testing.assert_allclose(
    model.logits(params, x_BTD[:1])[0], mean, rtol=1e-5, atol=1e-6
  )
  # Four standard errors of both.
  error = np.abs(draws.mean(0) - mean)
  assert np.all(error < 4 * np.sqrt(variance / 4000))
  np.testing.assert_allclose(draws.var(0), variance, rtol=0.1)


def test_classifier_drops_as_the_encoder_unless_told_otherwise():
  x_BTD, key = jnp.ones((1, 1, 32)), jax.random.key(0)
  _, params = build(3)

  def logits(**rates):
    return build(3, **rates)[0].logits(params, x_BTD, key)

  default = logits(hidden_dropout=0.3)
  np.testing.assert_array_equal(
    default, logits(hidden_dropout=0.7, classifier_dropout=0.3)
  )
  assert np.any(default != logits(hidden_dropout=0.3, classifier_dropout=0.0))


# Import.


def rewrite(folder, change):
  """Replaces the tensors of a folder by what `change` makes of them."""
  path = folder / 'model.safetensors'
  tensors = change(safetensors.numpy.load_file(path))
  safetensors.numpy.save_file(tensors, path)


def encoder(params):
  return {key: params[key] for key in ('embed', 'layers')}


def load_classifier(folder, num_outputs, key=0, **fields):
  """With the folder's configuration, some fields replaced."""
  config = roberta.config_from_hf(hf.load_config(folder))
  config = dataclasses.replace(config, **fields)
  return roberta.load_classifier(
    folder, config, num_outputs, jax.random.key(key)
  )


EXTRAS = {
  'roberta.pooler.dense.weight': (32, 32),
  'roberta.pooler.dense.bias': (32,),
  'roberta.embeddings.position_ids': (1, 20),
  'roberta.embeddings.token_type_ids': (1, 20),
}
COPIES = {'lm_head.decoder.weight': (61, 32), 'lm_head.decoder.bias': (61,)}


def added(shapes):
  zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  return lambda tensors: {**tensors, **zeros}


@pytest.mark.parametrize('extras', [{}, EXTRAS, {**EXTRAS, **COPIES}])
def test_masked_lm_is_read_beside_what_it_does_not_use(tmp_path, extras):
  model, params = build()
  export(tmp_path, MASKED_LM, model, params)
  rewrite(tmp_path, added(extras))
  got = hf.load_params(
    tmp_path, roberta.HF_TENSORS, abstract(model), unread=roberta.HF_UNREAD
  )
  assert_trees_equal(got, params)


@pytest.mark.parametrize('extras', [{}, EXTRAS])
@pytest.mark.parametrize('head', [3, 1])
def test_fitting_classifier_is_read(tmp_path, caplog, head, extras):
  caplog.set_level(logging.INFO)
  model, params = build(head)
  export(tmp_path, head, model, params)
  rewrite(tmp_path, added(extras))
  assert_trees_equal(load_classifier(tmp_path, head), params)
  # It may be that of another task with as many classes.
  assert caplog.messages == [f'The classifier is that of {tmp_path}.']


@pytest.mark.parametrize(
  'source, found, extras',
  [
    (MASKED_LM, 'none', {**EXTRAS, **COPIES}),
    (3, 'one of 3', {}),
    ('bare', 'none', EXTRAS),
  ],
)
def test_other_folders_give_their_encoder_and_a_new_classifier(
  tmp_path, caplog, source, found, extras
):
  caplog.set_level(logging.INFO)
  head = MASKED_LM if source == 'bare' else source
  model, params = build(head, initializer_std=0.5)
  export(tmp_path, head, model, params)
  rewrite(tmp_path, added(extras))
  if source == 'bare':
    rewrite(
      tmp_path,
      lambda tensors: {
        name.removeprefix('roberta.'): tensor
        for name, tensor in tensors.items()
        if name.startswith('roberta.')
      },
    )

  def load(key):
    return load_classifier(tmp_path, 2, key)

  got = load(0)
  assert_trees_equal(encoder(got), encoder(params))
  assert f'The classifier of 2 outputs is new: {tmp_path} has {found}.' in (
    caplog.messages
  )
  like = roberta.make_classifier(model.config, 2)
  assert jax.tree.structure(got) == jax.tree.structure(abstract(like))
  dense, out = got['classifier']['dense'], got['classifier']['out']
  assert out['kernel'].shape == (32, 2)
  assert not np.any(dense['bias']) and not np.any(out['bias'])
  # 1024 and 64 values: four standard errors.
  assert abs(np.std(dense['kernel']) / 0.5 - 1) < 0.09
  assert abs(np.std(out['kernel']) / 0.5 - 1) < 0.36
  if source == 'bare':
    assert_trees_equal(load(0), got)
    other = load(1)
    assert_trees_equal(encoder(other), encoder(got))
    assert np.any(other['classifier']['out']['kernel'] != out['kernel'])


@pytest.mark.parametrize('outputs', [3, 2])
def test_parameters_have_the_dtype_of_the_configuration(tmp_path, outputs):
  model, params = build(3)
  export(tmp_path, 3, model, params)
  got = load_classifier(tmp_path, outputs, param_dtype='bfloat16')
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got))
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  assert_trees_equal(encoder(got), encoder(half))
  if outputs == 3:
    assert_trees_equal(got, half)


def test_folder_of_robertamodel_gives_its_hidden_states(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = roberta.config_to_hf(build()[0].config)
  oracle = transformers.RobertaModel(
    transformers.RobertaConfig(**{**config, 'initializer_range': 0.2})
  ).eval()
  oracle.save_pretrained(tmp_path)
  assert 'pooler.dense.weight' in hf.tensor_shapes(tmp_path)
  model = roberta.make_classifier(build()[0].config, 3)
  params = load_classifier(tmp_path, 3)
  tokens = sequences()
  ids = torch.from_numpy(np.array(tokens, np.int64))
  mask = (ids != SMALL['pad_id']).long()
  with torch.no_grad():
    expected = oracle(ids, attention_mask=mask).last_hidden_state.numpy()
  real = np.asarray(tokens != SMALL['pad_id'])
  got = jax.jit(model.hidden)(params, tokens)
  np.testing.assert_allclose(got[real], expected[real], atol=1e-5)


def test_masked_lm_that_transformers_saved_is_read(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  oracle = transformers.RobertaForMaskedLM(
    transformers.RobertaConfig(**roberta.config_to_hf(build()[0].config))
  )
  oracle.save_pretrained(tmp_path)
  model = roberta.make(roberta.config_from_hf(hf.load_config(tmp_path)))
  assert model.config == build()[0].config
  params = hf.load_params(
    tmp_path, roberta.HF_TENSORS, abstract(model), unread=roberta.HF_UNREAD
  )
  np.testing.assert_array_equal(
    params['layers']['mlp']['up_proj']['kernel'][1],
    oracle.roberta.encoder.layer[1].intermediate.dense.weight.detach().T,
  )


def test_unexpected_and_missing_tensors_are_named(tmp_path):
  model, params = build(3)
  export(tmp_path, 3, model, params)
  query = 'roberta.encoder.layer.{}.attention.self.query.weight'

  def change(tensors):
    tensors[query.format(2)] = tensors.pop(query.format(1))
    tensors['classifier.dense.bias'] = np.zeros(31, np.float32)
    return tensors

  rewrite(tmp_path, change)
  with pytest.raises(ValueError) as error:
    load_classifier(tmp_path, 3)
  assert str(error.value) == (
    f"Checkpoint does not fit model. Missing: ['{query.format(1)}']. "
    f"Extra: ['{query.format(2)}']. Shape: ['classifier.dense.bias: (31,) in "
    "the checkpoint, (32,) in the model']."
  )


def test_new_classifier_excuses_no_other_tensor(tmp_path):
  model, params = build()
  export(tmp_path, MASKED_LM, model, params)
  rewrite(tmp_path, added({'adapter.weight': (2,)}))
  with pytest.raises(ValueError, match=r"Extra: \['adapter.weight'\]"):
    load_classifier(tmp_path, 3)


# Export.


@pytest.mark.parametrize('head', [3, 1])
def test_exported_classifier_says_what_its_outputs_are(tmp_path, head):
  transformers = pytest.importorskip('transformers')
  model, params = build(head, layer_norm_eps=1e-4)
  export(tmp_path / 'out', head, model, params)
  config = transformers.AutoConfig.from_pretrained(tmp_path / 'out')
  assert isinstance(config, transformers.RobertaConfig)
  assert config.architectures == ['RobertaForSequenceClassification']
  assert config.num_labels == head
  if head == 1:
    assert config.problem_type == 'regression'
  else:
    assert config.problem_type == 'single_label_classification'
    assert config.id2label == {0: 'no', 1: 'yes', 2: 'perhaps'}
    assert config.label2id == {'no': 0, 'yes': 1, 'perhaps': 2}
  assert roberta.config_from_hf(config.to_dict()) == model.config


@pytest.mark.parametrize(
  'head, labels, wrong',
  [
    (3, (), '0 labels () for 3 outputs'),
    (3, ('a', 'b'), "2 labels ('a', 'b') for 3 outputs"),
    (3, ('a', 'b', 'a'), "3 labels ('a', 'b', 'a') for 3 outputs"),
    (1, ('a',), "1 labels ('a',) for 1 outputs"),
  ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, head, labels, wrong):
  model, params = build(head)
  with pytest.raises(ValueError) as error:
    roberta.export_classifier(tmp_path / 'out', model.config, params, labels)
  assert str(error.value) == (
    f'{wrong}: give each class a name of its own, and a regression none.'
  )
  assert not (tmp_path / 'out').exists()


# Configurations of Hugging Face.


@pytest.mark.parametrize('name', roberta.PRESETS)
def test_config_survives_the_way_there_and_back(name):
  config = roberta.preset(
    name,
    param_dtype='bfloat16',
    pad_id=7,
    num_types=2,
    hidden_dropout=0.2,
    attention_dropout=0.3,
    classifier_dropout=0.4,
    layer_norm_eps=1e-3,
    initializer_std=0.5,
  )
  for each in (config, roberta.preset(name)):
    assert roberta.config_from_hf(roberta.config_to_hf(each)) == each


def test_config_names_the_special_tokens():
  config = roberta.config_to_hf(
    roberta.preset('base'), bos_token_id=0, eos_token_id=2, pad_token_id=1
  )
  special = [config[f'{name}_token_id'] for name in ('bos', 'eos', 'pad')]
  assert special == [0, 2, 1]
  assert config['max_position_embeddings'] == 514


def test_pad_token_of_another_id_is_refused():
  with pytest.raises(ValueError) as error:
    roberta.config_to_hf(roberta.preset('base'), pad_token_id=0)
  assert str(error.value) == (
    'pad_token_id=0 differs from the pad_id=1 that the model was built with. '
    'Give the model the pad_id of its tokenizer.'
  )


HF_CONFIG = {
  'model_type': 'roberta',
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 44,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 18,
}


def test_absent_fields_mean_the_defaults_of_transformers():
  transformers = pytest.importorskip('transformers')
  oracle = transformers.RobertaConfig(**HF_CONFIG)
  got = roberta.config_from_hf(HF_CONFIG)
  assert got == roberta.config_from_hf(oracle.to_dict())
  assert got.layer_norm_eps == oracle.layer_norm_eps == 1e-12
  assert got.num_types == oracle.type_vocab_size == 2
  assert (got.pad_id, got.max_seq_len) == (oracle.pad_token_id, 16)


@pytest.mark.parametrize(
  'change, wrong',
  [
    ({'model_type': 'bert'}, "model_type='bert' (supported: 'roberta')"),
    (
      {'hidden_act': 'gelu_new', 'is_decoder': True},
      "hidden_act='gelu_new' (supported: 'gelu'), is_decoder=True "
      '(supported: False)',
    ),
    (
      {'position_embedding_type': 'relative_key'},
      "position_embedding_type='relative_key' (supported: 'absolute')",
    ),
    (
      {'tie_word_embeddings': False},
      'tie_word_embeddings=False (supported: True)',
    ),
    (
      {'quantization_config': {'bits': 4}},
      "quantization_config={'bits': 4} (supported: None)",
    ),
  ],
)
def test_unsupported_fields_are_named(change, wrong):
  with pytest.raises(ValueError) as error:
    roberta.config_from_hf({**HF_CONFIG, **change})
  assert str(error.value) == f'Unsupported RoBERTa configuration: {wrong}.'


def test_missing_fields_are_named():
  config = dict(HF_CONFIG)
  del config['vocab_size'], config['max_position_embeddings']
  with pytest.raises(ValueError) as error:
    roberta.config_from_hf(config)
  assert str(error.value) == (
    "RoBERTa configuration lacks the fields ['vocab_size', "
    "'max_position_embeddings']."
  )
