"""Says whether this code is worse than the figures that are recorded.

  python -m benchmarks.check               # six minutes, on a quiet machine
  python -m benchmarks.check step scaling  # some of it

runs short versions of the benchmarks below, each in a process of its own, and
compares what they find with benchmarks/results, name by name. It changes none
of these files. What is compared:

step     the optimizer step beside its peers', of LLaMA-60m
train    whole training steps beside PyTorch's, of LLaMA-20m
scaling  bytes of the optimizer states of all presets

A ratio (larger is better for this package) is `WORSE` if its upper quartile now
lies below the recorded lower one, and its median has fallen by more than 5 %;
`better` is the mirror image, and anything else is `same`. Bytes do not vary:
one more is `WORSE`. Records of another machine, or made with other packages,
are compared after saying so: ratios carry over in part.

The exit status is 1 if anything got worse; else 2 if a benchmark failed or
there was nothing to compare; else 0.
"""

import importlib
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.common import cases, harness, record
from benchmarks.common.tables import markdown, median_in_quartiles

CHECKS: dict[str, tuple[str, ...]] = {
  'step': (
    *('--shapes', '60m', '--dtypes', 'float32', '--ranks', '128'),
    *('--methods', 'floor', 'galore-torch', 'gradnormlorp', 'adamw'),
  ),
  # What it has no time for in a short run would delay the rest.
  'train': (
    *('--sizes', '20m', '--gap', '100', '--loss-chunk', '512', '--methods'),
    *('gradnormlorp', 'galore-torch', 'adamw', 'torch-adamw'),
    'torch-adamw-fused',
  ),
  'scaling': ('state',),
}
"""Benchmark: the options of a short run that covers what is worth checking.

A benchmark has a path RESULTS and functions of a record: `ratios`, of names to
(low, median, high), or `sizes`, of names to bytes, or both. One that draws has
a path PLOT and an option for it.
"""
TOLERANCE = 0.05  # Of a median.
NAMED = 8  # Of what only one record has.
WORSE, SAME, BETTER = 'WORSE', 'same', 'better'

Ratio = tuple[float, float, float]


class Line(NamedTuple):
  """One comparison, in words."""

  name: str
  recorded: str
  now: str
  verdict: str


class Outcome(NamedTuple):
  """What checking one benchmark came to."""

  lines: list[Line] = []  # What both records have.
  missing: list[str] = []  # Names that only the recorded one has.
  new: list[str] = []  # Names that only the fresh one has.
  differences: list[str] = []  # Of the two machines and their packages.
  failure: str | None = None  # Why there is nothing to compare.


def judge_ratio(recorded: Ratio, now: Ratio) -> str:
  """Whether a ratio fell or rose beyond both spreads and the tolerance."""
  low, median, high = now
  if high < recorded[0] and median < (1 - TOLERANCE) * recorded[1]:
    return WORSE
  if low > recorded[2] and median > (1 + TOLERANCE) * recorded[1]:
    return BETTER
  return SAME


def judge_bytes(recorded: int, now: int) -> str:
  """Whether a number of bytes grew or shrank."""
  if now == recorded:
    return SAME
  return WORSE if now > recorded else BETTER


def compare(module: Any, recorded: Any, fresh: Any) -> Outcome:
  """Compares two records of a benchmark with `ratios`, `sizes`, or both."""
  found = Outcome([], [], [], differences(recorded, fresh))
  for kind, judge, text in (
    ('ratios', judge_ratio, lambda ratio: median_in_quartiles(ratio, '.3f')),
    ('sizes', judge_bytes, '{:,}'.format),
  ):
    if hasattr(module, kind):
      before, now = (getattr(module, kind)(r) for r in (recorded, fresh))
      found.missing.extend(name for name in before if name not in now)
      found.new.extend(name for name in now if name not in before)
      found.lines.extend(
        Line(name, text(value), text(now[name]), judge(value, now[name]))
        for name, value in before.items()
        if name in now
      )
  return found


def _facts(node: Any) -> Iterator[tuple[str, str]]:
  """Names and values of machine and packages, wherever a record has them."""
  if isinstance(node, dict) and 'versions' in node:
    for key in ('cpu', 'cores', 'device', 'python'):
      yield key, str(node.get(key))
    for key, version in node['versions'].items():
      yield key, str(version)
  elif isinstance(node, dict):
    for value in node.values():
      yield from _facts(value)


def differences(recorded: Any, fresh: Any) -> list[str]:
  """What machine and packages of two records do not have in common."""
  before, now = list(_facts(recorded)), list(_facts(fresh))
  lines = []
  for key in dict.fromkeys(key for key, _ in before):
    old, new = ({v for k, v in facts if k == key} for facts in (before, now))
    if new - old:
      shown = [' / '.join(sorted(values)) for values in (old, new)]
      lines.append('{}: recorded {}, now {}'.format(key, *shown))
  return lines


def check(
  name: str, options: tuple[str, ...], device: str, minutes: float
) -> Outcome:
  """Runs a benchmark for a short time and compares it with its record."""
  try:
    module = importlib.import_module(f'benchmarks.{name}.measure')
  except ImportError as error:
    return Outcome(failure=f'cannot be imported: {error}')
  path = pathlib.Path(module.RESULTS)
  if device != 'cpu':
    path = path.with_name(f'{device}_{path.name}')
  if not path.exists():
    return Outcome(failure=f'nothing is recorded: there is no {path}')
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder, 'fresh.json')
    command = [sys.executable, '-m', f'benchmarks.{name}', *options]
    command += ['--device', device, '--minutes', str(minutes)]
    command += ['--output', str(output)]
    if hasattr(module, 'PLOT'):
      command += ['--plot', str(output.with_suffix('.png'))]
    # A benchmark finishes what it began when its time is over.
    limit = 3 * 60 * minutes + 120
    try:
      quiet = {'stdout': subprocess.DEVNULL, 'check': False}
      code = subprocess.run(command, timeout=limit, **quiet).returncode
    except subprocess.TimeoutExpired:
      return Outcome(failure=f'not done after {limit:.0f} s')
    if code or not output.exists():
      return Outcome(failure=f'ended with code {code}')
    return compare(module, record.read(path), record.read(output))


def report(name: str, outcome: Outcome) -> str:
  """An outcome as Markdown."""
  text = f'## {name}\n\n'
  if outcome.failure:
    return f'{text}Not compared: {outcome.failure}.\n'
  for difference in outcome.differences:
    text += f'* Not the same: {difference}\n'
  if outcome.lines:
    order = (WORSE, BETTER, SAME)
    lines = sorted(outcome.lines, key=lambda line: order.index(line.verdict))
    text += '\n' * bool(outcome.differences)
    text += markdown(['what', 'recorded', 'now', 'verdict'], lines)
  for title, names in (
    ('Recorded, not in this run', outcome.missing),
    ('In this run, not recorded', outcome.new),
  ):
    if names:
      more = len(names) - NAMED
      end = f'; and {more} more' if more > 0 else ''
      text += f'\n{title}: {"; ".join(names[:NAMED])}{end}.\n'
  return text


def main() -> None:
  """Runs the checks and ends with what they came to."""
  parser = harness.parser(__doc__)
  cases.add_parts(parser, CHECKS, 'check')
  add = parser.add_argument
  devices = 'where to run; of a gpu, the records gpu_*.json are compared with'
  add('--device', choices=harness.PLATFORMS, default='cpu', help=devices)
  add('--minutes', type=float, default=2, help='time for each benchmark (2)')
  args = parser.parse_args()
  verdicts, failed = [], False
  for name in args.names or CHECKS:
    harness.progress(f'Checking {name}')
    outcome = check(name, CHECKS[name], args.device, args.minutes)
    sys.stdout.write(report(name, outcome) + '\n')
    sys.stdout.flush()
    verdicts += [line.verdict for line in outcome.lines]
    failed = failed or outcome.failure is not None
  worse = verdicts.count(WORSE)
  sys.stdout.write(f'{worse} of {len(verdicts)} got worse.\n')
  if worse:
    raise SystemExit(1)
  raise SystemExit(2 if failed or not verdicts else 0)


if __name__ == '__main__':
  main()
