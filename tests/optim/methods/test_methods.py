"""Optimizers by their names, and what their signatures say of them."""

import inspect
import typing

import jax
import jax.numpy as jnp
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim import methods


def test_methods_are_the_modules_that_take_a_learning_rate():
  assert {'adamw', 'gradnormlorp', 'vlorp'} <= set(methods.names())
  assert not {'assemble', 'options', 'released'} & set(methods.names())
  for name in methods.names():
    assert methods.get(name) is getattr(optim, name)


def test_unknown_optimizer_is_told_those_there_are():
  with pytest.raises(ValueError) as error:
    methods.get('adam')
  expected = f"Unknown optimizer 'adam'; expected one of {methods.names()}."
  assert str(error.value) == expected


WITH_SIDES = [
  name
  for name in methods.names()
  if 'side' in inspect.signature(methods.get(name)).parameters
]


@pytest.mark.parametrize('name', WITH_SIDES)
def test_the_type_of_side_is_what_it_may_be(name):
  method = methods.get(name)
  sides = typing.get_args(
    inspect.signature(method).parameters['side'].annotation
  )
  assert set(sides) >= {'short', 'long', 'in', 'out'}
  assert ('or ``both``' in ' '.join(method.__doc__.split())) == (
    'both' in sides
  )
  params = {'kernel': jax.ShapeDtypeStruct((128, 256), jnp.float32)}

  def init(side):
    return jax.eval_shape(lambda p: method(0.1, side=side).init(p), params)

  for side in sides:
    init(side)
  if 'both' not in sides:
    with pytest.raises(ValueError, match="side='both'"):
      init('both')
