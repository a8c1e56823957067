"""Intervals of numbers: what is in them, and that NaN is in none."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.optim.parts.checks import check_interval


@pytest.mark.parametrize(
  ('value', 'interval'),
  [
    (0, '[0, 1)'),
    (1, '[0, 1]'),
    (1e300, '(0, inf)'),
    (-1e300, '(-inf, inf)'),
    (np.float32(0.5), '(0, 1)'),
    (None, '[0, 1]'),
    (lambda count: count, '[0, 1]'),
  ],
)
def test_numbers_inside_and_what_is_none_pass(value, interval):
  check_interval('x', value, interval)


@pytest.mark.parametrize(
  ('value', 'interval'),
  [(1, '[0, 1)'), (0, '(0, 1)'), (2, '[0, 1]'), (-1e-9, '[0, inf)')],
)
def test_numbers_outside_are_refused_with_the_rule(value, interval):
  with pytest.raises(ValueError) as error:
    check_interval('b1', value, interval, 'Use 0.9.')
  assert str(error.value) == f'b1 must be in {interval}, got {value}. Use 0.9.'


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('interval', ['[0, inf)', '(-inf, inf)', '[0, inf]'])
@pytest.mark.parametrize('kind', [float, np.float32])
def test_what_is_not_finite_is_in_no_interval(value, interval, kind):
  with pytest.raises(ValueError) as error:
    check_interval('eps', kind(value), interval)
  assert str(error.value) == (
    f'eps must be a finite number in {interval}, got {value}.'
  )


def test_traced_numbers_pass():
  def function(x):
    check_interval('x', x, '[0, 1]')
    return x

  assert jax.jit(function)(jnp.float32(7)) == 7
