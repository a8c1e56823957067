"""Trees of what trains and of what is frozen, and plain arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim.quantized.weights import quantize_weights
from gnlorp_jax.training import parameters

TRAINED = {'layers': {'up': {'lora_a': 1, 'lora_b': 2}}, 'head': {'bias': 3}}
FROZEN = {'layers': {'up': {'kernel': 4}, 'norm': {'scale': 5}}, 'embed': 6}


def test_two_trees_are_joined_path_by_path():
  assert parameters.join(TRAINED, FROZEN) == {
    'embed': 6,
    'head': {'bias': 3},
    'layers': {
      'norm': {'scale': 5},
      'up': {'kernel': 4, 'lora_a': 1, 'lora_b': 2},
    },
  }


def test_nothing_frozen_leaves_the_tree_itself():
  assert parameters.join(TRAINED, {}) is TRAINED
  assert parameters.join({}, FROZEN) == FROZEN
  # Of a layer as of the whole model.
  joined = parameters.join({'up': {'lora_a': 1}}, {'norm': {'scale': 5}})
  assert joined == {'norm': {'scale': 5}, 'up': {'lora_a': 1}}


def test_codes_are_joined_as_arrays_are():
  codes = quantize_weights({'up': {'kernel': jnp.ones((2, 4, 8))}})
  joined = parameters.join({'up': {'lora_a': 1}}, codes)
  assert joined['up']['kernel'] is codes['up']['kernel']
  with pytest.raises(ValueError, match="Both trees of parameters hold 'up/ker"):
    parameters.join({'up': {'kernel': {'x': 1}}}, codes)


def test_a_path_is_either_trained_or_frozen():
  with pytest.raises(ValueError) as error:
    parameters.join(TRAINED, {'layers': {'up': {'lora_b': 7}}})
  assert str(error.value) == (
    "Both trees of parameters hold 'layers/up/lora_b'. Take it out of one."
  )


def test_plain_arrays_are_stored_as_they_are():
  trained, frozen = {'a': jnp.ones(2, jnp.bfloat16)}, {'b': jnp.zeros(3)}
  found = parameters.plain(trained, frozen)
  assert (found.trained, found.frozen) == (trained, frozen)
  assert found.start(jax.random.key(0)) == (trained, frozen)
  assert found.start_frozen(jax.random.key(0)) is frozen
  for tree in (trained, frozen):
    assert found.decode(tree) is found.decode_exact(tree) is tree
  assert found.merge(trained, frozen) == {**trained, **frozen}
  new = {'a': jnp.array([0.1, 1.0])}
  stored = found.store(new, trained, jnp.int32(3), 0)['a']
  assert stored.dtype == jnp.bfloat16
  np.testing.assert_array_equal(stored, new['a'].astype(jnp.bfloat16))
  assert parameters.plain(trained).frozen == {}
