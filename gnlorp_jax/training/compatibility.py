"""Whether a checkpoint is of the run that is to go on from it."""

import json
import logging
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

_logger = logging.getLogger(__name__)


class Since(NamedTuple):
  """What became of settings since older checkpoints were written.

  Attributes:
    defaults: Values by name that mean what was done before there was such a
      setting: a checkpoint without it was made with that value.
    may_change: Names of what may differ now; older checkpoints may hold it.
  """

  defaults: dict[str, Any] = {}
  may_change: frozenset[str] = frozenset()


_NOTHING = Since()


def check_compatible(
  saved: dict[str, Any],
  current: dict[str, Any],
  directory: str | pathlib.Path,
  accepted: Collection[str] = (),
  since: Since = _NOTHING,
) -> None:
  """Checks that a checkpoint was made with the settings and data at hand.

  Args:
    saved: The checkpoint's metadata.
    current: Those of this run.
    directory: Where the checkpoint is, for the error's text.
    accepted: Names of fields that may differ; a warning says so.
    since: What has come since the checkpoint was written.

  Raises:
    ValueError: If any other field differs; all that do are listed.
  """
  # A tuple is saved as a list.
  current = json.loads(json.dumps(current))
  defaults = json.loads(json.dumps(since.defaults))
  absent = '(absent)'
  settled = {
    name
    for name in current.keys() - saved.keys()
    if name in defaults and current[name] == defaults[name]
  } | (saved.keys() - current.keys()) & since.may_change
  differences = {
    name: f'{name} {saved.get(name, absent)} != {current.get(name, absent)}'
    for name in sorted((saved.keys() | current.keys()) - settled)
    if saved.get(name, absent) != current.get(name, absent)
  }
  if not differences.keys() <= set(accepted):
    raise ValueError(
      f'Checkpoint in {directory} was made with other settings: '
      f'{", ".join(differences.values())}. Use another run directory or the '
      'same settings. To go on all the same, name what may differ: '
      f"--accept '{','.join(differences)}'."
    )
  if differences:
    _logger.warning(
      'Going on in %s with other settings, which were accepted: %s.',
      *(directory, ', '.join(differences.values())),
    )
