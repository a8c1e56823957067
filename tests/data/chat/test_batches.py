"""Rows against examples: nothing lost, nothing twice, nothing across."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from gnlorp_jax.data import chat
from tests.data.chat import small_chat

PAD, LONGEST = 7, 40


def example(length, number):
  """Ids tell which example they are of, and which place they have there."""
  ids = 1000 * (number + 1) + np.arange(length)
  weights = np.arange(length) % 3 / 2
  return chat.Example(ids.astype(np.int32), weights.astype(np.float32))


EXAMPLES = st.lists(st.integers(1, LONGEST), min_size=1, max_size=12).map(
  lambda lengths: [example(n, i) for i, n in enumerate(lengths)]
)


def options(packing, batch_size=3):
  return dict(
    batch_size=batch_size, max_length=LONGEST, packing=packing, pad_id=PAD
  )


def learnt(batches):
  """What counts: ``(input, target, weight)``, sorted."""
  found = []
  for batch in batches:
    inputs = batch['inputs']
    if 'positions' in batch:
      inputs = np.take_along_axis(inputs, batch['positions'], axis=1)
    at = batch['weights'] > 0
    columns = (inputs, batch['targets'], batch['weights'])
    found += zip(*(values[at].tolist() for values in columns), strict=True)
  return sorted(found)


def expected(examples):
  return sorted(
    (before, after, weight)
    for ids, weights in examples
    for before, after, weight in zip(
      ids[:-1].tolist(), ids[1:].tolist(), weights[1:].tolist(), strict=True
    )
    if weight > 0
  )


@pytest.mark.parametrize('packing', [False, True])
@small_chat.FEW
@hypothesis.given(examples=EXAMPLES, epochs=st.integers(1, 2))
def test_every_token_is_learnt_once_an_epoch(packing, examples, epochs):
  made = chat.TrainingBatches(examples, **options(packing), seed=1)
  taken = [next(made) for _ in range(epochs * made.batches_per_epoch)]
  assert learnt(taken) == sorted(expected(examples) * epochs)
  tried = chat.evaluation_batches(examples, **options(packing))
  assert learnt(tried) == expected(examples)


@pytest.mark.parametrize('packing', [False, True])
@small_chat.FEW
@hypothesis.given(examples=EXAMPLES)
def test_rows_of_processes_joined_are_those_of_one(packing, examples):
  made = options(packing) | {'batch_size': 6}
  origins = [i % 2 for i in range(len(examples))]

  def batches(**parts):
    training = chat.TrainingBatches(
      *(examples,), **made, **parts, with_seeds=True, origins=origins
    )
    count = training.batches_per_epoch
    tried = chat.evaluation_batches(examples, **made, **parts)
    return [*(next(training) for _ in range(count)), *tried]

  parts = [batches(process_index=i, process_count=3) for i in range(3)]
  for whole, *of in zip(batches(), *parts, strict=True):
    for name, rows in whole.items():
      joined = np.concatenate([part[name] for part in of])
      np.testing.assert_array_equal(joined, rows)


def test_processes_that_cannot_share_a_batch_are_an_error():
  with pytest.raises(ValueError) as error:
    chat.TrainingBatches([example(3, 0)], **options(False), process_count=2)
  assert str(error.value) == (
    'batch_size=3 must be a multiple of process_count=2. Use a batch_size that '
    'the processes divide.'
  )


@small_chat.FEW
@hypothesis.given(examples=EXAMPLES)
def test_segments_separate_documents(examples):
  for batch in chat.evaluation_batches(examples, **options(True)):
    for b in range(3):
      ids, segments = batch['inputs'][b], batch['segments'][b]
      document = np.where(ids == PAD, -1, ids // 1000)
      # Equal numbers are equal documents, padding among them.
      np.testing.assert_array_equal(
        segments[:, None] == segments, document[:, None] == document
      )
      assert segments[0] == 1 and set(np.diff(segments)) <= {0, 1}
      # A first token is guessed from nothing.
      first = np.flatnonzero(np.diff(segments))
      positions = batch.get('positions', np.tile(np.arange(LONGEST), (3, 1)))
      at = np.isin(positions[b], first)
      assert not batch['weights'][b, at].any()
      assert (batch['targets'][b, at] == PAD).all()


def test_rows_are_what_they_should_be():
  examples = [example(3, 0), example(4, 1)]
  (batch,) = chat.evaluation_batches(
    examples, batch_size=2, max_length=8, packing=True, pad_id=PAD
  )
  rows = {name: values.tolist() for name, values in batch.items()}
  assert rows == {
    'inputs': [[2000, 2001, 2002, 2003, 1000, 1001, 1002, 7], [7] * 8],
    'targets': [[2001, 2002, 2003, 7, 1001, 1002, 7, 7], [7] * 8],
    'weights': [[0.5, 1, 0, 0, 0.5, 1, 0, 0], [0] * 8],
    'segments': [[1, 1, 1, 1, 2, 2, 2, 3], [1] * 8],
  }
  dtypes = {name: values.dtype for name, values in batch.items()}
  assert dtypes == dict(
    inputs=np.int32, targets=np.int32, weights=np.float32, segments=np.int32
  )
  (batch,) = chat.evaluation_batches(
    examples, batch_size=2, max_length=8, packing=False, pad_id=PAD
  )
  assert batch['inputs'].tolist() == [
    [2000, 2001, 2002, 2003, 7, 7, 7, 7], [1000, 1001, 1002, 7, 7, 7, 7, 7],
  ]  # fmt: skip
  assert 'segments' not in batch


def test_positions_are_those_where_something_is_learned():
  sparse = np.zeros(40, np.float32)
  sparse[[3, 20]] = 0.5, 1
  examples = [chat.Example(np.arange(100, 140, dtype=np.int32), sparse)]
  examples.append(example(8, 1))
  (batch,) = chat.evaluation_batches(
    examples, batch_size=3, max_length=64, packing=False, pad_id=PAD
  )
  assert batch['inputs'].shape == (3, 64)
  # The learned ones, then the first of the others.
  assert batch['positions'].tolist() == [
    [2, 19, 0, 1, *range(3, 15)],
    [0, 1, 3, 4, 6, 2, 5, *range(7, 16)],
    [*range(16)],
  ]
  assert batch['positions'].dtype == np.int32
  assert batch['targets'][0, :4].tolist() == [103, 120, 101, 102]
  assert batch['targets'][1, :5].tolist() == [2001, 2002, 2004, 2005, 2007]
  assert batch['weights'][:, :6].tolist() == [
    [0.5, 1, 0, 0, 0, 0], [0.5, 1, 0.5, 1, 0.5, 0], [0] * 6,
  ]  # fmt: skip


def test_batches_of_one_length_have_one_number_of_positions():
  examples = [
    chat.Example(
      np.zeros(length, np.int32), (np.arange(length) < learned) * 1.0
    )
    for length, learned in [(30, 3), (31, 20), (60, 2), (100, 60), (100, 1)]
  ]
  shapes = set()
  for seed in range(9):
    made = chat.TrainingBatches(
      *(examples,), batch_size=2, max_length=100, packing=False, pad_id=PAD,
      seed=seed,
    )  # fmt: skip
    for _ in range(made.batches_per_epoch):
      batch = next(made)
      shapes.add((batch['inputs'].shape[1], batch['targets'].shape[1]))
  # A row of 64 may stand beside a shorter one of which more is learned; of a
  # row of 32 so much is learned that all positions go along.
  assert shapes <= {(32, 32), (64, 32), (100, 64)} and len(shapes) == 3


def test_padding_that_is_the_end_leaves_the_end_to_be_learnt():
  # Ids of the end are those of padding.
  examples = [chat.Example(np.array([1, PAD]), np.array([0, 1.0]))]
  for packing in (False, True):
    (batch,) = chat.evaluation_batches(examples, **options(packing, 1))
    assert batch['targets'][0, 0] == PAD and batch['weights'][0, 0] == 1
    assert batch['weights'].sum() == 1


def test_rows_of_a_batch_are_of_similar_length():
  examples = [example(n, n) for n in [5] * 6 + [40] * 6 + [100] * 6 + [33]]
  made = chat.TrainingBatches(
    examples, batch_size=6, max_length=100, packing=False, pad_id=PAD
  )
  assert made.batches_per_epoch == 4
  taken = [next(made) for _ in range(8)]
  lengths = [batch['inputs'].shape[1] for batch in taken]
  # The longest shape is the longest example, not the power of two above it.
  assert set(lengths) <= {32, 64, 100}
  assert sum(lengths[:4]) < 4 * 100
  filled = (taken[3]['weights'] > 0).any(axis=1)
  assert filled.sum() == 1  # What fills no batch comes last.
  orders = [[b['inputs'][0, 0] for b in taken[i : i + 4]] for i in (0, 4)]
  assert orders[0] != orders[1]


@pytest.mark.parametrize('packing', [False, True])
def test_another_batch_size_learns_the_same_rows_in_the_same_order(packing):
  """From 4 to 2 to 8, within an epoch and over the end of two."""
  examples = [example(n, n - 1) for n in (5, 9, 3, 12, 7, 4, 11, 6, 8, 10)]

  def made(size, state=None):
    found = chat.TrainingBatches(
      examples, **options(packing, size), seed=2, with_seeds=True
    )
    if state is not None:
      found.set_state(state)
    return found

  def rows(batch):
    """Tokens and seeds of the rows that count."""
    for inputs, seed, weights in zip(
      batch['inputs'], batch['seeds'], batch['weights'], strict=True
    ):
      if weights.any():
        yield inputs[inputs != PAD].tolist(), int(seed)

  whole, state, found = made(4), None, []
  expected = [row for _ in range(12) for row in rows(next(whole))]
  for size, number in ((4, 1), (2, 2), (8, 4)):
    part = made(size, state)
    found += [row for _ in range(number) for row in rows(next(part))]
    state = part.get_state()
  assert state == {'sequences': len(found), 'drawn_for': 4}
  assert found == expected[: len(found)]
  assert len(found) > len({str(tokens) for tokens, _ in found})  # Two epochs.


@pytest.mark.parametrize('packing', [False, True])
@small_chat.FEW
@hypothesis.given(
  examples=EXAMPLES, stop=st.integers(0, 9), seed=st.integers(0, 3)
)
def test_stopped_run_goes_on_as_if_it_had_not(packing, examples, stop, seed):
  def made():
    return chat.TrainingBatches(
      examples, **options(packing, 2), seed=seed, with_seeds=True
    )

  whole, resumed = made(), made()
  for _ in range(stop):
    next(whole)
  state = json.loads(json.dumps(whole.get_state()))
  resumed.set_state(state)
  assert resumed.get_state() == state
  for _ in range(7):
    one, two = next(whole), next(resumed)
    assert one.keys() == two.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], two[name])
      assert one[name].dtype == two[name].dtype
  whole.close()


def test_seeds_differ_within_an_epoch_and_between_epochs():
  examples = [example(5, i) for i in range(7)]
  made = chat.TrainingBatches(examples, **options(False), with_seeds=True)
  taken = [next(made)['seeds'] for _ in range(6)]
  assert taken[0].dtype == np.uint32 and taken[0].shape == (3,)
  assert len(set(np.concatenate(taken).tolist())) == 18
  plain = chat.TrainingBatches(examples, **options(False))
  assert 'seeds' not in next(plain)


def test_examples_that_fit_no_row_are_refused():
  for examples, text in (
    ([], 'There are no examples, so there is no batch of them.'),
    (
      [example(3, 0), example(41, 1)],
      'Examples have 3 to 41 tokens; expected 1 to max_length=40. Prepare them '
      'with that max_length.',
    ),
  ):
    for make in (chat.TrainingBatches, chat.evaluation_batches):
      with pytest.raises(ValueError) as error:
        make(examples, **options(False))
      assert str(error.value) == text
  with pytest.raises(
    ValueError, match='batch_size=0 and max_length=40 must be'
  ):
    chat.evaluation_batches([example(3, 0)], **options(False, 0))


@pytest.mark.parametrize('packing', [False, True])
def test_rows_are_of_one_source_where_sources_are_told_apart(packing):
  lengths = [5, 8, 13, 20, 3, 9, 30, 7]
  origins = [0, 1, 0, 1, 1, 0, 2, 0]
  examples = [example(n, i) for i, n in enumerate(lengths)]
  made = chat.TrainingBatches(examples, origins=origins, **options(packing))
  found = [next(made) for _ in range(made.batches_per_epoch)]
  assert learnt(found) == expected(examples)
  rows = np.zeros(3, int)
  for batch in found:
    for source, ids in zip(batch['source'], batch['inputs'], strict=True):
      members = {int(i) // 1000 - 1 for i in ids if i != PAD}
      assert {origins[i] for i in members} <= {int(source)}
      rows[source] += bool(members)
  assert made.rows_by_source(3) == tuple(rows)
  plain = chat.TrainingBatches(examples, **options(packing))
  assert 'source' not in next(plain)
