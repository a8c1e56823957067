"""What is watched while a run trains: its speed, its health, its memory."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnlorp_jax.training import distributed

_logger = logging.getLogger(__name__)


class DivergedError(distributed.SharedError):
  """Training cannot recover, as all processes of a run see alike."""


class Instruments(NamedTuple):
  """What a row of metrics says beside what the training step returns.

  Attributes:
    schedule: Maps the number of updates taken to the next learning rate.
    stats: Compiled; maps the optimizer's state to scalars by name.
    state_bytes: Bytes of the optimizer's state.
    tokens_per_step: Tokens of every step, where all have as many and the loss
      is one of each token; None otherwise.
    flops_per_token: Operations that training needs for a token; None if that is
      not known.
    peak_flops: Operations per second of all devices together at their best;
      None if that is not known.
  """

  schedule: Callable[[int], Any]
  stats: Callable[[Any], dict[str, jax.Array]]
  state_bytes: int
  tokens_per_step: int | None = None
  flops_per_token: float | None = None
  peak_flops: float | None = None

  def speed(self, tokens_per_second: float) -> dict[str, float]:
    """Tokens per second, and model FLOP utilisation where it is known."""
    row = {'train/tokens_per_second': tokens_per_second}
    if self.flops_per_token is not None and self.peak_flops is not None:
      row['train/mfu'] = (
        tokens_per_second * self.flops_per_token / self.peak_flops
      )
    return row

  def tokens(self, number: int, before: tuple[int, int] = (0, 0)) -> int | None:
    """Tokens of the steps up to a number; None if they have not as many each.

    Args:
      number: The number of the last of them.
      before: A number of steps, of perhaps another size, and their tokens.
    """
    if self.tokens_per_step is None:
      return None
    return before[1] + (number - before[0]) * self.tokens_per_step

  def row(
    self,
    number: int,
    values: Mapping[str, Any],
    before: tuple[int, int] = (0, 0),
  ) -> dict[str, float]:
    """The metrics of a step.

    Args:
      number: The step's number.
      values: The step's metrics and those of `stats`, on the host.
      before: As of `tokens`.

    Returns:
      Those, and what follows from them.
    """
    row = {name: float(value) for name, value in values.items()}
    # The schedule counts the steps that were taken, not those left out.
    updates = number - 1 - int(row['train/skipped_steps'])
    tokens = self.tokens(number, before)
    if tokens is not None:
      row['train/perplexity'] = float(np.exp(row['train/loss']))
      row['train/tokens'] = tokens
    row['optim/learning_rate'] = float(self.schedule(updates))
    row['optim/state_bytes'] = self.state_bytes
    return row


class Clock:
  """Times steps: tokens per second since the last row, seconds of a step.

  Compilation, evaluations and checkpoints are left out: the step that compiled
  for a new shape does not count, and `restart` follows what is no step.

  Args:
    record: ``wall_seconds`` and ``seconds_per_step`` of the processes before.
  """

  def __init__(self, record: Mapping[str, Any]):
    self._before = record['wall_seconds'], record['seconds_per_step']
    self._began = time.perf_counter()
    self._shapes: set[tuple[int, ...]] = set()
    self._seconds: list[float] = []
    self._tokens = 0
    self.restart()

  def count(self, tokens: jax.Array, values: Any) -> None:
    """Notes that a step was dispatched, and the one before it has ended.

    Args:
      tokens: The step's tokens ``[B, T]``; a shape seen for the first time has
        been compiled for.
      values: What the step will return.
    """
    if tokens.shape not in self._shapes:
      self._shapes.add(tokens.shape)
      jax.block_until_ready(values)
      self.restart()
      return
    now = time.perf_counter()
    # Nothing ran before the first step since a restart: to dispatch it took no
    # time. The next one tells how long it ran.
    if self._last is not None:
      self._seconds.append(now - self._last)
    self._last = now
    self._tokens += math.prod(tokens.shape)

  def restart(self) -> None:
    """Leaves out the time since the last step or row."""
    self._since = time.perf_counter()
    self._last: float | None = None
    self._tokens = 0

  def tokens_per_second(self) -> float | None:
    """Of the steps since this was asked for last; None if there were none."""
    now = time.perf_counter()
    tokens, seconds = self._tokens, now - self._since
    self._since, self._tokens = now, 0
    return tokens / seconds if tokens else None

  def update(self, record: dict[str, Any]) -> dict[str, Any]:
    """The record with the times of now."""
    wall, seconds = self._before
    if self._seconds:
      seconds = float(np.median(self._seconds))
    return record | {
      'wall_seconds': wall + time.perf_counter() - self._began,
      'seconds_per_step': seconds,
    }


class Health:
  """Tells of steps that were left out, and ends a run that cannot recover.

  Args:
    number: The step that training goes on from.
    skipped: How many steps had been left out by then.
  """

  LIMIT = 100  # Steps in a row without a finite gradient.

  def __init__(self, number: int, skipped: int):
    self._last = number, skipped
    self._last_good = number

  def check(self, number: int, row: Mapping[str, Any]) -> None:
    """Judges a row of metrics.

    Raises:
      DivergedError: If going on is pointless.
    """
    if not np.isfinite(row['train/weight_norm']):
      raise DivergedError(_not_finite(number))
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
      raise DivergedError(
        f'No gradient was finite in the last {number - self._last_good} steps: '
        'training has diverged. Restart with a lower optim.learning_rate or '
        'with clipping; check the data around this step.'
      )


def tell(name: str, number: int, found: Mapping[str, float]) -> None:
  """Says what the evaluation of a run found after a step."""
  _logger.info(
    '%sevaluated at step %d: %s',
    f'{name}: ' if name else '',
    number,
    ', '.join(f'{metric} {value:.4f}' for metric, value in found.items()),
  )


def tell_early_end(
  name: str, steps: int, patience: int | None, record: Mapping[str, Any]
) -> None:
  """Says that a run ends before its last step, and why."""
  _logger.info(
    '%sends at step %d of %d: no evaluation was better than that of step %d '
    'for patience=%d of them. Raise patience to go on.',
    f'{name} ' if name else '',
    *(record['last']['step'], steps, record['best']['step'], patience),
  )


def check_weights(number: int, params: Any) -> None:
  """Checks weights before they are saved, or after they were read.

  Args:
    number: The number of steps taken.
    params: Pytree of arrays, on devices or in the memory of the host; codes
      and other integers are finite.

  Raises:
    DivergedError: If any is not finite.
  """
  if not _are_finite(params):
    raise DivergedError(
      f'{_not_finite(number)} They are not saved; checkpoints of earlier steps '
      'stay. Where one of this step is there, delete it, and the one before it '
      'is used.'
    )


def _not_finite(number: int) -> str:
  return (
    f'The weights are not finite at step {number}, and no step can mend them. '
    'Start from weights that are, or lower optim.learning_rate.'
  )


@jax.jit
def _are_finite(tree: Any) -> jax.Array:
  # Some of it may lie in the memory of the host.
  on_devices = jax.device_put(tree, jax.memory.Space.Device)
  return jnp.stack(
    [
      jnp.all(jnp.isfinite(leaf))
      for leaf in jax.tree.leaves(on_devices)
      if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    or [jnp.array(True)]
  ).all()


def peak_bytes() -> int | None:
  """The most bytes this process has held on its first device, if known."""
  return (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


def risen(before: int | None, after: int | None) -> int | None:
  """A peak that this run reached; None if an earlier one was as high."""
  return after if before is not None and after > before else None
