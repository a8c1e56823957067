"""What becomes of conversations: the report counts every record."""

import dataclasses

import numpy as np
import pytest

from gnlorp_jax.data import chat
from tests.data.chat import small_chat


@pytest.fixture(scope='module')
def template():
  return chat.load_template('none', small_chat.tokenizer())


def exchange(question, answer, weight=None):
  messages = (
    chat.Message('user', question),
    chat.Message('assistant', answer, weight),
  )
  return chat.Conversation(messages, where='f:1')


def source(name, conversations, weight=1.0, **skipped):
  return chat.Source(name, weight, tuple(conversations), skipped)


def numbered(name, count, weight=1.0):
  return source(
    name, [exchange(f'{name}{i}', 'a') for i in range(count)], weight
  )


def texts(examples):
  """Questions, which have four letters."""
  return [
    bytes(e.ids[:-2].astype(np.uint8).tolist()).decode() for e in examples
  ]


def test_every_record_is_accounted_for(template):
  conversations = [
    exchange('q', 'a'),
    exchange('<|end|>', 'a'),
    exchange('q', 'a', 0.0),
    exchange('q' * 10, 'a'),
    exchange('q', 'a' * 10),
    chat.Conversation(
      exchange('q', 'a').messages, tools=({'function': {'name': 'f'}},)
    ),
  ]
  made = chat.prepare(
    [source('s', conversations, bad=2)],
    template,
    max_length=6,
    overflow='truncate',
  )
  assert dataclasses.asdict(made.report['s']) == {
    'read': 8,
    'skipped': {'bad': 2},
    'dropped': {
      'spells a control token': 1,
      # One says so itself, the other loses its answer.
      'nothing trained': 2,
      'tools unknown to the template': 1,
    },
    'truncated': 1,
    'validation': 0,
    'examples': 2,
    'tokens': 3 + 6,
    'trained_tokens': 2 + 5,
  }
  assert [e.ids.tolist() for e in made.training] == [
    small_chat.ids('qa', small_chat.END), small_chat.ids('qaaaaa'),
  ]  # fmt: skip


def test_long_examples_are_cut_dropped_or_refused(template):
  (long,) = sources = [
    source('s', [exchange('q', 'a' * 9), exchange('q', 'a')])
  ]
  del long
  dropped = chat.prepare(sources, template, max_length=5, overflow='drop')
  assert dropped.report['s'].dropped == {'too long': 1}
  assert len(dropped.training) == 1
  with pytest.raises(ValueError) as error:
    chat.prepare(sources, template, max_length=5, overflow='raise')
  assert str(error.value) == (
    'f:1 has 11 tokens, more than max_length=5. Use a larger max_length, or '
    "overflow='truncate' or 'drop'."
  )
  long = [source('s', [exchange('q', 'long ' * 20_000)])]
  made = chat.prepare(long, template, max_length=64)
  assert len(made.training[0].ids) == 64


@pytest.mark.parametrize(
  'val_size, count', [(0.25, 3), (5, 5), (5.0, 5), (0, 0)]
)
def test_examples_are_held_out_once(template, val_size, count):
  sources = [numbered('ab', 4), numbered('cd', 6, 3)]
  made = chat.prepare(
    sources, template, max_length=9, val_size=val_size, seed=1
  )
  held_out = texts(made.validation)
  wanted = [c.messages[0].content for c in made.validation_conversations]
  # Questions of three letters, as these are, stand before 'a' and the end.
  assert held_out == wanted
  # 0.25 of ten is between two and three.
  assert len(held_out) in (count, count - (val_size == 0.25))
  assert len(set(held_out)) == len(held_out)
  trained = texts(made.training)
  assert not set(held_out) & set(trained)
  assert len(set(trained)) == 10 - len(held_out)
  assert {trained.count(t) for t in trained if t.startswith('cd')} == {3}
  counts = made.report
  assert counts['ab'].validation + counts['cd'].validation == len(held_out)
  assert counts['cd'].examples == 3 * (6 - counts['cd'].validation)
  tokens = sum(c.tokens for c in counts.values())
  assert tokens == sum(len(e.ids) for e in made.training)


def test_weights_repeat_and_thin_out(template):
  sources = [numbered('aa', 8, 0.5), numbered('bb', 4, 1.25)]
  made = chat.prepare(sources, template, max_length=9, seed=0)
  found = texts(made.training)
  first = [t for t in found if t.startswith('aa')]
  assert len(first) == len(set(first)) == 4
  second = [t for t in found if t.startswith('bb')]
  assert len(second) == 5 and len(set(second)) == 4
  assert made.report['aa'].examples == 4


def test_seed_decides_and_fingerprint_tells(template):
  sources = [numbered('aa', 30, 0.5), numbered('bb', 9)]

  def made(**options):
    return chat.prepare(sources, template, **{'max_length': 9, **options})

  same = made(val_size=0.2, seed=3)
  again = made(val_size=0.2, seed=3)
  assert texts(same.training) == texts(again.training)
  assert texts(same.validation) == texts(again.validation)
  assert same.fingerprint == again.fingerprint
  others = [
    made(val_size=0.2, seed=4),
    made(seed=3),
    made(seed=3, limit=20),
    made(seed=3, train_on='all'),
    made(seed=3, max_length=4),
  ]
  prints = {other.fingerprint for other in (same, *others)}
  assert len(prints) == 6
  # It is of what is trained on, and does not depend on what is held out.
  tried = made(seed=3, validation=[numbered('vv', 2)])
  more = made(seed=3, validation=[numbered('vv', 3)])
  assert tried.fingerprint == more.fingerprint == others[1].fingerprint


@pytest.mark.parametrize(
  'limit, counts',
  [(1, [0, 0, 1]), (5, [1, 2, 2]), (9, [2, 3, 4]), (20, [4, 6, 10])],
)
def test_limit_takes_the_first_of_each_source(template, limit, counts):
  # 4, 6 and 10 examples: of 9, exact shares are 1.8, 2.7 and 4.5; of 5, 1,
  # 1.5 and 2.5, where the first of equals is rounded up.
  sources = [numbered('aa', 4), numbered('bb', 3, 2), numbered('cc', 20, 0.5)]
  whole = texts(chat.prepare(sources, template, max_length=9).training)
  made = chat.prepare(sources, template, max_length=9, limit=limit)
  expected = []
  for name, count in zip(('aa', 'bb', 'cc'), counts, strict=True):
    expected += [t for t in whole if t.startswith(name)][:count]
    report = made.report[name]
    assert (report.examples, report.trained_tokens) == (count, 2 * count)
  assert texts(made.training) == expected
  tokens = sum(c.tokens for c in made.report.values())
  assert tokens == sum(len(e.ids) for e in made.training)


def test_limit_leaves_validation_alone(template):
  sources = [numbered('aa', 9)]
  options = dict(max_length=9, val_size=3, seed=2)
  whole = chat.prepare(sources, template, **options)
  made = chat.prepare(sources, template, limit=2, **options)
  assert texts(made.validation) == texts(whole.validation)
  assert texts(made.training) == texts(whole.training)[:2]
  assert made.report['aa'].validation == 3
  same = chat.prepare(sources, template, limit=6, **options)
  assert same.fingerprint == whole.fingerprint


def test_argument_out_of_range_is_refused(template):
  sources = [numbered('aa', 4)]
  for options, text in (
    ({'max_length': 1}, 'max_length=1 must be at least 2: a token and one to '),
    (
      {'overflow': 'cut'},
      "Unknown overflow='cut'; expected one of ('truncate'",
    ),
    ({'val_size': -1}, 'val_size=-1 must be a share in [0, 1) or a whole num'),
    ({'val_size': 1.5}, 'val_size=1.5 must be a share in [0, 1) or a whole '),
    ({'limit': 0}, 'limit=0 must be at least 1, an example to train on; None'),
    ({'val_size': 4}, 'val_size=4 holds out 4 of 4 examples and leaves none'),
  ):
    with pytest.raises(ValueError) as error:
      chat.prepare(sources, template, **{'max_length': 9, **options})
    assert text in str(error.value)


def test_run_without_examples_says_what_became_of_them(template):
  sources = [source('s', [exchange('<|end|>', 'a')], empty=3)]
  with pytest.raises(ValueError) as error:
    chat.prepare(sources, template, max_length=9, val_size=0.1)
  assert str(error.value) == (
    "No example is left to train on. What became of the records: {'s': "
    "{'empty': 3, 'spells a control token': 1}}. Use other data, another "
    'template, a larger max_length or a larger weight.'
  )
  with pytest.raises(ValueError) as error:
    chat.prepare(
      [numbered('aa', 2)], template, max_length=9, validation=sources
    )
  assert str(error.value) == (
    'No example of the validation data is left. What became of the records: '
    "{'aa': '2 records', 'validation s': {'empty': 3, 'spells a control "
    "token': 1}}. Use other validation data or none, another template or a "
    'larger max_length.'
  )


def test_single_example_cannot_be_held_out(template):
  with pytest.raises(ValueError) as error:
    chat.prepare([numbered('aa', 1)], template, max_length=9, val_size=0.05)
  assert str(error.value) == (
    'val_size=0.05 holds out 1 of 1 examples and leaves none to train on. Use '
    'val_size=0, no validation, or more data.'
  )
  with pytest.raises(ValueError, match='on. Use a smaller val_size or more'):
    chat.prepare([numbered('aa', 2)], template, max_length=9, val_size=2)
