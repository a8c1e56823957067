"""The campaign itself: it sees what a killed run did wrong, and only that."""

import json
import random

import pytest

from tests.campaign import kills, trees
from tests.campaign.configurations import Configuration

# Counts to 30, a line each, and then writes a report. It goes on where it was
# killed; the careless one does not know how much of its last lines was written.
COUNTER = """
import json, pathlib, sys, time

folder = pathlib.Path(sys.argv[-1])
folder.mkdir(exist_ok=True)
path, state = folder / 'metrics.jsonl', folder / 'state.json'
done = json.loads(state.read_text())['step'] if state.exists() else 0
lines = path.read_text().splitlines() if path.exists() else []
if 'careful' in sys.argv:
  lines = lines[:done]
draft = folder / 'draft'

def write(path, text):
  draft.write_text(text)
  draft.replace(path)

for step in range(done + 1, 31):
  lines.append(json.dumps({'step': step, 'seconds': time.time()}))
  write(path, ''.join(line + chr(10) for line in lines))
  time.sleep(0.01)
  write(state, json.dumps({'step': step}))
(folder / 'report.md').write_text(f'{time.time()}')
"""


@pytest.fixture
def counter(tmp_path):
  path = tmp_path / 'counter.py'
  path.write_text(COUNTER)
  return path


def trials(counter, words, count):
  """Kinds of the kills of some trials."""
  root = counter.parent
  configuration = Configuration(f'{counter} {words}')
  quiet = kills.undisturbed(configuration, root, root / 'quiet')
  found = []
  for number in range(count):
    rng, folder = random.Random(number), root / f'{number}'
    folder.mkdir()
    found += kills.trial(configuration, root, folder, quiet, rng)
  return found


def test_careful_run_passes_and_is_killed_at_paths_and_at_any_time(counter):
  found = trials(counter, 'careful', 6)
  assert 'any time' in found
  assert 'report' in found


def test_careless_run_is_found_out(counter):
  with pytest.raises(RuntimeError, match=r'metrics\.jsonl.*entries instead of'):
    trials(counter, 'careless', 20)


def test_failing_run_is_told_with_its_last_words(counter):
  counter.write_text('raise SystemExit("No disk.")')
  with pytest.raises(RuntimeError, match=r'exit status 1: No disk\.'):
    trials(counter, '', 1)


def write(folder, **changes):
  folder.mkdir()
  rows = [{'step': 1, 'loss': 2.0, 'seconds': random.random()}]
  files = {
    'metrics.jsonl': json.dumps(rows[0]),
    'summary.json': json.dumps({'rows': rows}),
    f'events.out.tfevents.{random.random()}': '',
    'sample.txt': 'Once',
    'loss.png': 'PNG',
  }
  for name, text in (files | changes).items():
    if text is not None:
      (folder / name).write_text(text)
  return trees.digest(folder)


def test_only_what_was_measured_may_differ(tmp_path):
  one, other = (write(tmp_path / name) for name in 'ab')
  assert trees.differences(one, other) == {}
  changed = write(
    tmp_path / 'c',
    **{
      'sample.txt': 'Twice',
      'summary.json': json.dumps({'rows': [{'step': 1, 'loss': 3.0}]}),
      'loss.png': None,
      '.hf.abc': '',
    },
  )
  found = trees.differences(changed, one)
  assert found.pop('sample.txt')
  assert found == {
    '.hf.abc': 'left behind',
    'loss.png': 'missing',
    'summary.json': 'rows: 0: loss: 3.0 instead of 2.0',
  }
