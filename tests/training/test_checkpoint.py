import errno
import logging
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from gnlorp_jax.training import distributed, integrity, sharding
from gnlorp_jax.training import state as state_lib
from gnlorp_jax.training.checkpoint import (
  Checkpointer,
  check_path,
)

RULES = (('.*', sharding.shard_largest_axis('fsdp', min_size=1024)),)
TX = optax.chain(
  optax.clip_by_global_norm(1.0),  # An empty state.
  optax.partition(
    {'train': optax.adamw(1e-3), 'freeze': optax.set_to_zero()},
    lambda params: {'matrix': 'train', 'half': 'train', 'frozen': 'freeze'},
  ),
)


def init(key):
  matrix = jax.random.normal(key, (64, 32))
  return {
    'matrix': matrix,
    'half': matrix.astype(jnp.bfloat16),
    'frozen': jnp.full((3,), jnp.nan),
  }


def make_state(mesh, seed=0):
  """A state with every kind of leaf that an optimizer keeps."""
  state = state_lib.create(init, TX, jax.random.key(seed), mesh, RULES)
  extra = {
    'codes': jnp.arange(-128, 128, dtype=jnp.int8),
    'bytes': jnp.arange(256, dtype=jnp.uint8),
    'count': jnp.int32(2**31 - 1),
    'flag': jnp.array(True),
    'key': jax.random.key(seed),
    'nothing': None,
  }
  extra = jax.device_put(extra, state.step.sharding)
  on_host = state.step.sharding.with_memory_kind('pinned_host')
  extra['on the host'] = jax.device_put(jnp.arange(9.0), on_host)
  return state._replace(opt_state=(state.opt_state, extra))


def abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)

  def raw(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    kind = x.sharding.memory_kind
    return x.dtype, x.shape, kind, np.asarray(x).tobytes()

  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert raw(a) == raw(b)


def small_state(step):
  """Arrays that tell which step they are from."""
  w = np.full((64, 64), step, np.float32) + np.arange(64, dtype='f')[None]
  return {'w': jnp.asarray(w), 'step': jnp.asarray(step, jnp.int32)}


@pytest.fixture
def one_device():
  return sharding.make_mesh(1, 1)


@pytest.fixture
def two_saved(tmp_path):
  """A directory with the small checkpoints of steps 10 and 20."""
  directory = tmp_path / 'checkpoints'
  with Checkpointer(directory) as checkpointer:
    for step in (10, 20):
      checkpointer.save(step, small_state(step), {'at': step}, {'width': 64})
  return directory


def restore_small(directory):
  with Checkpointer(directory) as checkpointer:
    return checkpointer.restore_latest(abstract(small_state(0)))


def names(directory):
  return sorted(path.name for path in directory.iterdir())


def assert_restored(restored, step):
  state, data_state, metadata = restored
  assert_same_bits(state, small_state(step))
  assert (data_state, metadata) == ({'at': step}, {'width': 64})


def test_state_is_restored_bit_for_bit(tmp_path, one_device):
  state = make_state(one_device)
  data_state = {'epoch': 1, 'position': [3, 5]}
  metadata = {'hidden_size': 128, 'rate': 0.1, 'tied': False, 'name': None}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(7, state, data_state, metadata)
  with Checkpointer(tmp_path) as checkpointer:
    restored = checkpointer.restore_latest(abstract(state))
  assert_same_bits(restored[0], state)
  assert restored[1:] == (data_state, metadata)


@pytest.mark.parametrize(
  ('saved_on', 'restored_on'), [((2, 2), (1, 1)), ((1, 1), (2, 2))]
)
def test_state_is_restored_on_another_mesh(tmp_path, saved_on, restored_on):
  state = make_state(sharding.make_mesh(*saved_on))
  target = abstract(make_state(sharding.make_mesh(*restored_on), seed=1))
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(7, state, {}, {})
    restored, _, _ = checkpointer.restore_latest(target)
  assert_same_bits(restored, state)
  assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
    lambda x: x.sharding, target
  )


def test_saved_values_survive_donation(tmp_path):
  overwrite = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
  )
  state = {'w': jnp.arange(4 * 2**20, dtype=jnp.float32)}  # 16 MiB.
  expected = np.array(state['w'])
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state, {}, {})
    for _ in range(5):
      state = overwrite(state)
    jax.block_until_ready(state)
    restored, _, _ = checkpointer.restore_latest(abstract(state))
  np.testing.assert_array_equal(restored['w'], expected)


def test_resumed_training_equals_uninterrupted(tmp_path, one_device):
  step = jax.jit(
    lambda state: state._replace(
      step=state.step + 1,
      params=jax.tree.map(lambda p: p * 0.9, state.params),
      opt_state=TX.update(state.params, state.opt_state, state.params)[1],
    ),
    donate_argnums=0,
  )
  key = jax.random.key(0)
  state = state_lib.create(init, TX, key, one_device)
  with Checkpointer(tmp_path) as checkpointer:
    for count in range(4):
      if count == 2:
        checkpointer.save(count, state, {}, {})
      state = step(state)
  target = state_lib.abstract(init, TX, key, one_device)
  with Checkpointer(tmp_path) as checkpointer:
    resumed, _, _ = checkpointer.restore_latest(target)
  assert int(resumed.step) == 2
  assert_same_bits(step(step(resumed)), state)


def test_empty_directory_has_nothing_to_restore(tmp_path):
  assert restore_small(tmp_path / 'new') is None
  with Checkpointer(tmp_path / 'new') as checkpointer:
    assert checkpointer.latest_metadata() is None


def test_only_the_newest_are_kept(tmp_path):
  with Checkpointer(tmp_path, keep=2) as checkpointer:
    for step in (1, 2, 3, 4):
      checkpointer.save(step, small_state(step), {}, {})
  assert {path.name for path in tmp_path.iterdir()} == {'3', '4'}


def test_what_a_kill_left_of_one_that_was_being_deleted_goes(two_saved):
  shutil.copytree(two_saved / '10', two_saved / '5')
  (two_saved / '5' / 'record' / 'metadata').unlink()
  for read_only in (True, False):
    assert names(two_saved) == ['10', '20', '5']
    with Checkpointer(two_saved, keep=2, read_only=read_only) as checkpointer:
      found = checkpointer.restore_latest(abstract(small_state(0)))
      assert_restored(found, 20)
  assert names(two_saved) == ['10', '20']


def test_none_is_deleted_before_the_newest_are_known_to_be_whole(two_saved):
  (two_saved / '20' / 'record' / 'metadata').unlink()
  with Checkpointer(two_saved, keep=1) as checkpointer:
    found = checkpointer.restore_latest(abstract(small_state(0)))
    assert_restored(found, 10)
  assert names(two_saved) == ['10', '20.corrupt']


def test_same_step_is_saved_once(two_saved):
  with Checkpointer(two_saved) as checkpointer:
    checkpointer.restore_latest(abstract(small_state(0)))
    checkpointer.save(20, small_state(99), {}, {}, wait=True)
  assert_restored(restore_small(two_saved), 20)


@pytest.mark.parametrize('step', [15, 20])
def test_saving_into_the_past_is_an_error(two_saved, step):
  text = (
    f'Step {step} cannot be saved: {two_saved} already holds step 20. Resume '
    'from it or use another run directory.'
  )
  with Checkpointer(two_saved) as checkpointer:
    with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
      checkpointer.save(step, small_state(step), {}, {})


# Damage. Each file of a checkpoint in turn is damaged in each way. Some files
# are of no consequence, so that the newest checkpoint may still be whole; but
# never may anything come back that was not saved.


def delete(path):
  path.unlink()


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bytes(path):
  content = bytearray(path.read_bytes())
  for index in range(len(content) // 3, len(content), 97):
    content[index] ^= 0x10
  path.write_bytes(content)


def write_garbage(path):
  path.write_bytes(b'{"content": 1, garbage')


@pytest.mark.parametrize(
  'damage', [delete, truncate, flip_bytes, write_garbage]
)
def test_damaged_checkpoint_falls_back(two_saved, damage, caplog):
  files = sorted(p for p in (two_saved / '20').rglob('*') if p.is_file())
  assert len(files) >= 8
  for index, file in enumerate(files):
    copy = two_saved.with_name(f'copy{index}')
    shutil.copytree(two_saved, copy)
    damaged = copy / file.relative_to(two_saved)
    damage(damaged)
    caplog.clear()
    state, data_state, metadata = restore_small(copy)
    step = int(state['step'])
    assert_restored((state, data_state, metadata), step)
    assert (step == 10) == (copy / '20.corrupt').is_dir()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= 30]
    ours = [w for w in warnings if w.startswith('The checkpoint of step 20')]
    assert len(ours) == (step == 10)
    # What holds the arrays and the record does matter.
    if damaged.name in ('metadata', 'manifest.ocdbt') and (
      'ocdbt.process_0' not in damaged.parts
    ):
      assert step == 10


def test_flipped_bit_in_an_array_is_noticed(tmp_path, caplog):
  # Random bits cannot be compressed: they lie on the disk as they are, and no
  # one but us would notice.
  bits = np.random.default_rng(0).integers(0, 2**32, 2**14, dtype=np.uint32)
  state = {'w': jnp.asarray(bits)}
  with Checkpointer(tmp_path) as checkpointer:
    for step in (10, 20):
      checkpointer.save(step, state, {'at': step}, {})
  data = max((tmp_path / '20').rglob('*'), key=lambda p: p.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(content)
  with Checkpointer(tmp_path) as checkpointer:
    restored, data_state, _ = checkpointer.restore_latest(abstract(state))
  assert_same_bits(restored, state)
  assert data_state == {'at': 10}
  assert "the checksum does not fit the contents of ['w']" in caplog.text


def test_changed_digit_in_the_record_is_noticed(two_saved, caplog):
  record = two_saved / '20' / 'record' / 'metadata'
  text = record.read_text()
  assert '"at": 20' in text
  record.write_text(text.replace('"at": 20', '"at": 30'))
  assert_restored(restore_small(two_saved), 10)
  assert 'the checksum does not fit the record' in caplog.text


def test_unfinished_checkpoint_of_a_killed_run_is_deleted(two_saved):
  unfinished = two_saved / '30.orbax-checkpoint-tmp'
  shutil.copytree(two_saved / '20', unfinished)
  with Checkpointer(two_saved) as checkpointer:
    assert_restored(checkpointer.restore_latest(abstract(small_state(0))), 20)
    checkpointer.save(25, small_state(25), {}, {})
  assert not unfinished.exists()


def test_missing_folder_falls_back(two_saved):
  for name in ('state', 'record'):
    copy = two_saved.with_name(f'without_{name}')
    shutil.copytree(two_saved, copy)
    shutil.rmtree(copy / '20' / name)
    assert_restored(restore_small(copy), 10)


def test_empty_folder_falls_back(two_saved):
  (two_saved / '30').mkdir()
  assert_restored(restore_small(two_saved), 20)
  assert (two_saved / '30.corrupt').is_dir()


def test_wrong_values_are_noticed_though_all_files_are_whole(two_saved, caplog):
  shutil.rmtree(two_saved / '20' / 'state')
  shutil.copytree(two_saved / '10' / 'state', two_saved / '20' / 'state')
  assert_restored(restore_small(two_saved), 10)
  text = (
    f'The checkpoint of step 20 in {two_saved} is damaged: the checksum does '
    "not fit the contents of ['step', 'w']."
  )
  assert text in caplog.messages
  assert f'Moved {two_saved / "20"} to 20.corrupt.' in caplog.messages


def test_damage_that_cannot_be_moved_is_an_error_of_all(two_saved, monkeypatch):
  (two_saved / '20' / 'record' / 'metadata').write_text('[]')
  shared, from_first = [], distributed.from_first

  def move_in_vain(make):
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, 'rename', refuse)
      return from_first(make)

  def refuse(source, target):
    shared.append(source.name)
    raise OSError(errno.EROFS, 'read-only')

  monkeypatch.setattr(distributed, 'from_first', move_in_vain)
  with Checkpointer(two_saved) as checkpointer:
    with pytest.raises(OSError, match='read-only'):
      checkpointer.restore_latest(abstract(small_state(0)))
  assert shared == ['20']


def test_damaged_step_can_be_saved_again(two_saved):
  for _ in range(2):
    shutil.rmtree(two_saved / '20' / 'record')
    with Checkpointer(two_saved) as checkpointer:
      restored = checkpointer.restore_latest(abstract(small_state(0)))
      assert_restored(restored, 10)
      checkpointer.save(20, small_state(20), {'at': 20}, {'width': 64})
    assert_restored(restore_small(two_saved), 20)
  assert (two_saved / '20.corrupt').is_dir()
  assert (two_saved / '20.corrupt2').is_dir()


@pytest.mark.parametrize('name', ['record/metadata', 'commit_success.txt'])
def test_a_pipe_is_not_waited_for(two_saved, name):
  """Whether Orbax reads that file or not: opening one may take for ever."""
  path = two_saved / '20' / name
  path.unlink(missing_ok=True)
  os.mkfifo(path)
  shutil.rmtree(two_saved / '10' / 'record')
  text = f'(step 20: {path} is no file; step 10: '
  with pytest.raises(ValueError, match=re.escape(text)):
    restore_small(two_saved)


def test_nothing_but_damage_is_an_error_and_stays_in_place(two_saved):
  for step in ('10', '20'):
    (two_saved / step / 'record' / 'metadata').write_text('garbage')
  text = f'No checkpoint in {two_saved} can be restored (step 20: JSONDecode'
  with pytest.raises(ValueError, match=f'^{re.escape(text)}.*step 10: .*use'):
    restore_small(two_saved)
  with Checkpointer(two_saved) as checkpointer:
    with pytest.raises(ValueError, match=f'^{re.escape(text)}'):
      checkpointer.latest_metadata()
  assert {path.name for path in two_saved.iterdir()} == {'10', '20'}


def test_records_of_another_version_are_left_alone(two_saved, monkeypatch):
  monkeypatch.setattr(integrity, 'VERSION', 2)
  with pytest.raises(ValueError, match='is of version 1, and this program re'):
    restore_small(two_saved)
  assert {path.name for path in two_saved.iterdir()} == {'10', '20'}


def test_other_arrays_are_an_error_and_no_damage(two_saved):
  target = abstract({'w': jnp.ones((64, 32)), 'v': jnp.ones(())})
  text = (
    f'Checkpoint of step 20 in {two_saved} does not fit the state. Missing: '
    "['v']. Extra: ['step']. Different: ['w: float32[64, 64] != float32[64, "
    "32]']. Use another run directory or the same settings."
  )
  with Checkpointer(two_saved) as checkpointer:
    with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
      checkpointer.restore_latest(target)
  assert_restored(restore_small(two_saved), 20)


@pytest.mark.parametrize(
  'error',
  [
    MemoryError('host'),
    PermissionError(errno.EACCES, 'denied'),
    OSError(errno.ESTALE, 'stale'),
    OSError(errno.EMFILE, 'many'),
  ],
)
def test_trouble_of_the_machine_is_no_damage(two_saved, monkeypatch, error):
  text = (
    f'The checkpoint of step 20 in {two_saved} cannot be read: {error}. It was '
    'left as it is. Run the same command again when its files can be read.'
  )
  with Checkpointer(two_saved) as checkpointer:

    def restore(*args, **kwargs):
      raise error

    monkeypatch.setattr(checkpointer._manager, 'restore', restore)
    with pytest.raises((MemoryError, OSError)) as found:
      checkpointer.restore_latest(abstract(small_state(0)))
  assert str(found.value) == ('host' if error.args == ('host',) else text)
  assert_restored(restore_small(two_saved), 20)


@pytest.fixture
def of_another_user(two_saved):
  """A copy, read by someone who may not read what is closed to others."""
  is_root = os.geteuid() == 0  # Whom no permission holds back.
  # Not below pytest's folder, which each of its processes closes to others.
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    copy = pathlib.Path(folder) / 'checkpoints'
    shutil.copytree(two_saved, copy)
    if is_root:
      for path in [copy, *copy.rglob('*')]:
        os.chown(path, 65534, 65534)
      os.seteuid(65534)
    try:
      yield copy
    finally:
      os.seteuid(0 if is_root else os.geteuid())


@pytest.mark.parametrize(
  'closed', ['record', 'state', 'state/manifest.ocdbt', 'state/d']
)
def test_files_of_another_user_are_no_damage(of_another_user, closed):
  path = of_another_user / '20' / closed
  usual = path.stat().st_mode
  path.chmod(0)
  text = (
    f'The checkpoint of step 20 in {of_another_user} cannot be read: '
    f"Permission denied: '{path}"
  )
  with Checkpointer(of_another_user) as checkpointer:
    with pytest.raises(OSError, match=f'^{re.escape(text)}.*permissions'):
      checkpointer.restore_latest(abstract(small_state(0)))
  path.chmod(usual)
  assert_restored(restore_small(of_another_user), 20)


def test_metadata_is_read_without_arrays(two_saved):
  shutil.rmtree(two_saved / '20' / 'state')
  with Checkpointer(two_saved) as checkpointer:
    assert checkpointer.latest_metadata() == {'width': 64}


def test_read_only_touches_nothing(two_saved):
  shutil.rmtree(two_saved / '20' / 'record')
  (two_saved / '30.orbax-checkpoint-tmp').mkdir()  # Another process saves.
  before = sorted(two_saved.rglob('*'))
  with Checkpointer(two_saved, read_only=True) as checkpointer:
    assert_restored(checkpointer.restore_latest(abstract(small_state(0))), 10)
    text = (
      f'{two_saved} was opened with read_only=True: nothing can be saved to it.'
    )
    with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
      checkpointer.save(30, small_state(30), {}, {})
  assert sorted(two_saved.rglob('*')) == before


def test_read_only_without_a_directory_has_nothing_to_restore(tmp_path):
  with Checkpointer(tmp_path / 'new', read_only=True) as checkpointer:
    assert checkpointer.restore_latest(abstract(small_state(0))) is None
  assert not (tmp_path / 'new').exists()


def test_unwritable_directory_is_an_error(tmp_path):
  (tmp_path / 'file').write_text('')
  directory = tmp_path / 'file' / 'checkpoints'
  text = (
    f'Checkpoint directory {directory} cannot be written: Not a directory. '
    'Choose another directory or correct its permissions.'
  )
  with pytest.raises(OSError, match=f'^{re.escape(text)}$'):
    Checkpointer(directory)


@pytest.mark.parametrize(
  ('name', 'found'),
  [('lr=[0.1,0.2]', '['), ('a*?', '*?'), ('**', '*'), ('a\\b', '\\')],
)
def test_directory_that_would_be_a_pattern_is_refused(tmp_path, name, found):
  directory = tmp_path / name / 'checkpoints'
  text = (
    f'The path {directory} holds {found}, and no checkpoint could be read back '
    'from it: none of *?[\\ may stand in the name of a folder with '
    'checkpoints, or of one above it. Choose another folder.'
  )
  with pytest.raises(ValueError, match=f'^{re.escape(text)}$'):
    Checkpointer(directory)
  assert not directory.parent.exists()


def test_directory_of_other_characters_is_read_back(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match='another folder'):
    check_path('a[1]')  # Also where it lies is looked at.
  directory = tmp_path / "~lr={0.1,2} ü%20$x:#'!]" / 'checkpoints'
  with Checkpointer(directory) as checkpointer:
    checkpointer.save(10, small_state(10), {'at': 10}, {'width': 64})
  assert_restored(restore_small(directory), 10)


def test_folder_that_cannot_be_made_is_an_error_and_nothing_waits(two_saved):
  aside = two_saved.with_name('aside')
  with pytest.raises(OSError, match='could not be written.*Not a directory'):
    with Checkpointer(two_saved) as checkpointer:
      two_saved.rename(aside)
      two_saved.write_text('in the way')
      checkpointer.save(30, small_state(30), {}, {})
  # Orbax's own, for which the end of the process would wait.
  writers = [t for t in threading.enumerate() if 'orbax' in type(t).__module__]
  for thread in writers:
    thread.join(5)
    assert not thread.is_alive()


def test_full_disk_is_an_error_and_spares_the_last_checkpoint(two_saved):
  # A limit on the size of a file stands in for the size of the disk.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  numbers = np.random.default_rng(0).normal(size=2**20)
  state = {'w': jnp.asarray(numbers, jnp.float32)}
  checkpointer = Checkpointer(two_saved, keep=1)
  text = f'A checkpoint could not be written to {two_saved}: .*File too large'
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
  try:
    with pytest.raises(OSError, match=text):
      checkpointer.save(30, state, {}, {}, wait=True)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpointer.close()
  assert_restored(restore_small(two_saved), 20)


def test_failed_asynchronous_save_is_raised_at_the_latest_by_close(two_saved):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  numbers = np.random.default_rng(0).normal(size=2**20)
  state = {'w': jnp.asarray(numbers, jnp.float32)}
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
  try:
    with pytest.raises(OSError, match='could not be written'):
      with Checkpointer(two_saved) as checkpointer:
        checkpointer.save(30, state, {}, {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_checkpoint_to_keep_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='^keep=0 must be at least 1.$'):
    Checkpointer(tmp_path, keep=0)


def test_orbax_is_quiet_and_we_are_not(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  caplog.set_level(logging.INFO, logger='absl')  # Other tests may silence it.
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, small_state(1), {}, {})
  restore_small(tmp_path)
  assert [record for record in caplog.records if record.name == 'absl'] == []
  logging.getLogger('absl').info('not from orbax')
  assert 'not from orbax' in caplog.messages


SAVE_FOREVER = """
import itertools, sys
import jax.numpy as jnp
import numpy as np
from gnlorp_jax.training.checkpoint import Checkpointer

checkpointers = [Checkpointer(name, keep=2) for name in sys.argv[1:]]
for step in itertools.count(1):
  for checkpointer in checkpointers:
    w = np.full((64, 64), step, np.float32) + np.arange(64.0, dtype='f')[None]
    state = {'w': jnp.asarray(w), 'step': jnp.asarray(step, jnp.int32)}
    checkpointer.save(step, state, {'at': step}, {'width': 64})
  if step == 2:
    print('saving', flush=True)
"""


def test_killed_run_leaves_a_usable_directory(tmp_path):
  # One process that saves to three folders in turn: when it is killed, one of
  # them is being written, and the others are complete.
  root = pathlib.Path(__file__).resolve().parents[2]
  directories = [tmp_path / str(index) for index in range(3)]
  with subprocess.Popen(
    [sys.executable, '-c', SAVE_FOREVER, *directories],
    cwd=root,
    stdout=subprocess.PIPE,
  ) as process:
    assert process.stdout.readline() == b'saving\n'
    time.sleep(random.Random(0).uniform(0.0, 0.3))
    process.kill()
  assert process.returncode == -signal.SIGKILL
  for directory in directories:
    state, data_state, metadata = restore_small(directory)
    step = int(state['step'])
    assert step >= 1
    assert_restored((state, data_state, metadata), step)
    # The run goes on.
    with Checkpointer(directory, keep=1) as checkpointer:
      checkpointer.restore_latest(abstract(small_state(0)))
      checkpointer.save(
        step + 1, small_state(step + 1), {'at': step + 1}, {'width': 64}
      )
    assert_restored(restore_small(directory), step + 1)
    assert {path.name for path in directory.iterdir()} == {str(step + 1)}


def test_checkpoint_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
  synced, fsync = [], os.fsync

  def note(descriptor):
    is_named = (tmp_path / '1').exists()
    synced.append((os.fstat(descriptor).st_ino, is_named))
    fsync(descriptor)

  monkeypatch.setattr(os, 'fsync', note)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, small_state(1), {}, {})
  for path in (tmp_path / '1').rglob('*'):
    # What Orbax writes on the way tells nothing that is read.
    is_read = path.name not in ('commit_success.txt', '_CHECKPOINT_METADATA')
    assert (path.stat().st_ino, False) in synced or not is_read, path
  assert synced[-1] == (tmp_path.stat().st_ino, True)


def test_saved_names_are_those_of_the_tree(tmp_path, one_device):
  # Other tools can read the state: Orbax stores it under its own names.
  state = make_state(one_device)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state, {}, {})
  with ocp.StandardCheckpointer() as reader:
    metadata = reader.metadata(tmp_path / '1' / 'state')
  tree = metadata.item_metadata.tree
  assert tree['params']['matrix'].shape == (64, 32)
  chex.assert_shape(tree['step'], ())
