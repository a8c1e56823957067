"""Read-only folders at every stage of a run: an error, and nothing is lost."""

import contextlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.compose import command_line, run_directory
from gnlorp_jax.data import text, tokenizer
from gnlorp_jax.disk import writing
from gnlorp_jax.training import metrics
from gnlorp_jax.training.checkpoint import Checkpointer
from tests import small_inputs
from tests.read_only import read_only_or_skip

READ_ONLY = '(Read-only file system|Permission denied)'


def refuses(text):
  return pytest.raises(OSError, match=text)


def test_start_of_a_run(tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  with read_only_or_skip(folder):
    for place in (folder, folder / 'new'):
      text = f'^The run directory {place} cannot be written: {READ_ONLY}. Ch'
      with refuses(text), run_directory.opened(place):
        pass
  assert list(folder.iterdir()) == []


def test_checkpoints(tmp_path):
  """A save fails at once, and the checkpoint before it is read."""
  state = {'x': jnp.arange(4.0)}
  folder = tmp_path / 'checkpoints'
  where = re.escape(str(folder))
  with contextlib.ExitStack() as stack:
    saved = stack.enter_context(Checkpointer(folder))
    saved.save(1, state, {'at': 1}, {}, wait=True)
    with read_only_or_skip(folder):
      text = f'^A checkpoint could not be written to {where}: .*{READ_ONLY}'
      with refuses(text):
        saved.save(2, state, {'at': 2}, {}, wait=True)
      # Nor is it opened for more, but read it is.
      text = f'^Checkpoint directory {where} cannot be written: {READ_ONLY}'
      with refuses(text):
        Checkpointer(folder)
      with Checkpointer(folder, read_only=True) as other:
        restored, position, _ = other.restore_latest(state)
    np.testing.assert_array_equal(restored['x'], state['x'])
    assert position == {'at': 1}
  with Checkpointer(folder) as later:
    later.save(2, state, {'at': 2}, {}, wait=True)
    assert later.latest_position()[:2] == (2, {'at': 2})


def test_metrics_and_plots(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'train/loss': 2.0, 'eval/loss': 2.5})
  rows, plot = tmp_path / 'metrics.jsonl', tmp_path / 'loss.png'
  metrics.plot_losses(rows, plot)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  with read_only_or_skip(tmp_path):
    with refuses(f'{READ_ONLY}: .*{re.escape(str(rows))}'):
      metrics.MetricsWriter(tmp_path, 1)
    with refuses(f'{READ_ONLY}: .*{re.escape(str(plot))}'):
      metrics.plot_losses(rows, plot)
  after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  assert after == before


def test_exports_and_reports(tmp_path):
  folder, report = tmp_path / 'hf', tmp_path / 'summary.json'
  with writing.replaced(folder) as draft:
    (draft / 'model').write_text('old')
  writing.write_text(report, 'old')
  with read_only_or_skip(tmp_path):
    with refuses(READ_ONLY), writing.replaced(folder) as draft:
      (draft / 'model').write_text('new')
    with refuses(f'{READ_ONLY}: .*{re.escape(str(report))}.$'):
      writing.write_text(report, 'new')
  assert (folder / 'model').read_text() == report.read_text() == 'old'
  # As the disk failed while it was written: what was there is there again.
  with refuses(READ_ONLY), contextlib.ExitStack() as stack:
    draft = stack.enter_context(writing.replaced(folder))
    stack.enter_context(read_only_or_skip(tmp_path))
    (draft / 'model').write_text('new')
  writing.sweep(tmp_path, writing.prefix_of(folder))
  assert (folder / 'model').read_text() == 'old'
  assert sorted(p.name for p in tmp_path.iterdir()) == ['hf', 'summary.json']


def test_caches_serve_what_they_have(tmp_path):
  small_inputs.write_text(tmp_path / 'text.txt', lines=40)
  source, cache = str(tmp_path / 'text.txt'), tmp_path / 'cache'
  cache.mkdir()

  def made(lines=40):
    small_inputs.write_text(tmp_path / 'more.txt', lines=lines)
    found = tokenizer.load(
      'bpe', source=source, vocab_size=300, cache_dir=cache
    )
    return text.prepare(source, found, cache_dir=cache, progress=False)

  says = (
    f'^{re.escape(str(cache))}, where tokens and tokenizers are kept, cannot '
    f'be written: {READ_ONLY}. Correct its permissions, or name another folder '
    'as data.cache_dir.$'
  )
  with read_only_or_skip(cache), refuses(says):
    made()
  whole = made()
  with read_only_or_skip(cache):
    assert made() == whole
  assert len(list(cache.iterdir())) == 2


def test_files_that_commands_write_are_tried_at_the_start(tmp_path):
  path = tmp_path / 'out.json'
  command_line.check_place('output', str(path))
  path.write_text('old')
  command_line.check_place('output', str(path))
  with read_only_or_skip(tmp_path):
    for name in ('out.json', 'new.json'):
      with pytest.raises(
        ValueError, match=f'--output .*{name}: .* cannot be wri'
      ):
        command_line.check_place('output', str(tmp_path / name))


def test_an_error_amid_a_command_is_one_message(tmp_path, capsys):
  path = tmp_path / 'report.json'
  with read_only_or_skip(tmp_path), pytest.raises(SystemExit) as ended:
    command_line.run(lambda: writing.write_text(path, 'x'), 'NO_SUCH_VARIABLE')
  assert ended.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith('error: ') and str(path) in said
  assert said.count('\n') == 1
