"""The package's file of measured rows is what the records say."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks.common import record
from benchmarks.quality import advice, frontier, measure, runs
from gnlorp_jax.models import llama
from gnlorp_jax.optim import advice as packaged
from gnlorp_jax.plan import budget

SHAPES = {'up': {'kernel': jax.ShapeDtypeStruct((1024, 2048), 'float32')}}
LOSSES = (6.0, 5.0, 5.2)  # Of three seeds; the first chose the rate.


@pytest.fixture
def frontier_record(tmp_path, monkeypatch):
  """A record of every method of the frontier, made up; one has one seed."""
  settings = {
    **{'size': '20m', 'parameters': 5261568, 'rank': 64},
    'compute_dtype': 'bfloat16',
    **{'steps': 2000, 'batch_size': 4, 'seq_len': 128},
  }
  rows = [
    {
      **{'method': name, 'learning_rate': 0.5, 'seed': seed},
      **{'outcome': 'trained', 'eval': [[0, 9.0], [2000, loss]]},
    }
    for name in frontier.METHODS
    for seed, loss in enumerate(LOSSES[: 1 if name == 'muon' else 3])
  ]
  monkeypatch.chdir(tmp_path)
  header = {'settings': settings}
  # Rates that seed 0 tried, of which one did not train.
  rows += [
    {
      **{'method': 'galore', 'learning_rate': rate, 'seed': 0},
      **{'outcome': outcome, 'eval': [[0, 9.0], [2000, 7.0]]},
    }
    for rate, outcome in ((0.25, 'trained'), (1.0, 'loss not finite'))
  ]
  record.write(frontier.COMPARISON.results, {**header, 'rows': rows})


def test_the_packaged_file_holds_the_recorded_rows():
  found = json.loads(advice.PACKAGED.read_text())
  assert found == advice.build(advice.chosen()), (
    'Run `python -m benchmarks.report quality.advice`.'
  )
  # And as they are read, beside the runs themselves.
  _, rows = runs.read(advice.chosen().COMPARISON.results)
  read = packaged.record()
  assert [row.loss for row in read.rows] == sorted(r.loss for r in read.rows)
  for row in read.rows:
    ends = [
      run['eval'][-1][1]
      for run in rows
      if (run['method'], run['learning_rate']) == (row.name, row.learning_rate)
    ][-row.seeds :]
    np.testing.assert_allclose(
      (row.loss, row.deviation),
      (np.mean(ends), np.std(ends, ddof=1)),
      atol=1e-6,
    )


def test_advice_counts_the_recorded_states():
  benchmark = advice.chosen()
  header, rows = runs.read(benchmark.COMPARISON.results)
  sizes = {row['method']: row['state_bytes'] for row in rows}
  settings = header['settings']
  model = llama.preset(settings['size'], vocab_size=settings['vocab_size'])
  params = jax.eval_shape(llama.make(model).init, jax.random.key(0))
  for found in packaged.recommend(params, 2**40):
    for part in ('moments', 'bases', 'errors'):
      assert found.bytes[part] == sizes[found.name][part], found.name
    assert found.options.get('rank', settings['rank']) == settings['rank']


def test_the_frontier_is_taken_once_it_is_recorded(frontier_record):
  assert advice.chosen() is frontier
  found = packaged.from_json(advice.build(frontier))
  # One seed tells nothing of noise.
  assert {row.name for row in found.rows} == {*frontier.METHODS} - {'muon'}
  assert found.source == 'benchmarks/results/frontier.json'
  assert (found.dtype, found.compute_dtype) == ('float32', 'bfloat16')
  assert (found.width, found.tokens) == (256, 2000 * 4 * 128)
  row = found.rows[0]
  assert (row.loss, row.seeds) == (5.1, 2)
  edges = {row.name: (row.rates, row.edge) for row in found.rows}
  assert edges.pop('galore') == ((0.25, 0.5, 1.0), None)
  assert set(edges.values()) == {((0.5,), 'lowest')}
  assert 'scale 0.25 of the width' in advice.tables()['advice']
  args = measure.parser('', frontier.COMPARISON, frontier.METHODS)
  args.set_defaults(**frontier.PROTOCOL)
  for row in found.rows:
    method = frontier.METHODS[row.name]
    # At the width of the record, what the runs had.
    config = measure.configure(args.parse_args([]), None, **method.options)
    asked = dataclasses.replace(config.optim, learning_rate=row.learning_rate)
    assert budget.optim_of(asked, row, found.width) == asked
    # And at another width, an optimizer.
    options = packaged.arguments(row, 1024)
    assert options.get('rank', 256) == options.get('scale', 256) == 256
    tx = packaged.make(row.optimizer, row.learning_rate, options)
    assert jax.tree.leaves(jax.eval_shape(tx.init, SHAPES))
