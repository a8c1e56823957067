"""Trees of other libraries as dictionaries, lists and tuples, and back."""

import collections
import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

from gnlorp_jax.optim.parts.plain import (
  arrays,
  boxed,
  content,
  is_box,
  path_name,
  plain,
  restore,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  """Fields out of order, one of them empty."""

  weight: typing.Any
  bias: typing.Any = None


@jax.tree_util.register_pytree_node_class
class Numbered:
  """A node without names for its children."""

  def __init__(self, *children):
    self.children = children

  def tree_flatten(self):
    return self.children, None

  @classmethod
  def tree_unflatten(cls, aux, children):
    return cls(*children)


class Pair(typing.NamedTuple):
  first: typing.Any
  second: typing.Any


def partitioned(x, *names):
  return nn.Partitioned(x, names=names)


TREES = {
  'dictionary': ({'b': 1, 'a': {'c': 2}}, {'b': 1, 'a': {'c': 2}}),
  'array': (1, 1),
  'list': ([1, (2, 3), {}], [1, (2, 3), {}]),
  'ordered': (collections.OrderedDict(b=1, a=2), {'a': 2, 'b': 1}),
  'frozen': (FrozenDict({'a': {'b': 1}}), {'a': {'b': 1}}),
  'dataclass': (
    {'l': Layer(weight=1, bias=2), 'm': Layer(3)},
    {'l': {'weight': 1, 'bias': 2}, 'm': {'weight': 3, 'bias': None}},
  ),
  'numbered': (Numbered(1, Numbered(2, 3)), [1, [2, 3]]),
  'named tuple': (Pair(1, {'a': 2}), Pair(1, {'a': 2})),
  'boxes': (
    {'k': partitioned(1, 'x'), 'b': 2, 'n': partitioned(partitioned(3), 'y')},
    {'k': 1, 'b': 2, 'n': 3},
  ),
  'masked': (
    {'a': optax.MaskedNode(), 'b': 1},
    {'a': optax.MaskedNode(), 'b': 1},
  ),
}


@pytest.mark.parametrize('name', TREES)
def test_trees_become_plain_and_come_back(name):
  tree, expected = TREES[name]
  found = plain(tree)
  assert found == expected
  assert type(found) is type(expected)
  # Other leaves, of which those of nodes come in another order.
  doubled = jax.tree.map(lambda x: 2 * x, found)
  back = restore(doubled, tree)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  assert jax.tree.leaves(back) == [2 * x for x in jax.tree.leaves(tree)]


def test_state_of_nnx_becomes_plain_and_comes_back():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(2)])

  state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
  for tree in (state, nnx.as_pure(state)):
    found = plain(tree)
    paths = [
      path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(found)
    ]
    assert paths == [
      f'layers/{i}/{name}' for i in range(2) for name in ('bias', 'kernel')
    ]
    back = restore(found, tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)


def test_boxes_keep_what_they_say():
  box = partitioned(jnp.ones(2), 'x')
  assert is_box(box) and not is_box({'value': 1}) and not is_box(Pair(1, 2))
  assert content(box) is box.value
  other = boxed(box, jnp.zeros(2))
  assert (other.names, float(other.value[0])) == (('x',), 0)
  variable = nnx.Param(jnp.ones(2), role='gate')
  other = boxed(variable, jnp.zeros(2))
  assert type(other) is nnx.Param
  assert other.get_metadata('role') == 'gate'


def test_numbers_become_arrays():
  found = arrays({'a': 1.5, 'b': np.ones(2), 'c': 2})
  assert found['a'].shape == () and found['a'].dtype == jnp.float32
  assert found['b'].shape == (2,)
  assert found['c'].dtype == jnp.int32


def test_a_leaf_that_is_no_array_is_an_error():
  with pytest.raises(ValueError) as error:
    arrays({'mlp': {'activation': jax.nn.relu}})
  assert str(error.value).startswith("'mlp/activation' is a ")
  assert str(error.value).endswith(
    'not an array: an optimizer takes arrays alone. Filter the parameters, '
    'such as by equinox.filter(model, equinox.is_inexact_array).'
  )
