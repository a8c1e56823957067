"""Bars on the terminal of commands that take a while."""

import contextlib
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

# Opens a bar of that title; its value takes how much is done, and is there.
Progress = Callable[
  [str], contextlib.AbstractContextManager[Callable[[int, int], None]]
]


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
  """A progress bar on the terminal; its value takes what is done, and is there.

  Args:
    title: What is under way.
  """
  columns = (
    rich.progress.TextColumn('{task.description}', markup=False),
    rich.progress.BarColumn(bar_width=None),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn('ETA'),
    rich.progress.TimeRemainingColumn(),
  )
  # In a notebook rich would ask for ipywidgets.
  console = rich.console.Console(stderr=True, force_jupyter=False)
  with rich.progress.Progress(*columns, console=console, expand=True) as shown:
    task = shown.add_task(title, total=None)
    yield lambda done, total: shown.update(task, completed=done, total=total)
