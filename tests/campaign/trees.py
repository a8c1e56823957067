"""What a finished run left behind, without what may differ between two runs."""

import hashlib
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

# Measured times and memory.
_MEASURED = re.compile(r'second|tokens_per|mfu|time|date|resident')
# Drawn or written of what is compared anyway, with times in it.
_REPORTS = ('.png', '.md')
_EVENTS = 'events.out.tfevents'  # One file of every process.


def digest(folder: pathlib.Path) -> dict[str, Any]:
  """Every file and checkpoint that a run left, by its path.

  Args:
    folder: The folder in which the command ran.

  Returns:
    A value for every path: of JSON what it says but for what is measured, of
    checkpoints a hash of their arrays, of pictures and tables their presence,
    of everything else a hash of the bytes. Two runs that did the same have
    equal digests.
  """
  found: dict[str, Any] = {}
  for path in sorted(folder.iterdir()):
    if path.is_dir() and (path / 'state').is_dir():
      found[path.name] = _arrays(path / 'state')
    elif path.is_dir():
      found[f'{path.name}/'] = 'folder'
      inner = digest(path)
      found |= {f'{path.name}/{name}': inner[name] for name in inner}
    elif not path.name.startswith(_EVENTS):
      found[path.name] = _file(path)
  return found


def differences(
  found: dict[str, Any], expected: dict[str, Any]
) -> dict[str, str]:
  """What is missing, too much or other, by path."""
  words = {}
  for name in sorted(found.keys() | expected.keys()):
    if name not in expected:
      words[name] = 'left behind'
    elif name not in found:
      words[name] = 'missing'
    elif found[name] != expected[name]:
      words[name] = _first_difference(found[name], expected[name])
  return words


def _first_difference(found: Any, expected: Any) -> str:
  """Where two values of JSON differ first."""
  if isinstance(found, list) and isinstance(expected, list):
    if len(found) != len(expected):
      return f'{len(found)} entries instead of {len(expected)}'
    found, expected = (dict(enumerate(x)) for x in (found, expected))
  if isinstance(found, dict) and isinstance(expected, dict):
    for key in sorted(found.keys() | expected.keys(), key=str):
      if found.get(key) != expected.get(key):
        inner = _first_difference(found.get(key), expected.get(key))
        return f'{key}: {inner}'
  return f'{found} instead of {expected}'


def _file(path: pathlib.Path) -> Any:
  if path.suffix in _REPORTS:
    return 'written' if path.stat().st_size else 'empty'
  if path.suffix == '.json':
    return _unmeasured(json.loads(path.read_text('utf-8')))
  if path.suffix == '.jsonl':
    lines = path.read_text('utf-8').splitlines()
    return [_unmeasured(json.loads(line)) for line in lines]
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _unmeasured(value: Any) -> Any:
  if isinstance(value, dict):
    return {
      k: _unmeasured(v)
      for k, v in value.items()
      if not _MEASURED.search(str(k))
    }
  return [_unmeasured(v) for v in value] if isinstance(value, list) else value


def _arrays(folder: pathlib.Path) -> str:
  """A hash of the arrays of a checkpoint, in the order of their paths."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    # As NumPy arrays, however many devices they were on.
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      reader.metadata(folder).item_metadata.tree,
    )
    tree = reader.restore(folder, restore_args=as_numpy)
  made = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf)
    made.update(f'{jax.tree_util.keystr(path)} {array.dtype}'.encode())
    made.update(array.tobytes())
  return made.hexdigest()
