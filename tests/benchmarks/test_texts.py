"""Plain texts for comparisons: what is held out, and how much is written."""

import json
import sys

from benchmarks.quality import texts


def test_every_tenth_conversation_is_held_out(tmp_path, monkeypatch):
  rows = [{'prompt': f'Is {n} odd?', 'completion': 'No.'} for n in range(20)]
  (tmp_path / 'chat.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'wiki.txt').write_text('An article.')
  wiki, out = str(tmp_path / 'wiki.txt'), tmp_path / 'out'
  command = ['texts', '--wikipedia', wiki, wiki, '--output', str(out)]
  command += ['--dialogue', str(tmp_path / 'chat.jsonl')]
  monkeypatch.setattr(sys, 'argv', [*command, '--characters', '2000'])
  texts.main()
  scored = (out / 'dialogue_scored.txt').read_text()
  assert scored == '\n\n'.join(
    f'user: Is {n} odd?\nassistant: No.\n' for n in (9, 19)
  )
  kept = (out / 'dialogue_train.txt').read_text()
  assert kept.count('odd?') == 18 and 'Is 9 odd?' not in kept
  assert (out / 'wikipedia_train.txt').read_text() == 'An article.'
  trained = (out / 'python_train.txt').read_text()
  assert len(trained) == 2000 and 'import' in trained
  assert (out / 'python_scored.txt').read_text() not in trained
