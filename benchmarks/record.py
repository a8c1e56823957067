"""Files of results: what they were measured with, and how they are written."""

import json
import pathlib
import subprocess
from typing import Any


def commit() -> str | None:
  """The commit of the working tree, with ``-dirty`` if it was changed."""
  git = subprocess.run(
    ['git', 'describe', '--always', '--dirty', '--abbrev=12'],
    capture_output=True,
    text=True,
    check=False,
  )
  return git.stdout.strip() or None


def write_json(path: pathlib.Path, record: dict[str, Any]) -> None:
  """Writes a record so that a reader never meets half of it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial')
  partial.write_text(json.dumps(record, indent=1) + '\n')
  partial.replace(path)
