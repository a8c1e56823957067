"""Where checkpoints stand in the data."""

import pathlib
from collections.abc import Mapping
from typing import Any

from gnlorp_jax.training.checkpoint import Checkpointer


def newest(
  folder: pathlib.Path, batch_size: int
) -> tuple[int, dict[str, Any]] | None:
  """Where the newest checkpoint of a run stands.

  Args:
    folder: The run's.
    batch_size: Rows of its batches, if the checkpoint does not say it.

  Returns:
    The number of its step, and what `set_state` of the run's batches takes;
    None if there is no checkpoint.

  Raises:
    ValueError: If there are checkpoints but none can be read.
  """
  if not (folder / 'checkpoints').is_dir():
    return None
  with Checkpointer(folder / 'checkpoints', read_only=True) as saved:
    found = saved.latest_position()
  if found is None:
    return None
  number, position, metadata = found
  rows = rows_before(position, metadata) or batch_size
  return number, {'batch_size': rows} | position['batches']


def rows_before(
  position: Mapping[str, Any], metadata: Mapping[str, Any]
) -> int | None:
  """Rows of the batches before a checkpoint.

  Args:
    position: Its data state.
    metadata: Its metadata.

  Returns:
    The number, or None if nothing says it.
  """
  if position.get('batch_size') is not None:
    return position['batch_size']
  # Checkpoints did not always say it beside the position.
  return metadata.get('coreset.pool') or metadata.get('batch_size')
