"""Kernels with heads, against the same kernels reshaped by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import galore, gradnormlorp, inspect, labels
from gnlorp_jax.optim.parts.kernel_axes import matrix_shape, with_kernel_axes

RULES = (('query', 1, 2), ('out', 2, 1))


@pytest.mark.parametrize(
  ('shape', 'axes', 'expected'),
  [
    ((8, 2, 4), (1, 2), (8, 8)),
    ((2, 4, 8), (2, 1), (8, 8)),
    ((5, 8, 2, 3), (1, 2), (5, 8, 6)),
    ((5, 6, 2, 3), (1, 1), (5, 6, 2, 3)),
  ],
)
def test_axes_of_each_kind_are_merged(shape, axes, expected):
  assert matrix_shape(shape, *axes) == expected


@pytest.mark.parametrize(
  ('alias', 'names'),
  [(gradnormlorp, ('query', 'out', 'dense')), (galore, ('out',))],
)
def test_kernel_with_heads_moves_as_its_matrix(alias, names):
  rng = np.random.default_rng(0)
  shapes = {'query': (8, 2, 6), 'out': (2, 6, 8), 'dense': (3, 8, 8)}
  params = {
    name: {'kernel': rng.standard_normal(shape).astype(np.float32)}
    for name, shape in shapes.items()
  }
  params = {name: params[name] for name in names}
  matrices = {'query': (8, 12), 'out': (12, 8), 'dense': (3, 8, 8)}
  flat = {
    name: {'kernel': kernel['kernel'].reshape(matrices[name])}
    for name, kernel in params.items()
  }
  low_rank = [('.*', 'low_rank')]
  options = {'rank': 3, 'param_labels': low_rank}
  rules = [rule for rule in RULES if rule[0] in names]
  tx = alias(1e-2, kernel_axes=rules, **options)
  plain = alias(1e-2, **options)
  updates, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
  expected, _ = jax.jit(lambda p: plain.update(p, plain.init(p), p))(flat)
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_array_equal(
      np.reshape(ours, theirs.shape), theirs
    ),
    updates,
    expected,
  )
  optax.tree.map_params(tx, lambda x: x, state)


def test_flax_attention_is_left_alone_until_its_axes_are_given():
  module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16)
  x = jnp.ones((1, 3, 16))
  params = jax.eval_shape(module.init, jax.random.key(0), x, x)['params']
  query = labels.assign(params)['query']['kernel']
  assert query.label == 'full'
  assert 'kernel_axes' in query.reason
  rules = [('kernel', 'low_rank'), ('.*', 'full')]
  axes = [('query|key|value', 1, 2), ('out', 2, 1)]
  tx = gradnormlorp(1e-2, rank=4, param_labels=rules, kernel_axes=axes)
  rows = {r.name: r for r in inspect.report(params, tx, rules)}
  assert (rows['query/kernel'].rank, rows['query/kernel'].side) == (4, 'in')
  assert rows['query/kernel'].state_bytes < 0.8 * 8 * 256


@pytest.mark.parametrize(
  ('build', 'text'),
  [
    (
      lambda: with_kernel_axes(optax.identity(), [('query', 0, 2)]),
      "kernel_axes rule ('query', 0, 2) must name at least one input and one "
      'output axis, as (regex, num_in, num_out).',
    ),
    (
      lambda: with_kernel_axes(optax.identity(), [('query', 1, 2)]).init(
        {'query': jnp.ones((4, 4))}
      ),
      "kernel_axes rule ('query', 1, 2) needs 3 axes, but 'query' has the "
      'shape [4, 4]. Correct the rule or its regex.',
    ),
  ],
)
def test_rules_that_do_not_fit_are_errors(build, text):
  with pytest.raises(ValueError) as error:
    build()
  assert str(error.value) == text
