"""What every benchmark has: a device, a time budget, an environment to name.

A script adds its own options to those of `add_arguments`, calls `start` before
it touches an array, and gives `Clock` what it is about to do: rows come in the
order of their worth, and those that no longer fit the time are left out.
"""

import argparse
import datetime
import fnmatch
import importlib.metadata
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterable
from typing import Any

# As in train_lm.py: OpenBLAS's threads would fight with those of XLA. PyTorch
# has a LAPACK of its own and keeps all its threads.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

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
  return argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
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
    add(
      '--device',
      choices=tuple(PLATFORMS),
      default='cpu',
      help='where to measure (default: %(default)s)',
    )
  if minutes is not None:
    add(
      '--minutes',
      type=float,
      default=minutes,
      help='time for everything; what no longer fits is left out and named '
      '(default: %(default)s)',
    )
  add(
    '--output',
    type=pathlib.Path,
    default=output,
    help='JSON file, written after every row (default: %(default)s)',
  )
  if plot is not None:
    add('--plot', type=pathlib.Path, default=plot, help='picture')
  add(
    '--report',
    action='store_true',
    help='measure nothing: write the recorded figures into the pages of '
    'docs/results, and draw their pictures again',
  )


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


class Clock:
  """The time that a benchmark has left.

  Args:
    minutes: All of it, from now.
  """

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
  """The methods that shell-style patterns fit.

  Args:
    patterns: Names, or patterns such as ``gradnormlorp*``.
    names: Of all methods.

  Returns:
    Names, in the order of the patterns, each once.

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
  cpu = platform.machine()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    lines = [x for x in cpuinfo.read_text().splitlines() if 'model name' in x]
    cpu = lines[0].split(':')[1].strip() if lines else cpu
  return {
    'date': datetime.date.today().isoformat(),
    'commit': record.commit(),
    'cpu': cpu,
    'cores': cores(),
    'device': jax.devices()[0].device_kind,
    'load_at_start': os.getloadavg()[0],
    'python': platform.python_version(),
    'versions': versions,
  }
