"""A run directory belongs to one process, clear of what killed ones left.

The three programs are asked to share one that is in use.
"""

import importlib.util
import os
import pathlib
import re
import socket

import jax
import pytest

from gnlorp_jax.compose import run_directory
from gnlorp_jax.disk import lock, writing

ROOT = pathlib.Path(__file__).parents[2]


def open_once(*args, **options):
  with run_directory.opened(*args, **options):
    pass


def test_directory_is_made_and_held_once(tmp_path):
  folder = tmp_path / 'a' / 'run'
  text = (
    f'The run directory {folder} is in use: {folder / ".lock"} is held by '
    f'process {os.getpid()} on {socket.gethostname()}. Two at once would write '
    'over each other. Wait for it, end it, or use another run directory; if '
    'its host is gone, delete that file.'
  )
  with run_directory.opened(folder):
    with pytest.raises(OSError, match=f'^{re.escape(text)}$'):
      open_once(folder)
    open_once(tmp_path / 'a')  # A grid's folder is not that of its runs.
  # Nothing is left of who did nothing.
  assert not list(tmp_path.iterdir())


def test_directory_stays_of_who_did_something(tmp_path):
  with run_directory.opened(tmp_path / 'a' / 'run'):
    (tmp_path / 'a' / 'run' / 'metrics.jsonl').write_text('')
  open_once(tmp_path / 'b')
  assert [path.name for path in tmp_path.rglob('*')] == [
    *('a', 'run', 'metrics.jsonl')
  ]
  (tmp_path / 'b').mkdir()
  open_once(tmp_path / 'b')
  assert (tmp_path / 'b').is_dir()


def test_the_first_of_joined_processes_holds_it_for_all(tmp_path, monkeypatch):
  with run_directory.opened(tmp_path):
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    open_once(tmp_path)


def test_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
  def refuse(path):
    raise lock.UnsupportedError('No locks available')

  monkeypatch.setattr(lock, 'hold', refuse)
  open_once(tmp_path)
  assert caplog.messages == [
    'The file system has no locks (No locks available): see that no other '
    f'process uses the run directory {tmp_path} at the same time.'
  ]


def test_directory_that_cannot_be_used_is_an_error(tmp_path):
  (tmp_path / 'file').write_text('')
  folder = tmp_path / 'file' / 'run'
  text = (
    f'The run directory {folder} cannot be written: Not a directory. Choose '
    'another or correct its permissions.'
  )
  with pytest.raises(OSError, match=f'^{re.escape(text)}$'):
    open_once(folder)
  with pytest.raises(ValueError, match='holds \\[, and no checkpoint'):
    open_once(tmp_path / 'lr=[0.1,0.2]')
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_what_killed_runs_left_is_removed(tmp_path):
  (tmp_path / '.hf.abcd1234' / 'new').mkdir(parents=True)
  (tmp_path / '.summary.json.draft').write_text('{')
  (tmp_path / '.lock').write_text('{"pid": 1, "host": "gone"}')
  (tmp_path / 'metrics.jsonl').write_text('')
  open_once(tmp_path, exports=('hf',))
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']


def test_export_replaces_nothing_but_an_export(tmp_path):
  with writing.replaced(tmp_path / 'hf') as draft:
    (draft / 'config.json').write_text('{}')
  open_once(tmp_path, exports=('hf',))
  (tmp_path / 'hf' / 'README.md').write_text('by hand')
  open_once(tmp_path)
  with pytest.raises(ValueError, match='see README.md. Move it elsewhere'):
    open_once(tmp_path, exports=('hf',))


@pytest.mark.parametrize(
  'read', ['hf', 'hf/tokenizer.json', '../run/hf', 'link']
)
def test_export_does_not_replace_what_the_run_reads(
  tmp_path, monkeypatch, read
):
  folder = tmp_path / 'run'
  with writing.replaced(folder / 'hf') as draft:
    (draft / 'tokenizer.json').write_text('{}')
  (folder / 'link').symlink_to('hf')
  monkeypatch.chdir(folder)
  other = ('hf:OWNER/hf', None, '.', '7b', str(tmp_path))
  open_once(folder, exports=('hf',), reads=other)
  open_once(folder, exports=('adapter',), reads=(read,))
  text = (
    f'The run reads {read}, and its end would replace {folder}/hf. Use another '
    'run directory, or move what is read out of it.'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    open_once(folder, exports=('hf',), reads=(*other, read))


# The programs.


@pytest.fixture
def program(request):
  """A script of the repository as a function of words."""
  spec = importlib.util.spec_from_file_location(
    request.param, ROOT / f'{request.param}.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.main


@pytest.mark.parametrize('words', [[], ['--seeds', '0,1']])
@pytest.mark.parametrize(
  'program', ['train_lm', 'train_sft', 'train_glue'], indirect=True
)
def test_program_does_not_share_its_run_directory(
  program, words, tmp_path, capsys
):
  with run_directory.opened(tmp_path), pytest.raises(SystemExit) as ended:
    program(['--run-dir', str(tmp_path), *words])
  assert ended.value.code == 2
  assert f'error: The run directory {tmp_path} is in use: ' in (
    capsys.readouterr().err
  )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('program', 'option', 'name'),
  [
    ('train_lm', '--init-from', 'hf'),
    ('train_sft', '--data.tokenizer', 'hf'),
    ('train_sft', '--data.tokenizer', 'adapter'),
  ],
  indirect=['program'],
)
def test_program_does_not_replace_a_model_of_its_user(
  program, option, name, tmp_path, capsys
):
  (tmp_path / name).mkdir()
  (tmp_path / name / 'model.safetensors').write_text('years of work')
  words = ['--run-dir', str(tmp_path), option, str(tmp_path / name)]
  if name == 'adapter':
    words += ['--export', 'adapter', '--method', 'lora']
  with pytest.raises(SystemExit):
    program(words)
  assert f'its end would replace {tmp_path / name}' in capsys.readouterr().err
  left = [path for path in tmp_path.rglob('*') if path.is_file()]
  assert left == [tmp_path / name / 'model.safetensors']


def test_what_would_be_waited_for_is_refused(tmp_path):
  (tmp_path / 'metrics.jsonl').symlink_to('nowhere')  # As before.
  with run_directory.opened(tmp_path):
    pass
  (tmp_path / 'metrics.jsonl').unlink()
  os.mkfifo(tmp_path / 'metrics.jsonl')
  text = (
    f'{tmp_path / "metrics.jsonl"} is neither a file nor a folder, but a pipe, '
    'a socket or a device, which a run would wait for. Remove it, or use '
    'another run directory.'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    with run_directory.opened(tmp_path):
      pass
