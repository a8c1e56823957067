"""Jinja templates of conversations, as transformers renders them.

Templates come with models from the hub, so they run in a sandbox.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from gnlorp_jax.data.chat.conversations import Message

# Around what an assistant says, until the text is complete. Unicode reserves
# these for such use; no text holds them.
MARKS = ('\ufdd0', '\ufdd1')
# Put behind the words of a message to find where they end. The third of these.
PLACE = '\ufdd2'
_MARK = re.compile('[' + ''.join(MARKS) + ']')


class Rendered(NamedTuple):
  """A conversation as one text.

  Attributes:
    text: The text.
    generated: Where the template says that the assistant speaks, ``{%
      generation %}``: begin and end of each part, characters, ascending.
  """

  text: str
  generated: list[tuple[int, int]]


class Renderer:
  """A compiled template.

  Attributes:
    source: The template, Jinja.
    marks_generation: Whether it says where the assistant speaks.
    variables: Names of what it reads.
  """

  def __init__(self, source: str, tokens: Mapping[str, str], name: str):
    """Compiles a template.

    Args:
      source: The template.
      tokens: Control tokens by name, `bos_token` and so on.
      name: What to call it in errors.

    Raises:
      ValueError: If it is no Jinja.
    """
    environment = _environment()
    try:
      self._template = environment.from_string(source)
      parsed = environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(
        f'Template {name!r} cannot be compiled: line {error.lineno}: '
        f'{error.message}. Expected Jinja, as in a chat_template.jinja of '
        'transformers.'
      ) from error
    self.source = source
    self.variables = frozenset(jinja2.meta.find_undeclared_variables(parsed))
    self.marks_generation = bool(re.search(r'\{%-?\+?\s*generation\b', source))
    self._tokens = dict(tokens)

  def __call__(
    self,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    prompt: bool = False,
  ) -> Rendered:
    """Renders messages.

    Args:
      messages: The messages.
      tools: Functions that may be called.
      prompt: Whether the beginning of an answer follows.

    Raises:
      jinja2.TemplateError: If the template does not take them.
    """
    try:
      marked = self._template.render(
        messages=[
          {'role': m.role, 'content': m.content, **m.extra} for m in messages
        ],
        tools=list(tools) or None,
        documents=None,
        add_generation_prompt=prompt,
        **self._tokens,
      )
    except (TypeError, ValueError, LookupError, AttributeError) as error:
      # Of its expressions, such as a text plus a number.
      raise jinja2.TemplateRuntimeError(str(error)) from error
    parts = _MARK.split(marked)
    borders = [0]
    for part in parts:
      borders.append(borders[-1] + len(part))
    # Every second part lies between two marks.
    generated = [
      (borders[i], borders[i + 1])
      for i in range(1, len(parts), 2)
      if borders[i] < borders[i + 1]
    ]
    return Rendered(''.join(parts), generated)


def _environment() -> jinja2.Environment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters['tojson'] = _tojson
  environment.globals['raise_exception'] = _raise
  environment.globals['strftime_now'] = _now
  return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
  """Jinja's own filter escapes what HTML would misread."""
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


class _Generation(jinja2.ext.Extension):
  """The block ``{% generation %}``: puts marks around what is in it."""

  tags = {'generation'}

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    inside = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    marked = self.call_method('_marked')
    return jinja2.nodes.CallBlock(marked, [], [], inside).set_lineno(line)

  def _marked(self, caller: Any) -> str:
    return caller().join(MARKS)
