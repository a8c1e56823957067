"""What is watched while a run trains: its rows, its speed, its health."""

import logging
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.training import monitor
from gnlorp_jax.training.monitor import Clock, DivergedError, Health

# Rows.


def instruments(**changes):
  return monitor.Instruments(
    schedule=lambda count: 0.5 - 0.01 * count,
    stats=lambda opt_state: {},
    state_bytes=48,
  )._replace(**changes)


def test_row_tells_what_follows_from_a_step():
  values = {
    'train/loss': np.float32(2.0),
    'train/skipped_steps': np.int32(3),
    'energy/low_rank': np.float32(0.25),
  }
  row = instruments(tokens_per_step=32).row(10, values)
  assert row == {
    'train/loss': 2.0,
    'train/skipped_steps': 3.0,
    'energy/low_rank': 0.25,
    'train/perplexity': pytest.approx(np.exp(2.0)),
    'train/tokens': 320,
    # The schedule counts the steps that were taken: 6 before this one.
    'optim/learning_rate': pytest.approx(0.44),
    'optim/state_bytes': 48,
  }
  assert all(isinstance(value, float | int) for value in row.values())


def test_tokens_go_on_from_those_of_steps_of_another_size():
  values = {'train/loss': 2.0, 'train/skipped_steps': 0}
  row = instruments(tokens_per_step=32).row(10, values, (7, 100))
  assert row['train/tokens'] == 100 + 3 * 32
  assert instruments().tokens(10, (7, 0)) is None


def test_row_of_steps_of_many_lengths_has_no_perplexity():
  values = {'train/loss': 2.0, 'train/skipped_steps': 0}
  row = instruments().row(1, values)
  assert 'train/perplexity' not in row and 'train/tokens' not in row
  assert row['optim/learning_rate'] == 0.5


def test_speed_of_an_unknown_device_has_no_utilisation():
  expected = {'train/tokens_per_second': 1e6}
  assert instruments().speed(1e6) == expected
  assert instruments(flops_per_token=5.0).speed(1e6) == expected
  assert instruments(peak_flops=1e12).speed(1e6) == expected


def test_utilisation_is_flops_over_the_peak():
  found = instruments(flops_per_token=5e4, peak_flops=2e12).speed(1e6)
  assert found['train/tokens_per_second'] == 1e6
  assert found['train/mfu'] == pytest.approx(1e6 * 5e4 / 2e12)


# Time.


@pytest.fixture
def time(monkeypatch):
  """A clock that is set by hand, in seconds."""
  now = types.SimpleNamespace(seconds=100.0)
  fake = types.SimpleNamespace(perf_counter=lambda: now.seconds)
  monkeypatch.setattr(monitor, 'time', fake)
  return now


FRESH = {'wall_seconds': 0.0, 'seconds_per_step': None}
SHORT, LONG = np.zeros((2, 8)), np.zeros((2, 16))


def test_speed_leaves_out_compilations_and_what_is_no_step(time):
  clock = Clock(FRESH)
  assert clock.tokens_per_second() is None
  time.seconds += 60  # Compiles.
  clock.count(SHORT, None)
  assert clock.tokens_per_second() is None
  for _ in range(4):
    time.seconds += 0.5
    clock.count(SHORT, None)
  assert clock.tokens_per_second() == pytest.approx(16 / 0.5)
  assert clock.tokens_per_second() is None  # None since.
  time.seconds += 0.5
  clock.count(SHORT, None)
  time.seconds += 30  # Compiles for another length: what was counted is lost.
  clock.count(LONG, None)
  assert clock.tokens_per_second() is None
  time.seconds += 0.25
  clock.count(LONG, None)
  time.seconds += 0.75
  clock.count(SHORT, None)
  assert clock.tokens_per_second() == pytest.approx((32 + 16) / 1.0)
  time.seconds += 20  # An evaluation.
  clock.restart()
  time.seconds += 2
  clock.count(SHORT, None)
  assert clock.tokens_per_second() == pytest.approx(16 / 2)


def test_record_has_the_median_step_and_the_time_of_all_processes(time):
  clock = Clock(FRESH)
  time.seconds += 9
  clock.count(SHORT, None)
  assert clock.update({'best': 1}) == {
    'best': 1, 'wall_seconds': 9.0, 'seconds_per_step': None,
  }  # fmt: skip
  clock.count(SHORT, None)  # Dispatched: the next one waits for it.
  for seconds in (1, 2, 6):
    time.seconds += seconds
    clock.count(SHORT, None)
  record = clock.update({})
  assert record == {'wall_seconds': 18.0, 'seconds_per_step': 2.0}
  time.seconds += 1000  # Nobody trains.
  resumed = Clock(record)
  time.seconds += 5
  assert resumed.update({}) == {'wall_seconds': 23.0, 'seconds_per_step': 2.0}
  resumed.count(SHORT, None)
  resumed.count(SHORT, None)
  time.seconds += 4
  resumed.count(SHORT, None)
  assert resumed.update({}) == {'wall_seconds': 27.0, 'seconds_per_step': 4.0}


def test_dispatching_after_what_is_no_step_is_no_time_of_a_step(time):
  clock = Clock(FRESH)
  clock.count(SHORT, None)
  for _ in range(3):  # Each step has an evaluation behind it.
    time.seconds += 0.02
    clock.count(SHORT, None)
    time.seconds += 50
    clock.restart()
  assert clock.update({})['seconds_per_step'] is None
  for _ in range(2):
    time.seconds += 0.02
    clock.count(SHORT, None)
    time.seconds += 7
  assert clock.update({})['seconds_per_step'] == pytest.approx(7.02)


def test_step_that_compiled_is_waited_for(time, monkeypatch):
  waited = []
  monkeypatch.setattr(jax, 'block_until_ready', waited.append)
  clock = Clock(FRESH)
  for name, tokens in (('a', SHORT), ('b', SHORT), ('c', LONG), ('d', SHORT)):
    clock.count(tokens, name)
  assert waited == ['a', 'c']


# Health.


def test_health_warns_of_skipped_steps_and_ends_what_has_diverged(caplog):
  health = Health(10, 3)
  row = {'train/weight_norm': 1.0}
  with caplog.at_level(logging.WARNING):
    health.check(20, {**row, 'train/skipped_steps': 3})
    assert not caplog.messages
    health.check(30, {**row, 'train/skipped_steps': 5})
    assert caplog.messages == [
      'Step 30: 2 of the last 10 steps had a gradient that is not finite and '
      'were left out.'
    ]
    health.check(120, {**row, 'train/skipped_steps': 95})
    with pytest.raises(ValueError, match='No gradient was finite in the last'):
      health.check(130, {**row, 'train/skipped_steps': 105})


def test_one_finite_gradient_is_enough_to_go_on():
  health = Health(0, 0)
  for number in range(50, 1000, 50):
    row = {
      'train/weight_norm': 1.0,
      'train/skipped_steps': number - number / 50,
    }
    health.check(number, row)


def test_divergence_says_how_long_and_what_to_do():
  health = Health(0, 0)
  with pytest.raises(DivergedError) as error:
    health.check(150, {'train/weight_norm': 1.0, 'train/skipped_steps': 150})
  assert str(error.value) == (
    'No gradient was finite in the last 150 steps: training has diverged. '
    'Restart with a lower optim.learning_rate or with clipping; check the data '
    'around this step.'
  )


def test_weights_are_checked_whatever_holds_them():
  monitor.check_weights(3, {'codes': jnp.arange(3), 'empty': jnp.ones((0, 2))})
  monitor.check_weights(3, {})
  text = (
    'The weights are not finite at step 3, and no step can mend them. Start '
    'from weights that are, or lower optim.learning_rate. They are not saved; '
    'checkpoints of earlier steps stay. Where one of this step is there, '
    'delete it, and the one before it is used.'
  )
  for bad in (jnp.inf, jnp.nan):
    scales = jnp.ones((2, 3), jnp.bfloat16).at[1, 2].set(bad)
    with pytest.raises(monitor.DivergedError, match=f'^{re.escape(text)}$'):
      monitor.check_weights(3, {'codes': jnp.arange(3), 'scales': scales})


@pytest.mark.parametrize('norm', [np.nan, np.inf])
def test_weights_that_are_not_finite_end_a_run_at_once(norm):
  with pytest.raises(DivergedError) as error:
    Health(4, 0).check(5, {'train/weight_norm': norm, 'train/skipped_steps': 0})
  assert str(error.value) == (
    'The weights are not finite at step 5, and no step can mend them. Start '
    'from weights that are, or lower optim.learning_rate.'
  )
  assert isinstance(error.value, ValueError)  # A user's mistake, as others.


# Memory.


def test_peak_of_an_earlier_run_is_not_told():
  assert monitor.risen(5, 7) == 7
  assert monitor.risen(7, 7) is None
  assert monitor.risen(None, None) is None


def test_peak_is_that_of_the_first_device(monkeypatch):
  assert monitor.peak_bytes() is None  # A CPU does not tell.
  device = types.SimpleNamespace(memory_stats=lambda: {'peak_bytes_in_use': 9})
  monkeypatch.setattr(monitor.jax, 'local_devices', lambda: [device])
  assert monitor.peak_bytes() == 9
