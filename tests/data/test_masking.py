import types

import numpy as np
import pytest

from gnlorp_jax.data import batches as batches_lib
from gnlorp_jax.data import masking, text

BOS, PAD, EOS, MASK = 0, 1, 2, 4
TOKENIZER = types.SimpleNamespace(
  bos_id=BOS, pad_id=PAD, eos_id=EOS, mask_id=MASK, text_ids=np.arange(5, 1000)
)


def sequence(seed=0, length=126, documents=()):
  text_T = np.random.default_rng(seed).integers(5, 1000, length)
  text_T[list(documents)] = EOS
  return text_T.astype(np.int32)


def many(count=400, rate=0.15, **options):
  mask = masking.Masking(TOKENIZER, rate)
  text_T = sequence(**options)
  rows = [mask(text_T, np.random.default_rng(i)) for i in range(count)]
  return text_T, {k: np.stack([row[k] for row in rows]) for k in rows[0]}


def test_sequence_is_framed_and_changes_only_where_something_is_to_be_guessed():
  text_T, rows = many()
  assert {k: (v.dtype.name, v.shape[1:]) for k, v in rows.items()} == {
    'inputs': ('int32', (128,)),
    'positions': ('int32', (19,)),
    'targets': ('int32', (19,)),
    'weights': ('float32', (19,)),
    'seeds': ('uint32', ()),
  }
  whole_T = np.concatenate([[BOS], text_T, [EOS]])
  for i in range(len(rows['inputs'])):
    counts = rows['weights'][i] > 0
    positions = rows['positions'][i][counts]
    assert (np.diff(positions) > 0).all()
    np.testing.assert_array_equal(
      rows['targets'][i][counts], whole_T[positions]
    )
    changed = np.flatnonzero(rows['inputs'][i] != whole_T)
    assert set(changed) <= set(positions)


def test_shares_are_those_of_roberta():
  text_T, rows = many(2000)
  counts = rows['weights'] > 0
  number = counts.sum(axis=1)
  # 15 % of 126 is 18.9: eighteen or nineteen, on average the share itself.
  assert set(number) == {18, 19}
  assert abs(number.mean() - 18.9) < 4 * np.sqrt(0.09 / 2000)
  inputs = np.take_along_axis(rows['inputs'], rows['positions'], axis=1)[counts]
  targets = rows['targets'][counts]
  total = len(targets)
  masked = np.mean(inputs == MASK)
  kept = np.mean(inputs == targets)
  # A random token is the old one with a chance of 1 in 995.
  for share, expected in ((masked, 0.8), (kept, 0.1 + 0.1 / 995)):
    assert abs(share - expected) < 4 * np.sqrt(expected / total)
  random = inputs[(inputs != MASK) & (inputs != targets)]
  assert random.min() >= 5 and len(np.unique(random)) > 900


def test_every_token_of_the_text_is_to_be_guessed_equally_often():
  _, rows = many(2000)
  counts = rows['weights'] > 0
  often = np.bincount(rows['positions'][counts], minlength=128) / 2000
  assert often[0] == often[127] == 0
  assert np.abs(often[1:-1] - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 2000)


def test_ends_of_documents_are_never_to_be_guessed():
  _, rows = many(documents=range(0, 126, 2))
  counts = rows['weights'] > 0
  assert EOS not in rows['targets'][counts]
  assert set(counts.sum(axis=1)) == {9, 10}  # 15 % of 63 tokens.


def test_sequence_that_fills_a_batch_has_nothing_to_be_guessed():
  row = masking.Masking(TOKENIZER)(
    sequence(), np.random.default_rng(0), counts=False
  )
  assert not row['weights'].any()


@pytest.fixture
def packed(tmp_path):
  """Ten sequences of 30 tokens of text."""
  items = sequence(length=301).astype(np.uint16)
  items.tofile(tmp_path / 'tokens')
  return text.TokenFile(
    path=tmp_path / 'tokens',
    dtype='uint16',
    mode='packed',
    seq_len=None,
    vocab_size=1000,
    eos_id=EOS,
    pad_id=PAD,
    documents=1,
    tokens=301,
    bad_records=0,
    start=0,
    stop=301,
    fingerprint='',
  )


def iterate(file, **options):
  return batches_lib.batches(
    file,
    batch_size=5,
    seq_len=32,
    masking=masking.Masking(TOKENIZER),
    **options,
  )


def text_of(batch):
  """The text as it was, in rows."""
  whole = batch['inputs'].copy()
  for row, positions, targets, weights in zip(
    whole,
    batch['positions'],
    batch['targets'],
    batch['weights'],
    strict=True,
  ):
    row[positions[weights > 0]] = targets[weights > 0]
  return whole[:, 1:-1]


def test_batches_hold_all_text_and_each_epoch_guesses_other_tokens(packed):
  batches = iterate(packed, seed=3)
  epochs = [[next(batches) for _ in range(2)] for _ in range(2)]
  expected = packed.items()[:300].reshape(10, 30)
  chosen = []
  for epoch in epochs:
    rows = np.concatenate([text_of(batch) for batch in epoch])
    order = [int(np.flatnonzero((rows == e).all(axis=1))[0]) for e in expected]
    assert sorted(order) == list(range(10))
    positions = np.concatenate([batch['positions'] for batch in epoch])
    chosen.append(positions[order])
  assert (chosen[0] != chosen[1]).any(axis=1).all()


def test_masks_resume_and_repeat(packed):
  batches = iterate(packed, seed=3)
  taken = [next(batches) for _ in range(4)]
  resumed = iterate(packed, seed=3, prefetch=0)
  resumed.set_state(batches.get_state())
  following, resumed_one = next(batches), next(resumed)
  assert all((following[k] == resumed_one[k]).all() for k in following)
  first = next(iterate(packed, seed=3))
  assert all((taken[0][k] == first[k]).all() for k in first)
  other = next(iterate(packed, seed=4))
  assert (other['inputs'] != first['inputs']).any()


def test_evaluation_guesses_the_same_tokens_every_time(packed):
  def evaluation():
    return list(iterate(packed, shuffle=False, repeat=False))

  for a, b in zip(evaluation(), evaluation(), strict=True):
    assert all((a[k] == b[k]).all() for k in a)


def test_last_batch_of_an_evaluation_is_filled_without_weight(packed):
  batches = batches_lib.batches(
    packed,
    batch_size=4,
    seq_len=32,
    shuffle=False,
    repeat=False,
    masking=masking.Masking(TOKENIZER),
  )
  *_, last = batches
  assert last['weights'].any(axis=1).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: masking.Masking(TOKENIZER, 0.0),
      r'rate=0.0 must lie in \(0, 1\); try 0.15.',
    ),
    (
      lambda: masking.Masking(types.SimpleNamespace(bos_id=None, mask_id=4)),
      'needs a tokenizer with a beginning-of-sequence and a mask token; this '
      'one has bos_id=None, mask_id=4. Use',
    ),
  ],
)
def test_what_cannot_mask_is_an_error(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_masking_needs_a_packed_file(packed):
  with pytest.raises(
    ValueError, match='seq_len of at least 3; got .*seq_len=2'
  ):
    batches_lib.batches(
      packed, batch_size=5, seq_len=2, masking=masking.Masking(TOKENIZER)
    )
