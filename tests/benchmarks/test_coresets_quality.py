"""The record and the tables of the comparison of coresets."""

from benchmarks.common import record
from benchmarks.common.rows import Rows
from benchmarks.quality import coresets

ROWS = [
  {
    'part': 'errors',
    'model': 'small',
    'method': 'herding',
    'last_v': [0.1, 0.3],
    'whole_model': [0.4, 0.4],
  },
  {
    'part': 'train',
    'method': 'quotas',
    'seed': 0,
    'steps': 4,
    'losses': {'loss': 2.0, 'loss_rare': 3.0},
  },
  {
    'part': 'train',
    'method': 'quotas',
    'seed': 1,
    'steps': 4,
    'losses': {'loss': 2.2, 'loss_rare': 3.0},
  },
  # Of runs of one seed the difference is .1 twice.
  *(
    {
      'part': 'train',
      'method': 'herding',
      'seed': seed,
      'steps': 4,
      'losses': {'loss': loss, 'loss_rare': 3.2 - 0.2 * seed},
    }
    for seed, loss in ((1, 2.3), (0, 2.1))
  ),
]


def test_tables_have_means_and_deviations(tmp_path):
  path = tmp_path / 'record.json'
  record.write(path, {'settings': {}, 'rows': ROWS})
  found = coresets.tables(path)
  assert set(found) == {
    *('coresets_errors', 'coresets_train', 'coresets_paired')
  }
  assert (
    '| small | herding | 0.200 ± 0.141 | 0.400 ± 0.000 | 2 |'
    in (found['coresets_errors'])
  )
  assert (
    '| quotas | 4 | 2.1000 ± 0.1414 | 3.0000 ± 0.0000 | 2 |'
    in (found['coresets_train'])
  )
  assert found['coresets_paired'].splitlines()[2:] == [
    '| herding | +0.1000 ± 0.0000 | +0.1000 ± 0.1000 | 2 |'
  ]


def test_every_row_is_found_by_its_keys(tmp_path):
  found = Rows(tmp_path / 'record.json', coresets.KEYS)
  for row in ROWS:
    assert found.find(row) is None
    found.keep(row)
