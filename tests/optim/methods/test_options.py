"""Shared keywords: filled in, checked, and told by `help`."""

import inspect
import math
import pydoc
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim import methods

every_alias = pytest.mark.parametrize('name', methods.names())


@every_alias
def test_help_tells_every_option_with_its_default(name):
  alias = methods.get(name)
  text = pydoc.render_doc(alias, renderer=pydoc.plaintext)
  section = text.partition('Args:\n')[2]
  indent = re.match(' +', section)[0]
  explained = re.findall(rf'^{indent}(\w+): \S', section, re.MULTILINE)
  parameters = inspect.signature(alias).parameters
  assert explained[: len(parameters)] == list(parameters)
  kinds = {p.kind for p in parameters.values()}
  assert inspect.Parameter.VAR_KEYWORD not in kinds
  assert inspect.unwrap(alias) is alias  # As those do who write references.
  assert not re.search(r': As in `', text)
  for parameter in list(parameters.values())[1:]:
    assert parameter.default is not inspect.Parameter.empty


@every_alias
def test_no_number_may_be_other_than_finite(name):
  alias = methods.get(name)
  checked = {'learning_rate'} | {
    argument
    for argument, parameter in inspect.signature(alias).parameters.items()
    if isinstance(parameter.default, float)
  }
  for argument in checked:
    for value in (math.nan, math.inf):
      with pytest.raises(ValueError) as error:
        alias(**{'learning_rate': 1e-3, argument: value})
      assert str(error.value).startswith(f'{argument} must be a finite number')


def test_defaults_are_those_of_the_method():
  def defaults(name):
    parameters = inspect.signature(methods.get(name)).parameters
    return {key: p.default for key, p in parameters.items()}

  galore, gradnormlorp = defaults('galore'), defaults('gradnormlorp')
  assert (galore['eps'], galore['eps_mode']) == (1e-6, 'hf')
  assert (galore['decay_order'], gradnormlorp['decay_order']) == (
    'after',
    'before',
  )
  assert galore['moments_on_refresh'] == 'keep'
  assert defaults('q_galore')['basis_bits'] == 4
  assert defaults('q_galore')['moment_bits'] == 8
  assert defaults('apollo_mini')['projection'] == 'random'
  assert (defaults('ldadam')['b1'], defaults('ldadam')['b2']) == (0.908, 0.99)


@pytest.mark.parametrize(
  ('call', 'text'),
  [
    (
      lambda: optim.galore(1e-2, ranks=4),
      "galore() got an unexpected keyword argument 'ranks'",
    ),
    (
      lambda: optim.apollo(),
      "apollo() missing a required argument: 'learning_rate'",
    ),
    (
      lambda: optim.adamw(1e-2, kernel_axes=()),
      "adamw() got an unexpected keyword argument 'kernel_axes'",
    ),
  ],
)
def test_wrong_arguments_are_named(call, text):
  with pytest.raises(TypeError) as error:
    call()
  assert str(error.value) == text


@pytest.mark.parametrize(
  ('name', 'static'),
  [
    ('adamw', ('moment_bits',)),
    ('galore', ('rank', 'update_proj_gap', 'basis_bits', 'moment_bits')),
    ('vlorp', ('rank', 'update_proj_gap', 'moment_bits')),
    ('ldadam', ('rank', 'error_bits', 'moment_bits')),
  ],
)
def test_what_must_be_static_is_named_at_once(name, static):
  alias = methods.get(name)
  with pytest.raises(ValueError) as error:
    optax.inject_hyperparams(alias)(1e-2).init({'kernel': jnp.ones((8, 8))})
  found = re.search(r'static_args=\((.*)\)\.', str(error.value))[1]
  assert set(re.findall(r"'(\w+)'", found)) == set(static)
  # That is enough.
  tx = optax.inject_hyperparams(alias, static_args=static)(1e-2)
  params = {'kernel': jnp.ones((128, 128))}
  jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
