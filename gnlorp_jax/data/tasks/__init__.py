"""Questions for a language model: one task one file, whose name is its name.

A task is read from files on this machine, in the formats in which it is passed
around (`records`, and the files of the tasks), and put into the words of
EleutherAI's lm_eval, so that scores can be compared with published ones.
"""

import difflib
import functools
import importlib
import inspect
import pathlib
import pkgutil
from collections.abc import Callable, Sequence

from gnlorp_jax.data.tasks.questions import Choice, FreeAnswer, Task

__all__ = [
  'Choice',
  'FreeAnswer',
  'Task',
  'check_data',
  'get',
  'names',
  'suggest',
]


def names() -> tuple[str, ...]:
  """Names of the tasks: modules that hold a function of their own name.

  It takes the folder of the files first, which tells it from what tasks share,
  such as `records`.
  """
  return tuple(_readers())


def get(
  name: str,
  data: str | pathlib.Path,
  *,
  shots: int | None = None,
  limit: int | None = None,
) -> Task:
  """Reads a task.

  Args:
    name: Name of a module of this package, such as ``arc_easy``.
    data: Folder with the task's files, which may lie in folders in it; or the
      file of the questions itself.
    shots: Solved questions that stand before each; None is what the task is
      usually asked with.
    limit: Take the first questions only, of MMLU those of each subject; None
      takes all.

  Returns:
    The task.

  Raises:
    ValueError: If there is no such task, a file is missing, damaged or one of
      another task, or a number is outside its interval.
  """
  if name not in names():
    raise ValueError(
      f'Unknown task {name!r}; expected one of {names()}.'
      f'{suggest(name, names())}'
    )
  if shots is not None and shots < 0:
    raise ValueError(f'shots={shots} must not be negative.')
  if limit is not None and limit < 1:
    raise ValueError(f'limit={limit} must be positive, or None for all.')
  path = pathlib.Path(data).expanduser()
  if not path.exists():
    raise ValueError(
      f'data={str(data)!r} does not exist. Name a folder with the files of the '
      'tasks.'
    )
  if path.is_file():
    _check_name(name, path)
  return _readers()[name](path, shots=shots, limit=limit)


def suggest(name: str, known: Sequence[str]) -> str:
  """The end of an error: which known name a misspelt one may mean, or ''."""
  near = difflib.get_close_matches(name.lower(), known, n=1)
  return f' Did you mean {near[0]!r}?' if near else ''


def check_data(
  names: Sequence[str], data: str | None, prefix: str = ''
) -> None:
  """Raises ValueError if several tasks are to be read from one file.

  Args:
    names: Names of tasks.
    data: Their folder, or the file of one.
    prefix: What stands before the names of the settings in an error.
  """
  if data is None or len(names) < 2:
    return
  if pathlib.Path(data).expanduser().is_file():
    raise ValueError(
      f'{prefix}data names one file, {data}, and {prefix}tasks {len(names)} '
      'tasks: name their folder.'
    )


def _check_name(name: str, path: pathlib.Path) -> None:
  """Raises ValueError if a file has the name of one of another task."""
  for other in names():
    if other != name and _is_named_for(other, path):
      raise ValueError(
        f'{path} has the name of a file of {other}, and is asked as {name}. '
        f'Name the file of {name}, or the folder of both.'
      )


def _is_named_for(task: str, path: pathlib.Path) -> bool:
  module = importlib.import_module(f'{__name__}.{task}')
  patterns = (*getattr(module, 'FILES', ()), *getattr(module, 'EXAMPLES', ()))
  return any(
    path.absolute().match(pattern)
    for pattern in patterns
    # Not those that any task may have, such as test.jsonl.
    if task in pattern.lower().replace('-', '_')
  )


@functools.cache
def _readers() -> dict[str, Callable[..., Task]]:
  # Imported when asked for: they import the parts that lie beside them.
  modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
  found = {
    name: getattr(importlib.import_module(f'{__name__}.{name}'), name, None)
    for name in modules
  }
  return {name: f for name, f in found.items() if f and _takes_data(f)}


def _takes_data(function: Callable[..., Task]) -> bool:
  return next(iter(inspect.signature(function).parameters), None) == 'data'
