import numpy as np
import pytest
import tokenizers

from gnlorp_jax.data import glue
from gnlorp_jax.data import tokenizer as tokenizer_lib

PAD = 1


def examples(*texts):
  return glue.Examples(list(texts), None, [str(i) for i in range(len(texts))])


@pytest.fixture
def backend():
  """One token per letter; `[` and `]` around texts."""
  letters = {letter: i for i, letter in enumerate('?_[]abcdefgh')}
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(letters, unk_token='?')
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  backend.add_special_tokens(['[', ']'])
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single='[ $A ]',
    pair='[ $A ] $B ]',
    special_tokens=[('[', 2), (']', 3)],
  )
  return backend


def decode(backend, rows):
  return [''.join(backend.id_to_token(i) for i in row) for row in rows]


def test_special_tokens_are_the_tokenizers_own(backend):
  rows = glue.encode(examples(('ab',), ('c',)), backend, 8)
  assert decode(backend, rows) == ['[ab]', '[c]']
  assert {row.dtype for row in rows} == {np.dtype(np.int32)}
  rows = glue.encode(examples(('ab', 'c')), backend, 8)
  assert decode(backend, rows) == ['[ab]c]']


def test_the_longer_text_of_a_pair_is_cut_first(backend):
  pairs = [('abcdef', 'gh'), ('a', 'bcdefgh'), ('abcd', 'efgh')]
  rows = decode(backend, glue.encode(examples(*pairs), backend, 7))
  assert rows[:2] == ['[ab]gh]', '[a]bcd]']
  assert rows[2] == '[ab]ef]'
  assert decode(backend, glue.encode(examples(('abcdef',)), backend, 5)) == [
    '[abc]'
  ]


def test_text_cannot_spell_special_tokens(shared):
  folder = shared / 'data' / 'tokenizers' / 'roberta-base'
  backend = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  (row,) = glue.encode(examples(('a </s> b',)), backend, 16)
  assert np.flatnonzero(row == 2).tolist() == [len(row) - 1]
  assert backend.decode(row.tolist()) == 'a </s> b'


def test_the_tokenizer_is_left_as_it_was(backend):
  before = backend.to_str(), backend.encode_special_tokens
  glue.encode(examples(('ab', 'c')), backend, 5)
  assert (backend.to_str(), backend.encode_special_tokens) == before
  assert backend.truncation is None


def test_tokenizer_that_adds_nothing_is_an_error(backend):
  with pytest.raises(ValueError, match='max_length=3 leaves no room.*at leas'):
    glue.encode(examples(('ab', 'c')), backend, 3)
  backend.post_processor = tokenizers.processors.ByteLevel()
  with pytest.raises(ValueError, match='no post-processor for a pair'):
    glue.encode(examples(('ab', 'c')), backend, 8)


def test_roberta_pairs_are_those_of_transformers(shared):
  transformers = pytest.importorskip('transformers')
  folder = shared / 'data' / 'tokenizers' / 'roberta-base'
  pairs = glue.read(
    glue.TASKS['mrpc'], str(shared / 'data' / 'glue'), 'dev'
  ).texts[:50]
  reference = transformers.AutoTokenizer.from_pretrained(str(folder))
  backend = tokenizer_lib.load(str(folder)).backend
  for length in (512, 40):
    expected = reference(
      [a for a, _ in pairs],
      [b for _, b in pairs],
      truncation='longest_first',
      max_length=length,
    )['input_ids']
    rows = glue.encode(examples(*pairs), backend, length)
    assert [row.tolist() for row in rows] == expected
  (row,) = glue.encode(examples(('Hello world',)), backend, 512)
  assert row.tolist() == [0, 31414, 232, 2]


@pytest.fixture(scope='module')
def encoded():
  """Rows whose tokens are the row's number, of lengths as in GLUE."""
  rng = np.random.default_rng(0)
  lengths = np.minimum(5 + rng.lognormal(3.2, 0.6, 1003), 256).astype(int)
  return [np.full(n, 2 + i, np.int32) for i, n in enumerate(lengths)]


def epoch_of(encoded, **changed):
  arguments = {'batch_size': 16, 'pad_id': PAD, 'shuffle': True} | changed
  labels = np.arange(len(encoded), dtype=np.int32) * 10
  return list(glue.batches(encoded, labels, **arguments))


@pytest.mark.parametrize('shuffle', [True, False])
def test_every_example_comes_once_with_its_label(encoded, shuffle):
  epoch = epoch_of(encoded, shuffle=shuffle)
  assert len(epoch) == glue.num_batches(1003, 16) == 63
  seen = []
  for batch in epoch:
    shapes = {key: (v.shape, v.dtype.name) for key, v in batch.items()}
    length = batch['inputs'].shape[1]
    assert shapes == {
      'inputs': ((16, length), 'int32'),
      'labels': ((16,), 'int32'),
      'weights': ((16,), 'float32'),
      'seeds': ((16,), 'uint32'),
      'index': ((16,), 'int32'),
    }
    for tokens, label, weight, index in zip(
      batch['inputs'],
      batch['labels'],
      batch['weights'],
      batch['index'],
      strict=True,
    ):
      assert weight == (index >= 0)
      if index < 0:
        assert (tokens == PAD).all() and label == 0
        continue
      seen.append(index)
      assert label == 10 * index
      np.testing.assert_array_equal(
        tokens[: len(encoded[index])], encoded[index]
      )
      assert (tokens[len(encoded[index]) :] == PAD).all()
  assert sorted(seen) == list(range(1003))
  # Only the last batch is not full.
  assert all(batch['weights'].all() for batch in epoch[:-1])
  assert epoch[-1]['weights'].sum() == 1003 % 16


def test_lengths_are_the_smallest_buckets(encoded):
  epoch = epoch_of(encoded)
  lengths = [batch['inputs'].shape[1] for batch in epoch]
  assert set(lengths) <= {16, 32, 64, 128, 256}
  for batch, length in zip(epoch, lengths, strict=True):
    longest = max(len(encoded[i]) for i in batch['index'] if i >= 0)
    assert longest <= length
    assert length == 16 or longest > length // 2


def test_grouping_by_length_saves_padding(encoded):
  lengths = np.array([len(row) for row in encoded])
  buckets = np.array([16, 32, 64, 128, 256])
  widths = buckets[np.searchsorted(buckets, lengths)]

  def padding(tokens):
    return 1 - lengths.sum() / tokens

  # Each row by itself in its bucket, and batches of rows in random order.
  least = padding(widths.sum())
  order = np.random.default_rng(0).permutation(1003)
  random = padding(
    sum(16 * widths[order[i : i + 16]].max() for i in range(0, 1003, 16))
  )
  assert (least, random) == (
    pytest.approx(0.31, abs=0.02),
    pytest.approx(0.7, abs=0.05),
  )
  # What is left over comes from the steps between buckets.
  for shuffle in (True, False):
    epoch = epoch_of(encoded, shuffle=shuffle)
    assert padding(sum(b['inputs'].size for b in epoch)) < least + 0.06


def test_order_follows_from_seed_and_epoch(encoded):
  def order(**changed):
    epoch = epoch_of(encoded, **changed)
    return np.concatenate([b['index'] for b in epoch]).tolist()

  first = order(seed=3, epoch=1)
  assert order(seed=3, epoch=1) == first
  others = [order(seed=3, epoch=2), order(seed=4, epoch=1)]
  assert first not in others and others[0] != others[1]
  # Which examples share a batch changes too, not only the order of batches.
  batches = [
    {frozenset(b['index'].tolist()) for b in epoch_of(encoded, epoch=e)}
    for e in (0, 1)
  ]
  assert not batches[0] & batches[1]
  assert order(shuffle=False) == order(shuffle=False, seed=1, epoch=5)


def test_batches_are_not_in_order_of_length(encoded):
  lengths = [
    np.mean([len(encoded[i]) for i in b['index']])
    for b in epoch_of(encoded)[:-1]
  ]
  correlation = np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]
  assert abs(correlation) < 0.35


@pytest.mark.parametrize('shuffle', [True, False])
def test_a_run_goes_on_at_any_batch(encoded, shuffle):
  whole = epoch_of(encoded, epoch=2, shuffle=shuffle)
  for start in (0, 1, 40, 63):
    rest = epoch_of(encoded, epoch=2, shuffle=shuffle, start=start)
    assert len(rest) == 63 - start
    for batch, expected in zip(rest, whole[start:], strict=True):
      for key, value in expected.items():
        np.testing.assert_array_equal(batch[key], value)


def test_seeds_are_distinct_and_belong_to_examples(encoded):
  def seeds(**changed):
    epoch = epoch_of(encoded, **changed)
    rows = np.concatenate([batch['seeds'] for batch in epoch])
    index = np.concatenate([batch['index'] for batch in epoch])
    return rows, dict(zip(index.tolist(), rows.tolist(), strict=True))

  rows, by_example = seeds(seed=1, epoch=2)
  assert len(set(rows.tolist())) == len(rows) == 63 * 16
  # About half of the bits differ from one example to the next.
  bits = np.unpackbits(
    np.array([by_example[i] ^ by_example[i + 1] for i in range(1000)])
    .astype(np.uint32)
    .view(np.uint8)
  )
  assert bits.mean() == pytest.approx(0.5, abs=0.02)
  # Whatever the batches are.
  other = seeds(seed=1, epoch=2, batch_size=7)[1]
  assert all(other[i] == by_example[i] for i in range(1003))
  assert seeds(seed=1, epoch=3)[1][0] != by_example[0]
  assert seeds(seed=2, epoch=2)[1][0] != by_example[0]


@pytest.mark.parametrize('shuffle', [True, False])
def test_remainder_can_be_dropped(encoded, shuffle):
  kept = epoch_of(encoded, drop_remainder=True, shuffle=shuffle)
  assert len(kept) == glue.num_batches(1003, 16, drop_remainder=True) == 62
  whole = epoch_of(encoded, shuffle=shuffle)
  for batch, expected in zip(kept, whole[:-1], strict=True):
    np.testing.assert_array_equal(batch['index'], expected['index'])


def test_remainder_is_not_always_of_the_longest(encoded):
  means = []
  for epoch in range(20):
    last = epoch_of(encoded, epoch=epoch)[-1]
    means.append(np.mean([len(encoded[i]) for i in last['index'] if i >= 0]))
  assert np.mean(means) == pytest.approx(
    np.mean([len(row) for row in encoded]), rel=0.15
  )


def test_evaluation_starts_with_the_longest(encoded):
  epoch = epoch_of(encoded, shuffle=False)
  order = np.concatenate([b['index'] for b in epoch])
  lengths = [len(encoded[i]) for i in order if i >= 0]
  assert lengths == sorted(lengths, reverse=True)


def test_outputs_can_be_put_back(encoded):
  outputs = np.zeros(1003)
  for batch in epoch_of(encoded, shuffle=False):
    real = batch['index'] >= 0
    outputs[batch['index'][real]] = batch['inputs'][real, 0]
  np.testing.assert_array_equal(outputs, np.arange(1003) + 2)


def test_labels_may_be_scores_or_absent(encoded):
  scores = np.linspace(0, 5, 1003, dtype=np.float32)
  arguments = {'batch_size': 16, 'pad_id': PAD, 'shuffle': False}
  batch = next(glue.batches(encoded, scores, **arguments))
  assert batch['labels'].dtype == np.float32
  np.testing.assert_array_equal(batch['labels'], scores[batch['index']])
  assert 'labels' not in next(glue.batches(encoded, None, **arguments))


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'batch_size': 0}, 'batch_size=0 must be at least 1'),
    ({'seed': -1}, 'seed=-1'),
    ({'epoch': -1}, 'epoch=-1'),
    ({'start': -1}, 'start=-1'),
    ({'start': 64}, 'start=64 is beyond the 63 batches'),
    ({'buckets': (64, 32)}, r'buckets=\(64, 32\) must be .* ascending'),
    ({'buckets': ()}, r'buckets=\(\) must be'),
    ({'buckets': (32,)}, 'the last bucket 32. Encode with max_length=32'),
    ({'batch_size': 2000, 'drop_remainder': True}, '1003 examples give no bat'),
  ],
)
def test_wrong_arguments_are_errors_before_the_first_batch(
  encoded, changed, message
):
  arguments = {'batch_size': 16, 'pad_id': PAD, 'shuffle': True} | changed
  with pytest.raises(ValueError, match=message):
    glue.batches(encoded, None, **arguments)


def test_labels_must_fit_and_examples_exist(encoded):
  arguments = {'batch_size': 16, 'pad_id': PAD, 'shuffle': True}
  with pytest.raises(ValueError, match='1003 examples have 3 labels'):
    glue.batches(encoded, np.zeros(3), **arguments)
  with pytest.raises(ValueError, match='0 examples give no batch of 16'):
    glue.batches([], None, **arguments)


# Epoch after epoch.


def training_batches(encoded, **changed):
  arguments = {'batch_size': 16, 'pad_id': PAD} | changed
  labels = np.arange(len(encoded), dtype=np.int32) * 10
  return glue.TrainingBatches(encoded, labels, **arguments)


def take(batches, count):
  return [next(batches) for _ in range(count)]


def assert_equal(found, expected):
  for batch, other in zip(found, expected, strict=True):
    assert batch.keys() == other.keys()
    for name, rows in batch.items():
      np.testing.assert_array_equal(rows, other[name])


def test_training_batches_are_those_of_all_epochs_without_index(encoded):
  few = encoded[:50]  # Four batches an epoch.
  found = take(training_batches(few, seed=3), 11)
  epochs = [epoch_of(few, seed=3, epoch=epoch) for epoch in range(3)]
  expected = [batch for epoch in epochs for batch in epoch][:11]
  for batch in expected:
    del batch['index']
  assert_equal(found, expected)
  first, second = found[:4], found[4:8]
  for name in ('labels', 'seeds'):
    rows = [
      np.concatenate([b[name] for b in epoch]) for epoch in (first, second)
    ]
    assert not np.array_equal(*rows)
  rows = [
    np.concatenate([b['labels'][b['weights'] > 0] for b in epoch])
    for epoch in (first, second)
  ]
  assert sorted(rows[0]) == sorted(rows[1]) == [10 * i for i in range(50)]


@pytest.mark.parametrize('number', [0, 1, 3, 4, 5, 8, 9])
def test_training_batches_go_on_from_any_position(encoded, number):
  few = encoded[:50]
  whole = training_batches(few)
  expected = take(whole, 11)
  first = training_batches(few)
  take(first, number)
  position = first.get_state()
  epoch, batch = divmod(number, 4)
  assert position == {'sequences': 50 * epoch + 16 * batch, 'drawn_for': 16}
  later = training_batches(few)
  take(later, 2)  # Whatever was taken before.
  later.set_state(position)
  assert_equal(take(later, 11 - number), expected[number:])
  assert later.get_state() == whole.get_state()


def test_positions_were_numbers_of_batches_before(encoded):
  few = encoded[:50]
  expected = take(training_batches(few), 11)
  for number in (0, 3, 4, 9):
    later = training_batches(few)
    later.set_state({'taken': number})
    assert_equal(take(later, 2), expected[number : number + 2])


def test_rows_of_processes_joined_are_those_of_one(encoded):
  few = encoded[:50]
  whole = take(training_batches(few), 5)  # The fourth is not full.
  parts = [
    take(training_batches(few, process_index=i, process_count=4), 5)
    for i in range(4)
  ]
  joined = [
    {name: np.concatenate([part[name] for part in of]) for name in of[0]}
    for of in zip(*parts, strict=True)
  ]
  assert_equal(joined, whole)


def test_training_batches_know_their_mistakes_at_once(encoded):
  with pytest.raises(ValueError, match='must be a multiple of process_count=5'):
    training_batches(encoded, process_count=5)
  with pytest.raises(ValueError, match='the last bucket 32. Encode with'):
    training_batches(encoded, buckets=(32,))
