import itertools
import json
import threading

import numpy as np
import pytest

from gnlorp_jax.data import batches as batches_lib
from gnlorp_jax.data import text

EOS, PAD = 1, 0


def token_file(path, items, mode):
  items = np.asarray(items, np.uint16)
  items.tofile(path)
  return text.TokenFile(
    path=path,
    dtype='uint16',
    mode=mode,
    seq_len=items.shape[1] if mode == 'padded' else None,
    vocab_size=int(items.max()) + 1,
    eos_id=EOS,
    pad_id=PAD,
    documents=0,
    tokens=items.size,
    bad_records=0,
    start=0,
    stop=len(items),
    fingerprint='',
  )


@pytest.fixture
def packed(tmp_path):
  """Tokens that say where they stand: 10 sequences of 4, and 3 tokens over."""
  return token_file(tmp_path / 'packed', np.arange(100, 144), 'packed')


@pytest.fixture
def padded(tmp_path):
  rows = [
    [7, 8, 9, EOS],
    [7, EOS, PAD, PAD],
    [EOS, PAD, PAD, PAD],
    [6, 5, EOS, PAD],
    [4, 3, 2, EOS],
  ]
  return token_file(tmp_path / 'padded', rows, 'padded')


def iterate(file, batch_size=3, seq_len=4, **options):
  return batches_lib.batches(
    file, batch_size=batch_size, seq_len=seq_len, **options
  )


def take(iterator, count=None):
  return list(itertools.islice(iterator, count))


def assert_same(actual, expected):
  assert len(actual) == len(expected)
  for a, b in zip(actual, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def firsts(taken):
  return [int(token) for batch in taken for token in batch['inputs'][:, 0]]


def test_packed_targets_are_the_next_tokens(packed):
  first, second = take(iterate(packed, shuffle=False), 2)
  starts = 100 + 4 * np.arange(3)[:, None]
  np.testing.assert_array_equal(first['inputs'], starts + np.arange(4))
  np.testing.assert_array_equal(first['targets'], starts + np.arange(1, 5))
  np.testing.assert_array_equal(first['weights'], np.ones((3, 4)))
  np.testing.assert_array_equal(second['inputs'], first['inputs'] + 12)
  assert {k: v.dtype for k, v in first.items()} == {
    'inputs': np.int32,
    'targets': np.int32,
    'weights': np.float32,
  }


def test_padded_weights_count_the_targets_of_the_document(padded):
  (batch,) = take(iterate(padded, batch_size=5, shuffle=False), 1)
  np.testing.assert_array_equal(batch['inputs'], padded.items())
  np.testing.assert_array_equal(
    batch['targets'],
    [
      [8, 9, EOS, PAD],
      [EOS, PAD, PAD, PAD],
      [PAD, PAD, PAD, PAD],
      [5, EOS, PAD, PAD],
      [3, 2, EOS, PAD],
    ],
  )
  np.testing.assert_array_equal(
    batch['weights'],
    [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]],
  )


def test_padded_weights_are_right_when_padding_is_end_of_sequence(tmp_path):
  file = token_file(
    tmp_path / 'f', [[7, 8, EOS, EOS], [7, EOS, 1, 1]], 'padded'
  )
  (batch,) = take(iterate(file, batch_size=2, shuffle=False), 1)
  np.testing.assert_array_equal(batch['weights'], [[1, 1, 0, 0], [1, 0, 0, 0]])


@pytest.fixture
def documents(tmp_path):
  """Packed documents of 0 to 6 words; words are 2 and up."""
  rng = np.random.default_rng(0)
  items = []
  for length in rng.integers(0, 7, 40):
    items += [*rng.integers(2, 90, length), EOS]
  return token_file(tmp_path / 'documents', items, 'packed')


def test_segments_number_the_documents_of_a_row(tmp_path):
  items = [7, 8, EOS, 9, EOS, EOS, 6, 5, 4, 3, 2, EOS, 9]
  file = token_file(tmp_path / 'f', items, 'packed')
  (batch,) = take(
    iterate(file, batch_size=2, seq_len=6, shuffle=False, document_mask=True),
    1,
  )
  np.testing.assert_array_equal(
    batch['segments'], [[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 1, 1]]
  )
  # Nothing tells what follows the end of a document.
  np.testing.assert_array_equal(
    batch['weights'], [[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
  )
  assert batch['segments'].dtype == np.int32
  assert batch['weights'].dtype == np.float32


def test_masked_documents_are_the_same_text_in_the_same_order(documents):
  plain = take(iterate(documents, seed=3), 20)
  masked = take(iterate(documents, seed=3, document_mask=True), 20)
  for a, b in zip(plain, masked, strict=True):
    np.testing.assert_array_equal(a['inputs'], b['inputs'])
    np.testing.assert_array_equal(a['targets'], b['targets'])
    for row, numbers in zip(b['inputs'], b['segments'], strict=True):
      expected, number = [], 1
      for token in row:
        expected.append(number)
        number += token == EOS
      assert numbers.tolist() == expected


@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_evaluation_of_masked_documents_counts_all_but_their_first_tokens(
  documents, batch_size
):
  taken = take(
    iterate(
      documents,
      batch_size=batch_size,
      repeat=False,
      shuffle=False,
      document_mask=True,
    )
  )
  targets = np.concatenate([b['targets'][b['weights'] > 0] for b in taken])
  items = documents.items()
  items = items[: (len(items) - 1) // 4 * 4 + 1]
  np.testing.assert_array_equal(targets, items[1:][items[:-1] != EOS])


def test_what_has_no_documents_to_keep_apart_is_an_error(padded, packed):
  def message(file, **options):
    with pytest.raises(ValueError) as error:
      iterate(file, document_mask=True, **options)
    return str(error.value)

  text = (
    'document_mask=True needs a packed token file and no tokens to be guessed '
    'within it; got mode={}, {}masking. A padded row is one document already.'
  )
  assert message(padded) == text.format("'padded'", 'no ')
  # What masks is not asked.
  assert message(packed, masking=object()) == text.format("'packed'", '')


def test_every_epoch_visits_every_sequence_in_its_own_order(packed):
  # 10 sequences in batches of 3: the fourth batch reaches into epoch two.
  order = firsts(take(iterate(packed, seed=1), 10))
  epochs = [order[i : i + 10] for i in (0, 10, 20)]
  every = list(range(100, 140, 4))
  assert [sorted(epoch) for epoch in epochs] == [every] * 3
  assert len({tuple(epoch) for epoch in epochs} | {tuple(every)}) == 4


def test_order_depends_on_the_seed_alone(packed):
  expected = take(iterate(packed, seed=5), 8)
  assert_same(take(iterate(packed, seed=5, prefetch=0), 8), expected)
  assert_same(take(iterate(packed, seed=5, prefetch=7), 8), expected)
  assert firsts(take(iterate(packed, seed=6), 8)) != firsts(expected)


@pytest.mark.parametrize('prefetch', [0, 2, 5])
@pytest.mark.parametrize('mode', ['packed', 'padded'])
def test_resumed_run_sees_the_batches_of_an_uninterrupted_one(
  request, mode, prefetch
):
  file = request.getfixturevalue(mode)
  expected = take(iterate(file, seed=3, prefetch=prefetch), 16)
  # Up to beyond an epoch (3.3 or 1.7 batches) before and after the cut.
  for cut in range(8):
    interrupted = iterate(file, seed=3, prefetch=prefetch)
    take(interrupted, cut)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = iterate(file, seed=3, prefetch=prefetch)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 8), expected[cut : cut + 8])


def test_state_may_be_set_on_a_running_iterator(packed):
  iterator = iterate(packed, seed=3)
  take(iterator, 2)
  state = iterator.get_state()
  expected = take(iterator, 5)
  iterator.set_state(state)
  assert_same(take(iterator, 5), expected)


def test_another_batch_size_sees_the_same_sequences_in_the_same_order(packed):
  """From 4 to 2 to 8, within an epoch and over its end; seeds too."""
  options = {'seed': 3, 'prefetch': 0, 'with_seeds': True}
  rows = {'inputs': [], 'seeds': []}
  state = {'sequences': 0}
  # An epoch has fewer rows than the first two parts together.
  for size, number in ((4, 3), (2, 5), (8, 4)):
    part = iterate(packed, batch_size=size, **options)
    part.set_state(state)
    for batch in take(part, number):
      for name, found in rows.items():
        found += list(batch[name])
    state = json.loads(json.dumps(part.get_state()))
  assert state == {'sequences': 12 + 10 + 32}
  whole = take(iterate(packed, batch_size=9, **options), 6)
  for name, found in rows.items():
    expected = np.concatenate([batch[name] for batch in whole])
    np.testing.assert_array_equal(np.stack(found), expected)


@pytest.mark.parametrize('repeat', [True, False])
@pytest.mark.parametrize('count', [2, 3, 6])
def test_processes_share_each_batch(packed, count, repeat):
  options = {'batch_size': 6, 'seed': 2, 'repeat': repeat}
  limit = 7 if repeat else None
  expected = take(iterate(packed, **options), limit)
  shares = [
    take(
      iterate(packed, process_index=i, process_count=count, **options), limit
    )
    for i in range(count)
  ]
  joined = [
    {key: np.concatenate([share[key] for share in step]) for key in step[0]}
    for step in zip(*shares, strict=True)
  ]
  assert len(shares[0][0]['inputs']) == 6 // count
  assert_same(joined, expected)


def test_state_survives_a_change_of_process_count(packed):
  single = iterate(packed, batch_size=4, seed=2)
  take(single, 3)
  half = iterate(packed, batch_size=4, seed=2, process_index=1, process_count=2)
  half.set_state(single.get_state())
  expected = {key: value[2:] for key, value in next(single).items()}
  assert_same([next(half)], [expected])


@pytest.mark.parametrize('mode', ['packed', 'padded'])
@pytest.mark.parametrize('batch_size', [1, 3, 5, 64])
def test_evaluation_counts_every_target_once(request, mode, batch_size):
  file = request.getfixturevalue(mode)
  taken = take(
    iterate(file, batch_size=batch_size, repeat=False, shuffle=False)
  )
  assert {batch['inputs'].shape for batch in taken} == {(batch_size, 4)}
  targets = np.concatenate([b['targets'][b['weights'] > 0] for b in taken])
  if mode == 'packed':
    expected = np.arange(101, 141)
  else:
    expected = [8, 9, EOS, EOS, 5, EOS, 3, 2, EOS]
  np.testing.assert_array_equal(targets, expected)
  assert max(int(batch['targets'].max()) for batch in taken) < file.vocab_size


def test_parts_of_a_split_share_no_token(packed):
  train, validation = text.split(packed, 0.3)
  seen = [
    {
      int(token)
      for batch in take(iterate(part, batch_size=1, repeat=False))
      for key in ('inputs', 'targets')
      for token in batch[key].ravel()
    }
    for part in (train, validation)
  ]
  assert not seen[0] & seen[1]
  assert min(seen[1]) == validation.start + 100
  assert (len(seen[0]), len(seen[1])) == (29, 13)


def test_closed_iterator_ends_its_thread(packed):
  iterator = iterate(packed)
  next(iterator)
  alive = [t for t in threading.enumerate() if 'grain' in t.name]
  assert alive
  iterator.close()
  for thread in alive:
    thread.join(timeout=10)
  assert not any(thread.is_alive() for thread in alive)


def test_too_little_data_is_an_error_with_the_numbers(packed, padded):
  take(iterate(packed, batch_size=10), 1)
  with pytest.raises(ValueError) as error:
    iterate(packed, batch_size=11)
  assert str(error.value) == (
    'The data has 44 tokens, which is less than one batch: it needs '
    '11 x 4 + 1. Use more text, or a smaller batch_size or seq_len.'
  )
  with pytest.raises(ValueError) as error:
    iterate(padded, batch_size=6)
  assert str(error.value) == (
    'The data has 5 documents, which is less than one batch: it needs 6. Use '
    "more text, or a smaller batch_size, or mode 'packed'."
  )
  # An evaluation fills its batches up, but one sequence there must be.
  take(iterate(packed, seq_len=43, repeat=False))
  with pytest.raises(ValueError, match='44 tokens.*needs 1 x 44 \\+ 1'):
    iterate(packed, seq_len=44, repeat=False)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'batch_size': 0},
      'batch_size=0, seq_len=4 and process_count=1 must be at least 1, and '
      'prefetch=2 at least 0.',
    ),
    (
      {'prefetch': -1},
      'batch_size=3, seq_len=4 and process_count=1 must be at least 1, and '
      'prefetch=-1 at least 0.',
    ),
    (
      {'process_index': 3, 'process_count': 3},
      'process_index=3 must be in [0, process_count=3).',
    ),
    (
      {'process_count': 2},
      'batch_size=3 must be a multiple of process_count=2. Use a batch_size '
      'that the processes divide.',
    ),
    (
      {'seq_len': 5},
      'seq_len=5 differs from the padded token file, whose rows have 4 tokens. '
      'Use that length or prepare it anew.',
    ),
  ],
)
def test_unfit_sizes_are_errors(padded, options, message):
  with pytest.raises(ValueError) as error:
    iterate(padded, **options)
  assert str(error.value) == message
