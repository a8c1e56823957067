"""The comparison of documents that see each other with such as stand alone."""

import sys

import pytest

from benchmarks.common import record
from benchmarks.quality import document_mask


def row(trained, seed, losses):
  return {
    'trained': trained,
    'seed': seed,
    'eval': dict(zip(document_mask.WAYS, losses, strict=True)),
  }


def test_table_has_means_and_deviations_over_seeds(tmp_path):
  rows = [
    row('each other', 0, (4.0, 5.0)),
    row('each other', 1, (4.2, 5.0)),
    row('alone', 0, (4.5, 4.75)),
  ]
  record.write(tmp_path / 'r.json', {'settings': {}, 'rows': rows})
  assert document_mask.tables(tmp_path / 'r.json')['document_mask'] == (
    '| documents see | loss, each other | loss, alone | seeds |\n'
    '| --- | --- | --- | --- |\n'
    '| each other | 4.1000 ± 0.1414 | 5.0000 ± 0.0000 | 2 |\n'
    '| alone | 4.5000 ± 0.0000 | 4.7500 ± 0.0000 | 1 |\n'
  )


def test_a_file_of_other_settings_is_refused(tmp_path, monkeypatch, capsys):
  file = tmp_path / 'r.json'
  record.write(file, {'settings': {'steps': 7}, 'environment': {}, 'rows': []})
  monkeypatch.setattr(sys, 'argv', ['document_mask', '--output', str(file)])
  with pytest.raises(SystemExit):
    document_mask.main()
  assert "holds runs of {'steps': 7}." in capsys.readouterr().err
