"""A conversation on a terminal, through a pipe, or of one question."""

import contextlib
import importlib
import sys
import unicodedata
from collections.abc import Iterator
from typing import TextIO

import rich.console

from gnlorp_jax.compose import interruption
from gnlorp_jax.recipes.chat.recipe import Dialogue

RESET, QUIT = '/reset', '/quit'
_WELCOME = (
  f'Ask something. {RESET} begins anew, {QUIT} or Ctrl-D ends, Ctrl-C stops an '
  'answer.'
)
_SIGN = '> '


def ask_once(dialogue: Dialogue, question: str, output: TextIO) -> None:
  """Writes the answer to one question, and the end of its line.

  Args:
    dialogue: The conversation.
    question: The question.
    output: Where to.

  Raises:
    ValueError: As `Dialogue.ask`.
  """
  for text in dialogue.ask(question):
    output.write(text)
    output.flush()
  output.write('\n')
  output.flush()


def answer_lines(dialogue: Dialogue, lines: TextIO, output: TextIO) -> None:
  """Answers each line of a file in turn; commands are as on a terminal.

  Args:
    dialogue: The conversation.
    lines: The questions.
    output: Where answers go, a line or more for each.

  Raises:
    ValueError: As `Dialogue.ask`.
  """
  for line in lines:
    question = line.strip()
    if question == QUIT:
      return
    if question == RESET:
      dialogue.reset()
    elif question:
      ask_once(dialogue, question, output)


def talk(dialogue: Dialogue, console: rich.console.Console) -> None:
  """Asks for questions and shows answers until the user has enough.

  Args:
    dialogue: The conversation.
    console: The terminal.
  """
  with contextlib.suppress(ImportError):
    importlib.import_module('readline')  # Lines can be edited and called back.
  _note(console, _WELCOME)
  with interruption.raising():
    for question in _questions(console):
      if question == RESET:
        dialogue.reset()
        _note(console, 'What was said is forgotten.')
        continue
      try:
        _show(dialogue, question, console)
      except ValueError as error:
        _note(console, f'error: {error}')


def _questions(console: rich.console.Console) -> Iterator[str]:
  """What the user types, until the end of it or of the program is asked for."""
  while True:
    try:
      question = input(_SIGN).strip()
    except EOFError:
      console.print()
      return
    except KeyboardInterrupt:
      console.print()
      _note(console, f'{QUIT} or Ctrl-D ends.')
      continue
    if question == QUIT:
      return
    if question:
      yield question


def _show(
  dialogue: Dialogue, question: str, console: rich.console.Console
) -> None:
  """Shows an answer as it is written; Ctrl-C ends it."""
  answer = dialogue.ask(question)
  if dialogue.left_out:
    _note(console, f'The oldest {dialogue.left_out} no longer fit: left out.')
  try:
    with contextlib.closing(answer):
      with console.status('...'):
        text = next(answer, '')
      while text:
        console.file.write(_harmless(text))
        console.file.flush()
        text = next(answer, '')
    console.print()
  except KeyboardInterrupt:
    console.print()
    _note(console, 'Stopped.')


def _harmless(text: str) -> str:
  """A text without what a terminal takes for commands."""
  return ''.join(
    c for c in text if c in '\n\t' or unicodedata.category(c) != 'Cc'
  )


def _note(console: rich.console.Console, text: str) -> None:
  console.print(text, style='dim', markup=False, highlight=False)


def run(dialogue: Dialogue, prompt: str | None = None) -> None:
  """Holds a conversation in the way that fits standard input and output.

  Args:
    dialogue: The conversation.
    prompt: The only question, if there is but one.

  Raises:
    ValueError: As `Dialogue.ask`, except on a terminal.
  """
  if prompt is not None:
    ask_once(dialogue, prompt, sys.stdout)
  elif sys.stdin.isatty():
    talk(dialogue, rich.console.Console())
  else:
    answer_lines(dialogue, sys.stdin, sys.stdout)
