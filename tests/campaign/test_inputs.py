"""The campaign of bad inputs: which ends it takes for faults."""

import importlib.util
import json
import pathlib
import random
import sys
import types

import pytest

from tests.campaign import inputs
from tests.campaign.configurations import CONFIGURATIONS


def told(monkeypatch, tmp_path, main, **given):
  """How the end of a command is judged."""
  monkeypatch.setitem(
    sys.modules, 'a_command', types.SimpleNamespace(main=main)
  )
  words = ['--run-dir', str(tmp_path)]
  return inputs.run(inputs.Input('something bad', 'a_command', words, **given))


def refuse(words):
  sys.stderr.write('error: steps -1 must be positive.')
  raise SystemExit(2)


def fail(words):
  raise KeyError('steps')


def end_silently(words):
  raise SystemExit(1)


def train(words):
  folder = pathlib.Path(words[-1])
  row = {'step': 1, 'train/loss': float('nan')}
  (folder / 'metrics.jsonl').write_text(json.dumps(row))


@pytest.mark.parametrize(
  ('main', 'end'),
  [
    (refuse, 'refused'),
    (fail, 'traceback'),
    (end_silently, 'without a word'),
    (train, 'a loss that is no number'),
    (lambda words: None, 'ran'),
  ],
)
def test_end_of_a_command_is_judged(monkeypatch, tmp_path, main, end):
  assert told(monkeypatch, tmp_path, main)[0] == end


def test_commands_are_right_but_for_what_is_bad(tmp_path):
  """Each of a configuration's own words is there, and its cache is apart."""
  for name, configuration in CONFIGURATIONS.items():
    module, words = inputs.command(name, tmp_path, tmp_path / 'one')
    whole = configuration.command(tmp_path)[1:-1]
    options = [word for word in whole if word.startswith('--')]
    assert [word for word in words if word.startswith('--')] == options
    assert words[-1] == str(tmp_path / 'one/run') and 'cache' not in words
    if '--data.cache-dir' in words:
      at = words[words.index('--data.cache-dir') + 1]
      assert at == str(tmp_path / 'one/cache')
    assert importlib.util.find_spec(module) is not None


def test_inputs_that_cannot_be_made_end_the_campaign(monkeypatch, tmp_path):
  monkeypatch.setattr(inputs, 'write_inputs', lambda root: None)
  with pytest.raises(
    RuntimeError, match='(?s)No input 0 could be made: .*KeyError'
  ):
    inputs.campaign(1, 0, ['no such kind'], tmp_path)


def test_number_that_is_none_must_not_be_taken(monkeypatch, tmp_path):
  end, _ = told(monkeypatch, tmp_path, lambda words: None, is_number=True)
  assert end == 'took what is no number'
  assert told(monkeypatch, tmp_path, refuse, is_number=True)[0] == 'refused'


def test_damaged_run_must_end_as_the_whole_one(monkeypatch, tmp_path):
  path = tmp_path / 'hf/model.safetensors'
  path.parent.mkdir()
  path.write_bytes(b'other')
  for weights, end in ((b'other', 'ran'), (b'right', 'other weights')):
    found, _ = told(monkeypatch, tmp_path, lambda words: None, weights=weights)
    assert found == end


def test_damage_is_done_and_told(tmp_path):
  rng = random.Random(0)
  path, done = tmp_path / 'file', set()
  for _ in range(200):
    path.write_text('some words of a file')
    what = inputs.damage(path, rng)
    done.add(what)
    assert (
      what in ('a FIFO', 'unreadable')
      or not path.is_file()
      or path.read_text(errors='replace') != 'some words of a file'
      or what == 'flipped'  # Twice the same bit.
    )
    if path.is_dir():
      path.rmdir()
    else:
      path.unlink(missing_ok=True)
  assert len(done) == 11
