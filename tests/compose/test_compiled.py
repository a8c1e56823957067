"""Programs of many runs do not use up what a process may map."""

import math
import subprocess
import sys

import jax
import pytest

from gnlorp_jax.compose import compiled

MANY = """
import pathlib, sys
import jax
import jax.numpy as jnp
from gnlorp_jax.compose import compiled

def maps():
  return len(compiled._MAPS.read_text().splitlines())

kept, most = [], 0
compiled._LIMIT = pathlib.Path(sys.argv[1])
start = maps()
compiled._LIMIT.write_text(str(2 * (start + 200)))
for number in range(40):
  function = jax.jit(lambda x: jnp.sin(x @ x + number))
  function(jnp.ones((8, 8))).block_until_ready()
  kept.append(function)
  most = max(most, maps())
  compiled.bound()
again = float(kept[3](jnp.eye(2))[0, 0])
print(start, most, again)
"""


def test_programs_take_no_more_than_their_share_and_stay_usable(tmp_path):
  # In a process of its own: all that others have compiled would be forgotten.
  found = subprocess.run(
    [sys.executable, '-c', MANY, tmp_path / 'limit'],
    capture_output=True,
    text=True,
    check=True,
  )
  start, most, again = map(float, found.stdout.split())
  # Forty programs would take more than 500.
  assert 150 < most - start < 300
  assert again == pytest.approx(math.sin(1 + 39), abs=1e-3)


@pytest.fixture
def cleared(monkeypatch):
  """How often all that was compiled was forgotten."""
  calls = []
  monkeypatch.setattr(jax, 'clear_caches', lambda: calls.append(1))
  return calls


def test_few_programs_are_kept(cleared, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(compiled, '_LIMIT', tmp_path / 'limit')
  monkeypatch.setattr(compiled, '_MAPS', tmp_path / 'maps')
  assert not compiled.bound()  # A system that tells nothing.
  (tmp_path / 'limit').write_text('12\n')
  (tmp_path / 'maps').write_bytes(b'a map\n' * 5)
  assert not compiled.bound() and not cleared
  (tmp_path / 'maps').write_bytes(b'a map\n' * 6)
  with caplog.at_level('INFO'):
    assert compiled.bound() and cleared == [1]
  assert caplog.messages == [
    'What was compiled took 6 of 12 memory maps, and is forgotten.'
  ]
