import math

import pytest
from jax.extend.core import jaxprs_in_params


def _matmul_flops(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contract, _), _ = equation.params['dimension_numbers']
      lhs = equation.invars[0].aval.shape
      terms = math.prod(lhs[axis] for axis in contract)
      total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
    repeats = equation.params.get('length', 1)
    for inner in jaxprs_in_params(equation.params):
      total += repeats * _matmul_flops(inner)
  return total


@pytest.fixture
def matmul_flops():
  """Counts the floating-point operations of all matrix products in a jaxpr."""
  return _matmul_flops
