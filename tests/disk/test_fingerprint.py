"""Fingerprints follow from what files hold."""

import hashlib

from gnlorp_jax.disk import fingerprint


def test_fingerprint_of_a_file_is_that_of_its_content(tmp_path):
  path = tmp_path / 'tokens.bin'
  path.write_bytes(b'abc')
  expected = hashlib.sha256(b'abc').hexdigest()[:16]
  assert fingerprint.of_file(path) == expected


def test_fingerprint_of_files_depends_on_names_and_contents_alone(tmp_path):
  def write(folder, **contents):
    (tmp_path / folder).mkdir()
    for name, text in contents.items():
      (tmp_path / folder / name).write_text(text)
    return [tmp_path / folder / name for name in contents]

  found = fingerprint.of_files(write('a', x='1', y='2'))
  assert fingerprint.of_files(write('b', y='2', x='1')) == found
  others = [{'x': '2', 'y': '1'}, {'x': '1'}, {'z': '1', 'y': '2'}, {}]
  others = [write(f'c{i}', **one) for i, one in enumerate(others)]
  assert len({found, *map(fingerprint.of_files, others)}) == 5
