"""Adapters in a whole model: its functions, layer by layer too, and dropout."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import adapters, interface, llama, roberta

SIZES = {
  'vocab_size': 40,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_layers': 2,
  'num_heads': 2,
  'max_seq_len': 16,
}
TOKENS = np.random.default_rng(1).integers(2, 40, (2, 8)).astype(np.int32)
TOKENS[1, 5:] = 1  # RoBERTa's padding.
RULES = ('q_proj/kernel', 'down_proj/kernel')
# Of the kinds of keys, the one that compiles fastest.
KEY, OTHER = (jax.random.key(seed, impl='unsafe_rbg') for seed in (0, 1))


def make(family):
  if family == 'llama':
    return llama.make(llama.LlamaConfig(**SIZES))
  config = roberta.RobertaConfig(
    **SIZES, hidden_dropout=0.0, attention_dropout=0.0
  )
  return roberta.make_classifier(config, 3)


@functools.cache
def build(family, kind='lora', dropout=0.0):
  """A model, its adapted form, and parameters with adapters at random."""
  model = make(family)
  config = adapters.AdapterConfig(
    kind=kind, rank=3, alpha=6.0, dropout=dropout, rules=RULES
  )
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, KEY)
  both = adapters.combine(
    shapes,
    jax.eval_shape(functools.partial(adapters.init, config), shapes, KEY),
  )
  params = jax.tree.map_with_path(
    lambda path, leaf: jnp.asarray(
      rng.normal(path[-1].key in ('scale', 'magnitude'), 0.2, leaf.shape),
      leaf.dtype,
    ),
    both,
  )
  return model, config, adapters.adapt(config, model), params


def layer_of(params, number=0):
  return jax.tree.map(lambda leaf: leaf[number], params['layers'])


def calls(model, params):
  """Every function of a model as a function of a dropout key alone."""
  fns = model.layer_fns
  x_BTD = jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 16)), 'f')
  mask = fns.context(TOKENS)
  layer = layer_of(params)
  return {
    'hidden': lambda *key: model.hidden(params, TOKENS, *key),
    'logits': lambda *key: model.logits(params, x_BTD, *key),
    'apply': lambda *key: model.apply(params, TOKENS, *key),
    'embed': lambda *key: fns.embed(params, TOKENS, *key),
    'block': lambda *key: fns.block(layer, x_BTD, mask, 0, *key),
    'head': lambda *key: fns.head(params, x_BTD, *key),
  }


def program(call, *key):
  """What a function computes, as text; nothing is compiled."""
  return re.sub('0x[0-9a-f]+', '', str(jax.make_jaxpr(call)(*key)))


@pytest.mark.parametrize('family', ['llama', 'roberta'])
def test_adapting_a_model_equals_wrapping_its_functions(family):
  model, config, adapted, params = build(family, 'dora')
  assert adapted.config == model.config and adapted.init is model.init
  wrap = functools.partial(adapters.adapted, config, is_part=True)
  by_hand = interface.Model(
    config=model.config,
    init=model.init,
    hidden=wrap(model.hidden),
    logits=wrap(model.logits),
    apply=wrap(model.apply),
    layer_fns=interface.LayerFns(
      embed=wrap(model.layer_fns.embed),
      block=wrap(model.layer_fns.block),
      head=wrap(model.layer_fns.head),
      context=model.layer_fns.context,
    ),
  )
  plain, expected = calls(model, params), calls(by_hand, params)
  for name, call in calls(adapted, params).items():
    assert program(call) == program(expected[name]), name
    # The blocks alone have adapters.
    differs = program(call) != program(plain[name])
    assert differs == (name in ('hidden', 'apply', 'block')), name


@pytest.mark.parametrize('family', ['llama', 'roberta'])
def test_layer_fns_of_an_adapted_model_equal_apply(family):
  _, _, model, params = build(family)
  fns = model.layer_fns

  @jax.jit
  def logits(params):
    x_BTD = fns.embed(params, TOKENS)
    for number in range(SIZES['num_layers']):
      x_BTD = fns.block(layer_of(params, number), x_BTD, fns.context(TOKENS))
    return fns.head(params, x_BTD)

  np.testing.assert_allclose(
    logits(params), jax.jit(model.apply)(params, TOKENS), atol=1e-6
  )


@pytest.mark.parametrize('family', ['llama', 'roberta'])
def test_adapters_drop_with_a_key_alone(family):
  _, _, without, params = build(family)
  _, _, model, _ = build(family, dropout=0.5)
  expected = calls(without, params)
  for name, call in calls(model, params).items():
    if name not in ('apply', 'block'):
      continue
    assert program(call) == program(expected[name])
    assert program(call, KEY) != program(expected[name], KEY)
    call = jax.jit(call)
    dropped = call(KEY)
    np.testing.assert_array_equal(dropped, call(KEY))
    references = [call(OTHER)]
    if name == 'block':
      references.append(call())
    for reference in references:
      difference = np.linalg.norm(np.subtract(dropped, reference))
      assert difference > 0.01 * np.linalg.norm(reference), name


def test_layers_of_a_llama_drop_independently(monkeypatch):
  # Not the model that other tests share and may have traced.
  _, _, model, params = build.__wrapped__('llama', dropout=0.5)
  masks, bernoulli = [], jax.random.bernoulli

  def keep(mask):
    masks.append(np.asarray(mask).tobytes())
    return mask

  def record(*args):
    mask = bernoulli(*args)
    # Flax scans no function with effects, such as those of `jax.debug`.
    return jax.pure_callback(keep, mask, mask)

  monkeypatch.setattr(jax.random, 'bernoulli', record)
  jax.jit(model.apply)(params, TOKENS, KEY).block_until_ready()
  assert len(masks) == len(set(masks)) == SIZES['num_layers'] * len(RULES)


def test_gradient_of_a_dropping_llama_is_of_the_masks_of_its_value():
  """Directional derivative against differences, with what remat recomputes."""
  _, _, model, params = build('llama', dropout=0.5)
  frozen, trainable = adapters.split(params, lambda path: 'lora' in path)

  @jax.jit
  def loss(trainable):
    logits = model.apply(adapters.combine(frozen, trainable), TOKENS, KEY)
    return jnp.square(logits).mean()

  value, gradient = jax.jit(jax.value_and_grad(loss))(trainable)
  step = np.float32(1e-3)
  trainable, gradient = jax.tree.map(np.asarray, (trainable, gradient))
  moved = [
    loss(jax.tree.map(lambda x, g, s=s: x + s * step * g, trainable, gradient))
    for s in (-1, 1)
  ]
  slope = sum(np.sum(g**2) for g in jax.tree.leaves(gradient))
  assert np.isclose(value, loss(trainable), rtol=1e-6)
  # Rounding of the difference, and the third derivative.
  np.testing.assert_allclose(
    (moved[1] - moved[0]) / (2 * step), slope, rtol=0.02
  )
