import itertools
import json
import logging
import multiprocessing
import shutil

import numpy as np
import pytest
import tokenizers

from gnlorp_jax.data import cache, sources, text
from gnlorp_jax.data import tokenizer as tokenizer_lib

WORDS = 'alpha beta gamma delta epsilon zeta eta theta'.split()
EOS, PAD = 1, 0


@pytest.fixture(scope='module')
def tokenizer():
  """One token a word, so that the ids of a text are known."""
  vocabulary = {'<pad>': 0, '</s>': 1, '<unk>': 2}
  vocabulary |= {word: i + 3 for i, word in enumerate(WORDS)}
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='<unk>')
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  return tokenizer_lib.Tokenizer(backend)


def ids_of(document):
  return [WORDS.index(word) + 3 for word in document.split()] + [EOS]


def write_documents(path, documents):
  path.write_text(''.join(json.dumps({'text': d}) + '\n' for d in documents))
  return str(path)


@pytest.fixture
def documents():
  rng = np.random.default_rng(0)
  return [' '.join(rng.choice(WORDS, size=n)) for n in (3, 9, 1, 7, 8, 20)]


@pytest.fixture
def source(tmp_path, documents):
  return write_documents(tmp_path / 'data.jsonl', documents)


def test_packed_file_is_the_documents_one_after_another(
  tmp_path, source, tokenizer, documents
):
  file = text.prepare(source, tokenizer, cache_dir=tmp_path / 'cache')
  expected = [i for document in documents for i in ids_of(document)]
  np.testing.assert_array_equal(file.items(), expected)
  assert (file.documents, file.tokens, file.bad_records) == (6, 54, 0)
  assert (file.vocab_size, file.dtype) == (11, 'uint16')
  assert [file.num_sequences(n) for n in (1, 7, 53, 54)] == [53, 7, 1, 0]


def test_padded_file_has_a_document_a_row_ended_and_filled(
  tmp_path, source, tokenizer, documents
):
  file = text.prepare(
    source, tokenizer, mode='padded', seq_len=8, cache_dir=tmp_path / 'cache'
  )
  rows = []
  for document in documents:
    words = ids_of(document)[:-1][:7]
    rows.append(words + [EOS] + [PAD] * (7 - len(words)))
  np.testing.assert_array_equal(file.items(), rows)
  assert (file.documents, file.tokens) == (6, 4 + 8 + 2 + 8 + 8 + 8)
  assert file.num_sequences(8) == 6


def with_bos(tokenizer):
  """The same words; the padding of the other is the beginning of this one."""
  return tokenizer_lib.Tokenizer(
    tokenizers.Tokenizer.from_str(tokenizer.backend.to_str()),
    bos_token='<pad>',
  )


def test_packed_documents_may_begin_with_a_token(
  tmp_path, source, tokenizer, documents, monkeypatch
):
  file = text.prepare(
    source, with_bos(tokenizer), cache_dir=tmp_path / 'a', add_bos=True
  )
  expected = [i for document in documents for i in [0, *ids_of(document)]]
  np.testing.assert_array_equal(file.items(), expected)
  assert (file.documents, file.tokens) == (6, 60)
  # A document in pieces begins once, whatever the groups of pieces are.
  path = tmp_path / 'a.txt'
  path.write_text('\n'.join(documents))
  monkeypatch.setattr(text, '_PIECE_CHARACTERS', 125)
  monkeypatch.setattr(text, '_GROUP_CHARACTERS', 100)
  file = text.prepare(
    str(path), with_bos(tokenizer), cache_dir=tmp_path / 'b', add_bos=True
  )
  np.testing.assert_array_equal(file.items(), [0, *ids_of(' '.join(documents))])


def test_padded_documents_may_begin_with_a_token(
  tmp_path, source, tokenizer, documents
):
  file = text.prepare(
    source,
    with_bos(tokenizer),
    mode='padded',
    seq_len=8,
    cache_dir=tmp_path / 'cache',
    add_bos=True,
  )
  rows = []
  for document in documents:
    words = [0, *ids_of(document)[:-1][:6], EOS]
    rows.append(words + [PAD] * (8 - len(words)))
  np.testing.assert_array_equal(file.items(), rows)
  assert file.tokens == 5 + 8 + 3 + 8 + 8 + 8


def test_tokens_with_and_without_a_beginning_are_other_files(
  tmp_path, source, tokenizer
):
  tokenizer = with_bos(tokenizer)
  paths = {
    text.prepare(
      source, tokenizer, cache_dir=tmp_path / 'cache', add_bos=add_bos
    ).path
    for add_bos in (False, True, False)
  }
  assert len(paths) == 2


def test_documents_cannot_begin_with_what_is_not_there(source, tokenizer):
  with pytest.raises(ValueError) as error:
    text.prepare(source, tokenizer, cache_dir='unused', add_bos=True)
  assert str(error.value) == (
    'add_bos=True needs a beginning-of-sequence token, and the tokenizer has '
    'none. Name one of its tokens as "bos_token" in a tokenizer_config.json '
    'beside the tokenizer.json, or leave add_bos out.'
  )
  both = tokenizer_lib.Tokenizer(tokenizer.backend, bos_token='</s>')
  with pytest.raises(ValueError) as error:
    text.prepare(source, both, cache_dir='unused', add_bos=True)
  assert str(error.value) == (
    "add_bos=True cannot be used with this tokenizer: id 1, '</s>', begins and "
    'ends a sequence, so nothing would tell where a document ends. Leave '
    'add_bos out: in packed text each follows the token that ends the one '
    'before.'
  )


def test_padded_rows_are_those_of_transformers(tmp_path, shared):
  transformers = pytest.importorskip('transformers')
  folder = shared / 'data' / 'tokenizers' / 't5'
  path = str(shared / 'data' / 'text' / 'c4' / 'c4-real-full-docs.json.gz')
  file = text.prepare(
    path,
    tokenizer_lib.load(str(folder)),
    mode='padded',
    seq_len=256,
    cache_dir=tmp_path,
    progress=False,
  )
  assert file.items().shape == (485, 256)
  oracle = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(folder / 'tokenizer.json'),
    pad_token='<pad>',
    eos_token='</s>',
  )
  theirs = oracle(
    list(sources.documents(path)),
    truncation=True,
    padding='max_length',
    max_length=256,
  )
  np.testing.assert_array_equal(file.items(), theirs['input_ids'])
  assert file.tokens == np.sum(theirs['attention_mask'])


def test_packed_c4_has_the_known_number_of_tokens(tmp_path, shared):
  file = text.prepare(
    str(shared / 'data' / 'text' / 'c4' / 'c4-real-full-docs.json.gz'),
    tokenizer_lib.load(str(shared / 'data' / 'tokenizers' / 't5')),
    cache_dir=tmp_path,
  )
  assert (file.documents, file.tokens) == (485, 261_088)
  assert file.items().max() < file.vocab_size == 32000


def test_packed_wikipedia_is_that_of_the_reference_curves(tmp_path, shared):
  # They took batches of 8 x 256 tokens and kept 4 x 128 of each.
  reference = np.load(shared / 'reference' / 'curves' / 'tokens.npz')['tokens']
  folder = shared / 'data' / 'text' / 'wikipedia_en'
  documents = sources.documents(str(folder / '*train.00000*'))
  file = text.prepare(
    write_documents(tmp_path / 'a.jsonl', itertools.islice(documents, 150)),
    tokenizer_lib.load(str(shared / 'data' / 'tokenizers' / 't5')),
    cache_dir=tmp_path / 'cache',
  )
  count = file.num_sequences(8 * 256)
  assert count > 30
  ours = file.items()[: count * 8 * 256].reshape(count, 8, 256)
  np.testing.assert_array_equal(ours[:, :4, :128], reference[:count])


def test_large_vocabularies_get_four_bytes(tmp_path, source):
  vocabulary = {'</s>': 1, 'x': 2, 'far': 70_000}
  tokenizer = tokenizer_lib.Tokenizer(
    tokenizers.Tokenizer(
      tokenizers.models.WordLevel(vocabulary, unk_token='far')
    )
  )
  file = text.prepare(source, tokenizer, cache_dir=tmp_path / 'cache')
  assert file.dtype == 'uint32'
  np.testing.assert_array_equal(file.items(), [70_000, 1] * 6)


def test_long_documents_are_cut_at_line_ends_without_effect(
  tmp_path, tokenizer, documents, monkeypatch
):
  path = tmp_path / 'a.txt'
  path.write_text('\n'.join(documents))
  whole = text.prepare(str(path), tokenizer, cache_dir=tmp_path / 'whole')
  monkeypatch.setattr(text, '_PIECE_CHARACTERS', 125)
  monkeypatch.setattr(text, '_GROUP_CHARACTERS', 200)
  pieces = list(text._pieces([path.read_text()], whole=False))
  assert len(pieces) == 3
  assert all(piece.endswith('\n') for piece, is_last in pieces if not is_last)
  cut = text.prepare(str(path), tokenizer, cache_dir=tmp_path / 'cut')
  np.testing.assert_array_equal(cut.items(), whole.items())
  assert (cut.documents, cut.tokens) == (1, 49)


@pytest.mark.parametrize('size', [1, 3, 4, 7, 100])
def test_pieces_join_to_the_document_and_are_bounded(monkeypatch, size):
  monkeypatch.setattr(text, '_PIECE_CHARACTERS', size)
  document = 'abcdef\n\nab\nabcdefgh'
  pieces = list(text._pieces([document, ''], whole=False))
  assert ''.join(piece for piece, _ in pieces) == document
  assert max(len(piece) for piece, _ in pieces) <= size
  assert [is_last for _, is_last in pieces].count(True) == 2
  assert pieces[-1] == ('', True)
  first = list(text._pieces([document], whole=True))
  assert first == [(document[:size], True)]


def test_file_is_reused_until_something_changes(
  tmp_path, source, tokenizer, monkeypatch
):
  def prepare(**options):
    return text.prepare(source, tokenizer, cache_dir=tmp_path / 'c', **options)

  packed = prepare()
  padded = prepare(mode='padded', seq_len=4)
  assert prepare(mode='padded', seq_len=5).path != padded.path != packed.path
  monkeypatch.setattr(tokenizer, 'encode_batch', None)
  assert prepare() == packed
  assert prepare(mode='padded', seq_len=4) == padded
  write_documents(tmp_path / 'data.jsonl', ['alpha'])
  with pytest.raises(TypeError):  # It would encode, were it not cached.
    prepare()


def test_interrupted_run_leaves_nothing_behind(
  tmp_path, source, tokenizer, monkeypatch
):
  whole = text.prepare(source, tokenizer, cache_dir=tmp_path / 'whole')
  folder = tmp_path / 'cache'
  monkeypatch.setattr(text, '_GROUP_CHARACTERS', 20)
  encode, calls = tokenizer.encode_batch, []

  def interrupted(texts):
    calls.append(texts)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return encode(texts)

  monkeypatch.setattr(tokenizer, 'encode_batch', interrupted)
  with pytest.raises(KeyboardInterrupt):
    text.prepare(source, tokenizer, cache_dir=folder)
  assert list(folder.iterdir()) == []
  again = text.prepare(source, tokenizer, cache_dir=folder)
  np.testing.assert_array_equal(again.items(), whole.items())


def test_first_of_two_writers_wins(tmp_path):
  folder = tmp_path / 'cache' / 'result'

  def fill(draft):
    (draft / 'who').write_text('slow')
    cache.cached_folder(folder, lambda d: (d / 'who').write_text('fast'))
    assert (folder / 'who').read_text() == 'fast'

  assert cache.cached_folder(folder, fill) == folder
  assert (folder / 'who').read_text() == 'fast'
  assert list(folder.parent.iterdir()) == [folder]


def test_what_killed_processes_were_writing_is_removed(tmp_path):
  left = tmp_path / 'writing-abcd1234' / 'new'
  left.mkdir(parents=True)
  (left / 'tokens.bin').write_text('half')
  for _ in range(2):
    cache.cached_folder(tmp_path / 'tokens', lambda draft: None)
    assert list(tmp_path.iterdir()) == [tmp_path / 'tokens']
    (tmp_path / 'writing-abcd1235').mkdir()


def test_fingerprint_is_that_of_the_content(source, tokenizer, tmp_path):
  file = text.prepare(source, tokenizer, cache_dir=tmp_path / 'cache')
  (tmp_path / 'moved').mkdir()
  copy = shutil.copy(source, tmp_path / 'moved')
  moved = text.prepare(str(copy), tokenizer, cache_dir=tmp_path / 'cache')
  assert moved.path != file.path and moved.fingerprint == file.fingerprint
  assert text.prepare(source, tokenizer, cache_dir=tmp_path / 'cache') == file


def test_failed_rename_is_not_hidden(tmp_path):
  folder = tmp_path / 'result'
  with pytest.raises(OSError):
    # A plain file has taken the name meanwhile: nobody has won.
    cache.cached_folder(folder, lambda draft: folder.write_text('in the way'))


def _prepare_in_process(source, folder, barrier, queue):
  vocabulary = {'</s>': 0, 'alpha': 1, '<unk>': 2}
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='<unk>')
  )
  barrier.wait()
  file = text.prepare(
    source, tokenizer_lib.Tokenizer(backend), cache_dir=folder
  )
  queue.put((str(file.path), file.tokens, int(file.items().sum())))


def test_processes_may_race_for_the_file(tmp_path):
  source = write_documents(tmp_path / 'data.jsonl', ['alpha', 'beta'] * 500)
  context = multiprocessing.get_context('spawn')
  barrier, queue = context.Barrier(2), context.Queue()
  workers = [
    context.Process(
      target=_prepare_in_process,
      args=(source, str(tmp_path / 'cache'), barrier, queue),
    )
    for _ in range(2)
  ]
  for worker in workers:
    worker.start()
  results = [queue.get(timeout=60) for _ in workers]
  for worker in workers:
    worker.join()
  assert [worker.exitcode for worker in workers] == [0, 0]
  assert results[0] == results[1]
  assert results[0][1:] == (2000, 1500)
  assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_bad_records_are_counted_beside_the_file(tmp_path, tokenizer, caplog):
  caplog.set_level(logging.INFO, logger='gnlorp_jax')
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "alpha"}\nbad\n{"text": "beta"}\n')
  file = text.prepare(str(path), tokenizer, cache_dir=tmp_path / 'cache')
  assert (file.documents, file.bad_records, file.bad_bytes) == (2, 1, 4)
  metadata = json.loads((file.path.parent / 'metadata.json').read_text())
  assert metadata['bad_records'] == 1
  assert f'Skipped {path}:2: ' in caplog.text
  assert '2 documents, 4 tokens, 1 bad records skipped.' in caplog.text


def test_what_was_left_out_is_told_at_every_start(tmp_path, tokenizer, caplog):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "alpha"}\nbad\n')
  for _ in range(2):
    caplog.clear()
    text.prepare(str(path), tokenizer, cache_dir=tmp_path / 'cache')
    assert caplog.messages[-1] == (
      f'{path}: left out were 1 bad records (4 bytes) and the rest of 0 '
      'damaged files.'
    )


@pytest.mark.parametrize(
  ('name', 'content', 'fault'),
  [
    ('metadata.json', b'', 'Expecting value'),
    ('metadata.json', b'[]', 'argument after ** must be a mapping'),
    (
      'metadata.json',
      b'{}',
      'missing 12 required keyword-only arguments',
    ),
    ('metadata.json', None, 'No such file or directory'),
    ('tokens.bin', b'12', '{folder}/tokens.bin has 2 bytes, not 4'),
    ('tokens.bin', None, 'No such file or directory'),
  ],
)
def test_damaged_cache_is_told_with_its_mending(
  tmp_path, tokenizer, name, content, fault
):
  path = tmp_path / 'a.txt'
  path.write_text('alpha')
  found = text.prepare(str(path), tokenizer, cache_dir=tmp_path / 'cache')
  folder = found.path.parent
  (folder / name).unlink()
  if content is not None:
    (folder / name).write_bytes(content)
  with pytest.raises(ValueError) as error:
    text.prepare(str(path), tokenizer, cache_dir=tmp_path / 'cache')
  message = str(error.value)
  assert message.startswith(f'The cached tokens in {folder} are damaged: ')
  assert fault.format(folder=folder) in message
  assert message.endswith('Remove that folder: the next run makes it again.')


def test_text_of_another_column_is_cached_apart(tmp_path, tokenizer):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "alpha", "body": "beta beta"}\n')
  found = [
    text.prepare(
      str(path), tokenizer, cache_dir=tmp_path / 'cache', column=column
    )
    for column in ('text', 'body')
  ]
  assert found[0].path != found[1].path
  assert found[0].tokens < found[1].tokens


@pytest.mark.parametrize(
  ('terminal', 'progress', 'shown'),
  [(True, True, True), (True, False, False), (False, True, False)],
)
def test_progress_is_shown_on_a_terminal_if_wanted(
  tmp_path, source, tokenizer, capsys, monkeypatch, terminal, progress, shown
):
  monkeypatch.delenv('FORCE_COLOR', raising=False)
  monkeypatch.setenv('TTY_COMPATIBLE', str(int(terminal)))
  text.prepare(
    source, tokenizer, cache_dir=tmp_path / 'cache', progress=progress
  )
  captured = capsys.readouterr()
  assert captured.out == ''
  if shown:
    assert 'Tokenising' in captured.err
    assert '54 tokens' in captured.err
  else:
    assert captured.err == ''


def test_unfit_modes_are_errors(source, tokenizer):
  def prepare(**options):
    text.prepare(source, tokenizer, cache_dir='unused', **options)

  with pytest.raises(ValueError) as error:
    prepare(mode='ragged')
  assert str(error.value) == (
    "Unknown mode 'ragged'; expected one of ('packed', 'padded')."
  )
  with pytest.raises(ValueError) as error:
    prepare(mode='packed', seq_len=8)
  assert str(error.value) == (
    "mode='packed' got seq_len=8: a packed file has no rows and serves every "
    'length. Leave seq_len out here and give it to batches().'
  )
  for seq_len in (None, 1):
    with pytest.raises(ValueError) as error:
      prepare(mode='padded', seq_len=seq_len)
    assert str(error.value) == (
      f"mode='padded' needs the row length, at least 2; got seq_len={seq_len}."
    )


@pytest.mark.parametrize(
  'options', [{}, {'mode': 'padded', 'seq_len': 8}], ids=['packed', 'padded']
)
def test_split_parts_join_to_the_whole(tmp_path, source, tokenizer, options):
  file = text.prepare(source, tokenizer, cache_dir=tmp_path / 'c', **options)
  train, validation = text.split(file, 0.3)
  assert len(validation.items()) == round(0.3 * len(file.items()))
  np.testing.assert_array_equal(
    np.concatenate([train.items(), validation.items()]), file.items()
  )
  inner, rest = text.split(validation, 0.5)
  np.testing.assert_array_equal(
    np.concatenate([inner.items(), rest.items()]), validation.items()
  )


def test_split_that_leaves_nothing_is_an_error(tmp_path, source, tokenizer):
  file = text.prepare(source, tokenizer, cache_dir=tmp_path / 'cache')
  for fraction in (0, 1, -0.1, 3):
    with pytest.raises(ValueError) as error:
      text.split(file, fraction)
    assert str(error.value) == (
      f'fraction={fraction} must lie in (0, 1); try 0.05.'
    )
  for fraction in (0.001, 0.999):
    with pytest.raises(ValueError) as error:
      text.split(file, fraction)
    assert str(error.value) == (
      f'fraction={fraction} of 54 items leaves one part empty; choose it '
      'nearer to 0.5 or take more text.'
    )


def test_check_vocab_names_both_sizes_and_the_fix():
  text.check_vocab(32000, 32000)
  with pytest.raises(ValueError) as error:
    text.check_vocab(50265, 32000)
  assert str(error.value) == (
    'The tokenizer produces ids up to 50264, but the model has '
    'vocab_size=32000: every id must be below it. Give the model a vocab_size '
    'of at least 50265 or choose another tokenizer.'
  )


def test_text_of_another_language_is_told():
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {'the': 0, '</s>': 1, '<unk>': 2}, unk_token='<unk>'
    )
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  words = tokenizer_lib.Tokenizer(backend)
  text.check_known(words, words.encode_batch(['the the der']), 'a.txt')
  with pytest.raises(ValueError) as error:
    text.check_known(words, words.encode_batch(['der die das the']), 'a.txt')
  assert str(error.value) == (
    "The tokenizer makes 3 of 5 tokens of a.txt '<unk>', which stands for text "
    'that it does not know: it is of another language or spelling. Name '
    'another tokenizer.'
  )


def test_tokenizer_without_an_unknown_token_knows_all():
  vocabulary = {'a': 0, '</s>': 1}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  letters = tokenizer_lib.Tokenizer(backend)
  assert letters.unknown_id is None
  text.check_known(letters, letters.encode_batch(['aaa']), 'a.txt')
