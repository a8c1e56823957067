"""Methods: every one has an optimizer, every optimizer a method."""

import typing

import pytest

from gnlorp_jax import optim
from gnlorp_jax.compose import methods
from gnlorp_jax.compose.settings import OptimizerName
from gnlorp_jax.models import adapters


def test_every_method_has_an_optimizer_of_the_family():
  assert set(methods.COMPARED) <= set(methods.METHODS)
  kinds = typing.get_args(adapters.Kind)
  for method in methods.METHODS.values():
    assert callable(getattr(optim, method.optimizer))
    assert method.optimizer in typing.get_args(OptimizerName)
    assert method.adapter is None or method.adapter in kinds
    assert method.rates in ('galore', 'lora', 'gradnormlorp')


def test_every_optimizer_can_be_asked_for_as_a_method():
  plain = {
    method.optimizer
    for method in methods.METHODS.values()
    if method.adapter is None
  }
  assert plain == set(typing.get_args(OptimizerName))


def test_methods_are_what_the_papers_compare():
  found = {name: methods.get_method(name)[:2] for name in methods.COMPARED}
  assert found == {
    'full': ('adamw', None),
    'lora': ('adamw', 'lora'),
    'dora': ('adamw', 'dora'),
    'galore': ('galore', None),
    'gradnormlorp': ('gradnormlorp', None),
    'gradnormlorp_adapter': ('galore', 'gradnormlorp'),
  }


def test_unknown_method_names_the_nearest():
  with pytest.raises(ValueError) as error:
    methods.get_method('loar')
  assert str(error.value).startswith(
    "Unknown method 'loar'. Did you mean 'lora'? Methods: full, lora, dora,"
  )
  assert 'all' not in str(error.value)
  with pytest.raises(ValueError) as error:
    methods.get_method('loar', or_all=True)
  assert str(error.value).endswith(
    ', or all for full, lora, dora, galore, gradnormlorp, gradnormlorp_adapter.'
  )
