"""Pre-trains a LLaMA or a RoBERTa: text in, a trained model out.

Without options, and without network, it trains a small model on the sources of
the running Python's standard library. Configurations for real runs are in
configs/: choose one with --config FILE and override any field. With --objective
masked the model is a RoBERTa, which learns to guess tokens left out of a text.
The same command in the same run directory resumes where it stopped. With
TRAIN_LM_TRACEBACK set in the environment, an error shows where it arose.

  python train_lm.py
  python train_lm.py --objective masked
  python train_lm.py --config configs/llama_60m.py --data.source 'c4/*.json.gz'
"""

import os

# Read when jaxlib loads LAPACK, whose threads would fight over the cores with
# XLA's own: the small factorisations of a refresh took a hundred times as long.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import logging
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from gnlorp_jax import build, config, optim, results
from gnlorp_jax.training import metrics, sharding
from gnlorp_jax.training.checkpoint import Checkpointer, check_compatible
from gnlorp_jax.training.interrupt import StopRequest
from gnlorp_jax.training.state import TrainState

_logger = logging.getLogger('train_lm')


def main(args: list[str]) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  metrics.log_to_terminal()
  try:
    settings = config.parse(args, __doc__)
    if settings.dry_run:
      rows = build.dry_run(settings)
      sys.stdout.write(optim.format_report(rows) + '\n')
      return
    run = build.build(settings)
    results.finish(run, train(run))
  except (ValueError, OSError) as error:
    if 'TRAIN_LM_TRACEBACK' in os.environ:
      raise
    config.exit_with_message(error)


def train(run: build.Run) -> TrainState:
  """Trains to the last step, or to a signal that asks to stop."""
  settings = run.config
  folder = pathlib.Path(settings.run_dir)
  with (
    Checkpointer(
      folder / 'checkpoints', keep=settings.checkpoint_keep
    ) as saved,
    StopRequest() as stop,
  ):
    state = resume_or_start(run, saved)
    first = int(state.step)
    evaluate = Evaluation(run)
    stats = jax.jit(training_stats)

    def save(number: int) -> None:
      position = run.train_batches.get_state()
      saved.save(number, state, position, run.metadata)

    with (
      metrics.MetricsWriter(folder, first or None) as writer,
      metrics.progress(settings.steps, first) as show_progress,
    ):
      if first == 0:
        writer.write(0, evaluate(state.params))
      clock, health = Clock(run), Health(first, int(state.skipped))
      running = None
      for number in range(first + 1, settings.steps + 1):
        batch = sharding.put_batch(next(run.train_batches), run.mesh)
        state, values = run.train_step(state, batch)
        # One step ahead of the device, no more: a signal is honoured soon.
        jax.block_until_ready(running)
        running = values['loss']
        is_last = number == settings.steps
        # Not the first step after a resume: an interrupted run and a whole one
        # leave the same rows.
        if number % settings.log_every == 0 or is_last or number == 1:
          values = {f'train/{name}': v for name, v in values.items()}
          values |= stats(state.opt_state)
          row = clock.row(number, jax.device_get(values))
          writer.write(number, row)
          health.check(number, row)
          if 'train/tokens_per_second' in row:  # Not while compiling.
            show_progress(
              number, row['train/loss'], row['train/tokens_per_second']
            )
        if number % settings.eval_every == 0 or is_last:
          writer.write(number, evaluate(state.params))
          clock.restart(number)
        if number % settings.checkpoint_every == 0 or is_last:
          save(number)
          clock.restart(number)
        if stop.received and not is_last:
          save(number)
          saved.close()
          _logger.warning(
            '%s: saved step %d of %d in %s. The same command continues.',
            stop.received.name,
            number,
            settings.steps,
            folder,
          )
          raise SystemExit(128 + stop.received)
  return state


def resume_or_start(run: build.Run, saved: Checkpointer) -> TrainState:
  """The newest whole checkpoint of the run directory, or a fresh state."""
  metadata = saved.latest_metadata()
  if metadata is None:
    return run.new_state()
  check_compatible(metadata, run.metadata, run.config.run_dir)
  state, position, _ = saved.restore_latest(run.abstract_state)
  if int(state.step) > run.config.steps:
    raise ValueError(
      f'{run.config.run_dir} holds step {int(state.step)}, beyond '
      f'steps={run.config.steps}. Raise steps or use another run directory.'
    )
  run.train_batches.set_state(position)
  if int(state.step) == run.config.steps:
    _logger.info(
      '%s is finished at step %d: its results are written anew. Raise steps to '
      'go on.',
      run.config.run_dir,
      run.config.steps,
    )
    return state
  _logger.info('Resuming %s at step %d.', run.config.run_dir, int(state.step))
  if run.config.init_from is not None:
    _logger.info('init_from=%r is not read again.', run.config.init_from)
  return state


def training_stats(opt_state: Any) -> dict[str, jax.Array]:
  """What the optimizer did, per kernel and for all kernels together."""
  subspaces = optim.inspect.subspace_stats(opt_state)
  stats = {}
  for field in optim.inspect.SubspaceStats._fields:
    values = {name: getattr(s, field) for name, s in subspaces.items()}
    stats |= {f'{field}/{name}': value for name, value in values.items()}
    if values:
      stats[f'{field}/low_rank'] = sum(values.values()) / len(values)
  return stats


class Clock:
  """Adds to a row of metrics what follows from time and from the schedule."""

  def __init__(self, run: build.Run):
    self._run = run
    self._state_bytes = optim.inspect.tree_bytes(run.abstract_state.opt_state)
    self._tokens = run.config.batch_size * run.config.data.seq_len
    self._since: tuple[int, float] | None = None  # Set after compilation.

  def row(self, number: int, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """The metrics of step `number`; `values` must be on the host already."""
    row = {name: float(value) for name, value in values.items()}
    # The schedule counts the steps that were taken, not those left out.
    updates = number - 1 - int(row['train/skipped_steps'])
    row |= {
      'train/perplexity': float(np.exp(row['train/loss'])),
      'train/tokens': number * self._tokens,
      'optim/learning_rate': float(self._run.schedule(updates)),
      'optim/state_bytes': self._state_bytes,
    }
    now = time.perf_counter()
    if self._since is not None and number > self._since[0]:
      steps = number - self._since[0]
      row |= results.speed(
        self._run, steps * self._tokens / (now - self._since[1])
      )
    self._since = number, now
    return row

  def restart(self, number: int) -> None:
    """Leaves the time since the last row out of the next one's speed."""
    self._since = number, time.perf_counter()


class Health:
  """Tells of steps that were left out, and ends a run that cannot recover."""

  LIMIT = 100  # Steps in a row without a finite gradient.

  def __init__(self, number: int, skipped: int):
    self._last = number, skipped
    self._last_good = number

  def check(self, number: int, row: dict[str, Any]) -> None:
    """Judges a row of metrics; raises ValueError if going on is pointless."""
    if not np.isfinite(row['train/weight_norm']):
      raise ValueError(
        f'The weights are not finite at step {number}, and no step can mend '
        'them. Start from weights that are.'
      )
    steps = number - self._last[0]
    skipped = int(row['train/skipped_steps']) - self._last[1]
    self._last = number, int(row['train/skipped_steps'])
    if skipped < steps:
      self._last_good = number
    if skipped:
      _logger.warning(
        'Step %d: %d of the last %d steps had a gradient that is not finite '
        'and were left out.',
        number,
        skipped,
        steps,
      )
    if number - self._last_good >= self.LIMIT:
      raise ValueError(
        f'No gradient was finite in the last {number - self._last_good} steps: '
        'training has diverged. Restart with a lower optim.learning_rate or '
        'with clipping; check the data around this step.'
      )


class Evaluation:
  """Mean loss over the validation text, each token counted once."""

  def __init__(self, run: build.Run):
    self._run = run

  def __call__(self, params: Any) -> dict[str, float]:
    """Validation loss and perplexity of `params`."""
    limit = self._run.config.eval_batches
    batches = self._run.eval_batches()
    sums = []
    for number, batch in enumerate(batches):
      if limit is not None and number >= limit:
        break
      placed = sharding.put_batch(batch, self._run.mesh)
      sums.append(self._run.eval_step(params, placed))
    batches.close()
    losses, weights = np.asarray(jax.device_get(sums), np.float64).T
    loss = float(losses.sum() / max(weights.sum(), 1))
    return {'eval/loss': loss, 'eval/perplexity': float(np.exp(loss))}


if __name__ == '__main__':
  main(sys.argv[1:])
