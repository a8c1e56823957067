"""Conversations, and which order of speakers makes one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

SYSTEM_ROLES = ('system', 'developer')
ROLES = (*SYSTEM_ROLES, 'user', 'assistant', 'tool')

# Reasons to skip a valid record that teaches nothing.
EMPTY, UNANSWERED = 'empty answer', 'no answer'


@dataclasses.dataclass(frozen=True)
class Message:
  """What one speaker says at a time.

  Attributes:
    role: One of `ROLES`; `text` in a conversation of kind `text`.
    content: The words; empty if the message only calls tools.
    weight: How much guessing its tokens counts, at least 0; None leaves that to
      `train_on`.
    extra: Other fields a template may read, such as `tool_calls` or `name`.
      Calls of tools are as transformers wants them: ``{'type': 'function',
      'function': {'name': str, 'arguments': dict}}``.
  """

  role: str
  content: str
  weight: float | None = None
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def calls_tools(self) -> bool:
    """Whether the message asks for the result of a function."""
    return bool(self.extra.get('tool_calls'))


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Messages from the first to the last answer; or one plain text.

  Attributes:
    messages: The messages; the last one is an answer.
    tools: Functions the model may call, as transformers wants them: ``{'type':
      'function', 'function': {'name': str, ...}}``.
    kind: `'chat'`; or `'text'`, a single message that is trained on as a whole
      and that no template touches.
    where: Where it was read, ``FILE:LINE``.
  """

  messages: tuple[Message, ...]
  tools: tuple[dict[str, Any], ...] = ()
  kind: Literal['chat', 'text'] = 'chat'
  where: str = ''


class SkippedError(ValueError):
  """A valid record that teaches nothing.

  Attributes:
    reason: What to count it as.
  """

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


def answered(messages: Sequence[Message]) -> tuple[Message, ...]:
  """Checks the order of speakers and cuts what follows the last answer.

  A system message may come first. Then a user speaks and the assistant answers,
  in turns. Where the assistant calls tools their results follow, and then the
  assistant again.

  Args:
    messages: The messages of a record.

  Returns:
    Those up to the last answer, at least two.

  Raises:
    ValueError: If the speakers are in another order.
    SkippedError: If there is no answer, or an empty one that calls no tool.
  """
  before = 'nothing'
  for number, message in enumerate(messages, 1):
    after = _AFTER[before]
    if message.role not in after:
      raise ValueError(
        f'message {number} is of role {message.role!r} after {before}; '
        f'expected {" or ".join(after)}. A conversation is [system], then user '
        'and assistant in turns, with results of tools between a call of the '
        'assistant and its answer. Join messages of one speaker, or leave the '
        'record out'
      )
    before = 'a call of tools' if message.calls_tools else message.role
  last = max(
    (i for i, m in enumerate(messages) if m.role == 'assistant'), default=-1
  )
  if last < 0:
    raise SkippedError(UNANSWERED)
  for message in messages[: last + 1]:
    silent = not message.content.strip() and not message.calls_tools
    if message.role == 'assistant' and silent:
      raise SkippedError(EMPTY)
  return tuple(messages[: last + 1])


_AFTER = {
  'nothing': (*SYSTEM_ROLES, 'user'),
  'system': ('user',),
  'developer': ('user',),
  'user': ('assistant',),
  'assistant': ('user',),
  'a call of tools': ('tool',),
  'tool': ('tool', 'assistant'),
}
