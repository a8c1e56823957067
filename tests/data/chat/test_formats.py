"""Records of every format against conversations by hand."""

import pytest

from gnlorp_jax.data.chat import conversations, formats
from gnlorp_jax.data.chat.conversations import Message

U, A = Message('user', 'q'), Message('assistant', 'a')


def messages_of(record):
  return list(formats.parse(record, 'f:1').messages)


def test_messages():
  turns = [
    {'role': 'user', 'content': 'q'},
    {'role': 'assistant', 'content': 'a'},
  ]
  conversation = formats.parse({'messages': turns, 'id': 3}, 'f:1')
  assert conversation == conversations.Conversation((U, A), where='f:1')
  assert conversation.kind == 'chat' and conversation.tools == ()
  system = {'role': 'system', 'content': 's'}
  assert messages_of({'messages': [system, *turns]}) == [
    Message('system', 's'), U, A,
  ]  # fmt: skip
  assert messages_of({'messages': turns, 'system': 's'}) == [
    Message('system', 's'), U, A,
  ]  # fmt: skip


def test_content_may_be_in_parts():
  parts = [{'type': 'text', 'text': 'q'}, {'type': 'text', 'value': 'r'}]
  record = {
    'messages': [
      {'role': 'user', 'content': parts},
      {'role': 'assistant', 'content': [{'text': 'a'}]},
    ]
  }
  assert messages_of(record) == [Message('user', 'qr'), A]
  parts[0]['type'] = 'image'
  with pytest.raises(
    ValueError, match=r'messages\[0\].content has a part .*"te'
  ):
    messages_of(record)


@pytest.mark.parametrize(
  'key, value, weight',
  [
    ('weight', 0, 0.0),
    ('weight', 0.5, 0.5),
    ('loss_weight', 1.0, 1.0),
    ('train', True, 1.0),
    ('training', False, 0.0),
    ('weight', None, None),
  ],
)
def test_messages_bring_weights(key, value, weight):
  record = {
    'messages': [
      {'role': 'user', 'content': 'q'},
      {'role': 'assistant', 'content': 'a', key: value},
    ]
  }
  assert messages_of(record) == [U, Message('assistant', 'a', weight)]


def test_weight_that_is_none_is_refused():
  answer = {'role': 'assistant', 'content': 'a'}
  for bad in (-1, 'yes', float('nan'), float('1e400'), 10**400, 1e39):
    bad = {'weight': bad}
    with pytest.raises(
      ValueError, match=r'weight=.*; expected true, .* from 0 to 1e\+30\. Cor'
    ):
      messages_of(
        {'messages': [{'role': 'user', 'content': 'q'}, answer | bad]}
      )
  twice = answer | {'weight': 0, 'train': True}
  with pytest.raises(ValueError, match='contradicts itself'):
    messages_of({'messages': [{'role': 'user', 'content': 'q'}, twice]})


def test_sharegpt():
  turns = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]
  assert messages_of({'conversations': turns}) == [U, A]
  roles = [
    {'role': 'user', 'content': 'q'},
    {'role': 'assistant', 'content': 'a'},
  ]
  assert messages_of({'conversations': roles}) == [U, A]
  assert messages_of({'conversations': turns, 'system': 's'}) == [
    Message('system', 's'), U, A,
  ]  # fmt: skip


FUNCTION = {'name': 'f', 'parameters': {'type': 'object'}}


def call(arguments):
  return {'type': 'function', 'function': {'name': 'f', 'arguments': arguments}}


def test_sharegpt_calls_tools():
  record = {
    'conversations': [
      {'from': 'human', 'value': 'q'},
      {
        'from': 'function_call',
        'value': '{"name": "f", "arguments": {"x": 1}}',
      },
      {'from': 'observation', 'value': '2'},
      {'from': 'gpt', 'value': 'a'},
    ],
    'tools': '[{"name": "f", "parameters": {"type": "object"}}]',
  }
  conversation = formats.parse(record, 'f:1')
  assert conversation.tools == ({'type': 'function', 'function': FUNCTION},)
  assert list(conversation.messages) == [
    U,
    Message('assistant', '', extra={'tool_calls': [call({'x': 1})]}),
    Message('tool', '2'),
    A,
  ]
  for none in ('', '[]', None, []):
    assert formats.parse(record | {'tools': none}, 'f:1').tools == ()
  with pytest.raises(ValueError, match='tools is no JSON'):
    messages_of(record | {'tools': '[{'})
  with pytest.raises(ValueError, match='expected a function, an object with'):
    messages_of(record | {'tools': [{'parameters': {}}]})


def test_tools_of_other_formats_are_not_looked_at():
  tools = {'tools': 'a hammer'}
  for record in (
    {'instruction': 'q', 'output': 'a'},
    {'prompt': 'q', 'completion': 'a'},
    {'question': 'q', 'answer': 'a'},
  ):
    conversation = formats.parse(record | tools, 'f:1')
    assert conversation.messages == (U, A) and conversation.tools == ()


def test_messages_call_tools():
  record = {
    'messages': [
      {'role': 'user', 'content': 'q'},
      {
        'role': 'assistant',
        'content': None,
        'tool_calls': [
          {'id': 'c1', **call('{"x": 1}')},
          {'name': 'f', 'arguments': {'x': 2}},
        ],
      },
      {'role': 'tool', 'content': '2', 'tool_call_id': 'c1', 'name': 'f'},
      {'role': 'assistant', 'content': 'a', 'reasoning_content': 'hm'},
    ],
    'tools': [{'type': 'function', 'function': FUNCTION | {'strict': None}}],
  }
  conversation = formats.parse(record, 'f:1')
  assert conversation.tools == ({'type': 'function', 'function': FUNCTION},)
  calls = [{'id': 'c1', **call({'x': 1})}, call({'x': 2})]
  assert list(conversation.messages) == [
    U,
    Message('assistant', '', extra={'tool_calls': calls}),
    Message('tool', '2', extra={'tool_call_id': 'c1', 'name': 'f'}),
    Message('assistant', 'a', extra={'reasoning_content': 'hm'}),
  ]


def test_alpaca():
  record = {'instruction': 'q', 'input': '', 'output': 'a'}
  assert messages_of(record) == [U, A]
  assert messages_of({'instruction': 'q', 'output': 'a', 'answer': 'x'}) == [
    U,
    A,
  ]
  full = record | {'input': 'i', 'system': 's', 'history': [['x', 'y']]}
  assert messages_of(full) == [
    Message('system', 's'),
    Message('user', 'x'),
    Message('assistant', 'y'),
    Message('user', 'q\ni', extra={'instruction': 'q', 'input': 'i'}),
    A,
  ]
  nulls = dict.fromkeys(('input', 'system', 'history'))
  assert messages_of(record | nulls) == [U, A]
  with pytest.raises(ValueError, match='"history" holds .*; expected pairs'):
    messages_of(record | {'history': ['x']})
  for history in (5, 'xy', {'x': 'y'}):
    with pytest.raises(ValueError, match='"history" is .*; expected a list of'):
      messages_of(record | {'history': history})


def test_prompt_and_completion():
  assert messages_of({'prompt': 'q', 'completion': 'a'}) == [U, A]
  user, answer = (
    {'role': 'user', 'content': 'q'},
    {'role': 'assistant', 'content': 'a'},
  )
  # What the prompt answers is given; only the completion is to be learnt.
  given = Message('assistant', 'a', 0.0)
  assert messages_of(
    {'prompt': [user, answer, user], 'completion': [answer]}
  ) == [U, given, U, A]
  assert messages_of({'prompt': [user], 'completion': 'a'}) == [U, A]
  assert messages_of({'prompt': 'q', 'completion': [answer, user, answer]}) == [
    U, A, U, A,
  ]  # fmt: skip


def test_question_and_answer():
  assert messages_of({'question': 'q', 'answer': 'a'}) == [U, A]


def test_text():
  conversation = formats.parse({'text': 'words'}, 'f:1')
  assert conversation.kind == 'text'
  assert conversation.messages == (Message('text', 'words'),)
  with pytest.raises(conversations.SkippedError, match='empty answer'):
    formats.parse({'text': ' \n'}, 'f:1')


def test_most_telling_format_counts():
  turns = [{'role': 'user', 'content': 'q'}]
  assert formats.name_of({'messages': turns, 'prompt': 'q', 'text': 't'}) == (
    'messages'
  )
  assert formats.name_of({'instruction': 'q', 'output': '', 'text': 't'}) == (
    'alpaca'
  )


@pytest.mark.parametrize(
  'record, text',
  [
    (
      {'chosen': 'a'},
      r"keys \['chosen'\] is of no known format; expected the k",
    ),
    ('words', "expected an object with fields, not 'words'; a file holds a"),
    ({'messages': 'q'}, "'messages' is 'q'; expected a list of messages"),
    ({'messages': []}, r"'messages' is \[\]; expected a list of messages"),
    ({'messages': ['q']}, r"messages\[0\] is 'q'; expected an object"),
    (
      {'messages': [{'role': 'bot', 'content': 'q'}]},
      r"messages\[0\] has the role 'bot'; expected one of \['assistant', ",
    ),
    (
      {'messages': [{'role': ['user'], 'content': 'q'}]},
      r"messages\[0\] has the role \['user'\]; .* Write the role as one of",
    ),
    (
      {'messages': [{'role': 'user', 'words': 'q'}]},
      r"messages\[0\] has the keys \['role', 'words'\]; expected its words as",
    ),
    (
      {'messages': [{'role': 'user', 'content': 3}]},
      r'messages\[0\].content is 3; expected a text',
    ),
    ({'prompt': 'q', 'completion': 3}, 'completion.* is 3; expected'),
    ({'instruction': 'q', 'output': None}, 'output is None; expected a text'),
    ({'text': '\ud800'}, 'text is no Unicode text: '),
    (
      {'conversations': [{'from': 'function_call', 'value': 'f(x)'}]},
      r"conversations\[0\] is no JSON: .*, in 'f\(x\)'",
    ),
  ],
)
def test_field_that_is_wrong_is_named(record, text):
  with pytest.raises(ValueError, match=text):
    formats.parse(record, 'f:1')
