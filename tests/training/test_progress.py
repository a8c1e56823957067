"""How far a run is, on a terminal and in a log."""

import io
import logging

import rich.console

from gnlorp_jax.training import progress


def test_terminal_shows_a_bar():
  screen = io.StringIO()
  console = rich.console.Console(file=screen, force_terminal=True, width=100)
  with progress.shown(100, start=50, console=console) as told:
    with told.doing('evaluating'):
      pass
    told.step(60, 2.34567, 12345.6)
  shown = screen.getvalue()
  assert 'step 50/100, evaluating' in shown
  assert 'step 50/100' in shown
  assert 'loss -' in shown
  assert 'step 60/100' in shown
  assert 'loss 2.3457' in shown
  assert '12,346 tokens/s' in shown
  assert 'ETA' in shown


def run_without_terminal(caplog, monkeypatch, steps, seconds_per_step):
  now = 1000.0
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now)
  caplog.set_level(logging.INFO)
  console = rich.console.Console(file=io.StringIO(), force_terminal=False)
  with progress.shown(
    10_000, 9_000, plain_interval=30, console=console
  ) as told:
    for step in steps:
      now = 1000.0 + (step - 9_000) * seconds_per_step
      told.step(step, 2.34567, 12345.6)
  assert console.file.getvalue() == ''
  return caplog.messages


def test_no_terminal_logs_a_line_now_and_then(caplog, monkeypatch):
  messages = run_without_terminal(caplog, monkeypatch, range(9_001, 9_071), 1)
  assert messages == [
    'step 9,001/10,000, loss 2.3457, 12,346 tokens/s',
    'step 9,031/10,000, loss 2.3457, 12,346 tokens/s, ETA 0:16:09',
    'step 9,061/10,000, loss 2.3457, 12,346 tokens/s, ETA 0:15:39',
  ]


def test_no_terminal_logs_the_first_time_what_else_takes_long(caplog):
  caplog.set_level(logging.INFO)
  console = rich.console.Console(file=io.StringIO(), force_terminal=False)
  with progress.shown(10, name='lora', console=console) as told:
    for what in ('evaluating', 'compiling the step', 'evaluating'):
      with told.doing(what):
        pass
  assert caplog.messages == [
    'lora: Evaluating ...',
    'lora: Compiling the step ...',
  ]


def test_no_terminal_logs_the_end(caplog, monkeypatch):
  messages = run_without_terminal(caplog, monkeypatch, (9_999, 10_000), 1)
  assert messages[-1] == (
    'step 10,000/10,000, loss 2.3457, 12,346 tokens/s, ETA 0:00:00'
  )
  assert len(messages) == 2


def test_time_left_is_not_told_before_there_is_a_pace(caplog, monkeypatch):
  (message,) = run_without_terminal(caplog, monkeypatch, (9_000,), 1)
  assert message.endswith('12,346 tokens/s')
