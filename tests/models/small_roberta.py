"""A small RoBERTa and its inputs, shared by tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from gnlorp_jax.models import hf, roberta

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
    flat[path] = jnp.asarray(np.broadcast_to(value, flat[path].shape))
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
