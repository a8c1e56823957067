"""Models small enough to train in a test.

Shape suffixes in this file: B sequences, T positions, D features, F hidden
features, V vocabulary, L layers, C classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

VOCAB, FEATURES, HIDDEN, LAYERS, POSITIONS = 64, 32, 64, 2, 16


class TinyLM(NamedTuple):
  """What the engine asks of a model, and data to feed it."""

  init: Any
  loss_fn: Any
  make_batch: Any


def init(key):
  """Parameters with scan-stacked ``[L, in, out]`` kernels."""
  shapes = {
    'embed': (VOCAB, FEATURES),
    'blocks': {
      'up': (LAYERS, FEATURES, HIDDEN),
      'down': (LAYERS, HIDDEN, FEATURES),
    },
    'head': (FEATURES, VOCAB),
  }
  sizes, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: type(x) is tuple)
  ends = np.cumsum([np.prod(shape) for shape in sizes])
  # One draw for all: compiling the generator is what takes the time.
  numbers = jnp.split(0.1 * jax.random.normal(key, ends[-1:]), ends[:-1])
  return treedef.unflatten(
    [x.reshape(shape) for x, shape in zip(numbers, sizes, strict=True)]
  )


def loss_fn(params, batch):
  """Weighted sum of next-token losses, and the sum of the weights."""

  def block(x_BTD, kernels):
    hidden_BTF = jax.nn.relu(x_BTD @ kernels['up'])
    return x_BTD + hidden_BTF @ kernels['down'], None

  x_BTD, _ = jax.lax.scan(
    block, params['embed'][batch['inputs']], params['blocks']
  )
  logits_BTV = (x_BTD @ params['head']).astype(jnp.float32)
  log_probs_BTV = jax.nn.log_softmax(logits_BTV)
  losses_BT = -jnp.take_along_axis(
    log_probs_BTV, batch['targets'][..., None], axis=-1
  ).squeeze(-1)
  weights_BT = batch['weights']
  return jnp.sum(losses_BT * weights_BT), jnp.sum(weights_BT)


def make_batch(seed, size):
  """Random tokens, with weights that differ between the sequences."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, VOCAB, (size, POSITIONS + 1), dtype=np.int32)
  lengths = rng.integers(1, POSITIONS + 1, (size, 1))
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': (np.arange(POSITIONS) < lengths).astype(np.float32),
  }


@pytest.fixture(scope='session')
def tiny_lm():
  """The model's functions."""
  return TinyLM(init, loss_fn, make_batch)


# Models in pieces, with padding and dropout, written as `objectives` asks.

PAD, CLASSES = 0, 3


class LayerFns(NamedTuple):
  """What a pass layer by layer asks of a model."""

  embed: Any
  block: Any
  head: Any
  context: Any
  extend: Any = None


class Model(NamedTuple):
  """What an objective asks of a model."""

  init: Any
  hidden: Any
  logits: Any
  apply: Any
  layer_fns: LayerFns
  extend: Any = None
  head_of: Any = None


def drop(x, key, number):
  if key is None:
    return x
  key = jax.random.fold_in(key, number)
  return jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0)


def embed_tokens(params, tokens_BT, key=None):
  return drop(params['embed']['embedding'][tokens_BT], key, 100)


def one_block(layer, x_BTD, mask_BT=None, number=None, key=None):
  if mask_BT is not None:
    count_B11 = mask_BT.sum(axis=1)[:, None, None]
    mean_B1D = (x_BTD * mask_BT[..., None]).sum(1, keepdims=True) / count_B11
    x_BTD += jnp.broadcast_to(mean_B1D, x_BTD.shape)
  hidden_BTF = jax.nn.silu(x_BTD @ layer['up']['kernel'])
  return x_BTD + drop(hidden_BTF @ layer['down']['kernel'], key, 200)


def normed(params, x):
  size = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
  scale = params['norm']['scale']
  return x / size * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def model_in_pieces(outputs, is_classifier):
  """A language model, or a classifier that reads the first position."""

  def init(key):
    shapes = {
      'embed': {'embedding': (VOCAB, FEATURES)},
      'head': {'kernel': (FEATURES, outputs)},
      'layers': {
        'down': {'kernel': (LAYERS, HIDDEN, FEATURES)},
        'up': {'kernel': (LAYERS, FEATURES, HIDDEN)},
      },
      'norm': {'scale': (FEATURES,)},
    }
    rng = np.random.default_rng(int(jax.random.key_data(key)[-1]))
    return jax.tree.map(
      lambda shape: jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32),
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    )

  def context(tokens_BT, segments_BT=None):
    assert segments_BT is None
    return tokens_BT != PAD if is_classifier else None

  def head(params, x, key=None):
    return logits(params, normed(params, x), key)

  def logits(params, x, key=None):
    if is_classifier:
      x = drop(x[:, 0], key, 300)
    return (x @ params['head']['kernel']).astype(jnp.float32)

  def hidden(params, tokens_BT, key=None, segments_BT=None):
    x_BTD = embed_tokens(params, tokens_BT, key)
    for number in range(LAYERS):
      layer = jax.tree.map(lambda w, n=number: w[n], params['layers'])
      layer_key = None if key is None else jax.random.fold_in(key, number)
      x_BTD = one_block(
        layer, x_BTD, context(tokens_BT, segments_BT), number, layer_key
      )
    return normed(params, x_BTD)

  def apply(params, tokens_BT, key=None):
    return logits(params, hidden(params, tokens_BT, key), key)

  fns = LayerFns(embed_tokens, one_block, head, context)
  return Model(init, hidden, logits, apply, fns)


@pytest.fixture(scope='session')
def language_model():
  """A language model with dropout, in pieces."""
  return model_in_pieces(VOCAB, is_classifier=False)


@pytest.fixture(scope='session')
def sequence_classifier():
  """A classifier with dropout and padding, in pieces."""
  return model_in_pieces(CLASSES, is_classifier=True)
