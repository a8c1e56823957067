"""What every benchmark has: a device, a time budget, an environment to name.

A script adds its own options to those of `add_arguments`, and calls `start`
before it touches an array. Rows come in the order of their worth, and those
that no longer fit the time are left out.
"""

import argparse
import datetime
import fnmatch
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax

from benchmarks.common import record

PACKAGES = (
  *('jax', 'optax', 'flax', 'torch', 'transformers', 'galore-torch'),
  *('apollo-torch', 'bitsandbytes', 'peft'),
)
PLATFORMS = {'cpu': 'cpu', 'gpu': 'cuda'}
BUSY = 0.25  # Load per core above which figures are in doubt.


def parser(doc: str) -> argparse.ArgumentParser:
  """A command line whose help is the text at the top of a file, as it is."""
  path = pathlib.Path(sys.argv[0])
  name = path.parent.name if path.stem == '__main__' else path.stem
  return argparse.ArgumentParser(
    prog=f'python -m benchmarks.{name}',
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def add_arguments(
  parser: argparse.ArgumentParser,
  output: pathlib.Path,
  *,
  minutes: float | None = None,
  plot: pathlib.Path | None = None,
  has_device: bool = True,
) -> None:
  """Adds the options that benchmarks share.

  These are --output and --report; --device, unless nothing is measured on one;
  and --minutes and --plot where they have a default here.
  """
  add = parser.add_argument
  if has_device:
    where = 'where to measure (default: %(default)s)'
    add('--device', choices=tuple(PLATFORMS), default='cpu', help=where)
  if minutes is not None:
    rest = 'what no longer fits is left out and named (default: %(default)s)'
    time_help = f'time for everything; {rest}'
    add('--minutes', type=float, default=minutes, help=time_help)
  file = (
    'JSON file, written after every row; the default is the record of this '
    'benchmark, whose figures are replaced (default: %(default)s)'
  )
  add('--output', type=pathlib.Path, default=output, help=file)
  if plot is not None:
    add('--plot', type=pathlib.Path, default=plot, help='picture')
  pages = 'write the recorded figures into docs/results, with their pictures'
  add('--report', action='store_true', help=f'measure nothing: {pages}')


def start(args: argparse.Namespace) -> 'Clock':
  """Chooses the device, warns of a busy machine, and starts the clock.

  Raises:
    SystemExit: If jax finds no such device, or --minutes is no time.
  """
  if not 0 <= args.minutes < float('inf'):
    raise SystemExit(f'--minutes {args.minutes:g} must be finite, 0 or more.')
  jax.config.update('jax_platforms', PLATFORMS[args.device])
  try:
    jax.devices()
  # An absent plugin is an assertion of jax's, without a text.
  except (RuntimeError, AssertionError) as error:
    raise SystemExit(
      f'--device {args.device}: jax finds none ({error or "no plugin"}). '
      'Install the `cuda` extra on a machine with an NVIDIA GPU, or use '
      '--device cpu.'
    ) from error
  load = os.getloadavg()[0]
  if load > BUSY * cores():
    progress(
      f'Warning: the load is {load:.1f} before anything is measured. Other '
      'processes slow some methods more than others; stop them, or take the '
      'figures for indications.'
    )
  return Clock(args.minutes)


def add_methods(
  parser: argparse.ArgumentParser,
  names: Iterable[str],
  default: Iterable[str],
  turn: int,
) -> None:
  """Adds --methods, patterns of names for `select`, and how they take turns.

  These are --gap, steps between two refreshes, and --turn, the most steps in a
  row of a method, which is `turn` by default.
  """
  add = parser.add_argument
  known = 'names or patterns as of a shell, quoted, of: ' + ', '.join(names)
  add('--methods', nargs='+', default=default, metavar='NAME', help=known)
  add('--gap', type=positive, default=200, help='steps between two refreshes')
  turns = 'most steps in a row of a method'
  add('--turn', type=positive, default=turn, help=turns)


def positive(text: str) -> int:
  """The type of an option that counts something.

  Raises:
    argparse.ArgumentTypeError: If it is less than 1.
  """
  if (number := int(text)) < 1:
    raise argparse.ArgumentTypeError(f'must be at least 1, got {number}')
  return number


def add_counts(
  parser: argparse.ArgumentParser, *counts: tuple[str, int, str]
) -> None:
  """Adds options that count something: name, default, and help."""
  for name, default, text in counts:
    text += ' (default: %(default)s)'
    parser.add_argument(
      name, type=positive, default=default, metavar='N', help=text
    )


class Clock:
  """The time that a benchmark has left: some minutes from now."""

  def __init__(self, minutes: float):
    self._deadline = time.monotonic() + 60 * minutes

  @property
  def seconds_left(self) -> float:
    """What is left, at least 0."""
    return max(self._deadline - time.monotonic(), 0.0)

  def share(self, parts: int) -> 'Clock':
    """A clock with an equal share of what is left, for one of `parts` rows."""
    return Clock(self.seconds_left / max(parts, 1) / 60)


def select(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
  """The names that shell-style patterns fit, in their order, each once.

  Raises:
    ValueError: If a pattern fits none.
  """
  names = list(names)
  found: dict[str, None] = {}
  for pattern in patterns:
    fitting = fnmatch.filter(names, pattern)
    if not fitting:
      raise ValueError(
        f'No method is called {pattern!r}; there are {", ".join(names)}.'
      )
    found |= dict.fromkeys(fitting)
  return list(found)


def cores() -> int:
  """CPU cores that this process may use."""
  return len(os.sched_getaffinity(0))


def progress(line: str) -> None:
  """Says on the standard error how far it is."""
  sys.stderr.write(line + '\n')
  sys.stderr.flush()


def environment() -> dict[str, Any]:
  """What the figures depend on beside the code."""
  versions = {}
  for package in PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  text = cpuinfo.read_text() if cpuinfo.exists() else ''
  cpu = re.search(r'model name\s*: (.*)', text)
  return {
    'date': datetime.date.today().isoformat(),
    'commit': record.commit(),
    'cpu': cpu[1] if cpu else platform.machine(),
    'cores': cores(),
    'device': jax.devices()[0].device_kind,
    'load_at_start': os.getloadavg()[0],
    'python': platform.python_version(),
    'versions': versions,
  }
