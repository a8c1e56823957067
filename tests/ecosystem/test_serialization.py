"""States through Flax's serialization, to the last bit.

tests/optim/test_conformance.py takes those of every optimizer through Orbax.
"""

import functools
import inspect
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim import methods, projections
from gnlorp_jax.optim.projections.dct import Columns
from gnlorp_jax.optim.projections.random import RandomBasis
from gnlorp_jax.optim.quantized.arrays import QuantizedArray
from tests.ecosystem.names import NAMES

RECORDS = (Columns, QuantizedArray, RandomBasis)
# Moments [512, 8] of a kernel, and tables, are large enough for few bits.
SHAPES = {
  'bits32': {'kernel': (16, 512), 'bias': (16,)},
  'bits8': {'kernel': (16, 512), 'table': (64, 80)},
  'bits4': {'kernel': (16, 512), 'table': (64, 80)},
}
OPTIONS = {
  'rank': 8,
  'update_proj_gap': 2,
  'granularity': 2,
  'basis_bits': 8,
  'error_bits': 8,
  'param_labels': [('kernel', 'low_rank'), ('table|bias', 'full')],
}
OF_APOLLO = {'granularity': 'channel'}
# Codes of 4 bits are the same record as those of 8, whoever keeps them: one
# optimizer that projects, and one that does not.
IN_4_BITS = ('adamw', 'galore')


def held_by(name):
  """The kinds of moments that an optimizer is asked for."""
  return [key for key in SHAPES if key != 'bits4' or name in IN_4_BITS]


def random_tree(name, seed):
  normal = np.random.default_rng(seed).standard_normal
  shapes = {key: SHAPES[key] for key in held_by(name)}
  return jax.tree.map(
    lambda shape: normal(shape, np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def on_host(tree):
  return jax.tree.map(np.asarray, tree)


class Halfway(NamedTuple):
  """An optimizer after two steps."""

  tx: optax.GradientTransformation
  update: Any  # compiled: (grads, state) -> (updates, state)
  state: Any  # on the host: what a program is called with is of one kind


@functools.cache
def halfway(name):
  method = methods.get(name)
  accepted = inspect.signature(method).parameters
  options = OPTIONS | (OF_APOLLO if name == 'apollo' else {})
  options['moment_bits'] = [
    (k, int(k.removeprefix('bits'))) for k in held_by(name)
  ]
  tx = method(0.1, **{k: v for k, v in options.items() if k in accepted})
  params = random_tree(name, 0)
  update = jax.jit(lambda grads, state: tx.update(grads, state, params))
  state = on_host(jax.jit(tx.init)(params))
  for seed in (1, 2):
    state = on_host(update(random_tree(name, seed), state)[1])
  return Halfway(tx, update, state)


def records(state):
  nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, RECORDS))
  return [node for node in nodes if isinstance(node, RECORDS)]


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_flax_restores_every_optimizer(name):
  tx, update, state = halfway(name)
  like = jax.eval_shape(tx.init, random_tree(name, 0))
  read = flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))
  assert_same(read, state)
  # And so is the step that follows.
  read, grads = on_host(read), random_tree(name, 3)
  assert_same(update(grads, read), update(grads, state))
  assert update._cache_size() == 1
  as_dict = flax.serialization.to_state_dict(state)
  assert_same(flax.serialization.from_state_dict(like, as_dict), state)


@pytest.mark.slow
def test_the_states_hold_every_kind_of_record():
  found = [r for name in NAMES for r in records(halfway(name).state)]
  assert {type(record) for record in found} == set(RECORDS)
  codecs = {r.codec for r in found if isinstance(r, QuantizedArray)}
  assert {(codec.kind, codec.bits) for codec in codecs} == {
    *(('dynamic', 8), ('dynamic', 4), ('linear', 4), ('affine', 8))
  }


@pytest.mark.parametrize(
  ('tx', 'kind'),
  [
    (optim.quantize_moments(optax.adam(0.1), 4), QuantizedArray),
    *(
      (
        optim.with_low_rank_projection(
          optax.scale_by_adam(), 2, projection=projections.get(name)
        ),
        kind,
      )
      for name, kind in (('dct', Columns), ('random', RandomBasis))
    ),
  ],
)
def test_flax_restores_a_part_by_itself(tx, kind):
  params = {'kernel': jnp.ones((64, 64))}
  state = jax.jit(tx.init)(params)
  assert {type(record) for record in records(state)} == {kind}
  data = flax.serialization.to_bytes(state)
  read = flax.serialization.from_bytes(jax.eval_shape(tx.init, params), data)
  assert_same(read, state)


@pytest.mark.parametrize(
  ('options', 'name'),
  [
    ({'moment_bits': 8}, 'mu/kernel'),
    ({'basis_bits': 4}, 'subspace/kernel/basis/in'),
  ],
)
def test_state_of_fewer_bits_is_refused_at_the_first_update(options, name):
  params = {'kernel': jnp.ones((64, 512))}
  old, new = optim.galore(0.1, 8, **options), optim.galore(0.1, 8)
  read = flax.serialization.from_bytes(
    jax.eval_shape(new.init, params),
    flax.serialization.to_bytes(jax.jit(old.init)(params)),
  )
  with pytest.raises(ValueError) as error:
    jax.eval_shape(new.update, params, read, params)
  text = str(error.value)
  assert f"{name}' was saved in few bits, where this one keeps 32 (see " in text
  assert text.endswith(
    'moment_bits, basis_bits and error_bits). Give the optimizer the options '
    'that the state was made with, or begin with init(params).'
  )


def test_state_of_other_fields_is_refused():
  old, new = (
    jax.jit(optim.quantize_moments(optax.adam(0.1), bits).init)(
      {'kernel': jnp.ones((64, 64))}
    )
    for bits in (32, 8)
  )
  with pytest.raises(ValueError) as error:
    flax.serialization.from_bytes(new, flax.serialization.to_bytes(old))
  assert str(error.value) == (
    "./0/mu/kernel is a QuantizedArray of ['codes', 'scale', 'zero'], but "
    'something else was saved. Restore into a state of the same optimizer, '
    'with the same options.'
  )
