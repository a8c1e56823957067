"""Records of the usual formats of instruction data become conversations.

A format is recognised by its keys, the first of these that fits:

* `messages`: `messages`, a list of `role` and `content`;
* `sharegpt`: `conversations`, a list of `from` and `value`;
* `alpaca`: `instruction` and `output`, perhaps `input`, `system` and `history`;
* `prompt-completion`: `prompt` and `completion`, two texts or two lists of
  messages;
* `question-answer`: `question` and `answer`, as in GSM8K;
* `text`: `text`, trained on as a whole.

Other keys are not looked at, except `tools` and `system` beside `messages` and
`conversations`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gnlorp_jax.data.chat import conversations
from gnlorp_jax.data.chat.conversations import Conversation, Message

# What data sets call the speakers.
_ROLES = {role: role for role in conversations.ROLES} | {
  'human': 'user',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'model': 'assistant',
  'function_call': 'assistant',
  'observation': 'tool',
  'function': 'tool',
}
_ROLE_KEYS, _CONTENT_KEYS = ('role', 'from'), ('content', 'value')
_WEIGHT_KEYS = ('weight', 'loss_weight', 'train', 'training')
_LARGEST_WEIGHT = 1e30  # The sum of many is finite in float32.


def name_of(record: Any) -> str:
  """The format of a record.

  Raises:
    ValueError: If it is of none.
  """
  if not isinstance(record, dict):
    raise ValueError(
      f'expected an object with fields, not {_shown(record)}; a file holds a '
      'JSON list of objects, or one object a line'
    )
  for name, keys in _KEYS.items():
    if all(key in record for key in keys):
      return name
  listed = '; '.join(f'{name}: {", ".join(k)}' for name, k in _KEYS.items())
  raise ValueError(
    f'a record with the keys {sorted(record)} is of no known format; expected '
    f'the keys of one of {listed}. Rename the keys'
  )


def parse(record: dict[str, Any], where: str) -> Conversation:
  """The conversation of a record.

  Args:
    record: A record of a known format.
    where: Where it was read.

  Returns:
    The conversation.

  Raises:
    ValueError: If a field is of another type, a speaker unknown, or the
      speakers are in the wrong order.
    conversations.SkippedError: If it has no answer, or an empty one.
  """
  format_name = name_of(record)
  if format_name == 'text':
    text = _text(record['text'], 'text')
    if not text.strip():
      raise conversations.SkippedError(conversations.EMPTY)
    return Conversation((Message('text', text),), kind='text', where=where)
  messages = conversations.answered(_PARSERS[format_name](record))
  tools = _tools(record.get('tools')) if format_name in _WITH_TOOLS else ()
  return Conversation(messages, tools=tools, where=where)


def _of_messages(record: dict[str, Any]) -> list[Message]:
  return _with_system(record, _messages(record['messages'], 'messages'))


def _of_sharegpt(record: dict[str, Any]) -> list[Message]:
  found = _messages(record['conversations'], 'conversations')
  return _with_system(record, found)


def _of_alpaca(record: dict[str, Any]) -> list[Message]:
  messages = []
  history = record.get('history') or []
  if not isinstance(history, list | tuple):
    raise ValueError(
      f'"history" is {_shown(history)}; expected a list of pairs of a question '
      'and its answer. Rewrite it so, or leave it out'
    )
  for turn in history:
    if not isinstance(turn, list | tuple) or len(turn) != 2:
      raise ValueError(
        f'"history" holds {_shown(turn)}; expected pairs of a question and its '
        'answer'
      )
    messages += _exchange(*(_text(part, 'history') for part in turn))
  instruction = _text(record['instruction'], 'instruction')
  given = _text(record.get('input') or '', 'input')
  question, answer = _exchange(instruction, _text(record['output'], 'output'))
  if given.strip():
    # The two together for all templates but Alpaca's, which heads them apart.
    parts = {'instruction': instruction, 'input': given}
    content = '\n'.join(part for part in parts.values() if part.strip())
    question = Message('user', content, extra=parts)
  return _with_system(record, [*messages, question, answer])


def _of_prompt(record: dict[str, Any]) -> list[Message]:
  prompt, completion = record['prompt'], record['completion']
  if isinstance(prompt, str) and isinstance(completion, str):
    return _exchange(_text(prompt, 'prompt'), _text(completion, 'completion'))
  if isinstance(prompt, str):
    given = [Message('user', _text(prompt, 'prompt'))]
  else:
    given = _messages(prompt, 'prompt')
  # Answers in the prompt are given, not to be learnt.
  given = [
    Message(
      m.role, m.content, 0.0 if m.role == 'assistant' else m.weight, m.extra
    )
    for m in given
  ]
  if isinstance(completion, str):
    return [*given, Message('assistant', _text(completion, 'completion'))]
  return [*given, *_messages(completion, 'completion')]


def _of_question(record: dict[str, Any]) -> list[Message]:
  parts = (_text(record[key], key) for key in ('question', 'answer'))
  return _exchange(*parts)


_PARSERS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
  'messages': _of_messages,
  'sharegpt': _of_sharegpt,
  'alpaca': _of_alpaca,
  'prompt-completion': _of_prompt,
  'question-answer': _of_question,
}
_WITH_TOOLS = ('messages', 'sharegpt')
_KEYS = {
  'messages': ('messages',),
  'sharegpt': ('conversations',),
  'alpaca': ('instruction', 'output'),
  'prompt-completion': ('prompt', 'completion'),
  'question-answer': ('question', 'answer'),
  'text': ('text',),
}


def _exchange(question: str, answer: str) -> list[Message]:
  return [Message('user', question), Message('assistant', answer)]


def _with_system(
  record: dict[str, Any], messages: list[Message]
) -> list[Message]:
  system = _text(record.get('system') or '', 'system')
  return [Message('system', system), *messages] if system.strip() else messages


def _messages(found: Any, key: str) -> list[Message]:
  if not isinstance(found, list | tuple) or not found:
    raise ValueError(
      f'{key!r} is {_shown(found)}; expected a list of messages, objects with '
      'role and content, or from and value'
    )
  return [_message(part, f'{key}[{i}]') for i, part in enumerate(found)]


def _message(found: Any, place: str) -> Message:
  if not isinstance(found, dict):
    raise ValueError(f'{place} is {_shown(found)}; expected an object')
  fields = {key: value for key, value in found.items() if value is not None}
  said = _pop(fields, _ROLE_KEYS)
  if not isinstance(said, str) or said not in _ROLES:
    raise ValueError(
      f'{place} has the role {_shown(said)}; expected one of {sorted(_ROLES)} '
      'as "role" or "from". Write the role as one of these texts'
    )
  content = _content(_pop(fields, _CONTENT_KEYS), f'{place}.content')
  weight = _weight(fields, place)
  if said == 'function_call':
    fields['tool_calls'], content = _json(content, place), ''
  if 'tool_calls' in fields:
    fields['tool_calls'] = _calls(fields['tool_calls'], place)
  elif not content and 'content' not in found and 'value' not in found:
    raise ValueError(
      f'{place} has the keys {sorted(found)}; expected its words as "content" '
      'or "value"'
    )
  return Message(_ROLES[said], content, weight, fields)


def _pop(fields: dict[str, Any], keys: Iterable[str]) -> Any:
  found = [fields.pop(key) for key in keys if key in fields]
  return found[0] if found else None


def _content(found: Any, place: str) -> str:
  """The words of a message, which may be in parts."""
  if not isinstance(found, list | tuple):
    return _text('' if found is None else found, place)
  texts = []
  for part in found:
    if isinstance(part, dict) and part.get('type', 'text') == 'text':
      texts.append(_text(part.get('text', part.get('value')), place))
    else:
      raise ValueError(
        f'{place} has a part {_shown(part)}; expected text and parts of type '
        '"text" alone'
      )
  return ''.join(texts)


def _text(found: Any, place: str) -> str:
  if not isinstance(found, str):
    raise ValueError(f'{place} is {_shown(found)}; expected a text')
  try:
    found.encode()
  except UnicodeEncodeError as error:
    # JSON can spell half a surrogate pair, which is not text.
    raise ValueError(f'{place} is no Unicode text: {error}') from error
  return found


def _weight(fields: dict[str, Any], place: str) -> float | None:
  """How much a message counts, by whichever name; taken out of its fields."""
  found = {key: fields.pop(key) for key in _WEIGHT_KEYS if key in fields}
  for key, value in found.items():
    number = isinstance(value, bool | int | float)
    if not number or not 0 <= value <= _LARGEST_WEIGHT:
      raise ValueError(
        f'{place} has {key}={_shown(value)}; expected true, false or a number '
        f'from 0 to {_LARGEST_WEIGHT:g}. Correct it, or leave it out'
      )
  weights = {float(value) for value in found.values()}
  if len(weights) > 1:
    raise ValueError(f'{place} contradicts itself: {found}. Keep one of them')
  return weights.pop() if weights else None


def _tools(found: Any) -> tuple[dict[str, Any], ...]:
  tools = _json(found, 'tools') if isinstance(found, str) and found else found
  if not tools:
    return ()
  return tuple(_function(tool, 'tools') for tool in _listed(tools))


def _calls(found: Any, place: str) -> list[dict[str, Any]]:
  calls = []
  for call in _listed(found):
    call = _function(call, f'{place}.tool_calls')
    function = dict(call['function'])
    # The API of OpenAI has them as a text, templates want an object.
    arguments = function.get('arguments', {})
    if isinstance(arguments, str):
      arguments = _json(arguments, f'{place}.tool_calls') if arguments else {}
    calls.append({**call, 'function': {**function, 'arguments': arguments}})
  return calls


def _function(found: Any, place: str) -> dict[str, Any]:
  """A function, wrapped as transformers has it."""
  wrapped = isinstance(found, dict) and isinstance(found.get('function'), dict)
  function = found['function'] if wrapped else found
  if not isinstance(function, dict) or not isinstance(
    function.get('name'), str
  ):
    raise ValueError(
      f'{place} holds {_shown(found)}; expected a function, an object with a '
      'name'
    )
  kept = found if wrapped else {'function': found}
  return {'type': 'function', **_without_none(kept)}


def _without_none(value: Any) -> Any:
  """Parquet gives every object the fields of all, most of them empty."""
  if isinstance(value, Mapping):
    return {k: _without_none(v) for k, v in value.items() if v is not None}
  if isinstance(value, list | tuple):
    return [_without_none(v) for v in value]
  return value


def _listed(found: Any) -> list[Any]:
  return list(found) if isinstance(found, list | tuple) else [found]


def _json(text: str, place: str) -> Any:
  try:
    return json.loads(text)
  except ValueError as error:
    raise ValueError(
      f'{place} is no JSON: {error}, in {_shown(text)}'
    ) from error


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'
