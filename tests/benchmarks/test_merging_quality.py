"""The comparison of methods of merging: what it records and shows."""

from benchmarks.quality import merging


def test_scores_are_kept_and_shown(tmp_path):
  path = tmp_path / 'r.json'
  found = merging.Record(path)
  row = {'experiment': 'encoder', 'method': 'average', 'task': 'rte'}
  for seed, value in ((0, 0.6), (1, 0.7)):
    assert found.lacks(row | {'seed': seed})
    found.keep(row | {'seed': seed, 'value': value})
  again = merging.Record(path)
  assert not again.lacks(row | {'seed': 1})
  assert again.lacks(row | {'seed': 2})
  tables = merging.tables(path)
  assert tables['merging_encoder'] == (
    '| method | rte |\n| --- | --- |\n| average | 0.65 ± 0.05 |\n'
  )
