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


def epoch_of(encoded, epoch=0, **changed):
  """The batches of an epoch of training; labels are places, times 10."""
  arguments = {'batch_size': 16, 'pad_id': PAD} | changed
  labels = np.arange(len(encoded), dtype=np.int32) * 10
  batches = glue.TrainingBatches(encoded, labels, **arguments)
  size = arguments['batch_size']
  position = {'sequences': epoch * len(encoded), 'drawn_for': size}
  batches.set_state(position)
  return take(batches, glue.num_batches(len(encoded), size))


def evaluation_of(encoded, **changed):
  arguments = {'batch_size': 16, 'pad_id': PAD} | changed
  return list(glue.evaluation_batches(encoded, **arguments))


def take(batches, count):
  return [next(batches) for _ in range(count)]


def index_of(batch):
  """The places of a batch's examples, -1 for rows that fill it up."""
  if 'index' in batch:
    return batch['index']
  return np.where(batch['weights'] > 0, batch['labels'] // 10, -1)


MAKERS = pytest.mark.parametrize('make', [epoch_of, evaluation_of])


@MAKERS
def test_every_example_comes_once(encoded, make):
  epoch = make(encoded)
  assert len(epoch) == glue.num_batches(1003, 16) == 63
  seen = []
  for batch in epoch:
    for tokens, index in zip(batch['inputs'], index_of(batch), strict=True):
      if index < 0:
        assert (tokens == PAD).all()
        continue
      seen.append(index)
      np.testing.assert_array_equal(
        tokens[: len(encoded[index])], encoded[index]
      )
      assert (tokens[len(encoded[index]) :] == PAD).all()
  assert sorted(seen) == list(range(1003))
  # Only the last batch is not full.
  assert all((index_of(batch) >= 0).all() for batch in epoch[:-1])
  assert np.sum(index_of(epoch[-1]) >= 0) == 1003 % 16


def test_batches_hold_what_they_say(encoded):
  def kinds(batch):
    return {key: (v.shape, v.dtype.name) for key, v in batch.items()}

  for batch in epoch_of(encoded):
    assert kinds(batch) == {
      'inputs': ((16, batch['inputs'].shape[1]), 'int32'),
      'labels': ((16,), 'int32'),
      'weights': ((16,), 'float32'),
      'seeds': ((16,), 'uint32'),
    }
  assert batch['labels'][batch['weights'] == 0].tolist() == [0] * 5
  for batch in evaluation_of(encoded):
    assert kinds(batch) == {
      'inputs': ((16, batch['inputs'].shape[1]), 'int32'),
      'index': ((16,), 'int32'),
    }


@MAKERS
def test_lengths_are_the_smallest_buckets(encoded, make):
  epoch = make(encoded)
  lengths = [batch['inputs'].shape[1] for batch in epoch]
  assert set(lengths) <= {16, 32, 64, 128, 256}
  for batch, length in zip(epoch, lengths, strict=True):
    longest = max(len(encoded[i]) for i in index_of(batch) if i >= 0)
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
  for epoch in (epoch_of(encoded), evaluation_of(encoded)):
    assert padding(sum(b['inputs'].size for b in epoch)) < least + 0.06


def test_order_follows_from_seed_and_epoch(encoded):
  def order(**changed):
    epoch = epoch_of(encoded, **changed)
    return np.concatenate([index_of(b) for b in epoch]).tolist()

  first = order(seed=3, epoch=1)
  assert order(seed=3, epoch=1) == first
  others = [order(seed=3, epoch=2), order(seed=4, epoch=1)]
  assert first not in others and others[0] != others[1]
  # Which examples share a batch changes too, not only the order of batches.
  batches = [
    {frozenset(index_of(b).tolist()) for b in epoch_of(encoded, epoch=e)}
    for e in (0, 1)
  ]
  assert not batches[0] & batches[1]


def test_batches_are_not_in_order_of_length(encoded):
  lengths = [
    np.mean([len(encoded[i]) for i in index_of(b)])
    for b in epoch_of(encoded)[:-1]
  ]
  correlation = np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]
  assert abs(correlation) < 0.35


def test_seeds_are_distinct_and_belong_to_examples(encoded):
  def seeds(**changed):
    epoch = epoch_of(encoded, **changed)
    rows = np.concatenate([batch['seeds'] for batch in epoch])
    index = np.concatenate([index_of(batch) for batch in epoch])
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


def test_remainder_is_not_always_of_the_longest(encoded):
  means = []
  for epoch in range(20):
    last = index_of(epoch_of(encoded, epoch=epoch)[-1])
    means.append(np.mean([len(encoded[i]) for i in last if i >= 0]))
  assert np.mean(means) == pytest.approx(
    np.mean([len(row) for row in encoded]), rel=0.15
  )


def test_evaluation_starts_with_the_longest(encoded):
  order = np.concatenate([b['index'] for b in evaluation_of(encoded)])
  lengths = [len(encoded[i]) for i in order if i >= 0]
  assert lengths == sorted(lengths, reverse=True)


def test_outputs_can_be_put_back(encoded):
  outputs = np.zeros(1003)
  for batch in evaluation_of(encoded):
    real = batch['index'] >= 0
    outputs[batch['index'][real]] = batch['inputs'][real, 0]
  np.testing.assert_array_equal(outputs, np.arange(1003) + 2)


def test_labels_may_be_scores(encoded):
  scores = np.linspace(0, 5, 1003, dtype=np.float32)
  batch = next(glue.TrainingBatches(encoded, scores, batch_size=16, pad_id=PAD))
  assert batch['labels'].dtype == np.float32
  np.testing.assert_array_equal(
    batch['labels'], scores[batch['inputs'][:, 0] - 2]
  )


@MAKERS
@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'batch_size': 0}, 'batch_size=0 must be at least 1'),
    ({'buckets': (64, 32)}, r'buckets=\(64, 32\) must be .* ascending'),
    ({'buckets': ()}, r'buckets=\(\) must be'),
    ({'buckets': (32,)}, 'the last bucket 32. Encode with max_length=32'),
    (
      {'process_count': 5},
      'batch_size=16 must be a multiple of process_count=5',
    ),
  ],
)
def test_wrong_arguments_are_errors_before_the_first_batch(
  encoded, make, changed, message
):
  with pytest.raises(ValueError, match=message):
    make(encoded, **changed)


def test_examples_must_exist_and_have_labels(encoded):
  with pytest.raises(ValueError, match='0 examples give no batch of 16'):
    evaluation_of([])
  with pytest.raises(ValueError, match='1003 examples have 3 labels; give one'):
    glue.TrainingBatches(encoded, np.zeros(3), batch_size=16, pad_id=PAD)
  with pytest.raises(ValueError, match='seed=-1 must be at least 0'):
    epoch_of(encoded, seed=-1)


# Epoch after epoch.


def training_batches(encoded, **changed):
  arguments = {'batch_size': 16, 'pad_id': PAD} | changed
  labels = np.arange(len(encoded), dtype=np.int32) * 10
  return glue.TrainingBatches(encoded, labels, **arguments)


def assert_equal(found, expected):
  for batch, other in zip(found, expected, strict=True):
    assert batch.keys() == other.keys()
    for name, rows in batch.items():
      np.testing.assert_array_equal(rows, other[name])


def test_every_epoch_has_an_order_and_seeds_of_its_own(encoded):
  few = encoded[:50]  # Four batches an epoch.
  found = take(training_batches(few, seed=3), 11)
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
  assert_equal(found[8:], epoch_of(few, seed=3, epoch=2)[:3])


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


def test_rows_of_processes_joined_in_an_evaluation_are_those_of_one(encoded):
  few = encoded[:50]
  parts = [
    evaluation_of(few, process_index=i, process_count=4) for i in range(4)
  ]
  for whole, *of in zip(evaluation_of(few), *parts, strict=True):
    joined = np.concatenate([part['inputs'] for part in of])
    np.testing.assert_array_equal(joined, whole['inputs'])
    for part in of:  # Outputs are gathered: every process puts all back.
      np.testing.assert_array_equal(part['index'], whole['index'])
