"""The dry run and what is read from states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax.optim import (
  adamw,
  galore,
  gradnormlorp,
  inspect,
  q_galore,
  quantize_moments,
)

SHAPES = {
  'embed': {'embedding': jax.ShapeDtypeStruct((50, 16), jnp.float32)},
  'layers': {'up': {'kernel': jax.ShapeDtypeStruct((4, 16, 40), jnp.float32)}},
  'norm': {'scale': jax.ShapeDtypeStruct((16,), jnp.float32)},
}


def rows_of(tx, **options):
  return {row.name: row for row in inspect.report(SHAPES, tx, **options)}


def test_report_states_what_happens_to_each_parameter():
  rows = rows_of(gradnormlorp(1e-2, rank=8))
  up = rows['layers/up/kernel']
  assert (up.label, up.rank, up.side) == ('low_rank', 8, 'in')
  assert up.reason == 'default: a kernel'
  # Two moments [4, 40, 8], basis [4, 16, 8], two moments of g [4, 1, 40], and
  # four numbers per matrix; all of four bytes.
  assert up.state_bytes == 4 * (2 * 4 * 40 * 8 + 4 * 16 * 8 + 2 * 4 * 40 + 16)
  assert up.adamw_bytes == 8 * 4 * 16 * 40
  embed = rows['embed/embedding']
  assert (embed.label, embed.rank, embed.side) == ('full', None, '')
  assert embed.state_bytes == embed.adamw_bytes == 8 * 50 * 16


def test_report_follows_rules_and_chains():
  rules = [('embed', 'frozen'), ('.*', 'full')]
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), adamw(1e-3, param_labels=rules)
  )
  rows = rows_of(tx, param_labels=rules)
  assert rows['embed/embedding'].state_bytes == 0
  assert rows['embed/embedding'].reason == "rule 'embed'"
  assert rows['norm/scale'].state_bytes == 8 * 16


def test_report_says_when_nothing_is_compressed():
  row = rows_of(galore(1e-2, rank=100, side='both'))['layers/up/kernel']
  assert (row.rank, row.side) == (16, 'in+out')
  assert row.reason.endswith(
    '; rank fills the shorter axis: nothing is compressed there'
  )


def test_report_bytes_add_up_to_the_state():
  for tx in (adamw(1e-3), galore(1e-2, rank=4), gradnormlorp(1e-2, rank=4)):
    state = jax.eval_shape(tx.init, SHAPES)
    rows = inspect.report(SHAPES, tx)
    scalars = sum(  # Step counts belong to no parameter.
      leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if not leaf.shape
    )
    total = sum(inspect.state_bytes(state).values())
    assert sum(row.state_bytes for row in rows) + scalars == total
    assert total == inspect.tree_bytes(state)


def test_owner_is_the_longest_path_that_fits():
  shapes = {
    'kernel': jax.ShapeDtypeStruct((8, 8), jnp.float32),
    'outer': {'kernel': jax.ShapeDtypeStruct((16, 16), jnp.float32)},
  }
  rows = {r.name: r for r in inspect.report(shapes, adamw(1e-3))}
  assert rows['kernel'].state_bytes == 8 * 64
  assert rows['outer/kernel'].state_bytes == 8 * 256


def test_report_with_other_labels_than_the_optimizer_is_an_error():
  rules = [('embed', 'frozen'), ('.*', 'full')]
  tx = adamw(1e-3, param_labels=rules)
  with pytest.raises(ValueError) as error:
    inspect.report(SHAPES, tx, [('.*', 'full')])
  assert str(error.value) == (
    "param_labels call 'embed/embedding' 'full', but tx treats it otherwise. "
    'Give report() the param_labels that tx was built with.'
  )
  # Without labels it tells what the state shows.
  rows = {row.name: row for row in inspect.report(SHAPES, tx)}
  assert rows['embed/embedding'].label == 'frozen'
  assert rows['embed/embedding'].reason == (
    'no state: so the options of tx, or a mask'
  )
  assert rows['layers/up/kernel'].label == 'full'
  assert rows['layers/up/kernel'].reason == 'by the options of tx'
  with pytest.raises(ValueError, match="call 'layers/up/kernel' 'full'"):
    inspect.report(SHAPES, galore(1e-3, rank=4), [('.*', 'full')])


def test_format_report_shows_totals():
  text = inspect.format_report(inspect.report(SHAPES, adamw(1e-3)))
  lines = text.splitlines()
  assert lines[0].split() == (
    'parameter shape label rank side state AdamW why'.split()
  )
  assert 'layers/up/kernel  4x16x40' in text
  assert lines[-1].startswith('total') and '0.0% less than AdamW' in lines[-1]


@pytest.mark.parametrize(
  ('count', 'text'),
  [(0, '0 B'), (1023, '1023 B'), (1536, '1.5 KiB'), (2**41, '2.0 TiB')],
)
def test_bytes_are_readable(count, text):
  assert inspect.format_bytes(count) == text


def test_subspace_stats_and_skipped_steps_are_read_from_any_chain():
  params = jax.tree.map(
    lambda s: jax.random.normal(jax.random.key(0), s.shape), SHAPES
  )
  tx = optax.chain(optax.clip_by_global_norm(1.0), galore(1e-2, 4, 5))
  state = tx.init(params)
  update = jax.jit(tx.update)
  for _ in range(5):
    _, state = update(params, state, params)
  _, state = update(jax.tree.map(lambda p: p * np.nan, params), state, params)
  stats = jax.jit(inspect.subspace_stats)(state)
  assert list(stats) == ['layers/up/kernel']
  # The first fit, and one refresh of three matrices since (phase 0 is next).
  assert 1 < stats['layers/up/kernel'].refreshes < 2.1
  assert 0 < stats['layers/up/kernel'].energy < 1
  assert int(inspect.skipped_steps(state)) == 1
  assert inspect.subspace_stats(optax.adam(1e-3).init(params)) == {}


def test_report_knows_the_rank_of_quantised_bases():
  rows = rows_of(q_galore(1e-2, rank=6))
  up = rows['layers/up/kernel']
  assert (up.rank, up.side) == (6, 'in')


@pytest.mark.parametrize(
  'params',
  [
    [{'kernel': jnp.ones((8, 8))}, {'kernel': jnp.ones((8, 8))}],
    {name: {'kernel': jnp.ones((8, 8))} for name in ('full', 'in', 'out')},
    {
      'low_rank': {'in': {'kernel': jnp.ones((8, 8))}},
      'full': jnp.ones(8),
      'mu': {'basis': {'kernel': jnp.ones((8, 8))}},
    },
  ],
  ids=['list', 'sides', 'labels'],
)
@pytest.mark.parametrize('alias', [galore, gradnormlorp])
def test_states_are_told_apart_whatever_parameters_are_called(alias, params):
  tx = alias(1e-2, rank=2)
  rows = inspect.report(params, tx)
  kernels = [row for row in rows if row.name.endswith('kernel')]
  assert {(row.label, row.rank, row.side) for row in kernels} == {
    ('low_rank', 2, 'in')
  }
  assert len({row.state_bytes for row in kernels}) == 1
  state = jax.eval_shape(tx.init, params)
  counts = inspect.tree_bytes(state) - sum(row.state_bytes for row in rows)
  assert 0 < counts <= 32


def test_a_single_array_is_a_tree_of_parameters_too():
  (row,) = inspect.report(
    jnp.ones((8, 4)),
    galore(1e-2, rank=2, param_labels=[('', 'low_rank')]),
    [('', 'low_rank')],
  )
  assert (row.rank, row.side) == (2, 'out')


def test_an_empty_tree_has_an_empty_report():
  rows = inspect.report({}, galore(1e-2))
  assert rows == []
  assert inspect.format_report(rows).splitlines()[-1].split() == [
    *('total', '0', 'B', '0', 'B'),
  ]


def test_low_rank_states_larger_than_adams_are_a_loud_warning(caplog):
  # Sixteen matrices of 4 x 4, where one of 16 x 16 was meant.
  params = {'query': {'kernel': jnp.ones((16, 4, 4))}}
  rules = [('.*', 'low_rank')]
  tx = gradnormlorp(1e-2, rank=4, param_labels=rules)
  with caplog.at_level('WARNING'):
    inspect.report(params, tx, rules)
  assert caplog.messages[-1] == (
    "The low-rank states of 'query/kernel' [16, 4, 4] are larger than those of "
    'AdamW would be: rank is too high for these shapes, or they are not the '
    'stacks of matrices [*, in, out] they are taken for. Label them '
    "'full', or give kernel_axes or weight_dimension_numbers."
  )
  caplog.clear()
  axes = [('query', 1, 2)]
  tx = gradnormlorp(1e-2, rank=4, param_labels=rules, kernel_axes=axes)
  inspect.report(params, tx, rules)
  assert not caplog.messages


def test_arrays_without_elements_are_reported_too():
  params = {
    'a': {'kernel': jnp.ones((0, 8))},
    'b': {'kernel': jnp.ones((8, 8))},
  }
  rules = [('a', 'frozen'), ('b', 'low_rank')]
  for labels in (None, rules):
    tx = galore(1e-2, rank=2, param_labels=labels)
    rows = inspect.report(params, tx, labels)
    assert [row.state_bytes > 0 for row in rows] == [False, True]


def test_rank_that_fills_an_axis_is_told_by_the_matrix_that_is_projected():
  params = {'query': {'kernel': jnp.ones((16, 4, 8))}}
  rules = [('.*', 'low_rank')]
  for projection in ('svd', 'random', 'dct'):
    options = {'rank': 4, 'param_labels': rules, 'projection': projection}
    (stack,) = inspect.report(params, galore(1e-2, **options), rules)
    assert 'nothing is compressed there' in stack.reason
    tx = galore(1e-2, kernel_axes=[('query', 1, 2)], **options)
    (matrix,) = inspect.report(params, tx, rules)
    assert 'nothing is compressed there' not in matrix.reason


def test_report_tells_whose_moments_stay_float32():
  params = {
    'embed': {'embedding': jax.ShapeDtypeStruct((64, 64), jnp.float32)},
    'query': {'kernel': jax.ShapeDtypeStruct((64, 4, 64), jnp.float32)},
    'out': {'kernel': jax.ShapeDtypeStruct((4, 64, 64), jnp.float32)},
    'up': {'kernel': jax.ShapeDtypeStruct((64, 128), jnp.float32)},
    'down': {'kernel': jax.ShapeDtypeStruct((4096, 64), jnp.float32)},
    'norm': {'scale': jax.ShapeDtypeStruct((64,), jnp.float32)},
  }

  def remarks(tx):
    rows = inspect.report(params, tx)
    parts = {row.name: row.reason.split('; moments ') for row in rows}
    return {name: rest for name, (_, *rest) in parts.items() if rest}

  def small(matrix):
    return [f'stay float32: matrices of {matrix} have fewer than 4096 elements']

  assert remarks(gradnormlorp(1e-3, rank=8, moment_bits=8)) == {
    'embed/embedding': ['stay float32 by name or rule, see moment_bits'],
    'query/kernel': small('4x64'),
    'up/kernel': small('128x8'),
  }
  assert remarks(gradnormlorp(1e-3, rank=8)) == {}
  # Those with heads may be asked for by the size of their matrices.
  rules = [('embed', 32), ('.*', 8)]
  tx = quantize_moments(gradnormlorp(1e-3, rank=8), rules, min_size=256)
  assert list(remarks(tx)) == ['embed/embedding']


def test_report_of_another_optimizer_says_so():
  rows = inspect.report(SHAPES, optax.adamw(1e-3))
  assert {(row.label, row.reason) for row in rows} == {
    ('other', 'tx holds no optimizer of this package')
  }
  tx = optax.partition(
    {'ours': galore(1e-2, rank=4), 'theirs': optax.adamw(1e-3)},
    {'embed': 'theirs', 'layers': 'ours', 'norm': 'ours'},
  )
  rows = rows_of(tx)
  assert rows['embed/embedding'].reason == (
    'another part of the partition, or frozen'
  )
  assert rows['layers/up/kernel'].reason == 'default: a kernel'


def test_parameters_that_are_no_arrays_are_named():
  with pytest.raises(ValueError, match="'mlp/activation' is a"):
    inspect.report({'mlp': {'activation': jax.nn.relu}}, galore(1e-2))
