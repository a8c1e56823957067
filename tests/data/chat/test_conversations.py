"""The order of speakers."""

import hypothesis
import pytest
from hypothesis import strategies as st

from gnlorp_jax.data.chat import conversations
from gnlorp_jax.data.chat.conversations import Message
from tests.data.chat import small_chat

CALL = {'tool_calls': [{'function': {'name': 'f', 'arguments': {}}}]}


def spoken(letters):
  """Messages by the first letters of their roles; C is a call of tools."""
  roles = dict(s='system', u='user', a='assistant', t='tool', C='assistant')
  return [
    Message(roles[x], '' if x == 'C' else x, extra=CALL if x == 'C' else {})
    for x in letters
  ]


@pytest.mark.parametrize(
  'letters, kept',
  [
    ('ua', 2),
    ('sua', 3),
    ('uaua', 4),
    ('uaC', None),
    ('uCta', 4),
    ('uCtta', 5),
    ('uCtCtaua', 8),
    # What follows the last answer is cut; a call of tools is an answer.
    ('uau', 2),
    ('uCt', 2),
    ('suauCtt', 5),
  ],
)
def test_speakers_take_turns(letters, kept):
  messages = spoken(letters)
  if kept is None:
    with pytest.raises(ValueError):
      conversations.answered(messages)
  else:
    assert conversations.answered(messages) == tuple(messages[:kept])


def test_speaker_out_of_order_is_told():
  with pytest.raises(ValueError) as error:
    conversations.answered(spoken('uau' + 'u' + 'a'))
  assert str(error.value) == (
    "message 4 is of role 'user' after user; expected assistant. A "
    'conversation is [system], then user and assistant in turns, with results '
    'of tools between a call of the assistant and its answer. Join messages of '
    'one speaker, or leave the record out'
  )
  for letters in ('a', 'aua', 'usa', 'ssua', 'uat', 'ut', 'uCu', 'uCtua'):
    with pytest.raises(ValueError, match='A conversation is'):
      conversations.answered(spoken(letters))


def test_what_teaches_nothing_is_skipped():
  for messages, reason in (
    (spoken('u'), 'no answer'),
    (spoken('s'), 'no answer'),
    ([], 'no answer'),
    ([Message('user', 'a'), Message('assistant', ' \n')], 'empty answer'),
  ):
    with pytest.raises(conversations.SkippedError) as skip:
      conversations.answered(messages)
    assert skip.value.reason == reason


@small_chat.FEW
@hypothesis.given(st.text('suatC', max_size=7))
def test_what_is_kept_ends_with_an_answer(letters):
  try:
    kept = conversations.answered(spoken(letters))
  except ValueError:
    return
  assert kept[-1].role == 'assistant'
  # Nobody answers what is cut.
  assert all(m.role != 'assistant' for m in spoken(letters)[len(kept) :])
