"""Models on stored parameters: the same numbers, and no decoded stack.

Shape suffixes in this file: B sequences, T positions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim.quantized.weights import (
  dequantize_weights,
  quantize_weights,
)
from gnlorp_jax.training import forward, objectives, parameters

decode = functools.partial(dequantize_weights, dtype=jnp.float32)
encode = jax.jit(quantize_weights)


def tokens(batch=2, positions=8):
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(1, 64, (batch, positions), dtype=np.int32)
  tokens_BT[-1, 5:] = 0
  return tokens_BT


@pytest.mark.parametrize('dropout', [False, True])
@pytest.mark.parametrize('kind', ['language_model', 'sequence_classifier'])
def test_codes_compute_what_their_values_do(request, kind, dropout):
  model = request.getfixturevalue(kind)
  stored = encode(model.init(jax.random.key(0)))
  key = jax.random.key(3) if dropout else None
  found = forward.on_stored(model, decode)
  expected = jax.jit(model.apply)(jax.jit(decode)(stored), tokens(), key)

  @jax.jit
  def logits_of(stored, key):
    # The head after the blocks, as a loss calls it.
    x = found.hidden(stored, tokens(), key)
    return found.apply(stored, tokens(), key), found.logits(stored, x, key)

  for logits in logits_of(stored, key):
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_decoded_model(language_model):
  params = language_model.init(jax.random.key(0))
  trained = {'norm': params.pop('norm'), 'head': params.pop('head')}
  frozen = encode(params)
  batch = {
    'inputs': tokens(),
    'targets': tokens(),
    'weights': np.ones((2, 8), np.float32),
    'seeds': np.arange(2, dtype=np.uint32),
  }

  def gradient(model, frozen):
    loss = objectives.language_model(model, 8, dropout=True).loss
    return jax.jit(
      jax.grad(lambda t: loss(parameters.join(t, frozen), batch), has_aux=True)
    )(trained)[0]

  found = gradient(forward.on_stored(language_model, decode), frozen)
  expected = gradient(language_model, jax.jit(decode)(frozen))
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
