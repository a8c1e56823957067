"""Conversations to token ids, and which of them are to be learnt.

Shape suffixes: T tokens.
"""

import contextlib
import dataclasses
import difflib
import logging
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jinja2
import numpy as np
import tokenizers

from gnlorp_jax.data.chat import rendering, styles
from gnlorp_jax.data.chat.conversations import (
  SYSTEM_ROLES,
  Conversation,
  Message,
  SkippedError,
)
from gnlorp_jax.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TrainOn = Literal['assistant', 'last', 'all']

# Reasons not to encode a conversation.
SPELLS, SURROGATE, TOOLS, REFUSED = (
  'spells a control token',
  'has half a surrogate pair, which is no Unicode text',
  'tools unknown to the template',
  'refused by the template',
)
_MARK_THEM = 'or a copy of the template with {% generation %} around answers.'
_BLANK = rendering.Rendered('', [])
_PROBE = (Message('user', 'question'), Message('assistant', 'answer'))


class Example(NamedTuple):
  """What a model reads, and how much guessing each token of it counts.

  Attributes:
    ids: int32 ``[T]``.
    weights: float32 ``[T]``; that of the first token is 0, as nothing tells it.
  """

  ids: np.ndarray
  weights: np.ndarray


class Template:
  """A way to write conversations down, and the tokenizer that reads it.

  Attributes:
    name: What `load_template` was asked for.
    jinja: The template itself: what makes `apply_chat_template` of transformers
      write the same.
    stop_ids: Ids that end an answer: the control tokens that the template puts
      behind one, in order, and those of the tokenizer.
  """

  def __init__(
    self, name: str, jinja: str, tokenizer: Tokenizer, encodes_whole: bool
  ):
    """Compiles a template.

    Args:
      name: What to call it in errors.
      jinja: The template.
      tokenizer: Reads what it writes.
      encodes_whole: Whether a conversation is encoded as one text, as
        transformers does. Otherwise each answer begins a text of its own, so
        that no token has a part of it and of the prompt.

    Raises:
      ValueError: If it is no Jinja.
    """
    self.name = name
    self.jinja = jinja
    self._tokenizer = tokenizer
    self._encodes_whole = encodes_whole
    self._render = rendering.Renderer(jinja, tokenizer.special_tokens, name)
    # Control tokens that the template writes become what they are.
    self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    self._backend.encode_special_tokens = False
    self._control, self._control_ids = control_tokens(tokenizer)
    control = '|'.join(map(re.escape, self._control))
    reserved = (*rendering.MARKS, rendering.PLACE)
    self._forbidden = re.compile('|'.join((control, *reserved)))
    self._ends = re.compile(rf'\s*(?:{control})')
    self.stop_ids = self._find_stop_ids()
    stops = (tokenizer.backend.id_to_token(i) for i in self.stop_ids)
    stop = '|'.join(map(re.escape, stops))
    self._stop = re.compile(stop)
    self._turn_end = re.compile(rf'\s*(?:{stop})\s*')

  def encode(
    self, conversation: Conversation, train_on: TrainOn = 'assistant'
  ) -> Example:
    """Encodes a conversation.

    Args:
      conversation: The conversation.
      train_on: Which tokens count where messages do not say it themselves:
        those of answers (`'assistant'`), of the last answer (`'last'`), or of
        all messages and what is around them (`'all'`). An answer reaches from
        what `prompt` ends with to its end-of-turn token, included. In a plain
        text every token counts, and the end-of-sequence token behind it.

    Returns:
      The example, at least one token.

    Raises:
      ValueError: If `train_on` is unknown, or the template writes earlier
        messages otherwise once others follow, so that their tokens cannot be
        told.
      SkippedError: If the text of a message or a tool spells a control token
        or is no Unicode, the template refuses the messages, or it would leave
        out tools.
    """
    if train_on not in get_args(TrainOn):
      raise ValueError(
        f'Unknown train_on={train_on!r}; expected one of {get_args(TrainOn)}.'
      )
    if conversation.kind == 'text':
      return self._plain(conversation.messages[0].content)
    self._check(conversation.messages, conversation.tools)
    try:
      rendered, spans = self._spans(conversation, train_on)
    except jinja2.TemplateError as error:
      raise SkippedError(_refused(error)) from error
    ids_T, offsets_T2 = self._ids(rendered)
    weights_T = np.full(len(ids_T), float(train_on == 'all'), np.float32)
    for start, end, weight in spans:
      inside_T = (offsets_T2[:, 1] > start) & (offsets_T2[:, 0] < end)
      weights_T[inside_T] = weight
    weights_T[:1] = 0
    return Example(ids_T.astype(np.int32), weights_T)

  def prompt(
    self,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
  ) -> np.ndarray:
    """What a model reads before it answers.

    Args:
      messages: The messages so far.
      tools: Functions that it may call.

    Returns:
      Ids, int64 ``[T]``, with the beginning of an answer.

    Raises:
      SkippedError: A ValueError, as in `encode`.
    """
    self._check(messages, tools)
    try:
      rendered = self._render(messages, tools, prompt=True)
    except jinja2.TemplateError as error:
      raise SkippedError(_refused(error)) from error
    return self._ids(rendered)[0]

  def _plain(self, text: str) -> Example:
    tokenizer = self._tokenizer
    ids_T = np.append(tokenizer.encode(text), tokenizer.eos_id)
    if tokenizer.adds_bos:
      ids_T = np.insert(ids_T, 0, tokenizer.bos_id)
    weights_T = np.ones(len(ids_T), np.float32)
    weights_T[:1] = 0
    return Example(ids_T.astype(np.int32), weights_T)

  def _check(
    self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
  ) -> None:
    """Raises SkippedError where tokens would not say what the messages do."""
    calls = any(m.calls_tools or m.role == 'tool' for m in messages)
    if tools and 'tools' not in self._render.variables:
      raise SkippedError(TOOLS)
    if calls and 'tool_calls' not in self.jinja:
      raise SkippedError(TOOLS)
    said = [(m.content, m.extra) for m in messages]
    texts = list(_texts((said, tools)))
    if any(map(self._forbidden.search, texts)):
      raise SkippedError(SPELLS)
    try:
      ''.join(texts).encode()
    except UnicodeEncodeError as error:
      raise SkippedError(SURROGATE) from error

  def _ids(self, rendered: rendering.Rendered) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``[T]``, and the characters of each, ``[T, 2]``, both int64."""
    borders = [0, len(rendered.text)]
    if not self._encodes_whole:
      borders += [start for start, _ in rendered.generated]
    borders = sorted(set(borders))
    ids, offsets = [], []
    for start, end in zip(borders, borders[1:], strict=False):
      encoding = self._backend.encode(
        rendered.text[start:end], add_special_tokens=False
      )
      ids += encoding.ids
      offsets += [(start + a, start + b) for a, b in encoding.offsets]
    return np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2)

  def _spans(
    self, conversation: Conversation, train_on: TrainOn
  ) -> tuple[rendering.Rendered, list[tuple[int, int, float]]]:
    """The text, and begin, end and weight of what is not as the rest of it."""
    messages = conversation.messages
    rendered = self._render(messages, conversation.tools)
    rest = float(train_on == 'all')
    wanted = {}
    for i, message in enumerate(messages):
      weight = rest
      if message.role == 'assistant' and train_on != 'last':
        weight = 1.0
      if i == len(messages) - 1:
        weight = 1.0
      weight = weight if message.weight is None else message.weight
      if weight != rest:
        wanted[i] = weight
    answers = [i for i, m in enumerate(messages) if m.role == 'assistant']
    marked = self._render.marks_generation
    if marked and all(wanted.get(i) == 1.0 for i in answers):
      # All that is marked, whichever message it belongs to.
      spans = [(*span, 1.0) for span in rendered.generated]
      wanted = {i: w for i, w in wanted.items() if i not in answers}
    else:
      spans = []
    for i, weight in wanted.items():
      parts = self._span(conversation, i, rendered)
      spans += [(start, end, weight) for start, end in parts]
    return rendered, spans

  def _span(
    self, conversation: Conversation, i: int, rendered: rendering.Rendered
  ) -> list[tuple[int, int]]:
    """Where a message stands in the text of its conversation."""
    messages = conversation.messages
    answers = messages[i].role == 'assistant'
    whole = rendered.text
    before, after = (
      self._first(conversation, n, whole, prompt=answers and n == i)
      for n in (i, i + 1)
    )
    if answers and self._render.marks_generation:
      return rendered.generated[len(before.generated) : len(after.generated)]
    start = len(before.text)
    place = f'{conversation.where or "A conversation"}: template {self.name!r}'
    if not whole.startswith(before.text):
      remedy = 'Use answers that begin as the prompt ends, '
      if i < len(messages) - 1:
        remedy = "Use train_on='last', one answer a conversation, "
      raise ValueError(
        f'{place} prompts for message {i + 1} by '
        f'{_differing(before.text, whole)!r} and then writes '
        f'{_differing(whole, before.text)!r}, so that the tokens to train on '
        f'cannot be told. {remedy}{_MARK_THEM}'
      )
    end: int | None = len(after.text)
    if not whole.startswith(after.text):
      end = self._end(conversation, i, whole, start) if answers else None
    if end is None:
      raise ValueError(
        f'{place} writes message {i + 1} otherwise once others follow, so that '
        "the tokens to train on cannot be told. Use train_on='last', one "
        f'answer a conversation, {_MARK_THEM}'
      )
    stripped = whole[:end].rstrip()
    if answers and stripped.endswith(self._control):
      end = len(stripped)  # A model need not learn what is never read.
    return [(start, end)]

  def _first(
    self, conversation: Conversation, count: int, whole: str, *, prompt: bool
  ) -> rendering.Rendered:
    """The first messages of a conversation, as they begin its text.

    A system message alone is no conversation: some templates refuse it, others
    write it into the first question and leave it out where none follows. The
    text up to its words, and the end of a turn behind them, is its own then.

    Raises:
      ValueError: If its words are not written as they are.
    """
    messages, tools = conversation.messages[:count], conversation.tools
    if not messages:
      return _BLANK
    if count > 1 or messages[0].role not in SYSTEM_ROLES:
      return self._render(messages, tools, prompt=prompt)
    alone = _BLANK
    with contextlib.suppress(jinja2.TemplateError):
      alone = self._render(messages, tools, prompt=prompt)
    told = messages[0].content.strip() in alone.text
    if told and whole.startswith(alone.text):
      return alone
    at = self._words_end(conversation, 0, whole)
    if at is None:
      raise ValueError(
        f'{conversation.where}: template {self.name!r} changes the words of '
        'the system message, so that their end cannot be told. Leave out its '
        'weight and that of the next message, or use another template.'
      )
    stop = self._turn_end.match(whole, at)
    return rendering.Rendered(whole[: stop.end() if stop else at], [])

  def _end(
    self, conversation: Conversation, i: int, whole: str, start: int
  ) -> int | None:
    """Where an answer ends that is written otherwise where it is the last one.

    Some templates put something before the last answer, such as an empty
    thought. None if its words are not all there, or no control token follows.
    """
    calls = conversation.messages[i].extra.get('tool_calls') or ()
    if calls:
      stop = self._stop.search(whole, start)
      names = [call['function']['name'] for call in calls]
      names.append(conversation.messages[i].content.strip())
      if stop and all(n in whole[start : stop.start()] for n in names):
        return stop.end()
      return None
    at = self._words_end(conversation, i, whole)
    control = None if at is None else self._ends.match(whole, at)
    return None if control is None else control.end()

  def _words_end(
    self, conversation: Conversation, i: int, whole: str
  ) -> int | None:
    """Where the words of a message end, if its text holds them once."""
    words = conversation.messages[i].content
    bare = words.rstrip()
    messages = list(conversation.messages)
    marked = bare + rendering.PLACE + words[len(bare) :]
    messages[i] = dataclasses.replace(messages[i], content=marked)
    text = self._render(messages, conversation.tools).text
    before, *behind = text.split(rendering.PLACE)
    once = len(behind) == 1 and before + behind[0] == whole
    return len(before) if once and before.endswith(bare.lstrip()) else None

  def _find_stop_ids(self) -> tuple[int, ...]:
    """Tries the template on an exchange."""
    known = self._tokenizer.eos_ids
    try:
      example = self.encode(Conversation(_PROBE))
    except (jinja2.TemplateError, ValueError):
      return known  # It wants other messages. Encoding them tells of faults.
    ends: list[int] = []
    for i in example.ids[np.flatnonzero(example.weights)][::-1].tolist():
      if i in self._control_ids:
        ends.insert(0, i)
      elif self._backend.decode([i]).strip():
        break
    if not ends:
      logger.warning(
        'Template %r ends no answer with a control token that is trained, so '
        'nothing teaches a model to stop. Put one behind the answer, inside '
        'of {%% generation %%} if the template has that.',
        self.name,
      )
    return tuple(dict.fromkeys((*ends, *known)))


def _differing(text: str, other: str) -> str:
  """What follows in a text from where another one is different."""
  pairs = enumerate(zip(text, other, strict=False))
  shorter = min(len(text), len(other))
  at = next((i for i, (a, b) in pairs if a != b), shorter)
  return text[at : at + 30]


def _refused(error: jinja2.TemplateError) -> str:
  return f'{REFUSED}: {error}'


def control_tokens(
  tokenizer: Tokenizer,
) -> tuple[tuple[str, ...], frozenset[int]]:
  """Special tokens, and those that the tokenizer has for an end."""
  added = tokenizer.backend.get_added_tokens_decoder()
  found = {token.content: i for i, token in added.items() if token.special}
  for i in (*tokenizer.eos_ids, tokenizer.pad_id, tokenizer.bos_id):
    if i is not None:
      found[tokenizer.backend.id_to_token(i)] = i
  return tuple(found), frozenset(found.values())


def _texts(value: Any) -> Iterator[str]:
  """All texts in nested lists and objects."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict):
    yield from _texts(list(value.items()))
  elif isinstance(value, list | tuple):
    for inner in value:
      yield from _texts(inner)


def load_template(spec: str, tokenizer: Tokenizer) -> Template:
  """Finds a template.

  Args:
    spec: `'none'` writes messages as they are and ends answers by the
      end-of-sequence token; `'alpaca'` puts the headings of Stanford's Alpaca
      before them; `'tokenizer'` is the tokenizer's own; or a file, Jinja, as
      transformers has it in `chat_template.jinja`.
    tokenizer: Reads what it writes.

  Returns:
    The template.

  Raises:
    ValueError: If there is no such template or it is no Jinja.
  """
  if spec in styles.NAMES:
    jinja = styles.jinja(spec, adds_bos=tokenizer.adds_bos)
    return Template(spec, jinja, tokenizer, encodes_whole=False)
  if spec == 'tokenizer':
    jinja = tokenizer.chat_template
    if jinja is None:
      raise ValueError(
        "template='tokenizer' needs a chat template, and the tokenizer has "
        "none. Use template='alpaca', a FILE.jinja, or the tokenizer of a "
        'model that was made for chat.'
      )
  else:
    path = pathlib.Path(spec).expanduser()
    if not path.is_file():
      choices = (*styles.NAMES, 'tokenizer')
      close = difflib.get_close_matches(spec, choices, 1)
      hint = f' Did you mean {close[0]!r}?' if close else ''
      raise ValueError(
        f'Unknown template {spec!r}; expected one of {choices}, or the path of '
        f'a FILE.jinja.{hint}'
      )
    jinja = path.read_text(encoding='utf-8')
  if 'strftime_now' in jinja:
    logger.warning(
      'Template %r writes the date of the day, so examples made tomorrow '
      'differ from those of today, which a resumed run refuses. Write a date '
      'into a copy of the template.',
      spec,
    )
  return Template(spec, jinja, tokenizer, encodes_whole=True)
