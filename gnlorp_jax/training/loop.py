"""The training loop: the only one there is.

A recipe describes what it trains as a `Run`; `train` takes it from its first
step, or from its newest checkpoint, to its last. `steps` is the bare loop, for
whoever wants nothing written.
"""

import contextlib
import logging
import pathlib
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import rich

from gnlorp_jax.training import (
  distributed,
  metrics,
  monitor,
  positions,
  progress,
  sharding,
)
from gnlorp_jax.training.checkpoint import Checkpointer
from gnlorp_jax.training.compatibility import Since, check_compatible
from gnlorp_jax.training.interrupt import Interrupted, StopRequest
from gnlorp_jax.training.keeper import Found, Keeper, Record
from gnlorp_jax.training.monitor import (
  Clock,
  Health,
  Instruments,
  peak_bytes,
  risen,
)
from gnlorp_jax.training.selection.selection import Selection
from gnlorp_jax.training.state import TrainState

_logger = logging.getLogger(__name__)


class Every(NamedTuple):
  """How many steps lie between two ..."""

  log: int  # rows of metrics,
  evaluate: int  # evaluations,
  checkpoint: int  # checkpoints.
  evaluate_first: bool = False  # Whether the first one comes before step 1.


class Run(NamedTuple):
  """Everything that `train` needs, built and checked.

  Attributes:
    name: What to call it beside other runs of the program; may be empty.
    folder: Where its checkpoints and metrics go.
    steps: Number of steps of the whole run.
    mesh: The devices.
    abstract_state: Shapes and shardings of the training state.
    start: Makes the state at step 0 and the constants.
    train_step: Compiled: (state, batch, constants) -> (state, metrics); the
      state is donated.
    batches: An iterator over host batches with an array ``inputs`` ``[B, T]``,
      and with `get_state()` and `set_state(state)` for its position, which
      does not depend on the size of batches.
    evaluate: Maps (parameters, constants) to numbers by name.
    instruments: What rows of metrics say besides.
    metadata: What a checkpoint must agree with.
    accepted: Names in it that may differ.
    since: How metadata of older checkpoints is read.
    every: How often things are done.
    keep: Number of checkpoints kept.
    constants: Makes the constants, such as frozen weights, of a run that
      resumes; a pytree that steps neither differentiate nor change.
    better: ``better(found, best)``: whether an evaluation is better than the
      best so far. With it, the best parameters are kept in ``best/``.
    patience: The run ends early after so many evaluations in a row of which
      none is better than the best; None: it takes all its steps. Needs
      `better`.
    select: Chooses the batch to train on from a larger one on the devices; its
      memory stands in checkpoints beside the state.
    log: Where rows of metrics go beside the folder.
    renew: ``renew(state)``: a state that was read, with what the settings of
      now decide in it, such as learning rates.
    batch_size: Rows of a batch of `batches`, those of all processes together;
      None does not check it.
  """

  name: str
  folder: pathlib.Path
  steps: int
  mesh: jax.sharding.Mesh
  abstract_state: TrainState
  start: Callable[[], tuple[TrainState, Any]]
  train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  batches: Any
  evaluate: Callable[[Any, Any], dict[str, float]]
  instruments: Instruments
  metadata: dict[str, Any]
  every: Every
  keep: int = 3
  constants: Callable[[], Any] = dict
  better: Callable[[Found, Found], bool] | None = None
  patience: int | None = None
  log: metrics.Log | None = None
  select: Selection | None = None
  renew: Callable[[TrainState], TrainState] | None = None
  accepted: tuple[str, ...] = ()
  since: Since = Since()
  batch_size: int | None = None


class Outcome(NamedTuple):
  """What `train` leaves.

  Attributes:
    params: The trained parameters: the best ones where a run keeps those,
      otherwise the last.
    constants: What the steps took beside them.
    record: ``last`` and ``best`` evaluation with their ``step`` (None before
      the first), ``since_best`` (evaluations after the best one),
      ``wall_seconds``, ``seconds_per_step``, ``skipped_steps`` and
      ``peak_device_bytes``.
  """

  params: Any
  constants: Any
  record: Record


class Taken(NamedTuple):
  """A step that was dispatched."""

  number: int
  state: TrainState  # After it; gone when the next step is dispatched.
  batch: Any  # On the devices.
  metrics: dict[str, jax.Array]
  memory: Any = None  # Of the selection.
  facts: dict[str, float] = {}  # Of the choice of its batch.


def steps(
  train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
  state: TrainState,
  batches: Iterable[Any],
  mesh: jax.sharding.Mesh,
  numbers: Iterable[int],
  *constants: Any,
  select: Selection | None = None,
  memory: Any = None,
  batch_size: int | None = None,
) -> Iterator[Taken]:
  """Takes training steps, one ahead of the device.

  Args:
    train_step: As in `Run`.
    state: The state to start from; it is donated.
    batches: Host batches.
    mesh: The devices.
    numbers: The numbers of the steps to take.
    *constants: What the step takes beside state and batch.
    select: As in `Run`.
    memory: Of the selection; None begins anew.
    batch_size: As in `Run`.

  Yields:
    Each step. When it is yielded the device may still work on it, but not on
    the one before: a signal is honoured soon.
  """
  batches, running = iter(batches), None
  facts: dict[str, float] = {}
  if select is not None and memory is None:
    memory = select.start()
  for number in numbers:
    batch = sharding.put_batch(next(batches), mesh, batch_size)
    if select is not None:
      memory, batch, facts = select.choose(memory, state, batch, *constants)
    state, values = train_step(state, batch, *constants)
    jax.block_until_ready(running)
    running = values['loss']
    yield Taken(number, state, batch, values, memory, facts)


def train(run: Run, stop: StopRequest) -> Outcome:
  """Trains to the last step, to the end of patience, or to a signal to stop.

  Args:
    run: The run. A folder that holds checkpoints is resumed.
    stop: Tells of signals.

  Returns:
    What it leaves.

  Raises:
    SystemExit: After a signal, to any process of the run, when everything is
      saved; 128 plus its number.
    DivergedError: If going on is pointless.
    ValueError: If the folder holds a run with other settings, or there is
      patience and no best evaluation.
  """
  _check(run)
  peak = peak_bytes()
  stop.agree = distributed.Stop(run.mesh).agree
  with contextlib.ExitStack() as stack:
    saved = stack.enter_context(
      Checkpointer(run.folder / 'checkpoints', keep=run.keep)
    )
    state, memory, constants, record, trained = _resume_or_start(run, saved)
    first = int(state.step)
    before = first, trained
    clock, health = Clock(record), Health(first, int(state.skipped))
    keeper = stack.enter_context(_keeper(run, record, first))
    write, sync, told = stack.enter_context(_opened(run, first, record))

    def save(number: int, *, wait: bool = False) -> None:
      monitor.check_weights(number, state.params)
      sync()  # A checkpoint has the rows before it on the disk.
      tokens = run.instruments.tokens(number, before)
      position = _position(run, clock.update(keeper.record), tokens)
      kept = _kept(state, memory)
      saved.save(number, kept, position, run.metadata, wait=wait)

    def evaluate(number: int) -> None:
      try:
        with told.doing('evaluating'):
          found = run.evaluate(state.params, constants)
      except Interrupted as interrupted:
        save(number, wait=True)
        raise _stopped(run, number, interrupted.received) from None
      if found:
        write(number, {f'eval/{name}': v for name, v in found.items()})
        monitor.tell(run.name, number, found)
      if keeper.note(number, found, state.params):
        # After the best model, which the checkpoint must find.
        save(number)
      clock.restart()

    if _evaluates(run, first, record['last']):
      evaluate(first)
    for step in steps(
      *(_telling(run.train_step, told), state, run.batches, run.mesh),
      () if keeper.gives_up else range(first + 1, run.steps + 1),
      constants,
      select=run.select,
      memory=memory,
      batch_size=run.batch_size,
    ):
      number, state, memory = step.number, step.state, step.memory
      clock.count(step.batch['inputs'], step.metrics)
      is_last = number == run.steps
      # Not the first step after a resume: an interrupted run and a whole one
      # leave the same rows.
      if number % run.every.log == 0 or is_last or number == 1:
        row = _row(run.instruments, step, clock, before)
        write(number, row)
        health.check(number, row)
        if (speed := row.get('train/tokens_per_second')) is not None:
          told.step(number, row['train/loss'], speed)
      if number % run.every.evaluate == 0 or is_last:
        evaluate(number)
        is_last = is_last or keeper.gives_up
      if number % run.every.checkpoint == 0 or is_last:
        save(number)
        clock.restart()
      received = stop.agree(stop.received)
      if received and not is_last:
        save(number, wait=True)
        raise _stopped(run, number, received)
      if is_last:
        break
    if keeper.gives_up:
      told = (run.name, run.steps, run.patience, keeper.record)
      monitor.tell_early_end(*told)
    record = clock.update(keeper.record) | {
      'skipped_steps': int(state.skipped),
      'peak_device_bytes': risen(peak, peak_bytes()),
    }
    params = keeper.best_params(state)
  return Outcome(params, constants, record)


def _check(run: Run) -> None:
  """Raises ValueError if parts of a run, or processes, do not fit."""
  if run.patience is not None and run.better is None:
    raise ValueError(
      f'patience={run.patience} counts evaluations since the best one, and '
      'this run keeps no best. Keep it, or leave patience out.'
    )
  distributed.check_shared_folder(run.folder)
  distributed.check_same('metadata', run.metadata)


def _keeper(run: Run, record: Record, first: int) -> Keeper:
  """What keeps a run's best parameters, all of them there."""
  keeper = Keeper(
    *(run.folder / 'best', run.better, run.patience),
    *(run.abstract_state.params, run.metadata, record),
  )
  keeper.check(first)
  return keeper


@contextlib.contextmanager
def _opened(run: Run, first: int, record: Record) -> Iterator[Any]:
  """What writes rows of metrics, and what shows how far a run is."""
  last = record['last']
  with (
    distributed.of_first(
      lambda: metrics.MetricsWriter(
        *(run.folder, first or None, run.name, run.log),
        evaluated=-1 if last is None else last['step'],
      ),
      None,
    ) as writer,
    progress.shown(
      run.steps, first, name=run.name, console=rich.get_console()
    ) as told,
  ):
    if writer is None:
      yield (lambda *row: None), (lambda: None), told
    else:
      yield writer.write, writer.sync, told


def _telling(
  train_step: Callable[..., Any], told: progress.Progress
) -> Callable[..., Any]:
  """A training step that says that the first call compiles it."""
  first = [told.doing('compiling the first step')]

  def step(*arguments: Any) -> Any:
    with first.pop() if first else contextlib.nullcontext():
      return train_step(*arguments)

  return step


def _evaluates(run: Run, first: int, last: Found | None) -> bool:
  """Whether to evaluate before any step; also what a signal had ended."""
  is_due = first % run.every.evaluate == 0 or first == run.steps
  is_new = last is None or last['step'] != first
  return is_due and is_new if first else run.every.evaluate_first


def _stopped(run: Run, number: int, received: signal.Signals) -> SystemExit:
  """Says that a run stops after a signal; what ends the program."""
  if distributed.is_first():
    _logger.warning(
      '%s: saved step %d of %d in %s. The same command continues.',
      *(received.name, number, run.steps, run.folder),
    )
  return distributed.SharedExit(128 + received)


def _row(
  instruments: Instruments, step: Taken, clock: Clock, before: tuple[int, int]
) -> Record:
  """The metrics of a step, fetched from the device."""
  values = {f'train/{name}': value for name, value in step.metrics.items()}
  values |= instruments.stats(step.state.opt_state)
  row = instruments.row(step.number, jax.device_get(values), before)
  row |= {f'coreset/{name}': value for name, value in step.facts.items()}
  if (speed := clock.tokens_per_second()) is not None:
    row |= instruments.speed(speed)
  return row


def _position(run: Run, record: Record, tokens: int | None) -> dict[str, Any]:
  """What a checkpoint holds beside arrays."""
  return {
    'batches': run.batches.get_state(),
    'record': record,
    'batch_size': run.batch_size,
    'tokens': tokens,
  }


def _kept(state: Any, memory: Any) -> Any:
  """What a checkpoint holds: the state, and what a selection remembers."""
  if not jax.tree.leaves(memory):
    return state
  return {'state': state, 'memory': memory}


def _resume_or_start(
  run: Run, saved: Checkpointer
) -> tuple[TrainState, Any, Any, Record, int]:
  """The newest whole checkpoint of the run's folder, or a fresh state.

  Returns:
    State, memory of a selection or None, constants, record, and the tokens
    that were trained on so far, where steps have as many each.
  """
  metadata = saved.latest_metadata()
  if metadata is None:
    state, constants = run.start()
    record = {'best': None, 'last': None, 'since_best': 0}
    times = {'seconds_per_step': None, 'wall_seconds': 0.0}
    memory = None if run.select is None else run.select.start()
    return state, memory, constants, record | times, 0
  check_compatible(
    *(metadata, run.metadata, run.folder, run.accepted, run.since)
  )
  memory = None if run.select is None else run.select.abstract
  kept, position, metadata = saved.restore_latest(
    _kept(run.abstract_state, memory)
  )
  state = kept
  if isinstance(kept, dict):
    state, memory = kept['state'], kept['memory']
  if run.renew is not None:
    state = run.renew(state)
  number = int(state.step)
  monitor.check_weights(number, state.params)
  if number > run.steps:
    raise ValueError(
      f'{run.folder} holds step {number}, beyond steps={run.steps}. Raise '
      'steps or use another run directory.'
    )
  rows = positions.rows_before(position, metadata) or run.batch_size
  run.batches.set_state({'batch_size': rows} | position['batches'])
  tokens = position.get('tokens')
  if tokens is None:
    tokens = run.instruments.tokens(number) or 0
    if run.batch_size is not None:
      tokens = tokens * rows // run.batch_size
  if number == run.steps:
    _logger.info(
      '%s is finished at step %d: its results are written anew. More steps, '
      'such as --steps %d, go on.',
      run.folder,
      number,
      2 * number,
    )
  else:
    _logger.info('Resuming %s at step %d.', run.name or run.folder, number)
  if rows != run.batch_size and number < run.steps:
    _logger.info(
      'Batches of %s rows after %d of %s: training goes on with the row behind '
      'the last that was seen. Steps and the learning rate count updates as '
      'before: %d of %d are taken.',
      *(run.batch_size, number, rows, number, run.steps),
    )
  return state, memory, run.constants(), position['record'], tokens
