"""Named sources, and batches whose rows are of one each."""

import numpy as np
import pytest

from gnlorp_jax.data import batches, mixture, text
from tests.compose import small_lm

SEQ = 8


def test_names_of_sources():
  assert mixture.parse('a.txt') == mixture.parse('hf:a/b:c,x/*.json') == {}
  found = mixture.parse('web=hf:a/b:en[:9], my-code=src/,web=b.txt')
  assert found == {'web': 'hf:a/b:en[:9],b.txt', 'my-code': 'src/'}
  assert mixture.without_names('web=a,code=b') == 'a,b'
  assert mixture.without_names('a,b') == 'a,b'


def test_a_source_without_a_name_beside_named_ones_is_an_error():
  with pytest.raises(ValueError) as error:
    mixture.parse('web=a.txt,b.txt')
  assert str(error.value) == (
    "Of the sources 'web=a.txt,b.txt' some have a name and 'b.txt' has none: "
    'each needs one, NAME=SPEC, and those of one name are one source.'
  )


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
  """A source of the letter a, and a smaller one of the letter b."""
  folder = tmp_path_factory.mktemp('text')
  files = []
  for name, length in (('a', 150), ('b', 45)):
    (folder / f'{name}.txt').write_text(name * length)
    files.append(
      text.prepare(
        str(folder / f'{name}.txt'), small_lm.tokenizer(), cache_dir=folder
      )
    )
  return mixture.Mixture(('many', 'few'), tuple(files))


def test_rows_are_of_one_source_and_say_which(mixed):
  assert mixed.sizes(SEQ) == (18, 5)
  ids = [small_lm.tokenizer().encode(name)[0] for name in 'ab']
  found = batches.batches(mixed, batch_size=4, seq_len=SEQ, repeat=False)
  rows = list(found)
  sources = np.concatenate([batch['source'] for batch in rows])
  inputs = np.concatenate([batch['inputs'] for batch in rows])
  counted = np.concatenate([batch['weights'] for batch in rows]).any(axis=1)
  assert sources.dtype == np.int32
  np.testing.assert_array_equal(np.bincount(sources[counted]), [18, 5])
  assert len(sources) == 24  # One row fills up the last batch.
  for source, row in zip(sources[counted], inputs[counted], strict=True):
    assert set(row) == {ids[source]}


def test_position_is_kept(mixed):
  options = {'batch_size': 4, 'seq_len': SEQ, 'seed': 3}
  whole = batches.batches(mixed, **options)
  expected = [next(whole)['source'].tolist() for _ in range(9)]
  first = batches.batches(mixed, **options)
  for _ in range(5):
    next(first)
  later = batches.batches(mixed, **options)
  later.set_state(first.get_state())
  assert [next(later)['source'].tolist() for _ in range(4)] == expected[5:]
  for iterator in (whole, first, later):
    iterator.close()


def test_a_source_without_a_row_is_an_error(mixed):
  with pytest.raises(ValueError) as error:
    batches.batches(mixed, batch_size=1, seq_len=100)
  assert str(error.value) == (
    "The source 'few' has not one row of seq_len=100 tokens. Give it more "
    'text, use a smaller seq_len, or leave it out.'
  )
