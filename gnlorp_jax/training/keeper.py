"""The best parameters of a run, and what its evaluations found."""

import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from gnlorp_jax.training import distributed, monitor
from gnlorp_jax.training.checkpoint import Checkpointer
from gnlorp_jax.training.state import TrainState

Record = dict[str, Any]
Found = dict[str, float | None]  # An evaluation; None is no finite number.
Better = Callable[[Found, Found], bool]


class Keeper:
  """Remembers evaluations, and keeps the best parameters if a run asks to.

  Use it as a context manager.

  Args:
    folder: Where the best parameters are kept.
    better: As in `loop.Run`; None keeps none.
    patience: As in `loop.Run`.
    abstract_params: Shapes and shardings of the parameters.
    metadata: What is written beside them.
    record: ``best``, ``last`` and ``since_best`` of the processes before.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    better: Better | None,
    patience: int | None,
    abstract_params: Any,
    metadata: dict[str, Any],
    record: Record,
  ):
    # Checkpoints did not always count.
    self.record = {'since_best': 0} | record
    self._folder = folder
    self._better = better
    self._patience = patience
    self._abstract_params = abstract_params
    self._metadata = metadata
    self._best: Checkpointer | None = None
    if better is None:
      # Of an earlier process that kept it.
      self.record |= {'best': None, 'since_best': 0}
      return
    # An interrupted run finds once more what came after its checkpoint.
    distributed.from_first(lambda: _remove_later(self._folder, record['last']))
    self._best = Checkpointer(self._folder, keep=2)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    if self._best is not None:
      self._best.__exit__(*exception)

  @property
  def gives_up(self) -> bool:
    """Whether so many evaluations were no better that the run ends."""
    if self._patience is None:
      return False
    return self.record['since_best'] >= self._patience

  def note(self, number: int, found: dict[str, float], params: Any) -> bool:
    """Takes in an evaluation; whether it is the best so far, and kept.

    Args:
      number: The step it was made after.
      found: The evaluation.
      params: The parameters of then.

    Raises:
      DivergedError: If they would be kept and are not finite.
    """
    values = {n: v if math.isfinite(v) else None for n, v in found.items()}
    self.record['last'] = {'step': number, **values}
    if self._best is None:
      return False
    best = self.record['best']
    if best is not None and best['step'] == number:
      return False  # Found once more, after an interruption.
    if best is not None and not self._better(values, best):
      self.record['since_best'] += 1
      return False
    monitor.check_weights(number, params)
    self.record |= {'best': self.record['last'], 'since_best': 0}
    self._best.save(number, params, {'step': number}, self._metadata, wait=True)
    return True

  def check(self, number: int) -> None:
    """Checks that what was best is there, before a run goes on from a step.

    Raises:
      ValueError: If it is not, and the parameters of this step are others.
    """
    best = self.record['best']
    if self._best is None or best is None or best['step'] == number:
      return
    there = distributed.from_first(
      lambda: (self._folder / str(best['step'])).is_dir()
    )
    if not there:
      raise self._lost(best['step'])

  def best_params(self, state: TrainState) -> Any:
    """The parameters of the best evaluation, or those of the last state."""
    best = self.record['best']
    if self._best is None or best['step'] == int(state.step):
      return state.params
    found = self._best.restore_latest(self._abstract_params)
    if found is None or found[1]['step'] != best['step']:
      raise self._lost(best['step'])
    return found[0]

  def _lost(self, step: int) -> ValueError:
    return ValueError(
      f'{self._folder.parent} lacks its best model, that of step {step}. '
      'Delete the folder to train it anew.'
    )


def _remove_later(folder: pathlib.Path, last: Found | None) -> None:
  """Removes what was kept after the last evaluation that is remembered."""
  for path in folder.glob('[0-9]*'):
    if path.name.isdigit() and (last is None or int(path.name) > last['step']):
      shutil.rmtree(path)
