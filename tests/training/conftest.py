"""A language model small enough to train in a test.

Shape suffixes in this file: B sequences, T positions, D features, F hidden
features, V vocabulary, L layers.
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
