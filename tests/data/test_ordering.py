import numpy as np
import pytest

from gnlorp_jax.data import ordering


def test_epoch_has_every_example_once():
  lengths = np.arange(2003) % 97
  rng = np.random.default_rng(0)
  plan = ordering.shuffled(lengths, 10, rng)
  sizes = [len(batch) for batch in plan]
  assert sizes == [10] * 200 + [3]
  found = np.concatenate(plan)
  assert sorted(found) == list(range(2003))
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


def epochs(batch_size, **options):
  return ordering.Epochs(
    np.arange(22) % 7, batch_size, **({'seed': 1} | options)
  )


@pytest.mark.parametrize('cuts', [(3, 2, 9), (2, 5, 6), (0, 11, 4)])
def test_another_batch_size_sees_the_same_examples_in_the_same_order(cuts):
  """Through the end of an epoch too, whose last batch is shorter."""
  whole = epochs(4)
  expected = np.concatenate([whole.take()[0] for _ in range(30)])
  found, offsets, state = [], [], None
  for size, number in zip((4, 2, 8), cuts, strict=True):
    part = epochs(size)
    if state is not None:
      part.set_state(state)
    batches = [part.take() for _ in range(number)]
    assert all(len(index) <= size for index, _ in batches)
    found += [index for index, _ in batches]
    offsets += [(len(index), offset) for index, offset in batches]
    state = part.get_state()
  seen = np.concatenate(found)
  assert state == {'sequences': len(seen), 'drawn_for': 4} and len(seen) > 22
  np.testing.assert_array_equal(seen, expected[: len(seen)])
  # No batch has examples of two epochs: seeds of each are its own.
  of_rows = np.repeat([o for _, o in offsets], [n for n, _ in offsets])
  assert len(set(of_rows[:22])) == 1 and of_rows[22] != of_rows[21]


def test_batches_behind_a_position_are_those_of_the_size_of_now():
  whole = epochs(4)
  for number in range(15):
    assert whole.batches_behind == number
    whole.take()
  # 22 examples are 6 batches of 4, of 8 they are 3.
  half = epochs(8)
  for taken, behind in ((0, 0), (8, 1), (12, 1), (16, 2), (20, 2), (22, 3)):
    half.set_state({'sequences': taken, 'drawn_for': 4})
    assert half.batches_behind == behind
    half.set_state({'sequences': 44 + taken, 'drawn_for': 4})
    assert half.batches_behind == 6 + behind


def test_rows_of_processes_are_all_rows():
  owned = [ordering.own_rows(12, i, 3) for i in range(3)]
  assert owned == [slice(0, 4), slice(4, 8), slice(8, 12)]
  with pytest.raises(ValueError) as error:
    ordering.own_rows(12, 0, 5)
  assert str(error.value) == (
    'batch_size=12 must be a multiple of process_count=5. Use a batch_size '
    'that the processes divide.'
  )
