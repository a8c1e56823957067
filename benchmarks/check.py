"""Says whether this code is worse than the figures that are recorded.

  python -m benchmarks.check               # six minutes, on a quiet machine
  python -m benchmarks.check step scaling  # some of it

runs short versions of the benchmarks below, each in a process of its own, and
compares what they find with the records in benchmarks/results, name by name. It
changes none of these files. What is compared:

step      the optimizer step beside its peers', of LLaMA-60m
train     whole training steps beside PyTorch's, of LLaMA-20m
scaling   bytes of the optimizer states of all presets

A ratio (larger is better for this package) has a median and the quartiles of
its turns. It is `WORSE` if its upper quartile now lies below the recorded lower
one, so that the spreads of both runs are apart, and its median has fallen by
more than 5 %; `better` is the mirror image, and anything else is `same`. Bytes
do not vary: one more is `WORSE`. Records of another machine, or made with other
packages, are compared all the same, after saying so: ratios carry over in part.

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
  """What checking one benchmark came to.

  Attributes:
    lines: What both records have.
    missing: Names that only the recorded one has.
    new: Names that only the fresh one has.
    differences: What else is different between the two: machine, packages.
    failure: Why there is nothing to compare, or None.
  """

  lines: list[Line] = []
  missing: list[str] = []
  new: list[str] = []
  differences: list[str] = []
  failure: str | None = None


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
    if not hasattr(module, kind):
      continue
    before, after = (getattr(module, kind)(r) for r in (recorded, fresh))
    found.missing.extend(name for name in before if name not in after)
    found.new.extend(name for name in after if name not in before)
    found.lines.extend(
      Line(name, text(value), text(after[name]), judge(value, after[name]))
      for name, value in before.items()
      if name in after
    )
  return found


def environments(node: Any) -> Iterator[dict[str, Any]]:
  """The descriptions of machines in a record, see `harness.environment`."""
  if isinstance(node, dict):
    if 'versions' in node:
      yield node
    else:
      for value in node.values():
        yield from environments(value)


def differences(recorded: Any, fresh: Any) -> list[str]:
  """What machine and packages of two records do not have in common."""

  def facts(found: Any) -> dict[str, set[str]]:
    known: dict[str, set[str]] = {}
    for place in environments(found):
      values = {k: place.get(k) for k in ('cpu', 'cores', 'device', 'python')}
      for key, value in {**values, **place['versions']}.items():
        known.setdefault(key, set()).add(str(value))
    return known

  before, now = facts(recorded), facts(fresh)
  return [
    f'{key}: recorded {" / ".join(sorted(before[key]))}, now '
    f'{" / ".join(sorted(now[key]))}'
    for key in before
    if key in now and not now[key] <= before[key]
  ]


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
    command = [
      *(sys.executable, '-m', f'benchmarks.{name}', *options),
      *('--device', device, '--minutes', str(minutes)),
      *('--output', str(output)),
    ]
    if hasattr(module, 'PLOT'):
      command += ['--plot', str(output.with_suffix('.png'))]
    try:
      code = subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        # A benchmark finishes what it began when its time is over.
        timeout=3 * 60 * minutes + 120,
        check=False,
      ).returncode
    except subprocess.TimeoutExpired as error:
      return Outcome(failure=f'not done after {error.timeout:.0f} s')
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


def status(outcomes: list[Outcome]) -> int:
  """The exit status, see the top of the file."""
  lines = [line for outcome in outcomes for line in outcome.lines]
  if any(line.verdict == WORSE for line in lines):
    return 1
  failed = any(outcome.failure for outcome in outcomes)
  return 2 if failed or not lines else 0


def main() -> None:
  """Runs the checks and ends with what they came to."""
  parser = harness.parser(__doc__)
  cases.add_parts(parser, CHECKS, 'check')
  add = parser.add_argument
  devices = 'where to run; of a gpu, the records gpu_*.json are compared with'
  add('--device', choices=harness.PLATFORMS, default='cpu', help=devices)
  add('--minutes', type=float, default=2, help='time for each benchmark (2)')
  args = parser.parse_args()
  outcomes = []
  for name in args.names or CHECKS:
    harness.progress(f'Checking {name}')
    outcome = check(name, CHECKS[name], args.device, args.minutes)
    sys.stdout.write(report(name, outcome) + '\n')
    sys.stdout.flush()
    outcomes.append(outcome)
  verdicts = [line.verdict for outcome in outcomes for line in outcome.lines]
  worse = verdicts.count(WORSE)
  sys.stdout.write(f'{worse} of {len(verdicts)} got worse.\n')
  raise SystemExit(status(outcomes))


if __name__ == '__main__':
  main()
