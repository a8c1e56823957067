"""Timing in turns: methods take a few steps each, then the next one does.

A machine that slows down then slows them all, and what is reported is the ratio
of two methods in the same round.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.common import harness
from benchmarks.common.methods import AbsentError

GRADIENTS = 3  # Different ones at most, used in turn.
APART = 2  # Steps before the counted ones: the first, and one to warm up.
ROUNDS = 5  # Wanted at least: turns are shortened for them.
REST = 0.05  # Seconds between turns: PyTorch's threads spin on for a while.
# Where a refresh's cost is from.
COUNTED = 'counted steps'
FIRST = 'first step'
Row = dict[str, Any]


class Method(Protocol):
  """Something whose steps are timed, built and compiled but not yet used."""

  compile_s: float | None = None  # Tracing and compiling.
  peak_bytes: int | None = None  # What it holds at most, where that is known.
  loss: float | None = None  # Of the first step, where there is one.

  def step(self, index: int) -> None:
    """One step with gradient or batch `index`, finished when it returns."""

  def refreshes(self, steps: int) -> float:
    """Refreshes of all bases together in the `steps` steps so far, if known."""
    return 0.0


class Turn(NamedTuple):
  """Consecutive steps of one method."""

  seconds: np.ndarray  # float64 [steps]
  refreshed: np.ndarray  # bool [steps]


class Racer:
  """A method with its counted steps; the first two are taken at once, apart.

  It takes `inputs` gradients or batches in turn.
  """

  def __init__(self, name: str, method: Method, inputs: int = GRADIENTS):
    self.name, self.method, self.turns = name, method, list[Turn]()
    self._inputs = inputs
    self.count = 0
    self.refreshes = 0.0
    first, second = self._steps(1), self._steps(1)
    self.first_s = float(first.seconds[0])
    self.second_s = float(second.seconds[0])
    self.first_refreshed = bool(first.refreshed[0])

  def _steps(self, steps: int) -> Turn:
    seconds, refreshed = [], []
    for _ in range(steps):
      start = time.perf_counter()
      self.method.step(self.count % self._inputs)
      seconds.append(time.perf_counter() - start)
      self.count += 1
      # What counts refreshes is not timed.
      refreshes = self.method.refreshes(self.count)
      refreshed.append(refreshes != self.refreshes)
      self.refreshes = refreshes
    return Turn(np.array(seconds), np.array(refreshed))

  def turn(self, steps: int) -> None:
    """Takes and times some steps."""
    self.turns.append(self._steps(steps))


def order(racers: Sequence[Racer], rounds: int) -> list[Racer]:
  """Who comes when in a round: a method may suffer from the one before it.

  After each round they move on by a place, and every other one is turned about.
  """
  first = rounds % len(racers)
  turned = [*racers[first:], *racers[:first]]
  return turned[::-1] if rounds % 2 else turned


def rounds(
  racers: Sequence[Racer],
  number: int,
  turn: int,
  *,
  least: int = 0,
  clock: harness.Clock | None = None,
  rest: float = REST,
) -> None:
  """Lets all take turns of `turn` steps, `number` of them each.

  With a clock there are no more than the `least` once its time is over.
  """
  for made in range(number):
    if clock and made >= least and not clock.seconds_left:
      break
    for racer in order(racers, made):
      time.sleep(rest)
      racer.turn(turn)


def race(
  names: Sequence[str],
  build: Callable[[str], Method],
  describe: Callable[[Racer, list[Racer]], Row],
  save: Callable[[list[Row]], None],
  clock: harness.Clock,
  *,
  steps: int,
  turn: int,
  inputs: int = GRADIENTS,
) -> list[Row]:
  """Builds methods, then lets them take turns until the steps are made.

  Args:
    names: What they are called.
    build: Makes one of them.
    describe: The row of a method, given all that run.
    save: Gets all rows after each method built and after each round.
    clock: When to stop, at the latest; each takes a turn in any case.
    steps: Counted steps that each should make.
    turn: Most steps in a row of one method.
    inputs: As of `Racer`.

  Returns:
    A row per name; what is absent or fails has the reason, the others go on.
  """
  racers, absent = list[Racer](), dict[str, str]()

  def rows() -> list[Row]:
    found = {racer.name: describe(racer, racers) for racer in racers}
    found |= {n: {'method': n, 'absent': why} for n, why in absent.items()}
    return [found[name] for name in names if name in found]

  for name in names:
    try:
      if racers and not clock.seconds_left:
        raise AbsentError('no time was left to build it')
      racers.append(Racer(name, build(name), inputs))
      harness.progress(f'  {name}: first step {racers[-1].first_s:.2f} s')
    except Exception as error:  # Whatever it raises is its row.
      absent[name] = reason(error)
      harness.progress(f'  {name}: absent, {absent[name]}')
    save(rows())
  a_round = sum(racer.second_s for racer in racers)
  fitting = clock.seconds_left / (ROUNDS * a_round) if racers else 0
  turn = max(int(min(turn, steps, fitting)), 1)
  made, last = 0, 0.0
  while racers and made < steps and (not made or clock.seconds_left > last):
    start = time.perf_counter()
    for racer in order(racers, made // turn):
      time.sleep(REST)
      try:
        racer.turn(turn)
      except Exception as error:
        racers.remove(racer)
        absent[racer.name] = reason(error)
        harness.progress(f'  {racer.name}: failed, {absent[racer.name]}')
    made, last = made + turn, time.perf_counter() - start
    save(rows())
    harness.progress(f'  {made} of {steps} steps')
  return rows()


def reason(error: Exception) -> str:
  """Why a method is absent: the first line of an error, and its kind."""
  if isinstance(error, AbsentError):
    return str(error)
  return f'{type(error).__name__}: {error}'.splitlines()[0]


def not_timed(rows: Sequence[Row]) -> str:
  """A list of the rows without turns, and why; Markdown."""
  text = ''
  for row in rows:
    if 'absent' in row:
      text += f'* {row["method"]}: absent, {row["absent"]}\n'
    elif 'median_s' not in row:
      text += f'* {row["method"]}: no time was left after its first step\n'
  return f'\n{text}' if text else ''


def known(racer: Racer) -> Row:
  """What is known of a method before its first turn."""
  method: Any = racer.method
  return {
    'method': racer.name,
    **{k: getattr(method, k) for k in ('state_bytes', 'peak_bytes')},
    **{'compile_s': method.compile_s, 'first_step_s': racer.first_s},
  }


def medians(turns: list[Turn]) -> np.ndarray:
  """The median step of each turn, seconds."""
  return np.array([np.median(turn.seconds) for turn in turns])


def quartiles(turns: list[Turn]) -> list[float]:
  """Quartiles over the turns of their median steps, seconds."""
  return np.percentile(medians(turns), [25, 50, 75]).tolist()


def ratio_quartiles(turns: list[Turn], others: list[Turn]) -> list[float]:
  """Quartiles of the ratio to another's medians, over rounds both have made."""
  rounds = min(len(turns), len(others))
  ratios = medians(turns[:rounds]) / medians(others[:rounds])
  return np.percentile(ratios, [25, 50, 75]).tolist()


def refresh_cost(racer: Racer, gap: int) -> tuple[float | None, str | None]:
  """Seconds that refreshes add to the mean step, and how they were found.

  From the counted steps where some of them refreshed: each of these is compared
  with the median of its turn's others, and steps at the same place of the
  interval, of `gap` steps, count by their median. Where none did although the
  first step fitted all bases: that step less the median, once per interval.
  None and None where nothing is refreshed, and where every step refreshes,
  which then is part of the step.
  """
  turns = racer.turns
  flags = np.concatenate([turn.refreshed for turn in turns])
  if flags.all():
    return None, None
  if not flags.any():
    if not racer.first_refreshed:
      return None, None
    return (racer.first_s - float(np.median(medians(turns)))) / gap, FIRST
  all_plain = np.concatenate([t.seconds[~t.refreshed] for t in turns])
  extra: dict[int, list[float]] = {}
  count = APART
  for seconds, refreshed in turns:
    # A turn may consist of refreshes only.
    plain = all_plain if refreshed.all() else seconds[~refreshed]
    for t, hit in zip(seconds, refreshed, strict=True):
      if hit:
        extra.setdefault(count % gap, []).append(t - np.median(plain))
      count += 1
  mean = float(np.mean([np.median(x) for x in extra.values()]))
  return mean * float(flags.mean()), COUNTED


def worst_step(racer: Racer, gap: int) -> tuple[float, float, int]:
  """The worst place of the interval, the worst step, and the fewest visits.

  Both in medians of the step's turn. A step's place in the interval of `gap`
  steps decides what work it has. Of the visits of a place the fastest counts,
  so that what the machine does beside is left out after two visits. Where the
  first step refreshed and no counted one did, it is a place of its own.
  """
  places: dict[int, list[float]] = {}
  turns = racer.turns
  relative = np.concatenate([t.seconds / np.median(t.seconds) for t in turns])
  for count, value in enumerate(relative, start=APART):
    places.setdefault(count % gap, []).append(float(value))
  worst = max(min(values) for values in places.values())
  largest = float(relative.max())
  if racer.first_refreshed and not any(t.refreshed.any() for t in turns):
    first = racer.first_s / float(np.median(medians(turns)))
    worst, largest = max(worst, first), max(largest, first)
  return worst, largest, min(map(len, places.values()))
