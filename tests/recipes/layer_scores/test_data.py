"""Which sequences are read, and what of them is padding."""

import json

import numpy as np
import pytest

from gnlorp_jax.recipes.layer_scores import data
from gnlorp_jax.recipes.layer_scores.settings import LayerScoresConfig
from tests.compose import small_lm

TOKENIZER = small_lm.tokenizer()
VOCAB = small_lm.CONFIG.vocab_size


@pytest.fixture
def make(tmp_path):
  """Loads sequences of at most 8 tokens."""

  def load(text, vocab_size=VOCAB, **options):
    (tmp_path / 'data.jsonl').write_text(text)
    config = LayerScoresConfig(
      data=str(tmp_path / 'data.jsonl'),
      cache_dir=str(tmp_path / 'cache'),
      **{'batch_size': 2, 'sequences': 3, **options},
    )
    return data.load(config, TOKENIZER, 8, vocab_size)

  return load


TEXT = json.dumps({'text': 'What the model reads is cut every 8 tokens.'})


def test_windows_of_text_are_drawn_at_random(make):
  found = make(TEXT)
  assert (found.num_sequences, found.num_tokens) == (3, 24)
  first, second = found.batches
  np.testing.assert_array_equal(second['is_token'], [[True] * 8, [False] * 8])
  np.testing.assert_array_equal(second['weights'], second['is_token'])
  rows = np.concatenate([first['inputs'], second['inputs'][:1]])
  texts = [TOKENIZER.decode(row) for row in rows]
  windows = ['What the', ' model r', 'eads is ', 'cut ever', 'y 8 toke']
  assert len(set(texts)) == 3
  assert texts == [text for text in windows if text in texts]
  for name in first:
    assert first[name].dtype == second[name].dtype
  following = np.concatenate([first['targets'], second['targets'][:1]])
  np.testing.assert_array_equal(following[:, :-1], rows[:, 1:])
  # The seed decides; another draws others.
  again, other = make(TEXT), make(TEXT, seed=3)
  np.testing.assert_array_equal(again.batches[0]['inputs'], first['inputs'])
  assert (other.batches[0]['inputs'] != first['inputs']).any()


def test_all_is_read_where_there_is_less_than_asked_for(make, caplog):
  assert make(TEXT, sequences=9).num_sequences == 5
  assert caplog.messages == [
    'The data has 5 sequences of the 9 that were asked for: all are read.'
  ]


def test_less_than_a_sequence_is_refused(make):
  with pytest.raises(ValueError) as error:
    make(json.dumps({'text': 'Short.'}))
  assert str(error.value) == (
    'The data has 7 tokens; a sequence of length=8 needs 9. Use more text or a '
    'smaller --length.'
  )


def test_tokens_that_the_model_has_not_are_refused(make):
  with pytest.raises(ValueError) as error:
    make(TEXT, vocab_size=100)
  assert str(error.value).endswith(
    ', and the model has those of [0, 100). Use the tokenizer and the template '
    'that the model was trained with.'
  )


def test_conversations_are_read_one_a_row(make):
  pairs = [('a', 'b'), ('abc', 'def'), ('ab', 'c'), ('much too long', 'x')]
  lines = [json.dumps({'prompt': p, 'completion': c}) for p, c in pairs]
  found = make('\n'.join(lines), format='chat', template='none', sequences=9)
  # Of the last no answer is left when it is cut.
  assert found.num_sequences == 3
  rows = [
    (row[is_token], is_token, weights)
    for batch in found.batches
    for row, is_token, weights in zip(
      batch['inputs'], batch['is_token'], batch['weights'], strict=True
    )
  ]
  texts = [TOKENIZER.decode(row) for row, _, _ in rows]
  assert [len(row) for row, _, _ in rows] == sorted(
    [len(row) for row, _, _ in rows], reverse=True
  )
  assert sorted(filter(None, texts)) == ['ab', 'abc', 'abcdef']
  assert found.num_tokens == sum(len(row) for row, _, _ in rows)
  for row, is_token, weights in rows:
    # Tokens are in front; answers count, and padding never does.
    np.testing.assert_array_equal(is_token[: len(row)], True)
    assert not weights[~is_token].any()
    assert weights.any() == bool(len(row))
