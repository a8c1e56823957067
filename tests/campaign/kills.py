r"""Kills small runs at any moment, resumes them, and compares what they leave.

  python -m tests.campaign.kills --minutes 60
  python -m tests.campaign.kills --minutes 5 --only GLUE --seed 3
  python -m tests.campaign.kills --minutes 60 --disk
  python -m tests.campaign.kills --minutes 60 --read-only

Every configuration runs once undisturbed. Then trials follow, one configuration
after the other, until the time is over: the command runs in an empty folder and
is killed with SIGKILL, up to five times, either at a random time or just after
a path has appeared that the undisturbed run made too (part of a checkpoint, an
export, a plot, a cache, a report), and at last runs to its end. A trial is good
if all that it left equals what the undisturbed run left, bit for bit, with
nothing more beside it. What failed is kept and told; the exit status is 1 then.

With --disk, as root of a Linux, a run is not killed: it has a disk of its own,
which is full from that moment until the run has ended, by itself, with a clear
message. With --read-only, as root of a Linux too, the folders that it writes to
are read-only from that moment on, and it has to end likewise.
"""

import argparse
import collections
import contextlib
import itertools
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gnlorp_jax.disk import writing
from tests.campaign import trees
from tests.campaign.configurations import (
  CONFIGURATIONS,
  OUTPUT,
  Configuration,
  write_inputs,
)
from tests.read_only import read_only

MOST_KILLS = 5  # Of a trial.
PATIENCE = 120.0  # Seconds in which a run notices that the disk is full.
_DISK = 64  # MiB.
_FILLER = 'filler'
TIMEOUT = 600.0  # Seconds of a process.
_LOOK = 0.002  # Seconds between two looks at a folder.
# What a path is part of; the first that fits.
_KINDS = {
  'checkpoint': 'checkpoints|best',
  'export': r'hf|safetensors|tokenizer|^out|\.merge',
  'cache': 'cache|tokens-',
  'plot': r'\.png',
  'report': 'json|txt|md',
}


Strike = Callable[[subprocess.Popen[bytes], pathlib.Path], None]


class Undisturbed(NamedTuple):
  """What a configuration does when nobody disturbs it.

  Attributes:
    left: What it leaves behind, as `trees.digest` tells it.
    paths: All that appeared while it ran, names of chance taken out.
    seconds: How long it ran, with its programs compiled.
  """

  left: dict[str, Any]
  paths: list[str]
  seconds: float


def kind_of(path: str) -> str:
  """Which part of a run a path belongs to."""
  for kind, pattern in _KINDS.items():
    if re.search(pattern, path):
      return kind
  return 'other'


def pattern_of(path: str) -> str:
  """A path without what differs from run to run: long hexadecimal numbers."""
  return re.sub(r'[0-9a-f]{6,}|\d{4,}', '*', path)


def paths_in(folder: pathlib.Path) -> Iterator[str]:
  """All paths in a folder in which others write and remove."""
  for parent, folders, files in os.walk(folder):
    for name in (*folders, *files):
      yield os.path.relpath(os.path.join(parent, name), folder)


def start(
  configuration: Configuration, root: pathlib.Path, folder: pathlib.Path
) -> subprocess.Popen[bytes]:
  """Starts a configuration in a folder, in a session of its own."""
  with (folder.parent / f'{folder.name}.log').open('ab') as log:
    return subprocess.Popen(
      configuration.command(root),
      cwd=folder,
      env=configuration.environment(root),
      stdout=log,
      stderr=log,
      start_new_session=True,
    )


def wait(process: subprocess.Popen[bytes], folder: pathlib.Path) -> None:
  """Waits for the end.

  Raises:
    RuntimeError: If it takes too long or fails, with its last words.
  """
  try:
    status = process.wait(TIMEOUT)
  except subprocess.TimeoutExpired:
    kill(process, folder)
    raise RuntimeError(f'still running after {TIMEOUT:.0f} s') from None
  if status:
    log = (folder.parent / f'{folder.name}.log').read_text(errors='replace')
    raise RuntimeError(f'exit status {status}: {log[-1500:]}')


def kill(process: subprocess.Popen[bytes], folder: pathlib.Path) -> None:
  """Kills a process and its children."""
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def fill(process: subprocess.Popen[bytes], folder: pathlib.Path) -> None:
  """Fills the disk until a process has ended.

  Raises:
    RuntimeError: If it does not end, or not with a message.
  """
  filler = folder / _FILLER
  with contextlib.suppress(OSError), filler.open('wb', buffering=0) as file:
    while True:
      file.write(bytes(4096))
  with contextlib.ExitStack() as stack:
    stack.callback(filler.unlink)
    _await_message(process, folder, 'on a full disk')


def close(process: subprocess.Popen[bytes], folder: pathlib.Path) -> None:
  """Makes folders read-only until a process has ended.

  What it has open already it may write to, as on a disk that fails.

  Raises:
    RuntimeError: If it does not end, or not with a message.
  """
  with contextlib.ExitStack() as stack:
    found = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    for path in found:
      stack.enter_context(read_only(path))
    _await_message(process, folder, f'with {len(found)} read-only folders')


def _await_message(
  process: subprocess.Popen[bytes], folder: pathlib.Path, where: str
) -> None:
  """Waits for a process that cannot write any more.

  Raises:
    RuntimeError: If it does not end, or not with a message.
  """
  log = folder.parent / f'{folder.name}.log'
  begin = log.stat().st_size
  try:
    status = process.wait(PATIENCE)
  except subprocess.TimeoutExpired:
    kill(process, folder)
    raise RuntimeError(f'runs on {PATIENCE:.0f} s {where}') from None
  words = log.read_bytes()[begin:].decode(errors='replace')
  if 'Traceback' in words or (status and 'error' not in words):
    raise RuntimeError(f'{where}, exit status {status}: {words[-1500:]}')


@contextlib.contextmanager
def own_disk(folder: pathlib.Path) -> Iterator[None]:
  """Mounts a small disk at a folder."""
  options = ['-t', 'tmpfs', '-o', f'size={_DISK}M']
  subprocess.run(['mount', *options, 'none', str(folder)], check=True)
  try:
    yield
  finally:
    subprocess.run(['umount', str(folder)], check=True)


def undisturbed(
  configuration: Configuration, root: pathlib.Path, folder: pathlib.Path
) -> Undisturbed:
  """Runs a configuration twice: to compile, and to see what it does."""
  for name in ('compiling', 'undisturbed'):
    found = folder / name
    found.mkdir(parents=True)
    begin = time.monotonic()
    process, seen = start(configuration, root, found), {}
    while process.poll() is None and time.monotonic() < begin + TIMEOUT:
      seen |= dict.fromkeys(map(pattern_of, paths_in(found)))
      time.sleep(_LOOK)
    wait(process, found)
    seconds = time.monotonic() - begin
  first = trees.digest(folder / 'compiling')
  left = trees.digest(folder / 'undisturbed')
  differing = trees.differences(left, first)
  if differing:
    raise RuntimeError(f'two undisturbed runs differ: {differing}')
  return Undisturbed(left, list(seen), seconds)


def disturb(
  process: subprocess.Popen[bytes],
  folder: pathlib.Path,
  quiet: Undisturbed,
  rng: random.Random,
  strike: Strike,
) -> str | None:
  """Strikes a process at some moment.

  Returns:
    The kind of moment; None if the process ended before it came.
  """
  by_kind = collections.defaultdict(list)
  for path in quiet.paths:
    by_kind[kind_of(path)].append(path)
  kind = rng.choice(['any time', *sorted(by_kind)])
  before = set(map(pattern_of, paths_in(folder)))
  waited = [p for p in by_kind[kind] if p not in before]
  # A path that is there already does not appear: any time will do then.
  path = rng.choice(waited) if waited else None
  delay = rng.uniform(0, 0.05 if path else 1.2 * quiet.seconds)
  begin = time.monotonic()
  while process.poll() is None and time.monotonic() < begin + TIMEOUT:
    is_there = path is None or path in map(pattern_of, paths_in(folder))
    if is_there:
      time.sleep(min(delay, 0.05))
      delay -= 0.05
    if is_there and delay <= 0 and process.poll() is None:
      strike(process, folder)
      return 'any time' if path is None else kind
    time.sleep(0 if is_there else _LOOK)
  return None


def trial(
  configuration: Configuration,
  root: pathlib.Path,
  folder: pathlib.Path,
  quiet: Undisturbed,
  rng: random.Random,
  strike: Strike = kill,
) -> list[str]:
  """Strikes and resumes a configuration until its end.

  Returns:
    The kinds of moments at which it was struck.

  Raises:
    RuntimeError: If it does not end well, or as the undisturbed one.
  """
  kinds: list[str] = []
  for _ in range(rng.randint(1, MOST_KILLS)):
    process = start(configuration, root, folder)
    kind = disturb(process, folder, quiet, rng, strike)
    if kind is None:
      wait(process, folder)
    else:
      kinds.append(kind)
    if not configuration.overwrites and (folder / OUTPUT).exists():
      # Killed as it cleaned up: the next command of that name does.
      writing.sweep(folder, writing.prefix_of(folder / OUTPUT))
      break
  else:
    wait(start(configuration, root, folder), folder)
  differing = trees.differences(trees.digest(folder), quiet.left)
  if differing:
    raise RuntimeError(f'after kills at {kinds}: {differing}')
  return kinds


def campaign(
  names: list[str],
  minutes: float,
  seed: int,
  root: pathlib.Path,
  strike: Strike = kill,
) -> dict[str, Any]:
  """Trials of all configurations in turn, until the time is over.

  Args:
    names: Of `CONFIGURATIONS`.
    minutes: After that many no further trial begins.
    seed: Of the moments.
    root: An empty folder. What failed stays in it.
    strike: `kill`, `fill` or `close`.

  Returns:
    Counts of trials and of kills by kind, and what failed.
  """
  end = time.monotonic() + 60 * minutes
  write_inputs(root)
  quiet: dict[str, Undisturbed] = {}
  kinds: collections.Counter[str] = collections.Counter()
  trials: collections.Counter[str] = collections.Counter()
  failures = []
  for number, name in enumerate(itertools.cycle(names)):
    if time.monotonic() > end:
      break
    folder = root / f'{number:04d}'
    configuration = CONFIGURATIONS[name]
    try:
      if name not in quiet:
        quiet[name] = undisturbed(configuration, root, folder)
      rng = random.Random(f'{seed} {number}')
      tried = folder / 'trial'
      tried.mkdir(parents=True)
      with own_disk(tried) if strike is fill else contextlib.nullcontext():
        found = trial(configuration, root, tried, quiet[name], rng, strike)
    except RuntimeError as error:
      failures.append({'trial': number, 'name': name, 'error': str(error)})
      say(f'{number} {name}: FAILED {error}')
      if name not in quiet:
        names = [other for other in names if other != name]
      continue
    trials[name] += 1
    kinds.update(found)
    say(f'{number} {name}: {", ".join(found) or "not killed"}')
    shutil.rmtree(folder)
  return {
    'seed': seed,
    'trials': dict(trials),
    'kills': dict(kinds),
    'failures': failures,
  }


def say(text: str) -> None:
  """Writes a line at once."""
  sys.stdout.write(f'{text}\n')
  sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
  """Runs a campaign; returns 1 if a trial failed."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--minutes', type=float, default=30.0, help='default: %(default)s')
  add('--only', default='', help='configurations whose name has this')
  add('--seed', type=int, default=0, help='of the moments')
  add('--disk', action='store_true', help='fill the disk instead of killing')
  add('--read-only', action='store_true', help='make folders read-only instead')
  add('--folder', type=pathlib.Path, help='an empty one; default: temporary')
  add('--output', type=pathlib.Path, help='a JSON file of what was found')
  args = parser.parse_args(arguments)
  names = [name for name in CONFIGURATIONS if args.only in name]
  if not names:
    parser.error(f'--only {args.only!r}: there are {list(CONFIGURATIONS)}.')
  root = args.folder or pathlib.Path(tempfile.mkdtemp(prefix='campaign'))
  root.mkdir(parents=True, exist_ok=True)
  # Orbax warns of every checkpoint that it reads without a device.
  logging.getLogger('absl').setLevel(logging.ERROR)
  strike = fill if args.disk else close if args.read_only else kill
  found = campaign(names, args.minutes, args.seed, root.resolve(), strike)
  text = json.dumps(found, indent=2)
  if args.output:
    args.output.write_text(f'{text}\n')
  say(text)
  if not found['failures'] and args.folder is None:
    shutil.rmtree(root)
  return 1 if found['failures'] else 0


if __name__ == '__main__':
  sys.exit(main())
