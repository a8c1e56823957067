import logging
import os
import pathlib
import subprocess
import sys

import pytest
from huggingface_hub import constants

from gnlorp_jax.data import hub, sources, text
from gnlorp_jax.data import tokenizer as tokenizer_lib
from tests.data import small_hub

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = {'config.json': b'{}', 'generation_config.json': b'{}'}
TOKENIZER = {
  'tokenizer.json': b'{}',
  'tokenizer_config.json': b'{}',
  'special_tokens_map.json': b'{}',
  'chat_template.jinja': b'{{ messages }}',
}
WEIGHTS = {'model.safetensors': bytes(range(250)) * 400}
LEFT_OUT = {
  'README.md': b'',
  'consolidated.safetensors': b'the same weights',
  'model.gguf': b'',
  'onnx/model.safetensors': b'',
  'pytorch_model.bin': b'pickled',
  'original/params.json': b'',
  'training_args.pt': b'pickled',
}
MODEL = SMALL | TOKENIZER | WEIGHTS


@pytest.fixture
def server(tmp_path, monkeypatch):
  with small_hub.connected(tmp_path, monkeypatch) as served:
    yield served


def restart(server):
  """What a new process knows: the cache, and no commit."""
  hub._commit.cache_clear()
  server.requests.clear()


def names(folder):
  return sorted(
    path.relative_to(folder).as_posix()
    for path in folder.rglob('*')
    if path.is_file()
  )


def fault(spec, what='model'):
  with pytest.raises(ValueError) as error:
    hub.folder(spec, what)
  return str(error.value)


@pytest.mark.parametrize(
  'what, files',
  [
    ('config', SMALL),
    ('tokenizer', SMALL | TOKENIZER),
    ('model', MODEL),
  ],
)
def test_folder_holds_what_is_asked_for_and_no_pickles(server, what, files):
  commit = server.add('me/model', MODEL | LEFT_OUT)
  folder = hub.folder('hf:me/model', what)
  assert folder.name == commit
  assert names(folder) == sorted(['.gitattributes', *files])
  for name, content in files.items():
    assert (folder / name).read_bytes() == content


def test_shards_and_their_index_are_weights(server):
  index, grid = 'model.safetensors.index.json', 'grid_8bit.safetensors'
  shards = [f'model-0000{n}-of-00002.safetensors' for n in (1, 2)]
  server.add('me/model', SMALL | dict.fromkeys([index, grid, *shards], b'x'))
  folder = hub.folder('hf:me/model', 'model')
  assert {index, grid, *shards} < set(names(folder))


def test_second_time_downloads_nothing(server):
  server.add('me/model', MODEL)
  first = hub.folder('hf:me/model', 'model')
  server.requests.clear()
  assert hub.folder('hf:me/model', 'model') == first
  assert hub.folder('hf:me/model', 'tokenizer') == first
  assert server.paths() == []
  restart(server)
  assert hub.folder('hf:me/model', 'model') == first
  assert server.downloads() == []
  assert len(server.paths()) <= 2


def test_name_is_one_commit_in_a_process_and_the_latest_in_the_next(server):
  old = server.add('me/model', MODEL)
  assert hub.folder('hf:me/model', 'config').name == old
  new = server.add('me/model', MODEL | {'config.json': b'{"new": 1}'})
  assert hub.folder('hf:me/model', 'model').name == old
  restart(server)
  assert hub.folder('hf:me/model', 'model').name == new
  # What did not change is not fetched again.
  assert server.downloads() == ['config.json']


def test_revision_is_a_branch_or_a_commit(server):
  old = server.add('me/model', MODEL)
  server.add('me/model', MODEL | {'config.json': b'[]'})
  tag = server.add('me/model', MODEL | {'config.json': b'1'}, 'v1.0/final')
  assert hub.folder(f'hf:me/model@{old}', 'config').name == old
  assert hub.folder('hf:me/model@v1.0/final', 'config').name == tag


def test_no_network_after_the_first_time_is_said(server, caplog, monkeypatch):
  commit = server.add('me/model', MODEL)
  first = hub.folder('hf:me/model', 'model')
  restart(server)
  # Nothing listens on that port.
  monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
  caplog.set_level(logging.INFO)
  caplog.clear()
  assert hub.folder('hf:me/model', 'model') == first
  (record,) = [r for r in caplog.records if r.name == hub.__name__]
  assert record.levelname == 'WARNING'
  assert record.getMessage().startswith(
    f'hf:me/model is read from the cache, at commit {commit}: ConnectError: '
  )
  assert server.requests == []
  hub._commit.cache_clear()
  assert hub.folder(f'hf:me/model@{commit}', 'model') == first
  assert fault('hf:me/other').startswith(
    "'hf:me/other' is neither in the cache nor to be had from "
    'http://127.0.0.1:9: ConnectError: '
  )
  assert fault('hf:me/other').endswith(
    'Try again with network (files that have arrived whole are kept), or give '
    'a local path.'
  )


def test_offline_asks_nothing(server, caplog, monkeypatch):
  server.add('me/model', MODEL)
  hub.folder('hf:me/model', 'tokenizer')
  restart(server)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  caplog.clear()
  hub.folder('hf:me/model', 'tokenizer')
  assert not [r for r in caplog.records if r.levelname == 'WARNING']
  # The weights have not been fetched.
  assert fault('hf:me/model', 'model').startswith("'hf:me/model' ")
  assert fault('hf:me/other') == (
    "'hf:me/other' is neither in the cache nor to be had from "
    f'{server.url}: HF_HUB_OFFLINE is set. Try again with network (files that '
    'have arrived whole are kept), or give a local path.'
  )
  assert server.requests == []


def test_hub_that_is_ill_is_replaced_by_the_cache(server, monkeypatch):
  server.add('me/model', MODEL)
  hub.folder('hf:me/model', 'model')
  restart(server)
  server.ill = True
  hub.folder('hf:me/model', 'model')
  assert 'HTTP 500' in fault('hf:me/other')


def test_download_that_breaks_off_goes_on_where_it_was(server, monkeypatch):
  monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 10_000)
  server.add('me/model', MODEL)
  server.breaks['model.safetensors'] = [30_000]
  folder = hub.folder('hf:me/model', 'model')
  assert (folder / 'model.safetensors').read_bytes() == (
    WEIGHTS['model.safetensors']
  )
  assert server.downloads().count('model.safetensors') == 2
  assert server.ranges == ['bytes=30000-']


def test_download_that_never_ends_leaves_whole_files_alone(server):
  server.add('me/model', MODEL)
  server.breaks['model.safetensors'] = [30_000] * 20
  message = fault('hf:me/model')
  assert 'peer closed connection' in message
  assert 'files that have arrived whole are kept' in message
  server.breaks.clear()
  restart(server)
  folder = hub.folder('hf:me/model', 'model')
  assert (folder / 'model.safetensors').read_bytes() == (
    WEIGHTS['model.safetensors']
  )
  assert server.downloads() == ['model.safetensors']


def test_killed_download_is_never_taken_for_the_file(server, tmp_path):
  """Also: what users set in the environment is all there is to set."""
  server.add('me/model', MODEL)
  server.breaks['model.safetensors'] = [30_000] * 20
  program = (
    'import os, time\n'
    'sleep = time.sleep\n'
    # The library waits for a second before it goes on.
    'time.sleep = lambda s: os._exit(9) if s >= 1 else sleep(s)\n'
    'from gnlorp_jax.data import hub\n'
    "hub.folder('hf:me/model', 'model')\n"
  )
  environment = os.environ | {
    'HF_HUB_CACHE': str(tmp_path / 'cache'),
    'HF_HUB_OFFLINE': '0',
    'HF_TOKEN': 'hf_secret',
    'PYTHONPATH': str(ROOT),
  }
  killed = subprocess.run(
    [sys.executable, '-c', program],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert killed.returncode == 9
  assert 'hf_secret' not in killed.stdout + killed.stderr
  assert {token for _, _, token in server.requests} == {'Bearer hf_secret'}
  assert 'model.safetensors' in server.downloads()
  server.breaks.clear()
  folder = hub.folder('hf:me/model', 'model')
  assert (folder / 'model.safetensors').read_bytes() == (
    WEIGHTS['model.safetensors']
  )


def test_nothing_is_shown_where_there_is_no_terminal(server, capfd):
  server.add('me/model', MODEL)
  hub.folder('hf:me/model', 'model')
  assert capfd.readouterr() == ('', '')


def test_faults_of_names_are_told(server):
  commit = server.add('me/model', MODEL)
  assert fault('hf:me/model@v9') == (
    "'hf:me/model@v9': the model me/model has no such revision; expected a "
    f'branch, a tag or a commit that {server.url}/me/model lists.'
  )
  for spec in ('hf:me/modle', f'hf:me/modle@{commit}'):
    assert fault(spec) == (
      f'{spec!r}: the hub shows no model me/modle to a request without token '
      '(HTTP 404): the name is wrong, or access is refused. Check the name at '
      f'{server.url}/me/modle; if it is private, log in (hf auth login) or set '
      'HF_TOKEN.'
    )
  server.requests.clear()
  for spec in (
    *('hf:model', 'hf:me/', 'hf:me/model@', 'hf:me/model:en', 'hf://me/model'),
    *('hf:me/../model', 'hf: me/model', 'hf:me/model/config.json', 'hf:'),
  ):
    assert fault(spec) == (
      f'Malformed name {spec!r}; expected hf:OWNER/NAME or '
      "hf:OWNER/NAME@REVISION, such as 'hf:HuggingFaceTB/SmolLM2-135M@main'."
    )
  assert server.requests == []


def test_repository_without_what_is_asked_for_is_told(server):
  commit = server.add('me/model', {'config.json': b'', 'model.bin': b'x'})
  hub.folder('hf:me/model', 'config')
  assert fault('hf:me/model', 'model') == (
    f"'hf:me/model' (commit {commit}) holds no model to read; expected "
    'model.safetensors or model.safetensors.index.json. Save it in that form '
    'by AutoModel.from_pretrained(...).save_pretrained(FOLDER) of '
    'transformers, and name the folder.'
  )
  assert 'holds no tokenizer to read; expected tokenizer.json.' in (
    fault('hf:me/model', 'tokenizer')
  )


def test_private_repository_opens_to_the_token_alone(
  server, caplog, capfd, monkeypatch, tmp_path
):
  caplog.set_level(logging.DEBUG)
  server.add('me/model', MODEL)
  server.private['me/model'] = 'hf_right'
  messages = [fault('hf:me/model')]
  assert 'to a request without token (HTTP 401)' in messages[0]
  monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
  messages.append(fault('hf:me/model'))
  assert 'to the token that was sent (HTTP 401)' in messages[1]
  monkeypatch.delenv('HF_TOKEN')
  (tmp_path / 'token').write_text('hf_right')  # As after a login.
  hub.folder('hf:me/model', 'model')
  sent = {token for _, _, token in server.requests}
  assert sent == {None, 'Bearer hf_wrong', 'Bearer hf_right'}
  said = [*messages, caplog.text, *capfd.readouterr(), *server.paths()]
  assert not [s for s in said if 'hf_right' in s or 'hf_wrong' in s]


def test_gated_repository_says_where_to_ask(server):
  server.add('me/model', MODEL)
  server.gated.add('me/model')
  assert fault('hf:me/model') == (
    "'hf:me/model' is open to those alone whom its owner admits. Ask for "
    f'access at {server.url}/me/model, then log in (hf auth login) or set '
    'HF_TOKEN.'
  )


@pytest.mark.parametrize('name', ['me/model', 'folder', 'tfds', 'hf', './hf:a'])
def test_mistyped_path_asks_nothing(server, name):
  server.add('me/model', MODEL)
  assert not hub.is_hub(name)
  with pytest.raises(ValueError):
    sources.fingerprint(name)
  assert server.requests == []


DATA = {'README.md': b'', 'train.jsonl': b'{"text": "one"}\n{"text": "two"}\n'}


def test_texts_are_known_by_their_commit(server):
  old = server.add('me/texts', DATA, kind='datasets')
  data = hub.texts('hf:me/texts:en:dev[:7]')
  assert data == (
    *('hf:me/texts:en:dev[:7]', 'me/texts', 'en', 'dev', old, 7, True),
  )
  assert hub.texts('hf:me/texts[:]')[2:6] == (None, 'train', old, None)
  assert hub.texts('hf:me/texts::dev[:]')[2:6] == (None, 'dev', old, None)
  prints = {
    sources.fingerprint(f'hf:me/texts{rest}')
    for rest in ('[:]', '[:7]', ':en[:7]', ':en:dev[:7]')
  }
  assert len(prints) == 4
  again = sources.fingerprint(f'hf:me/texts@{old}[:7]')
  assert again == sources.fingerprint('hf:me/texts[:7]')
  server.add('me/texts', DATA | {'more.jsonl': b''}, kind='datasets')
  restart(server)
  assert sources.fingerprint('hf:me/texts[:7]') != again
  assert sources.fingerprint(f'hf:me/texts@{old}[:7]') == again
  assert server.downloads() == []


def test_texts_without_bound_are_refused_before_anything_is_asked(server):
  with pytest.raises(ValueError) as error:
    sources.fingerprint('hf:allenai/c4:en')
  assert str(error.value) == (
    "'hf:allenai/c4:en' does not say how much to read, and data sets of the "
    "hub may hold hundreds of gigabytes. Write 'hf:allenai/c4:en[:1000000]' "
    "for its first million documents, or 'hf:allenai/c4:en[:]' for all."
  )
  for spec in ('hf:c4[:3]', 'hf:a/b[:0]', 'hf:a/b[3:]', 'hf:a/b:c:d:e[:3]'):
    with pytest.raises(ValueError) as error:
      sources.fingerprint(spec)
    assert str(error.value) == (
      f'Malformed name {spec!r}; expected '
      'hf:OWNER/NAME:CONFIG:SPLIT@REVISION[:N], of which CONFIG, SPLIT and '
      "@REVISION may be left out, such as 'hf:allenai/c4:en[:1000000]'."
    )
  with pytest.raises(ValueError, match='the hub shows no dataset me/none to'):
    sources.fingerprint('hf:me/none[:3]')
  assert len(server.requests) == 1


class Streams:
  """Stands for the library datasets."""

  def __init__(self, records):
    self.records, self.asked = records, []

  def load_dataset(self, *args, **options):
    self.asked.append((args, options))
    return self

  def take(self, number):
    return self.records[:number]

  def __iter__(self):
    return iter(self.records)


@pytest.fixture
def streams(monkeypatch):
  found = Streams([{'text': t} for t in ('one two', None, ' ', 'three')])
  monkeypatch.setitem(sys.modules, 'datasets', found)
  return found


def test_stream_is_a_source(server, streams):
  commit = server.add('me/texts', DATA, kind='datasets')
  tally = sources.Tally()
  read = list(sources.documents('hf:me/texts:en[:4]', tally))
  assert read == ['one two', 'three']
  assert (tally.records, tally.bad, tally.fraction) == (4, 1, 1.0)
  assert tally.first_bad == (
    'hf:me/texts:en[:4]:2: expected a record with a string field "text"'
  )
  assert list(sources.documents('hf:me/texts:en[:1]')) == ['one two']
  assert list(sources.documents('hf:me/texts:en[:]')) == ['one two', 'three']
  options = {'split': 'train', 'revision': commit, 'streaming': True}
  assert streams.asked[0] == (('me/texts', 'en'), options)


def test_tokenized_stream_needs_no_network(
  server, streams, tmp_path, monkeypatch
):
  server.add('me/texts', DATA, kind='datasets')
  spec = 'hf:me/texts[:4]'

  def prepare():
    tokenizer = tokenizer_lib.load(
      'bpe', source=spec, vocab_size=300, cache_dir=tmp_path
    )
    return text.prepare(spec, tokenizer, cache_dir=tmp_path)

  first = prepare()
  assert len(streams.asked) == 2
  restart(server)
  monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
  monkeypatch.setitem(sys.modules, 'datasets', None)
  assert prepare() == first
  with pytest.raises(ValueError, match='which was not reached; without'):
    list(sources.documents(spec))


def test_faults_of_streams_are_told(server, monkeypatch):
  server.add('me/texts', DATA, kind='datasets')

  def read(spec='hf:me/texts[:9]'):
    with pytest.raises(ValueError) as error:
      list(sources.documents(spec))
    return str(error.value)

  monkeypatch.setitem(sys.modules, 'datasets', None)
  assert read() == (
    "'hf:me/texts[:9]' is read by the library datasets, which is not "
    "installed: pip install 'gnlorp_jax[hub]', or in a checkout pip install "
    "'.[hub]'."
  )
  monkeypatch.setitem(sys.modules, 'datasets', Streams([{'content': ''}]))
  assert read() == (
    "'hf:me/texts[:9]' has no field \"text\"; its fields are ['content']. "
    'Name that of the text, or a data set of texts.'
  )

  class Broken(Streams):
    def take(self, number):
      yield from self.records
      raise OSError('lost http://cdn/file?Signature=secret\n again')

  monkeypatch.setitem(sys.modules, 'datasets', Broken([{'text': 'x'}]))
  assert read() == (
    "Cannot read 'hf:me/texts[:9]': OSError: lost http://cdn/file again. That "
    'was after 1 documents; a new run starts afresh.'
  )
  monkeypatch.setitem(sys.modules, 'datasets', Broken([]))
  assert read().endswith(
    'Name an existing split, as hf:OWNER/NAME:CONFIG:SPLIT[:N].'
  )


def test_datasets_streams_from_the_hub(server, tmp_path):
  """In a process of its own: the library reads the environment once."""
  pytest.importorskip('datasets', reason='the extra hub is not installed')
  lines = [b'{"text": "document %d"}\n' % n for n in range(9)]
  files = {'README.md': b'', 'data/train-0.jsonl': b''.join(lines[:5])}
  files['data/train-1.jsonl'] = b''.join(lines[5:])
  server.add('me/texts', files, kind='datasets')
  program = (
    'from gnlorp_jax.data import sources\n'
    "print(list(sources.documents('hf:me/texts[:7]')))\n"
  )
  environment = os.environ | {
    'HF_HOME': str(tmp_path / 'home'),
    'HF_HUB_OFFLINE': '0',
    'PYTHONPATH': str(ROOT),
  }
  done = subprocess.run(
    [sys.executable, '-c', program],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.stdout == f'{[f"document {n}" for n in range(7)]}\n', done.stderr
