"""Optimizers on the parameters of every library: equal to plain ones.

A form says how a library holds parameters and takes a step. What becomes of the
numbers is compared with a run on dictionaries of arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

from gnlorp_jax import optim
from gnlorp_jax.optim.parts.plain import plain
from tests.ecosystem.names import NAMES

# Names of the axes of boxed kernels and biases.
AXES = {'a': {'bias': ('tp',), 'kernel': ('fsdp', 'tp')}}
AXES['b'] = {'kernel': ('tp', None)}


class Form(NamedTuple):
  """How a library holds parameters and takes steps."""

  # From nested dictionaries of arrays to the library's parameters.
  hold: Callable[[Any], Any]
  # What the plain run has in the place of the library's parameters.
  like: Callable[[Any], Any] = lambda tree: tree
  apply_updates: Callable[[Any, Any], Any] = optax.apply_updates
  dtype: str = 'float32'


def boxed(tree):
  return jax.tree.map(
    nn.Partitioned, tree, AXES, is_leaf=lambda x: isinstance(x, tuple)
  )


class Layer(nnx.Module):
  def __init__(self, arrays):
    for name, array in arrays.items():
      setattr(self, name, nnx.Param(jnp.asarray(array)))


class Network(nnx.Module):
  def __init__(self, tree):
    for name, arrays in tree.items():
      setattr(self, name, Layer(arrays))


@flax.struct.dataclass
class Block:
  """A dataclass whose fields are not in the order of their names."""

  kernel: Any
  bias: Any = None


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['b', 'a'], meta_fields=[]
)
@dataclasses.dataclass
class Blocks:
  b: Any
  a: Any


def hold_in_equinox(tree):
  eqx = pytest.importorskip('equinox')

  def linear(arrays):
    n_in, n_out = arrays['kernel'].shape[-2:]
    layer = eqx.nn.Linear(
      n_in, n_out, use_bias='bias' in arrays, key=jax.random.key(0)
    )
    values = [jnp.asarray(arrays['kernel']).mT]
    if 'bias' in arrays:
      values.append(jnp.asarray(arrays['bias']))
    return eqx.tree_at(
      lambda layer: [layer.weight, layer.bias][: len(values)], layer, values
    )

  return equinox_model()(
    **{name: linear(arrays) for name, arrays in tree.items()}
  )


@functools.cache
def equinox_model():
  eqx = pytest.importorskip('equinox')

  class Model(eqx.Module):
    b: Any
    a: Any

  return Model


def like_equinox(tree):
  return {
    name: {
      'weight': arrays['kernel'].mT,
      'bias': arrays.get('bias'),
    }
    for name, arrays in tree.items()
  }


def apply_equinox(params, updates):
  import equinox as eqx

  return eqx.apply_updates(params, updates)


def hold_in_haiku(tree):
  hk = pytest.importorskip('haiku')

  def forward(x):
    x = hk.Linear(8, name='a')(x)
    return hk.Linear(8, with_bias=False, name='b')(x)

  shapes = jax.eval_shape(
    hk.transform(forward).init, jax.random.key(0), jnp.ones((1, 12))
  )
  params = like_haiku(tree)
  assert jax.tree.structure(params) == jax.tree.structure(shapes)
  return params


def like_haiku(tree):
  return {
    name: {'w': arrays['kernel']}
    | ({'b': arrays['bias']} if 'bias' in arrays else {})
    for name, arrays in tree.items()
  }


FORMS = {
  'Linen boxed': Form(boxed),
  'NNX functional': Form(lambda tree: nnx.state(Network(tree), nnx.Param)),
  'Equinox bf16': Form(
    hold_in_equinox, like_equinox, apply_equinox, dtype='bfloat16'
  ),
  'Haiku': Form(hold_in_haiku, like_haiku),
  'dataclass': Form(
    lambda tree: Blocks(**{k: Block(**v) for k, v in tree.items()}),
    lambda tree: {k: {'bias': None, **v} for k, v in tree.items()},
  ),
  'FrozenDict': Form(FrozenDict),
  'list': Form(
    lambda tree: [tree['a'], tree['b']], lambda tree: [*tree.values()]
  ),
}


# Inside, every optimizer sees the same plain tree, so that for most forms a few
# optimizers stand for all: without projection, of another moment, and with
# magnitudes.
FEW = ('adamw', 'galore_adafactor', 'gradnormlorp')
# One optimizer for every kind of record in a state; the states of the rest are
# tuples of arrays, as that of `gradnormlorp` is. Boxes lie around what a state
# holds too, and NNX's own optimizer holds each array of it in a variable.
RECORDS = (*FEW, 'apollo', 'dct_adamw', 'ldadam', 'q_galore')
# Equinox has other names, matrices the other way round, and bfloat16. It takes
# the rest, so that every kind of state has met a foreign tree, and codes.
REST = tuple(name for name in NAMES if name not in RECORDS)
METHODS_OF = {'Linen boxed': RECORDS, 'Equinox bf16': (*FEW, 'q_galore', *REST)}
CASES = [
  pytest.param(name, method, id=f'{method}-{name}')
  for name in FORMS
  for method in METHODS_OF.get(name, FEW)
]


def cast(tree, dtype):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def assert_as_plain(found, expected, start, dtype='float32'):
  """Parameters have moved alike: to 1e-6 of a step's size, or a rounding."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  # A bfloat16 number has 8 digits: one unit in the last place of most.
  rtol, atol = (1e-6, 1e-7) if dtype == 'float32' else (2**-7, 2**-9)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=rtol, atol=atol
    ),
    found,
    expected,
  )
  moved = jax.tree.map(
    lambda a, b: float(np.abs(np.float32(a) - np.float32(b)).max()),
    found,
    start,
  )
  assert min(jax.tree.leaves(moved)) > 1e-3


def take_steps(tx, params, grads, apply_updates=optax.apply_updates):
  """Parameters after a step for each of the stacked gradients."""

  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return (apply_updates(params, updates), state), None

  # One program, and states that stay of one type.
  def run(params, grads):
    return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

  return jax.jit(run)(params, grads)


@pytest.fixture(scope='module')
def plain_run(make, params, stacked, compiled_once):
  """Parameters as dictionaries after three steps, by alias and dtype."""
  del compiled_once

  @functools.cache
  def run(alias, dtype='float32'):
    return take_steps(make(alias), cast(params, dtype), cast(stacked, dtype))

  return run


@pytest.mark.parametrize(('name', 'method'), CASES)
def test_form_moves_as_plain_trees_do(
  name, method, make, params, stacked, plain_run
):
  form = FORMS[name]
  start, grads = (
    form.hold(cast(tree, form.dtype)) for tree in (params, stacked)
  )
  found = take_steps(make(method), start, grads, form.apply_updates)
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(form.dtype)}
  assert jax.tree.structure(found) == jax.tree.structure(start)
  expected = plain_run(method, form.dtype)
  assert_as_plain(
    plain(found), form.like(expected), form.like(params), form.dtype
  )


@pytest.mark.parametrize('method', FEW)
def test_linen_train_state_moves_as_plain_trees_do(
  method, make, params, stacked, plain_run
):
  state = TrainState.create(
    apply_fn=None, params=cast(params, 'float32'), tx=make(method)
  )

  @jax.jit
  def run(state, grads):
    return jax.lax.scan(
      lambda state, g: (state.apply_gradients(grads=g), None), state, grads
    )[0]

  found = run(state, stacked)
  assert int(found.step) == 3
  assert_as_plain(found.params, plain_run(method), params)


@pytest.mark.parametrize('method', RECORDS)
def test_nnx_optimizer_moves_as_plain_trees_do(
  method, make, params, stacked, plain_run
):
  model = Network(params)
  optimizer = nnx.Optimizer(model, make(method), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, grads):
    optimizer.update(model, grads)

  for leaves in zip(*jax.tree.leaves(stacked), strict=True):
    grads = jax.tree.unflatten(jax.tree.structure(stacked), leaves)
    step(model, optimizer, nnx.state(Network(grads), nnx.Param))
  found = plain(nnx.state(model, nnx.Param))
  assert_as_plain(found, plain_run(method), params)
  # What reads a state reads that of the optimizer too.
  stats = optim.inspect.subspace_stats(optimizer.opt_state)
  assert set(stats) == (
    set() if method == 'adamw' else {'a/kernel', 'b/kernel'}
  )
  assert int(optim.inspect.skipped_steps(optimizer.opt_state)) == 0


@pytest.mark.parametrize('kind', ['bits', 'parts'])
def test_what_users_compose_takes_any_tree(kind, params, stacked):
  if kind == 'bits':
    tx = optim.quantize_moments(optax.adam(1e-2), 8, min_size=64)
  else:
    kernels = optax.chain(
      optim.with_low_rank_projection(optax.scale_by_lion(), rank=3),
      optax.scale_by_learning_rate(1e-2),
    )
    tx = optim.for_any_tree(
      optax.partition(
        {'low_rank': kernels, 'full': optax.adam(1e-2)}, optim.labels.labels()
      )
    )
  expected = take_steps(tx, params, stacked)
  for name in ('Linen boxed', 'NNX functional'):
    hold = FORMS[name].hold
    found = take_steps(tx, hold(params), hold(stacked))
    assert_as_plain(plain(found), expected, params)


def test_trees_like_a_module_that_can_be_called_are_trees():
  eqx = pytest.importorskip('equinox')
  model = eqx.nn.MLP(8, 8, width_size=8, depth=1, key=jax.random.key(0))
  params = eqx.filter(model, eqx.is_inexact_array)

  numbers = jax.tree.map(
    lambda x: optim.WeightDimensionNumbers(1, 0) if x.ndim > 1 else None, params
  )
  is_matrix = jax.tree.map(lambda x: x.ndim > 1, params)
  labels = jax.tree.map(lambda x: 'low_rank' if x.ndim > 1 else 'full', params)
  spared = eqx.tree_at(lambda m: m.layers[0].weight, is_matrix, False)
  zeros = jax.tree.map(jnp.zeros_like, params)
  # Which of two weights and two biases decay.
  for options, decay in (
    ({'param_labels': labels}, [True] * 4),
    ({'weight_dimension_numbers': numbers}, [True] * 4),
    ({'weight_decay_mask': is_matrix}, [True, False] * 2),
    # Functions are given the module itself.
    ({'weight_decay_mask': lambda model: spared}, [False, False, True, False]),
  ):
    tx = optim.galore(0.1, rank=2, weight_decay=0.5, **options)
    updates, _ = jax.jit(lambda p, tx=tx: tx.update(zeros, tx.init(p), p))(
      params
    )
    moved = [bool(np.any(u != 0)) for u in jax.tree.leaves(updates)]
    assert moved == decay
  rows = optim.report(params, optim.galore(0.1, rank=2))
  assert [row.label for row in rows] == ['full', 'low_rank'] * 2
