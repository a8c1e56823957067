"""Small sources and quotas."""

import itertools

import numpy as np
import pytest

from gnlorp_jax.training.selection.quotas import quotas, small_sources

GOLDEN = np.load('tests/golden/colm.npz')


def test_small_is_below_the_mean_source():
  assert small_sources(GOLDEN['sizes']) == tuple(GOLDEN['small'])
  assert small_sources([5, 5, 5]) == small_sources([7]) == ()


def test_quotas_are_those_of_the_release():
  cases = [GOLDEN[f'budget/{key}'] for key in ('counts', 'total', 'released')]
  for counts, total, expected in zip(*cases, strict=True):
    np.testing.assert_array_equal(quotas(counts, total), expected)


def test_quotas_add_up_and_exceed_no_source():
  for counts in itertools.product(range(4), repeat=3):
    for total in range(sum(counts) + 1):
      found = quotas(np.array(counts), total)
      assert found.sum() == total
      assert (found <= counts).all()
      assert (found >= 0).all()


def test_all_of_a_pool_is_all_of_every_source():
  # In floats, floor(n / N * N) is too small for these.
  for number in (22, 23, 26, 39):
    counts = np.array([number - 5, 5])
    np.testing.assert_array_equal(quotas(counts, number), counts)


def test_more_picks_than_examples_are_an_error():
  with pytest.raises(ValueError) as error:
    quotas(np.array([2, 1]), 4)
  assert str(error.value) == (
    '4 examples cannot be picked among 3. Ask for 0 to 3.'
  )
