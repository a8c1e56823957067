"""The comparison by bytes of state: what counts, and differences by seed."""

import re

import numpy as np
import pytest
import scipy.stats

from benchmarks.quality import frontier, measure, runs
from gnlorp_jax.compose import optimizer
from gnlorp_jax.config import OptimConfig


def row(name, seed, loss, rate=1.0):
  return {
    'method': name,
    'learning_rate': rate,
    'seed': seed,
    'outcome': 'trained',
    'eval': [[0, 9.0], [10, loss]],
    'state_bytes': {'moments': 4},
  }


ENDED = {
  'galore': (5.0, 5.1, 5.3, 5.2),
  'fira': (4.9, 4.8, 5.2, 5.0),
  'adamw': (5.5, 5.5, 5.9, 5.6),
}
ROWS = [
  row(name, seed, loss)
  for name, losses in ENDED.items()
  for seed, loss in enumerate(losses)
]


def test_the_seed_that_chose_the_rate_does_not_count_beside_two_others():
  # At a worse rate it never does.
  rows = [*ROWS, row('fira', 0, 8.0, rate=2.0)]
  chosen = runs.chosen(rows)
  assert [*chosen] == ['fira', 'galore', 'adamw']
  assert [r['seed'] for r in chosen['fira']] == [1, 2, 3]
  few = [r for r in rows if r['seed'] < 2]
  assert [r['seed'] for r in runs.chosen(few)['fira']] == [0, 1]
  line = runs.table(rows).splitlines()[2]
  mean, deviation = (
    np.mean(ENDED['fira'][1:]),
    np.std(ENDED['fira'][1:], ddof=1),
  )
  assert f'| fira | 1 | {mean:.4f} ± {deviation:.4f} |' in line
  assert line.split('|')[5].strip() == '3'


def test_differences_are_paired_by_seed():
  found = {
    line.split('|')[1].strip(): [
      [*map(float, re.findall(r'[+-]?\d+\.\d+', cell))]
      for cell in line.split('|')[2:4]
    ]
    for line in frontier.paired(ROWS).splitlines()[2:]
  }
  assert found['galore'][0] == found['adamw'][1] == []
  for name, place, other in (
    ('fira', 0, 'galore'),
    ('fira', 1, 'adamw'),
    ('adamw', 0, 'galore'),
  ):
    test = scipy.stats.ttest_rel(ENDED[name][1:], ENDED[other][1:])
    low, high = test.confidence_interval(0.95)
    np.testing.assert_allclose(
      found[name][place], [(low + high) / 2, (high - low) / 2], atol=1e-4
    )


@pytest.mark.parametrize('name', [*frontier.METHODS])
def test_every_option_of_a_method_has_an_effect(name, caplog):
  method = frontier.METHODS[name]
  args = measure.parser('', frontier.COMPARISON, frontier.METHODS)
  args.set_defaults(**frontier.PROTOCOL)
  config = measure.configure(args.parse_args([]), None, **method.options)
  optimizer.make(config.optim, config.steps, (('.*', 'full'),))
  assert not caplog.messages
  assert config.optim.name == method.options['name']
  accepts_rank = optimizer.accepts(OptimConfig(name=config.optim.name), 'rank')
  assert config.optim.rank == (64 if accepts_rank else None)
