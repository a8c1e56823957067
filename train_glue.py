"""Fine-tunes a RoBERTa on GLUE with GradNormLoRP and what it is compared with.

Without options, and without network, it trains a small model on a generated
task with three methods, and ends with their table. The same command in the same
run directory goes on where it stopped: finished runs are not repeated, and the
unfinished one continues at its batch. With TRAIN_GLUE_TRACEBACK set in the
environment, an error shows where it arose.

  python train_glue.py
  python train_glue.py --task mrpc,rte --method all --model roberta-base/
    --data.source glue/ --seeds 0,1,2 --learning-rates 1e-5,3e-5,1e-4
  python train_glue.py --task mine --data.train train.tsv --data.dev dev.tsv
    --data.text-columns question,answer --data.label-column y --model base/
"""

import os

# Read when jaxlib loads LAPACK, whose threads would fight over the cores with
# XLA's own: the small factorisations of a refresh took a hundred times as long.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import contextlib
import json
import logging
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import rich

from gnlorp_jax import config, finetune, finetune_data, glue_table
from gnlorp_jax.finetune_config import FinetuneConfig
from gnlorp_jax.glue_table import RESULT_FILE, Result
from gnlorp_jax.training import metrics, sharding
from gnlorp_jax.training.checkpoint import Checkpointer, check_compatible
from gnlorp_jax.training.interrupt import StopRequest
from gnlorp_jax.training.state import TrainState

_logger = logging.getLogger('train_glue')


def main(args: list[str]) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  metrics.log_to_terminal()
  try:
    settings = config.override(FinetuneConfig(), args, __doc__)
    if settings.dry_run:
      sys.stdout.write(finetune.dry_run(settings))
      return
    with StopRequest() as stop:
      train_all(settings, stop)
    results = glue_table.write(settings.run_dir)
    glue_table.show(results)
    _logger.info(
      'Results of all runs are in %s: results.json, results.md, results.png.',
      settings.run_dir,
    )
  except (ValueError, OSError) as error:
    if 'TRAIN_GLUE_TRACEBACK' in os.environ:
      raise
    config.exit_with_message(error)


def train_all(settings: FinetuneConfig, stop: StopRequest) -> None:
  """Every task with every method, learning rate and seed, one by one."""
  seeds, rates = settings.seed_numbers, settings.searched_rates
  tasks = finetune_data.find_tasks(settings)
  finetune.check(settings, tasks)
  _logger.info(
    'Tasks: %s. Methods: %s. Learning rates: %s. Seeds: %s.',
    ', '.join(task.name for task in tasks),
    ', '.join(settings.method_names),
    ', '.join(f'{rate:g}' for rate in rates or ()) or 'of the table or given',
    ', '.join(map(str, seeds)),
  )
  # All of them: a malformed row of the last one must not be found after days.
  for data in [finetune_data.load_task(settings, task) for task in tasks]:
    for method in settings.method_names:
      programs = {
        rate: finetune.program(settings, data, method, rate)
        for rate in rates or (None,)
      }
      first = {
        rate: run_once(finetune.make_run(program, seeds[0]), stop)
        for rate, program in programs.items()
      }
      best = best_rate(first) if rates else None
      for seed in seeds[1:]:
        run_once(finetune.make_run(programs[best], seed), stop)


def best_rate(first: dict[float, Result]) -> float:
  """The best of the searched learning rates, which is told."""
  best = glue_table.best_learning_rate(list(first.values()))
  result = first[best]
  metric = result['main_metric']
  tried = ', '.join(
    f'{rate:g}: {glue_table.worth(first[rate]["best"][metric]):.4f}'
    for rate in first
  )
  _logger.info(
    '%s %s: learning rate %g has the best %s on the dev set with seed %d (%s).',
    *(result['task'], result['method'], best, metric, result['seed'], tried),
  )
  return best


def run_once(run: finetune.Run, stop: StopRequest) -> Result:
  """The result of a run: read if it is finished, or else worked out."""
  path = run.folder / RESULT_FILE
  if path.is_file():
    result = json.loads(path.read_text(encoding='utf-8'))
    check_compatible(result['settings'], run.metadata, run.folder)
    remove_what_is_not_kept(run, result)  # A kill may have come in between.
    _logger.info('%s is finished already.', run.name)
    return result
  result = train(run, stop)
  glue_table.write(run.program.settings.run_dir, picture=False)
  if stop.received:  # Came while the run was finished.
    raise SystemExit(128 + stop.received)
  return result


def train(run: finetune.Run, stop: StopRequest) -> Result:
  """Trains to the last step, or to a signal that asks to stop."""
  parts, settings = run.program, run.program.settings
  check_every = finetune.eval_every(parts)
  peak = peak_bytes()
  with Checkpointer(run.folder / 'checkpoints', keep=2) as saved:
    state, frozen, record = resume_or_start(run, saved)
    first, clock = int(state.step), Clock(record)
    batches = finetune.train_batches(run, first)

    def save(number: int, *, wait: bool = False) -> None:
      saved.save(number, state, clock.update(record), run.metadata, wait=wait)

    def next_batch() -> tuple[tuple[int, ...], Any]:
      rows = {n: x for n, x in next(batches).items() if n != 'index'}
      placed = sharding.put_batch(rows, parts.compiled.mesh)
      return rows['tokens'].shape, placed

    with (
      Checkpointer(run.folder / 'best', keep=2) as best,
      metrics.MetricsWriter(run.folder, first or None) as writer,
      metrics.progress(
        parts.steps, first, name=run.name, console=rich.get_console()
      ) as show_progress,
    ):
      upcoming = next_batch()
      for number in range(first + 1, parts.steps + 1):
        shape, placed = upcoming
        with clock.step(shape):
          state, values = parts.compiled.train_step(state, placed, frozen)
          upcoming = next_batch()  # While the device works.
          jax.block_until_ready(values)
        is_last = number == parts.steps
        if number % settings.log_every == 0 or is_last or number == 1:
          row = {f'train/{n}': float(v) for n, v in values.items()}
          row['optim/learning_rate'] = float(
            # It counts the steps that were taken, not those left out.
            parts.schedule(number - 1 - int(values['skipped_steps']))
          )
          writer.write(number, row)
          if (seconds := clock.median()) is not None:
            tokens = math.prod(shape) / seconds
            show_progress(number, row['train/loss'], tokens)
        if number % check_every == 0 or is_last:
          found = finetune.evaluate(parts, state.params, frozen)
          writer.write(number, {f'eval/{n}': v for n, v in found.items()})
          if note(run, record, number, found):
            # Before the checkpoint, which must find what it calls the best.
            position = {'step': number}
            best.save(number, state.params, position, run.metadata, wait=True)
            save(number)
        every = settings.checkpoint_every or check_every
        if number % every == 0 or is_last:
          save(number)
        if stop.received and not is_last:
          save(number, wait=True)
          _logger.warning(
            '%s: saved step %d of %d of %s. The same command continues.',
            *(stop.received.name, number, parts.steps, run.name),
          )
          raise SystemExit(128 + stop.received)
  record = clock.update(record)
  record['skipped_steps'] = int(state.skipped)
  record['peak_device_bytes'] = risen(peak, peak_bytes())
  return finish(run, best_params(run, state, record), frozen, record)


def resume_or_start(
  run: finetune.Run, saved: Checkpointer
) -> tuple[TrainState, Any, dict[str, Any]]:
  """The newest whole checkpoint and its record, or a fresh start."""
  metadata = saved.latest_metadata()
  if metadata is None:
    remove_later(run.folder / 'best', 0)
    state, frozen = finetune.new_state(run)
    record = {'best': None, 'last': None, 'seconds_per_step': None}
    return state, frozen, record | {'wall_seconds': 0.0}
  check_compatible(metadata, run.metadata, run.folder)
  state, record, _ = saved.restore_latest(run.program.compiled.abstract_state)
  remove_later(run.folder / 'best', int(state.step))
  _logger.info('Resuming %s at step %d.', run.name, int(state.step))
  return state, finetune.frozen_params(run), record


def remove_later(folder: pathlib.Path, number: int) -> None:
  """Removes the best models that an interrupted run will find once more."""
  for path in folder.glob('[0-9]*'):
    if path.name.isdigit() and int(path.name) > number:
      shutil.rmtree(path)


def note(
  run: finetune.Run, record: dict[str, Any], number: int, found: dict
) -> bool:
  """Puts an evaluation into the record; whether it is the best so far."""
  metric = run.program.data.task.main_metric
  values = {n: v if math.isfinite(v) else None for n, v in found.items()}
  record['last'] = {'step': number, **values}
  before = record['best']
  is_best = before is None or (
    glue_table.worth(values[metric]) > glue_table.worth(before[metric])
  )
  if is_best:
    record['best'] = record['last']
  _logger.info(
    '%s: step %d, %s %.4f%s.',
    *(run.name, number, metric, found[metric], ', best' if is_best else ''),
  )
  return is_best


def best_params(run: finetune.Run, state: TrainState, record: dict) -> Any:
  """The parameters of the best evaluation."""
  if record['best']['step'] == int(state.step):
    return state.params
  with Checkpointer(run.folder / 'best', read_only=True) as best:
    found = best.restore_latest(run.program.compiled.abstract_state.params)
  if found is None or found[1]['step'] != record['best']['step']:
    raise ValueError(
      f'{run.folder} lacks its best model, that of step '
      f'{record["best"]["step"]}. Delete the folder to train it anew.'
    )
  return found[0]


def finish(
  run: finetune.Run, params: Any, frozen: Any, record: dict[str, Any]
) -> Result:
  """Writes predictions, export and result; then removes what is not kept."""
  settings = run.program.settings
  finetune.write_predictions(run, params, frozen)
  if settings.export or (settings.export is None and settings.is_single):
    finetune.export(run, params, frozen)
  result = finetune.describe(run) | record
  text = json.dumps(result, indent=2, allow_nan=False)
  glue_table.write_atomically(run.folder / RESULT_FILE, text + '\n')
  remove_what_is_not_kept(run, result)
  return result


def remove_what_is_not_kept(run: finetune.Run, result: Result) -> None:
  """Removes checkpoints of a finished run that were asked not to be kept."""
  keep = run.program.settings.keep
  if keep == 'all':
    return
  shutil.rmtree(run.folder / 'checkpoints', ignore_errors=True)
  for path in (run.folder / 'best').glob('*'):
    if keep == 'none' or path.name != str(result['best']['step']):
      shutil.rmtree(path)


class Clock:
  """Times steps, without those that compile, and the run as a whole."""

  def __init__(self, record: dict[str, Any]):
    self._before = record['wall_seconds'], record['seconds_per_step']
    self._began = time.perf_counter()
    self._shapes: set[tuple[int, ...]] = set()
    self._seconds: list[float] = []

  @contextlib.contextmanager
  def step(self, shape: tuple[int, ...]) -> Iterator[None]:
    """A context around a step; the first of a shape does not count."""
    began = time.perf_counter()
    yield
    if shape in self._shapes:
      self._seconds.append(time.perf_counter() - began)
    self._shapes.add(shape)

  def median(self) -> float | None:
    """Seconds of a step in this process; None before there are any."""
    return float(np.median(self._seconds)) if self._seconds else None

  def update(self, record: dict[str, Any]) -> dict[str, Any]:
    """The record with the times of now."""
    wall, seconds = self._before
    median = self.median()
    return record | {
      'wall_seconds': wall + time.perf_counter() - self._began,
      'seconds_per_step': seconds if median is None else median,
    }


def peak_bytes() -> int | None:
  """The most bytes this process has held on its first device, if known."""
  return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


def risen(before: int | None, after: int | None) -> int | None:
  """A peak that this run reached; None if an earlier one was as high."""
  return after if before is not None and after > before else None


if __name__ == '__main__':
  main(sys.argv[1:])
