"""Conversations as they are held, with a model that repeats the question."""

import io
import os
import sys

import pytest
import rich.console

from gnlorp_jax.recipes.chat import terminal


class Parrot:
  """Says each word of a question, and remembers how often it was asked."""

  def __init__(self):
    self.asked, self.left_out, self.resets, self.ends = [], 0, 0, []

  def reset(self):
    self.resets += 1

  def ask(self, question):
    if question == 'long':
      raise ValueError('too long')
    self.asked.append(question)
    return self._answer(question)

  def _answer(self, question):
    try:
      for word in question.split():
        if word == 'interrupt':
          raise KeyboardInterrupt
        yield f'{word} '
    finally:
      self.ends.append(question)


def test_prompt_is_answered_alone(capsys):
  parrot = Parrot()
  terminal.run(parrot, 'a b')
  assert capsys.readouterr() == ('a b \n', '')
  assert parrot.asked == ['a b']


def test_pipe_gives_a_question_a_line(monkeypatch, capsys):
  parrot = Parrot()
  lines = 'one\n\n two three \n/reset\nfour\n/quit\nfive\n'
  monkeypatch.setattr(sys, 'stdin', io.StringIO(lines))
  terminal.run(parrot)
  assert capsys.readouterr() == ('one \ntwo three \nfour \n', '')
  assert parrot.asked == ['one', 'two three', 'four']
  assert parrot.resets == 1


def test_text_is_written_when_it_is_there():
  shown = io.StringIO()
  seen = []

  class Slow(Parrot):
    def _answer(self, question):
      for word in ('a', 'b'):
        yield word
        seen.append(shown.getvalue())

  terminal.ask_once(Slow(), '?', shown)
  assert seen == ['a', 'ab']


def talk(parrot, monkeypatch, typed):
  """What a terminal shows while someone types, or presses Ctrl-C."""
  typed = iter(typed)

  def type_in(sign):
    assert sign == '> '
    word = next(typed, EOFError)
    if not isinstance(word, str):
      raise word
    return word

  monkeypatch.setattr('builtins.input', type_in)
  shown = io.StringIO()
  terminal.talk(parrot, rich.console.Console(file=shown, width=100))
  return shown.getvalue().splitlines()


def test_terminal_shows_answers_until_the_user_has_enough(monkeypatch):
  parrot = Parrot()
  typed = ['a\x1b[2Jb', ' ', 'long', '/reset', 'c', '/quit', 'd']
  assert talk(parrot, monkeypatch, typed) == [
    'Ask something. /reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an '
    'answer.',
    'a[2Jb ',  # Without the character that clears a screen.
    'error: too long',
    'What was said is forgotten.',
    'c ',
  ]
  assert parrot.resets == 1
  assert talk(Parrot(), monkeypatch, [])[1:] == ['']  # Ctrl-D.


def test_interrupt_stops_an_answer_and_no_more(monkeypatch):
  parrot = Parrot()
  parrot.left_out = 2
  typed = [KeyboardInterrupt, 'a interrupt b', 'interrupt', 'c']
  left_out = 'The oldest 2 no longer fit: left out.'
  assert talk(parrot, monkeypatch, typed)[1:] == [
    *('', '/quit or Ctrl-D ends.'),
    *(left_out, 'a ', 'Stopped.'),
    *(left_out, '', 'Stopped.'),
    *(left_out, 'c ', ''),
  ]
  assert parrot.ends == ['a interrupt b', 'interrupt', 'c']


def test_terminal_is_told_from_a_pipe(monkeypatch):
  pty = pytest.importorskip('pty')
  held = []
  monkeypatch.setattr(terminal, 'talk', lambda *args: held.append(args))
  ends = pty.openpty()
  with os.fdopen(ends[1]) as stdin:
    monkeypatch.setattr(sys, 'stdin', stdin)
    terminal.run(Parrot())
  os.close(ends[0])
  assert held
