"""States of other options are named at the first update."""

import jax
import jax.numpy as jnp
import pytest

from gnlorp_jax.optim import LazyRefresh, apollo, galore, ldadam, vlorp

PARAMS = {'dense': {'kernel': jnp.ones((64, 128))}}
FIX = (
  'Give the optimizer the options that the state was made with, or begin with '
  'init(params).'
)


def update(tx, state):
  return jax.eval_shape(tx.update, PARAMS, state, PARAMS)


@pytest.mark.parametrize(
  ('method', 'options', 'name', 'old', 'new'),
  [
    (galore, {}, 'subspace/dense/kernel/basis/in', [64, 8], [64, 16]),
    (
      galore,
      {'projection': 'dct'},
      'subspace/dense/kernel/basis/in/indices_R',
      *([8], [16]),
    ),
    # Of a random basis there is a seed alone; moments tell.
    (apollo, {}, 'inner_state/mu/dense/kernel', [128, 8], [128, 16]),
    (
      vlorp,
      {'granularity': 2},
      'inner_state/mu/dense/kernel',
      *([256, 8], [256, 16]),
    ),
    (
      ldadam,
      {'error_bits': None},
      'subspace/dense/kernel/basis/in',
      *([64, 8], [64, 16]),
    ),
  ],
)
def test_another_rank_is_an_error_before_the_first_step(
  method, options, name, old, new
):
  state = jax.eval_shape(method(0.1, rank=8, **options).init, PARAMS)
  with pytest.raises(ValueError) as error:
    update(method(0.1, rank=16, **options), state)
  assert str(error.value) == (
    f'The state is not one of this optimizer: its {name!r} has the shape {old},'
    f' and that of this one (rank=16) has the shape {new}. {FIX}'
  )


@pytest.mark.parametrize('bits', [8, 4])
def test_another_rank_is_an_error_in_few_bits_too(bits):
  options = {'moment_bits': bits, 'basis_bits': bits, 'projection': 'svd'}
  params = {'kernel': jnp.ones((64, 1024))}
  state = jax.eval_shape(galore(0.1, rank=8, **options).init, params)
  tx = galore(0.1, rank=16, **options)
  with pytest.raises(ValueError, match=r"its 'subspace/kernel/basis/in/codes'"):
    jax.eval_shape(tx.update, params, state, params)


def test_other_subspaces_are_an_error():
  state = jax.eval_shape(galore(0.1, 8, side='out').init, PARAMS)
  with pytest.raises(ValueError) as error:
    update(galore(0.1, 8, side='in'), state)
  assert str(error.value) == (
    "The state is not one of this optimizer: its 'subspace/dense/kernel/basis/"
    "in' has no array, and that of this one (rank=8) has the shape [64, 8]. "
    f'{FIX}'
  )
  lazy = galore(0.1, 8, lazy_refresh=LazyRefresh(queue=3))
  with pytest.raises(ValueError, match=r'has the shape \[3\], .* shape \[5\]'):
    update(
      galore(0.1, 8, lazy_refresh=LazyRefresh(queue=5)),
      jax.eval_shape(lazy.init, PARAMS),
    )


def test_one_matrix_of_a_stack_and_its_part_of_the_state_fit():
  # As a step layer by layer takes them.
  tx, stack = galore(0.1, 4), {'kernel': jnp.ones((3, 8, 16))}
  part = jax.tree.map(
    lambda x: (
      jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
      if x.shape[:1] == (3,)
      else x
    ),
    jax.eval_shape(tx.init, stack),
  )
  one = {'kernel': stack['kernel'][:1]}
  updates, _ = jax.eval_shape(tx.update, one, part, one)
  assert updates['kernel'].shape == (1, 8, 16)


def test_nothing_is_warned_of_again(caplog):
  tx = galore(0.1, rank=100)
  state = jax.eval_shape(tx.init, PARAMS)
  assert len(caplog.messages) == 1
  update(tx, state)
  assert len(caplog.messages) == 1
