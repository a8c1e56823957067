import numpy as np
import pytest

from gnlorp_jax.data import ordering


@pytest.mark.parametrize('drop_remainder', [False, True])
def test_epoch_has_every_example_once(drop_remainder):
  lengths = np.arange(2003) % 97
  rng = np.random.default_rng(0)
  plan = ordering.shuffled(lengths, 10, rng, drop_remainder)
  sizes = [len(batch) for batch in plan]
  assert sizes == [10] * 200 + [3] * (not drop_remainder)
  found = np.concatenate(plan)
  assert len(set(found.tolist())) == len(found) and found.max() < 2003
  # Random batches would spread over nearly all lengths.
  spread = [np.ptp(lengths[batch]) for batch in plan[:200]]
  assert np.mean(spread) < 5
  # And batches do not come by length.
  means = np.array([lengths[batch].mean() for batch in plan[:200]])
  assert abs(np.corrcoef(means, np.arange(200))[0, 1]) < 0.3


def test_seeds_are_distinct():
  positions = np.arange(10_000)
  seeds = ordering.mix(np.uint32(2**32 - 5), positions)
  assert seeds.dtype == np.uint32 and len(set(seeds.tolist())) == 10_000
  assert not np.array_equal(seeds, ordering.mix(np.uint32(7), positions))
