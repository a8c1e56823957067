"""Whose classifier a folder holds: which of its outputs is which class.

A classifier fits a task if its classes are the task's. How many there are says
nothing: the order may be another, and so may the question.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_TASK = 'finetuning_task'
# Names that transformers gives, and numbers: every classifier may have them.
_NAMELESS = r'(LABEL_)?\d+'


class Head(NamedTuple):
  """What of a folder's classifier a task takes."""

  outputs: tuple[int, ...] | None
  """Which output is each class of the task; None: a new classifier."""
  why: str
  """Why a new one, as the end of a sentence about the folder's."""


NEW = Head(None, 'a new one was asked for')
"""Takes nothing of a folder's classifier."""


def match(
  hf_config: dict[str, Any], labels: Sequence[str], task: str | None = None
) -> Head:
  """Finds the classes of a task among those of a folder's classifier.

  It fits if it names the same classes, in any order and in any spelling of
  cases, blanks and hyphens, and is of the same task where it says of which.
  Where names say nothing (``LABEL_0``, ``1``, the output of a regression) it
  must say that it is of this task.

  Args:
    hf_config: The folder's `config.json`, with `id2label` and, as `describe`
      writes it, `finetuning_task`.
    labels: Names of the task's classes in the order of their ids; none for a
      regression.
    task: Name of the task; None, where it has none, asks for classes alone.

  Returns:
    The outputs to take, or why there are none.
  """
  names = _class_names(hf_config)
  source = hf_config.get(_TASK)
  if None not in (task, source) and _folded(str(source)) != _folded(task):
    return Head(None, f'it is of the task {source!r}')
  if task is not None and source is None and _say_nothing(names):
    return Head(None, 'neither a task nor names of classes say of what')
  if not labels:
    if len(names) > 1:
      return Head(None, f'its classes are {names}')
    return Head((0,), '')
  # Classes of the task that differ in their case alone stay apart.
  spelling: Callable[[str], str] = _folded
  if len(set(map(_folded, labels))) < len(labels):
    spelling = str
  found = [spelling(name) for name in names]
  wanted = [spelling(label) for label in labels]
  if sorted(found) != sorted(wanted):
    return Head(None, f'its classes are {names}')
  return Head(tuple(found.index(label) for label in wanted), '')


def describe(labels: Sequence[str], task: str | None = None) -> dict[str, Any]:
  """Fields of a `config.json` that `match` reads, and transformers.

  Args:
    labels: Names of the classes; none for a regression.
    task: Name of the task, if it has one.
  """
  names = tuple(labels) or ('LABEL_0',)
  return {
    'id2label': {str(i): name for i, name in enumerate(names)},
    'label2id': {name: i for i, name in enumerate(names)},
    'problem_type': 'single_label_classification' if labels else 'regression',
    **({} if task is None else {_TASK: task}),
  }


def _class_names(hf_config: dict[str, Any]) -> tuple[str, ...]:
  """Names of the outputs in their order; none where they are not all named."""
  names = hf_config.get('id2label')
  if not isinstance(names, dict):
    return ()
  names = {str(i): str(name) for i, name in names.items()}
  numbers = [str(i) for i in range(len(names))]
  return tuple(names[i] for i in numbers) if set(numbers) == set(names) else ()


def _say_nothing(names: Sequence[str]) -> bool:
  return all(re.fullmatch(_NAMELESS, name) for name in names)


def _folded(name: str) -> str:
  return re.sub(r'[\s-]+', '_', name.strip().casefold())
