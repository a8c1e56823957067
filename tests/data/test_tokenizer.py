import itertools
import json

import numpy as np
import pytest
import tokenizers

from gnlorp_jax.data import sources
from gnlorp_jax.data import tokenizer as tokenizer_lib
from tests.data import small_hub

TEXTS = [
  'The cat sat on the mat.\n\n  It sat still; the mat did not.',
  'né à 漢字 🙂\ttab\r\n',
  'x </s> y <|endoftext|> z <extra_id_0> <pad> <unk> <s>',
  '',
]


@pytest.fixture(scope='module')
def text_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'a.txt'
  path.write_text('the cat sat on the mat and the dog sat on the log\n' * 9)
  return str(path)


@pytest.fixture(scope='module')
def bpe(text_file, tmp_path_factory):
  return tokenizer_lib.load(
    'bpe',
    source=text_file,
    vocab_size=280,
    cache_dir=tmp_path_factory.mktemp('cache'),
  )


@pytest.fixture(scope='module')
def masked_bpe(text_file, tmp_path_factory):
  return tokenizer_lib.load(
    'bpe',
    source=text_file,
    vocab_size=280,
    cache_dir=tmp_path_factory.mktemp('masked'),
    masked=True,
  )


@pytest.fixture
def t5(shared):
  return tokenizer_lib.load(str(shared / 'data' / 'tokenizers' / 't5'))


def word_level(**vocabulary):
  return tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='x')
  )


@pytest.mark.parametrize('text', TEXTS)
def test_bpe_decodes_what_it_encoded(bpe, text):
  (ids,) = bpe.encode_batch([text])
  assert bpe.decode(ids) == text


def test_bpe_learned_the_words_of_its_source(bpe):
  (ids,) = bpe.encode_batch([' the'])
  assert len(ids) == 2
  (ids,) = bpe.encode_batch([' qzv'])
  assert len(ids) == 5


def test_bpe_of_masked_text_has_the_special_tokens_of_roberta(masked_bpe):
  special = masked_bpe.bos_id, masked_bpe.pad_id, masked_bpe.eos_id
  assert (*special, masked_bpe.mask_id) == (0, 1, 2, 4)
  # Neither these nor the unknown token, 3, may replace a token at random.
  np.testing.assert_array_equal(masked_bpe.text_ids, np.arange(5, 280))
  encoded = masked_bpe.backend.encode('the', 'cat').tokens
  assert (encoded[0], encoded[-1]) == ('<s>', '</s>')
  assert encoded.count('</s>') == 3


@pytest.mark.parametrize('text', TEXTS)
def test_end_of_sequence_comes_once_and_last(bpe, text):
  (ids,) = bpe.encode_batch([text])
  assert list(np.flatnonzero(ids == bpe.eos_id)) == [len(ids) - 1]
  assert bpe.pad_id not in ids
  assert ids.max() < bpe.vocab_size


def test_bpe_training_is_deterministic_and_cached(
  bpe, text_file, tmp_path, monkeypatch
):
  def load(vocab_size=280):
    return tokenizer_lib.load(
      'bpe', source=text_file, vocab_size=vocab_size, cache_dir=tmp_path
    )

  # The fixture's own folder is another one, so this trains afresh.
  assert load().fingerprint == bpe.fingerprint
  assert load(270).vocab_size == 270
  assert load(270).fingerprint != bpe.fingerprint
  monkeypatch.setattr(tokenizer_lib.bpe, 'train', None)
  assert load().fingerprint == bpe.fingerprint
  with pytest.raises(TypeError):  # It would train, were it not cached.
    load(271)


def test_bpe_from_a_small_source_has_fewer_entries(text_file, tmp_path):
  bpe = tokenizer_lib.load('bpe', source=text_file, cache_dir=tmp_path)
  assert 258 < bpe.vocab_size < 400


def test_bpe_without_what_it_needs_is_an_error(text_file, tmp_path):
  with pytest.raises(ValueError) as error:
    tokenizer_lib.load('bpe', cache_dir='c')
  assert str(error.value) == (
    "Tokenizer 'bpe' is trained on the data: got source=None, cache_dir='c'; "
    'both must be given.'
  )
  with pytest.raises(ValueError) as error:
    tokenizer_lib.load(
      'bpe', source=text_file, cache_dir=tmp_path, vocab_size=257
    )
  assert str(error.value) == (
    "Tokenizer 'bpe' cannot have vocab_size=257: it needs an entry for each of "
    'the 256 bytes and for <|pad|>, <|endoftext|>. Use at least 258, '
    'and at most 16777216.'
  )
  with pytest.raises(ValueError, match='<s>, <pad>, </s>, .* Use at least 261'):
    tokenizer_lib.load(
      'bpe', source=text_file, cache_dir=tmp_path, vocab_size=260, masked=True
    )


def test_t5_ids_stay_below_its_sentinels(t5):
  assert (t5.vocab_size, t5.eos_id, t5.pad_id, t5.bos_id) == (32000, 1, 0, None)
  (ids,) = t5.encode_batch(['Hello world'])
  np.testing.assert_array_equal(ids, [8774, 296, 1])
  # Each of these is a piece of the unigram model itself.
  hostile = 'a <extra_id_0> b </s> c <pad> <extra_id_99></s> 漢'
  (ids,) = t5.encode_batch([hostile])
  assert ids.max() < 32000
  assert list(np.flatnonzero(ids == 1)) == [len(ids) - 1]
  assert 0 not in ids
  assert 2 in ids  # The unknown token is no control token.


def test_t5_ids_agree_with_transformers(t5, shared):
  transformers = pytest.importorskip('transformers')
  oracle = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(shared / 'data' / 'tokenizers' / 't5' / 'tokenizer.json')
  )
  path = shared / 'data' / 'text' / 'c4' / 'c4-real-full-docs.json.gz'
  texts = list(itertools.islice(sources.documents(str(path)), 60))
  for ids, text in zip(t5.encode_batch(texts), texts, strict=True):
    np.testing.assert_array_equal(ids, oracle(text)['input_ids'])


def test_roberta_tokens_are_found_by_their_usual_names(shared):
  roberta = tokenizer_lib.load(
    str(shared / 'data' / 'tokenizers' / 'roberta-base' / 'tokenizer.json')
  )
  assert (roberta.bos_id, roberta.pad_id, roberta.eos_id) == (0, 1, 2)
  (ids,) = roberta.encode_batch(['Hello world'])
  np.testing.assert_array_equal(ids, [31414, 232, 2])
  for text in TEXTS:
    assert roberta.decode(roberta.encode_batch([text])[0]) == text


def test_truncation_and_padding_of_a_file_are_switched_off(bpe, tmp_path):
  bpe.save(tmp_path / 'plain')
  backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
  backend.enable_truncation(4)
  backend.enable_padding(length=64)
  backend.save(str(tmp_path / 'tokenizer.json'))
  limited = tokenizer_lib.load(str(tmp_path / 'tokenizer.json'))
  (expected,) = bpe.encode_batch([TEXTS[0]])
  assert len(expected) > 10
  np.testing.assert_array_equal(limited.encode_batch([TEXTS[0]])[0], expected)
  assert limited.fingerprint == bpe.fingerprint


def test_configuration_beside_the_file_names_the_tokens(tmp_path):
  path = tmp_path / 'tokenizer.json'
  word_level(x=0, end=1, fill=2, begin=3, **{'</s>': 4}).save(str(path))
  config = {'eos_token': {'content': 'end'}, 'pad_token': 'fill'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  tokenizer = tokenizer_lib.load(str(tmp_path))
  assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (1, 2, None)


def test_padding_falls_back_to_end_of_sequence():
  tokenizer = tokenizer_lib.Tokenizer(word_level(x=0, end=1), eos_token='end')
  assert tokenizer.pad_id == tokenizer.eos_id == 1


def test_tokenizer_without_end_of_sequence_is_an_error():
  with pytest.raises(ValueError) as error:
    tokenizer_lib.Tokenizer(word_level(x=0, end=1), eos_token='finis')
  assert str(error.value).startswith(
    "Tokenizer has no end-of-sequence token: eos_token='finis' and none of "
  )


def test_fingerprint_depends_on_the_tokens(bpe):
  backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
  other = tokenizer_lib.Tokenizer(
    backend, eos_token='<|pad|>', pad_token='<|endoftext|>'
  )
  assert other.fingerprint != bpe.fingerprint


@pytest.mark.parametrize('name', ['bpe', 't5'])
def test_saved_tokenizer_is_read_by_transformers_and_load(
  name, request, tmp_path
):
  transformers = pytest.importorskip('transformers')
  tokenizer = request.getfixturevalue(name)
  tokenizer.save(tmp_path / 'new' / 'folder')
  pretrained = transformers.AutoTokenizer.from_pretrained(
    str(tmp_path / 'new' / 'folder')
  )
  assert pretrained.eos_token_id == tokenizer.eos_id
  assert pretrained.pad_token_id == tokenizer.pad_id
  for text in TEXTS[:2]:
    (ids,) = tokenizer.encode_batch([text])
    theirs = pretrained(text, add_special_tokens=False)['input_ids']
    np.testing.assert_array_equal(ids[:-1], theirs)
    assert pretrained.decode(
      theirs, skip_special_tokens=True
    ) == tokenizer.decode(ids)
  again = tokenizer_lib.load(str(tmp_path / 'new' / 'folder'))
  assert again.fingerprint == tokenizer.fingerprint


def test_what_is_no_tokenizer_is_an_error(tmp_path):
  path = tmp_path / 'tokenizer.json'
  with pytest.raises(
    ValueError, match=f'No tokenizer at {path}; expected a to'
  ):
    tokenizer_lib.load(str(tmp_path))
  with pytest.raises(
    ValueError, match=f'No tokenizer at {path}; expected a to'
  ):
    tokenizer_lib.load(str(path))
  path.write_text('{"not": "one"}')
  with pytest.raises(ValueError, match=f'{path} is not a tokenizer; expected'):
    tokenizer_lib.load(str(path))
  path.write_bytes(b'\xff\x00')
  with pytest.raises(ValueError, match=f'{path} is not a tokenizer; expected'):
    tokenizer_lib.load(str(path))


@pytest.mark.parametrize(
  'name, hint',
  [
    ('nobody/tokenizer', " Did you mean 'hf:nobody/tokenizer'?"),
    ('no_such_folder', ''),
    ('/no/such/folder', ''),
  ],
)
def test_what_is_nowhere_is_an_error_and_asks_nobody(
  name, hint, tmp_path, monkeypatch
):
  with small_hub.connected(tmp_path, monkeypatch) as server:
    with pytest.raises(ValueError) as error:
      tokenizer_lib.load(name)
  assert str(error.value) == (
    f"Unknown tokenizer {name!r}: not 'bpe', and no such file or folder. "
    "Expected 'bpe', the path of a tokenizer.json or its folder, or "
    f"'hf:OWNER/NAME' for one of the Hugging Face hub.{hint}"
  )
  assert server.requests == []


def test_tokenizer_of_the_hub_is_that_of_its_folder(bpe, tmp_path, monkeypatch):
  bpe.save(tmp_path / 'saved')
  with small_hub.connected(tmp_path, monkeypatch) as server:
    files = {p.name: p.read_bytes() for p in (tmp_path / 'saved').iterdir()}
    server.add('some/model', files | {'model.safetensors': b'weights'})
    tokenizer = tokenizer_lib.load('hf:some/model')
    assert server.downloads() == sorted(files)
  assert tokenizer.fingerprint == bpe.fingerprint
  np.testing.assert_array_equal(
    tokenizer.encode_batch(TEXTS)[2], bpe.encode_batch(TEXTS)[2]
  )
  assert (tokenizer.eos_id, tokenizer.pad_id) == (bpe.eos_id, bpe.pad_id)


def test_special_tokens_have_the_names_that_templates_use(bpe, masked_bpe):
  assert bpe.special_tokens == {
    'eos_token': '<|endoftext|>',
    'pad_token': '<|pad|>',
  }
  assert masked_bpe.special_tokens == {
    'bos_token': '<s>',
    'eos_token': '</s>',
    'sep_token': '</s>',
    'pad_token': '<pad>',
    'cls_token': '<s>',
    'mask_token': '<mask>',
  }
