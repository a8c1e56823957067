import collections

import numpy as np
import pytest

from gnlorp_jax.data import glue


@pytest.fixture(scope='module')
def demo():
  return glue.generated_task(0, train=2000, dev=301, test=50)


def test_sizes_labels_and_metrics(demo):
  task, splits = demo
  assert task.name == 'demo'
  assert task.labels == ('unacceptable', 'acceptable')
  assert task.metrics == ('matthews_correlation', 'accuracy')
  counts = {k: np.bincount(v.labels).tolist() for k, v in splits.items()}
  assert counts == {'train': [1000] * 2, 'dev': [150, 151], 'test': [25] * 2}
  assert splits['dev'].labels.dtype == np.int32
  assert splits['test'].ids == [str(i) for i in range(50)]


def test_splits_share_no_sentence(demo):
  texts = [text for split in demo[1].values() for text in split.texts]
  assert len(set(texts)) == len(texts) == 2351


def test_sentences_follow_from_the_seed(demo):
  _, again = glue.generated_task(0, train=2000, dev=301, test=50)
  assert again['dev'].texts == demo[1]['dev'].texts
  _, other = glue.generated_task(1, train=2000, dev=301, test=50)
  assert not set(other['dev'].texts) & set(demo[1]['dev'].texts[:20])


def is_acceptable(sentence):
  """A reader of its own: shape of the sentence, then agreement."""
  words = sentence.split()
  adjectives = {'brave', 'sleepy', 'purple', 'tiny', 'famous', 'clumsy'}
  prepositions = {'near', 'behind', 'beside', 'above', 'under'}
  kinds = ''.join(
    {'the': 't', '.': ''}.get(
      w, 'a' if w in adjectives else 'p' if w in prepositions else 'w'
    )
    for w in words
  )
  shapes = {
    f't{a}wpt{b}w{end}'
    for a in ('', 'a')
    for b in ('', 'a')
    for end in ('ww', 'wtw')
  }
  if kinds not in shapes:
    return False
  subject = words[1 + (kinds[1] == 'a')]
  verb = words[len(kinds) - (3 if kinds.endswith('wtw') else 2)]
  # English: one of subject and verb ends in s, never both, never neither.
  return subject.endswith('s') != verb.endswith('s')


def test_labels_are_those_of_english(demo):
  for split in demo[1].values():
    for (sentence,), label in zip(split.texts, split.labels, strict=True):
      assert is_acceptable(sentence) == label, sentence


def test_a_bag_of_words_is_at_chance(demo):
  linear_model = pytest.importorskip('sklearn.linear_model')
  vocabulary = sorted(
    {word for (text,) in demo[1]['train'].texts for word in text.split()}
  )

  def bags(split):
    rows = [collections.Counter(text.split()) for (text,) in split.texts]
    return np.array([[row[word] for word in vocabulary] for row in rows])

  train, dev = demo[1]['train'], demo[1]['dev']
  model = linear_model.LogisticRegression(max_iter=1000)
  model.fit(bags(train), train.labels)
  predictions = model.predict(bags(dev))
  # Three standard deviations of a coin.
  limit = 3 / (2 * np.sqrt(len(dev.texts)))
  assert abs(np.mean(predictions == dev.labels) - 0.5) < limit


def test_tokenizer_knows_every_word(demo):
  backend = glue.generated_tokenizer()
  rows = glue.encode(demo[1]['train'], backend, 32)
  assert min(row.min() for row in rows) == 0
  unknown = backend.token_to_id('<unk>')
  assert not any(unknown in row for row in rows)
  assert all((row[0], row[-1]) == (0, 2) for row in rows)
  assert [backend.id_to_token(i) for i in range(3)] == ['<s>', '<pad>', '</s>']
  assert backend.decode(rows[0].tolist()) == demo[1]['train'].texts[0][0]


@pytest.mark.parametrize('size', ['train', 'dev', 'test'])
def test_sizes_must_be_possible(size):
  sizes = {'train': 4, 'dev': 4, 'test': 4} | {size: 0}
  with pytest.raises(ValueError, match=f'{size}=0.*at least 1'):
    glue.generated_task(0, **sizes)
