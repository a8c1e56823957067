"""Files and folders that are there whole or not at all."""

import os
import pathlib
import re
import shutil

import pytest

from gnlorp_jax.disk import lock, writing


@pytest.fixture
def synced(monkeypatch):
  """What happened in which order: what was synced, what renamed."""
  events, sync, replace = [], os.fsync, os.replace

  def fsync(descriptor):
    path = os.readlink(f'/proc/self/fd/{descriptor}')
    events.append(('sync', os.path.basename(path)))
    sync(descriptor)

  def rename(source, target):
    events.append(('rename', os.path.basename(target)))
    replace(source, target)

  monkeypatch.setattr(os, 'fsync', fsync)
  monkeypatch.setattr(os, 'replace', rename)
  return events


@pytest.fixture
def umask():
  before = os.umask(0o027)
  yield 0o640
  os.umask(before)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


# Files.


def test_file_is_on_the_disk_before_it_is_renamed(tmp_path, synced, umask):
  path = tmp_path / 'result.json'
  path.write_text('old')
  writing.write_text(path, 'né\n')
  assert path.read_bytes() == 'né\n'.encode()
  assert synced == [
    ('sync', '.result.json.draft'),
    ('rename', 'result.json'),
    ('sync', tmp_path.name),
  ]
  assert path.stat().st_mode & 0o777 == umask
  assert names(tmp_path) == ['result.json']


def test_file_that_is_not_finished_leaves_the_old_one(tmp_path):
  path = tmp_path / 'plot.png'
  path.write_text('old')
  with pytest.raises(RuntimeError):
    with writing.written(path) as draft:
      draft.write_text('half')
      raise RuntimeError
  assert (path.read_text(), names(tmp_path)) == ('old', ['plot.png'])


def test_drafts_of_files_are_swept_and_nothing_else(tmp_path):
  kept = ['.hidden', 'a.draft', 'result.json']
  for name in [*kept, '.result.json.draft']:
    (tmp_path / name).write_text('x')
  writing.sweep_files(tmp_path)
  assert names(tmp_path) == kept
  writing.sweep_files(tmp_path / 'absent')


# Folders.


def fill(folder, text='new'):
  (folder / 'inner').mkdir()
  for path in (folder / 'model', folder / 'inner' / 'template'):
    path.write_text(text)
    path.chmod(0o600)  # As safetensors and temporary files have it.


def test_folder_is_on_the_disk_before_it_is_renamed(tmp_path, synced, umask):
  with writing.drafted(tmp_path / 'hf') as draft:
    fill(draft)
    writing.put_in_place(draft, tmp_path / 'hf')
  assert synced[-2:] == [('rename', 'hf'), ('sync', tmp_path.name)]
  assert sorted(synced[:-2]) == [
    ('sync', name) for name in ('inner', 'model', 'new', 'template')
  ]
  for name in ('model', 'inner/template'):
    assert (tmp_path / 'hf' / name).stat().st_mode & 0o777 == umask
  assert names(tmp_path) == ['hf']


def test_folder_takes_the_place_of_what_an_earlier_one_wrote(tmp_path):
  folder = tmp_path / 'hf'
  folder.mkdir()  # An empty one is nobody's.
  for text in ('first', 'second'):
    with writing.replaced(folder) as draft:
      fill(draft, text)
    assert (folder / 'inner' / 'template').read_text() == text
    assert names(tmp_path) == ['hf']
    (folder / 'model').unlink()  # Nothing of this is lost.
  with pytest.raises(RuntimeError):
    with writing.replaced(folder) as draft:
      fill(draft, 'third')
      raise RuntimeError
  assert (folder / 'inner' / 'template').read_text() == 'second'
  assert names(tmp_path) == ['hf']


def test_folder_is_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
  folder, sync, seen = tmp_path / 'hf', writing.sync, []
  with writing.replaced(folder) as draft:
    fill(draft)

  def slow(path, **options):
    seen.append((pathlib.Path(path).name, folder.exists()))
    sync(path, **options)

  monkeypatch.setattr(writing, 'sync', slow)
  with writing.replaced(folder) as draft:
    fill(draft)
  assert seen[0] == ('new', True)


@pytest.mark.parametrize('name', ['old', 'new', 'lock', '.hf', 'a.b'])
def test_folder_may_have_any_name(tmp_path, name):
  folder = tmp_path / name
  for text in ('first', 'second'):
    with writing.replaced(folder) as draft:
      fill(draft, text)
    assert (folder / 'model').read_text() == text
  assert names(tmp_path) == [name]


def change_size(folder):
  (folder / 'model').write_text('another')


def add(folder):
  (folder / 'README.md').write_text('by hand')


def unmark(folder):
  (folder / writing.MARK).unlink()


def garble(folder):
  (folder / writing.MARK).write_text('[]')


@pytest.mark.parametrize(
  ('change', 'names'),
  [
    (change_size, 'model'),
    (add, 'README.md'),
    (unmark, 'inner/template, model'),
    (garble, 'inner/template, model'),
  ],
)
def test_folder_that_is_not_ours_stays(tmp_path, change, names):
  folder = tmp_path / 'hf'
  with writing.replaced(folder) as draft:
    fill(draft)
  change(folder)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  text = (
    f'{folder} would be replaced, and it is not what an earlier run wrote '
    f'there: see {names}. Move it elsewhere, or use another run directory.'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    with writing.replaced(folder) as draft:
      fill(draft)
  found = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  assert found == before


def test_file_in_the_place_of_a_folder_stays(tmp_path):
  (tmp_path / 'hf').write_text('mine')
  with pytest.raises(ValueError, match='Move it elsewhere'):
    with writing.replaced(tmp_path / 'hf'):
      pass
  assert (tmp_path / 'hf').read_text() == 'mine'


def test_old_folder_comes_back_where_the_new_one_cannot_be_placed(
  tmp_path, monkeypatch
):
  folder = tmp_path / 'hf'
  with writing.replaced(folder) as draft:
    fill(draft, 'old')

  def fail(source, target):
    raise OSError('no')

  with pytest.raises(OSError, match='no'):
    with writing.replaced(folder) as draft:
      fill(draft)
      monkeypatch.setattr(os, 'replace', fail)
  assert (folder / 'model').read_text() == 'old'
  assert names(tmp_path) == ['hf']


# What killed programs leave.


def leave(tmp_path, name, *, old=False):
  """A draft of `hf` as a killed program leaves it."""
  around = tmp_path / name
  (around / 'new').mkdir(parents=True)
  (around / 'new' / 'model').write_text('half')
  (around / 'lock').write_text('{"pid": 1, "host": "gone"}')
  if old:
    (around / 'old').mkdir()
    (around / 'old' / 'model').write_text('whole')
  return around


def test_drafts_of_killed_programs_are_swept(tmp_path):
  leave(tmp_path, '.hf.abcd_123')
  (tmp_path / '.hf.unlocked').mkdir()  # Killed before it was locked.
  kept = ['.adapter.abcd1234', '.hf.backup', '.hfxabcd1234', 'hf']
  for name in kept:
    (tmp_path / name).mkdir()
  with writing.drafted(tmp_path / 'hf') as alive:
    writing.sweep(tmp_path, '.hf.')
    assert alive.is_dir()
    assert names(tmp_path) == sorted([*kept, alive.parent.name])
  assert names(tmp_path) == kept
  writing.sweep(tmp_path / 'absent', '.hf.')


def test_half_a_folder_is_never_taken_for_one_that_was_replaced(tmp_path):
  with writing.drafted(tmp_path / 'old') as draft:
    fill(draft)
    shutil.copytree(draft.parent, tmp_path / '.old.abcd1234')
  writing.sweep(tmp_path, writing.prefix_of(tmp_path / 'old'))
  assert not names(tmp_path)


def test_draft_of_a_draft_is_swept_with_it(tmp_path):
  with writing.drafted(tmp_path / 'hf') as draft:
    with writing.drafted(draft) as inner:
      fill(inner)
      shutil.copytree(draft.parent, tmp_path / '.hf.abcd1234')
  writing.sweep(tmp_path, '.hf.')
  assert not names(tmp_path)


def test_folder_of_a_user_that_is_called_as_drafts_are_stays(tmp_path):
  (tmp_path / '.model.original').mkdir()
  (tmp_path / '.model.original' / 'weights').write_text('mine')
  (tmp_path / '.model.ori_ginal').write_text('mine')
  before = names(tmp_path)
  writing.sweep(tmp_path, '.model.')
  assert names(tmp_path) == before
  assert names(tmp_path / '.model.original') == ['weights']


def test_drafts_of_other_users_are_passed_by(tmp_path, monkeypatch):
  around, iterdir = leave(tmp_path, '.hf.abcd1234'), pathlib.Path.iterdir

  def refuse(path):  # Tests may be run by root, who reads everything.
    if path == around:
      raise PermissionError
    return iterdir(path)

  monkeypatch.setattr(pathlib.Path, 'iterdir', refuse)
  writing.sweep(tmp_path, '.hf.')
  assert around.is_dir()


def test_folder_that_was_being_replaced_is_put_back(tmp_path):
  leave(tmp_path, '.hf.abcd1234', old=True)
  writing.sweep(tmp_path, '.hf.')
  assert (tmp_path / 'hf' / 'model').read_text() == 'whole'
  assert names(tmp_path) == ['hf']
  # Not over the one that had come in its place.
  leave(tmp_path, '.hf.abcd1234', old=True)
  (tmp_path / 'hf' / 'model').write_text('new')
  writing.sweep(tmp_path, '.hf.')
  assert (tmp_path / 'hf' / 'model').read_text() == 'new'
  assert names(tmp_path) == ['hf']


def test_draft_that_was_swept_as_it_was_made_is_made_anew(
  tmp_path, monkeypatch
):
  hold, made = lock.hold, []

  def hold_late(path):
    made.append(path)
    if len(made) == 1:  # Another process comes between.
      path.parent.rmdir()
    return hold(path)

  monkeypatch.setattr(lock, 'hold', hold_late)
  with writing.drafted(tmp_path / 'hf') as draft:
    assert draft.is_dir()
  assert len(made) == 2 and not names(tmp_path)


def test_drafts_where_there_are_no_locks_are_made_and_left(
  tmp_path, monkeypatch
):
  def refuse(path):
    raise lock.UnsupportedError

  monkeypatch.setattr(lock, 'hold', refuse)
  leave(tmp_path, '.hf.abcd1234')
  with writing.drafted(tmp_path / 'hf') as draft:
    fill(draft)
    writing.put_in_place(draft, tmp_path / 'hf')
  writing.sweep(tmp_path, '.hf.')
  assert names(tmp_path) == ['.hf.abcd1234', 'hf']
