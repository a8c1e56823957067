"""Turns of made-up methods: who comes when, what counts, and what fails."""

import types

import numpy as np
import pytest

from benchmarks.common import turns
from benchmarks.common.methods import AbsentError


class Still:
  """A clock that stands still: results do not hang on the machine's load."""

  def __init__(self, seconds_left):
    self.seconds_left = seconds_left


class Counting(turns.Method):
  """Steps without work; the step with number `fails` raises."""

  def __init__(self, fails=None, gap=4):
    self.fails, self.gap, self.seen = fails, gap, []

  def step(self, index):
    self.seen.append(index)
    if len(self.seen) == self.fails:
      raise RuntimeError('out of memory\nand much more')

  def refreshes(self, steps):
    return -(-steps // self.gap)


def race(made, clock=None, steps=4, turn=2):
  saved = []

  def build(name):
    if isinstance(made[name], Exception):
      raise made[name]
    return made[name]

  rows = turns.race(
    *(list(made), build, lambda racer, racers: row(racer, racers)),
    *(saved.append, clock or Still(1e6)),
    **{'steps': steps, 'turn': turn, 'inputs': 3},
  )
  assert saved[-1] == rows
  return rows, saved


def row(racer, racers):
  known = {'method': racer.name, 'steps': racer.count - turns.APART}
  return known | ({'median_s': 1.0} if racer.turns else {})


def test_everyone_takes_its_steps_and_inputs_in_turn(monkeypatch):
  monkeypatch.setattr(turns, 'REST', 0)
  made = {'a': Counting(), 'b': Counting()}
  rows, saved = race(made)
  assert rows == [
    {'method': 'a', 'steps': 4, 'median_s': 1.0},
    {'method': 'b', 'steps': 4, 'median_s': 1.0},
  ]
  assert made['a'].seen == made['b'].seen == [0, 1, 2, 0, 1, 2]
  # After each method built, after each round.
  assert [len(rows) for rows in saved] == [1, 2, 2, 2]
  racer = turns.Racer('a', Counting(), 1)
  turns.rounds([racer], number=2, turn=3)
  flags = [turn.refreshed.tolist() for turn in racer.turns]
  assert racer.first_refreshed and flags == [[False, False, True], [False] * 3]


def test_what_fails_is_a_row_and_the_others_go_on(monkeypatch):
  monkeypatch.setattr(turns, 'REST', 0)
  made = {
    'at once': Counting(fails=1),
    'good': Counting(),
    'later': Counting(fails=5),
    'absent': AbsentError('not installed: No module named torch'),
  }
  rows, _ = race(made)
  why = 'RuntimeError: out of memory'
  assert rows == [
    {'method': 'at once', 'absent': why},
    {'method': 'good', 'steps': 4, 'median_s': 1.0},
    {'method': 'later', 'absent': why},
    {'method': 'absent', 'absent': 'not installed: No module named torch'},
  ]
  assert turns.not_timed([*rows, {'method': 'slow', 'first_step_s': 9.0}]) == (
    f'\n* at once: absent, {why}\n* later: absent, {why}\n'
    '* absent: absent, not installed: No module named torch\n'
    '* slow: no time was left after its first step\n'
  )
  assert turns.not_timed(rows[1:2]) == ''


def test_without_time_one_method_takes_one_turn():
  rows, _ = race({'a': Counting(), 'b': Counting()}, clock=Still(0.0), turn=3)
  assert rows == [
    {'method': 'a', 'steps': 1, 'median_s': 1.0},
    {'method': 'b', 'absent': 'no time was left to build it'},
  ]


def racer_of(*known, first_refreshed=False, first_s=0.0):
  return types.SimpleNamespace(
    turns=list(known), first_refreshed=first_refreshed, first_s=first_s
  )


def test_worst_step_and_refresh_cost_of_known_times():
  plain, refresh = 0.1, 0.3
  usual = np.array([plain, plain, refresh, plain])
  flags = np.array([False, False, True, False])
  disturbed = usual.copy()
  disturbed[0] = 1.0  # Something else ran; its place was fine before.
  racer = racer_of(turns.Turn(usual, flags), turns.Turn(disturbed, flags))
  worst, largest, visits = turns.worst_step(racer, gap=4)
  assert worst == pytest.approx(0.3 / 0.2)  # Median of the second: 0.2.
  assert largest == pytest.approx(1.0 / 0.2)
  assert visits == 2
  cost, source = turns.refresh_cost(racer, gap=4)
  assert cost == pytest.approx((refresh - plain) / 4)
  assert source == turns.COUNTED
  none = turns.Turn(np.array([0.1, 0.2, 0.1]), np.zeros(3, bool))
  racer = racer_of(none, first_refreshed=True, first_s=2.1)
  cost, source = turns.refresh_cost(racer, gap=100)
  assert cost == pytest.approx(2.0 / 100)
  assert source == turns.FIRST
  assert turns.worst_step(racer, gap=100) == (
    pytest.approx(21),
    pytest.approx(21),
    1,
  )
  racer = racer_of(none, first_s=2.1)  # Like AdamW's.
  assert turns.refresh_cost(racer, gap=100) == (None, None)
  assert turns.worst_step(racer, gap=100)[0] == pytest.approx(2)
  always = turns.Turn(np.array([0.1, 0.2]), np.ones(2, bool))
  assert turns.refresh_cost(racer_of(always), gap=100) == (None, None)


def test_ratios_of_turns():
  flags = np.zeros(2, bool)
  mine = [turns.Turn(np.array([x, x]), flags) for x in (1.0, 2.0, 6.0, 9.0)]
  other = [turns.Turn(np.array([2.0, 2.0]), flags)] * 3
  assert turns.ratio_quartiles(mine, other) == [0.75, 1.0, 2.0]


def test_everyone_comes_once_in_a_round_and_in_other_places():
  orders = [''.join(turns.order('abcd', rounds)) for rounds in range(4)]
  assert orders == ['abcd', 'adcb', 'cdab', 'cbad']
  seven = {turns.order('abcdefg', rounds)[0] for rounds in range(0, 14, 2)}
  assert seven == set('abcdefg')
