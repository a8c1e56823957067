"""Kernels with heads, against the same kernels reshaped by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import galore, gradnormlorp, inspect, labels
from gnlorp_jax.optim.parts.kernel_axes import (
  WeightDimensionNumbers,
  as_matrix,
  from_matrix,
  matrix_axes,
  with_kernel_axes,
)

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
  found = matrix_axes('kernel', shape, [('kernel', *axes)])
  assert found.shape(shape) == expected


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
  ('shape', 'numbers', 'matrix'),
  [
    ((6, 4), (0, 1), (6, 4)),
    ((6, 4), (1, 0), (4, 6)),
    ((8, 2, 4), (0, (1, 2)), (8, 8)),
    ((2, 4, 8), ((0, 1), 2), (8, 8)),
    ((8, 3, 6), (0, 2), (3, 8, 6)),  # A scan in the middle.
    ((8, 3, 2, 5), (0, (-2, -1)), (3, 8, 10)),
    ((6, 5, 4, 3), ((-1, 0), 2), (5, 18, 4)),  # Inputs in the order given.
  ],
)
def test_dimension_numbers_make_a_stack_of_matrices(shape, numbers, matrix):
  rng = np.random.default_rng(0)
  x = rng.standard_normal(shape)
  axes = matrix_axes(
    'w', shape, numbers={'w': WeightDimensionNumbers(*numbers)}
  )
  seen = as_matrix(x, axes)
  assert seen.shape == matrix
  np.testing.assert_array_equal(from_matrix(seen, axes, shape), x)
  # By another way: a product over the inputs, for each of the stack.
  *stack, n_in, n_out = matrix
  y = rng.standard_normal((*stack, n_in))
  inputs = [axis % len(shape) for axis in np.atleast_1d(numbers[0])]
  outputs = [axis % len(shape) for axis in np.atleast_1d(numbers[1])]
  letters = 'abcdefg'[: len(shape)]
  named = [
    ''.join(letters[axis] for axis in group) for group in (inputs, outputs)
  ]
  batch = ''.join(c for c in letters if c not in ''.join(named))
  shaped = y.reshape(*stack, *(shape[axis] for axis in inputs))
  expected = np.einsum(
    f'{letters},{batch}{named[0]}->{batch}{named[1]}', x, shaped
  )
  np.testing.assert_allclose(
    np.einsum('...io,...i->...o', seen, y),
    expected.reshape(*stack, n_out),
    rtol=1e-12,
  )


@pytest.mark.parametrize('kind', ['tree', 'function', 'optax'])
def test_dimension_numbers_label_and_turn_weights(kind):
  rng = np.random.default_rng(0)
  params = {
    'linear': {'table': rng.standard_normal((6, 8)).astype(np.float32)},
    'rest': {'kernel': rng.standard_normal((8, 8)).astype(np.float32)},
  }
  made = WeightDimensionNumbers(1, 0)
  if kind == 'optax':
    made = optax.contrib.MuonDimensionNumbers(1, 0)
  numbers = {'linear': {'table': made}, 'rest': None}
  tx = galore(
    1e-2,
    rank=2,
    weight_dimension_numbers=numbers
    if kind != 'function'
    else lambda _: numbers,
  )
  updates, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
  turned = {
    'linear': {'kernel': params['linear']['table'].T},
    'rest': {'table': params['rest']['kernel']},
  }
  other = galore(1e-2, rank=2)
  expected, _ = jax.jit(lambda p: other.update(p, other.init(p), p))(turned)
  # The products of a turned matrix are rounded otherwise.
  np.testing.assert_allclose(
    updates['linear']['table'], expected['linear']['kernel'].T, rtol=1e-5
  )
  np.testing.assert_array_equal(
    updates['rest']['kernel'], expected['rest']['table']
  )
  rows = inspect.report(params, tx)
  assert [row.label for row in rows] == ['low_rank', 'full']


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
    (
      lambda: with_kernel_axes(
        optax.identity(), (), WeightDimensionNumbers(0, 2)
      ).init({'query': jnp.ones((4, 4))}),
      "Dimension numbers name the axes (2,) of 'query', which has the shape "
      '[4, 4].',
    ),
    (
      lambda: with_kernel_axes(
        optax.identity(), (), WeightDimensionNumbers(0, -2)
      ).init({'query': jnp.ones((4, 4))}),
      'Dimension numbers WeightDimensionNumbers(reduction_axis=0, '
      "output_axis=-2) of 'query' [4, 4] must name at least one reduction and "
      'one output axis, and no axis twice.',
    ),
    (
      lambda: galore(1e-2, weight_dimension_numbers={'key': None}).init(
        {'query': jnp.ones((4, 4))}
      ),
      "weight_dimension_numbers has no entry for 'query': its tree must be "
      'that of the parameters, with None where a parameter is no matrix. Its '
      "entries: ['key'].",
    ),
  ],
)
def test_rules_that_do_not_fit_are_errors(build, text):
  with pytest.raises(ValueError) as error:
    build()
  assert str(error.value) == text
