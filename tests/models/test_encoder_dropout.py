import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.models.small_roberta import (
  MASKED_LM,
  SMALL,
  build,
  compiled,
  norm,
  sequences,
  with_leaves,
)


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


@pytest.mark.parametrize('head', [MASKED_LM, 3])
def test_layer_fns_drop_by_their_key(head):
  model, params = build(head)
  fns, tokens = model.layer_fns, sequences()
  x_BTD = jax.jit(fns.embed)(params, tokens)
  layer = jax.tree.map(lambda leaf: np.asarray(leaf)[0], params['layers'])
  mask = fns.context(tokens)
  calls = {'head': lambda *key: fns.head(params, x_BTD, *key)}
  if head != MASKED_LM:  # The rest is the same with any head.
    calls |= {
      'embed': lambda *key: fns.embed(params, tokens, *key),
      'block': lambda *key: fns.block(layer, x_BTD, mask, 0, *key),
    }
  for name, call in calls.items():
    call = jax.jit(call)
    plain, dropped = call(), call(dropout_key(0))
    np.testing.assert_array_equal(dropped, call(dropout_key(0)))
    if (head, name) == (MASKED_LM, 'head'):  # It drops nothing.
      np.testing.assert_array_equal(dropped, plain)
      continue
    for reference in (plain, call(dropout_key(1))):
      assert norm(dropped - reference) > 0.05 * norm(reference), name


def test_layer_fns_draw_where_apply_draws():
  model, params = build(3)
  fns, tokens, key = model.layer_fns, sequences(), dropout_key()
  layer = jax.tree.map(lambda leaf: leaf[0], params['layers'])
  x_BTD, mask = jnp.zeros((3, 12, 32)), fns.context(tokens)
  drawn = [
    *shapes_drawn(jax.make_jaxpr(fns.embed)(params, tokens, key).jaxpr),
    *shapes_drawn(jax.make_jaxpr(fns.block)(layer, x_BTD, mask, 0, key).jaxpr),
    *shapes_drawn(jax.make_jaxpr(fns.head)(params, x_BTD, key).jaxpr),
  ]
  program = jax.make_jaxpr(model.apply)(params, tokens, key)
  assert sorted(drawn) == sorted(shapes_drawn(program.jaxpr))


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
    np.asarray(compiled(**rates)(params, tokens, key))[real],
    np.asarray(compiled()(params, tokens))[real],
    atol=1e-5,
  )


def test_attention_dropout_differs_between_sequences_and_positions():
  rates = {'hidden_dropout': 0.0, 'attention_dropout': 0.5}
  _, params = build()
  tokens = jnp.full((3, 12), 5, jnp.int32)
  # Without positions, and without dropout, all outputs are equal.
  params = with_leaves(params, **{'embed/positions/embedding': 0.0})
  plain = np.asarray(compiled()(params, tokens))
  np.testing.assert_allclose(
    plain, np.broadcast_to(plain[0, 0], plain.shape), atol=1e-5
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
  zeros = jax.tree.map(np.zeros_like, params)
  bias_LD = np.float32([[1.0], [10.0]])
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
  x_BTD = np.ones((4000, 1, 32), np.float32)
  draws = np.asarray(jax.jit(model.logits)(params, x_BTD, jax.random.key(0)))
  head = params['classifier']
  terms = np.tanh(head['dense']['bias'])[:, None] * np.asarray(
    head['out']['kernel']
  )
  mean = terms.sum(0) + head['out']['bias']
  variance = 0.25 / 0.75 * np.square(terms).sum(0)
  np.testing.assert_allclose(
    jax.jit(model.logits)(params, x_BTD[:1])[0], mean, rtol=1e-5, atol=1e-6
  )
  # Four standard errors of both.
  error = np.abs(draws.mean(0) - mean)
  assert np.all(error < 4 * np.sqrt(variance / 4000))
  np.testing.assert_allclose(draws.var(0), variance, rtol=0.1)


def test_classifier_drops_as_the_encoder_unless_told_otherwise():
  x_BTD, key = jnp.ones((1, 1, 32)), jax.random.key(0)
  _, params = build(3)

  def logits(**rates):
    return np.asarray(jax.jit(build(3, **rates)[0].logits)(params, x_BTD, key))

  default = logits(hidden_dropout=0.3)
  np.testing.assert_array_equal(
    default, logits(hidden_dropout=0.7, classifier_dropout=0.3)
  )
  assert np.any(default != logits(hidden_dropout=0.3, classifier_dropout=0.0))
