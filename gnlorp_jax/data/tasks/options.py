"""Tasks of questions with options in one file, and examples in another."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from gnlorp_jax.data.tasks import records
from gnlorp_jax.data.tasks.questions import Choice, Task, solved

Reader = Callable[[pathlib.Path, int | None], list[Choice]]


def make(
  name: str,
  data: pathlib.Path,
  read: Reader,
  *,
  files: Sequence[str],
  examples: Sequence[str],
  shots: int | None,
  limit: int | None,
  has_acc_norm: bool = True,
) -> Task:
  """A task of one file of questions and another of examples.

  Args:
    name: The task.
    data: Folder with its files, or the file of the questions.
    read: Reads the first questions of a file, or all for None.
    files: Where the questions may lie in that folder.
    examples: Where others may lie, of which the first are shown solved.
    shots: How many of these are shown; None: none.
    limit: Take the first questions only; None takes all.
    has_acc_norm: As in `Task`.

  Returns:
    The task.

  Raises:
    ValueError: If a file is missing or damaged, or has too few examples.
  """
  before = ''
  if shots:
    folder = data.parent if data.is_file() else data
    path = records.find(name, folder, examples)
    before = solved(enough(path, read(path, shots), shots))
  return Task(
    name=name,
    questions=[
      question._replace(context=before + question.context)
      for question in read(records.find(name, data, files), limit)
    ],
    shots=shots or 0,
    has_acc_norm=has_acc_norm,
  )


def prompted(task: str, prompt: str, num_options: int | None = None) -> Reader:
  """A reader of what `records.questions` reads.

  Args:
    task: The task.
    prompt: What becomes of a question: its text takes the place of ``{}``.
    num_options: Options that a question of the task has; None: any number.

  Returns:
    A function (path, limit).
  """
  return lambda path, limit: [
    Choice(prompt.format(question.text), question.options, question.answer)
    for question in records.questions(
      path, limit, task=task, num_options=num_options
    )
  ]


def enough(path: pathlib.Path, found: list[Any], shots: int) -> list[Any]:
  """The examples of a file; ValueError where there are less than `shots`."""
  if len(found) < shots:
    raise ValueError(
      f'shots={shots}, but {path} has {len(found)} examples. Ask for fewer.'
    )
  return found
