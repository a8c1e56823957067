"""The comparison of whole training steps on a tiny model."""

import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from benchmarks.common import harness, peers, turns
from benchmarks.train import measure as train
from benchmarks.train import products, train_sides
from gnlorp_jax.models import llama

CONFIG = llama.LlamaConfig(
  vocab_size=32,
  hidden_size=16,
  intermediate_size=24,
  num_layers=1,
  num_heads=2,
  max_seq_len=16,
)
CASE = train_sides.Case(
  *(CONFIG, 2, 8),
  peers.Setting(learning_rate=1e-2, rank=4, gap=4),
  *(16, 'cpu'),
)
WEIGHTS = 4 * 16 * 16 + 3 * 16 * 24
OTHERS = 2 * 32 * 16 + 3 * 16  # Embedding and head, and the norms.


@pytest.fixture(scope='module')
def rows(one_torch_thread):
  names = ['adamw', 'gradnormlorp', 'optax-galore', 'torch-adamw']
  found = turns.race(
    *([*names, 'galore-torch'], lambda name: train.METHODS[name](CASE)),
    *(lambda *known: train.row(*known, CASE), lambda rows: None),
    *(harness.Clock(10),),
    **{'steps': 4, 'turn': 2, 'inputs': train.BATCHES},
  )
  return {row['method']: row for row in found}


@pytest.mark.slow
def test_rows_of_this_package(rows):
  for name in ('adamw', 'gradnormlorp', 'optax-galore'):
    known = rows[name]
    assert known['steps'] == 4 and known['intervals'] == 1
    assert known['tokens_per_second'] == pytest.approx(16 / known['mean_s'])
    assert known['peak_bytes'] > 0 and known['compile_s'] > 0
    assert 1 <= known['worst_per_median']
    assert isinstance(known['loss'], float) and math.isfinite(known['loss'])
  assert rows['adamw']['speed_per']['adamw'] == {
    'mean': 1.0,
    'quartiles': [1.0, 1.0, 1.0],
  }
  counts = 200  # And statistics: no moments.
  adam = 8 * (WEIGHTS + OTHERS)
  assert 0 <= rows['adamw']['state_bytes'] - adam <= counts
  # Bases, and moments of the coordinates; optax projects the longer axis.
  bases = 4 * (4 * 16 + 3 * 24)
  low = 4 * 7 * 16
  known = 4 * (bases + 2 * low) + 8 * OTHERS
  assert 0 <= rows['optax-galore']['state_bytes'] - known <= counts


@pytest.mark.slow
def test_pytorch_computes_the_same(rows):
  pytest.importorskip('galore_torch')
  losses = [row['loss'] for row in rows.values()]
  assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)
  assert set(rows['adamw']['speed_per']) == set(train.PEERS) - {
    'torch-adamw-fused'
  }
  # Other frameworks count steps too, 4 bytes a matrix.
  difference = rows['torch-adamw']['state_bytes'] - rows['adamw']['state_bytes']
  assert abs(difference) < 300


def racer_of(name, *seconds):
  class Side(turns.Method):
    state_bytes, loss = 1_500_000, 1.0

  racer = turns.Racer(name, Side(), 1)
  racer.turns = [
    turns.Turn(np.array(x), np.zeros(len(x), bool)) for x in seconds
  ]
  return racer


def test_speed_is_the_inverse_ratio_of_the_seconds():
  # One step of each has a refresh, which the mean shows.
  ours = racer_of('adamw', [0.1, 0.1, 0.1, 0.4])
  theirs = racer_of('galore-torch', [0.3, 0.3, 0.3, 1.2], [9.0] * 4)
  waits = racer_of('galore')
  racers = [ours, theirs, waits]
  known = train.row(ours, racers, CASE)
  # Of the rounds that both have made.
  assert known['speed_per']['galore-torch']['mean'] == pytest.approx(3)
  assert known['speed_per']['galore-torch']['quartiles'] == (
    pytest.approx([3, 3, 3])
  )
  assert known['mean_s'] == pytest.approx(0.1 * 7 / 4)
  assert known['median_s'] == pytest.approx(0.1)
  assert known['worst_per_median'] == pytest.approx(4)
  assert known['tokens_per_second'] == pytest.approx(16 / (0.1 * 7 / 4))
  assert set(train.row(waits, racers, CASE)) == {
    *('method', 'state_bytes', 'peak_bytes', 'compile_s', 'first_step_s'),
    'loss',
  }


def entry_of(*racers):
  return {
    **{'size': 't', 'batch_size': 2, 'seq_len': 8, 'dtype': 'float32'},
    **{'gap': 4, 'loss_chunk': 16},
    'rows': [train.row(racer, list(racers), CASE) for racer in racers],
  }


def test_table_picture_and_what_a_check_compares(tmp_path):
  entry = entry_of(
    racer_of('adamw', [0.1] * 4),
    racer_of('galore-torch', [0.2] * 4),
    racer_of('optax-adamw', [0.1] * 4),
  )
  entry['rows'].append({'method': 'fira', 'absent': 'out of memory'})
  entry['products'] = {'xla': {'seconds': 0.5, 'gflops': 20.0}}
  assert train.table(entry).splitlines()[2:] == [
    '| adamw | 160 | 2.00 [2.00, 2.00] | - | - | - | 1.00 | 1.00 | 1.5 | - | - '
    '| - |',
    '| galore-torch | 80 | - | - | - | 0.50 [0.50, 0.50] | 1.00 | 1.00 | 1.5 '
    '| - | - | - |',
    '| optax-adamw | 160 | 2.00 [2.00, 2.00] | - | - | 1.00 [1.00, 1.00] '
    '| 1.00 | 1.00 | 1.5 | - | - | - |',
    '',
    '* fira: absent, out of memory',
    '',
    'Bare products: XLA 0.500 s per step (20 GFLOP/s).',
  ]
  case = 'train t float32 2 x 8, T=4, chunk 16'
  record = {'cases': [entry]}
  assert train.ratios(record) == {
    f'{case}: adamw / galore-torch': pytest.approx((2, 2, 2))
  }
  assert train.sizes(record) == {f'{case}: adamw, state_bytes': 1_500_000}
  path = tmp_path / 'folder' / 'a.png'
  train.plot([entry, {**entry, 'rows': []}], path)
  assert path.stat().st_size > 1000


@pytest.mark.parametrize(
  'options, reason',
  [
    (['--gap', '0'], 'argument --gap: must be at least 1, got 0'),
    (['--sizes', '21m'], "Unknown model '21m'; expected one of"),
    (['--minutes', 'nan'], '--minutes nan must be finite, 0 or more.'),
    (['--methods', 'gallore'], "No method is called 'gallore'; there are"),
  ],
)
def test_wrong_numbers_are_refused(monkeypatch, capsys, options, reason):
  monkeypatch.setattr('sys.argv', ['train', *options])
  with pytest.raises(SystemExit) as stop:
    train.main()
  assert reason in capsys.readouterr().err + str(stop.value)


def test_a_gpu_that_is_not_there_is_named():
  command = [sys.executable, '-m', 'benchmarks.train', '--device', 'gpu']
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
  if jax.default_backend() == 'gpu':
    pytest.skip('there is a GPU')
  ended = subprocess.run(
    command, capture_output=True, text=True, env=environment, check=False
  )
  assert ended.returncode == 1
  assert ended.stderr.splitlines()[-1].startswith(
    '--device gpu: jax finds none ('
  )


def test_unstacked_optimizer_equals_one_on_each_layer():
  """An independent path: the optimizer on a flat list of matrices."""
  keys = jax.random.split(jax.random.key(0), 2)
  stack, grad = (jax.random.normal(key, (3, 6, 4)) for key in keys)
  tx = optax.adamw(0.1)
  stacked = train_sides._unstacked(tx)
  params = {'layers': {'kernel': stack}, 'head': stack[0]}
  grads = {'layers': {'kernel': grad}, 'head': grad[0]}
  updates, _ = stacked.update(grads, stacked.init(params), params)
  for i, (weight, slope) in enumerate(zip(stack, grad, strict=True)):
    expected, _ = tx.update(slope, tx.init(weight), weight)
    np.testing.assert_allclose(
      updates['layers']['kernel'][i], expected, rtol=1e-6
    )


def test_products_count_every_kernel(monkeypatch):
  monkeypatch.setattr(
    products, '_time_products', lambda *_: {'xla': [1e-3, 2e-3, 3e-3]}
  )
  config = llama.preset('20m')
  found = products.measure(config, 100)
  count = sum(known['count'] for known in found['products'])
  assert count == 4 * 7 + 1
  weights = sum(
    known['count'] * known['in'] * known['out'] for known in found['products']
  )
  norms, embedding = (2 * 4 + 1) * 256, 32000 * 256
  assert weights == llama.num_params(config) - norms - embedding
  assert found['xla']['seconds'] == pytest.approx(29 * 6e-3)
  flops = 6 * 100 * weights
  assert found['xla']['gflops'] == pytest.approx(flops / (29 * 6e-3) / 1e9)


def test_products_are_timed():
  times = products._time_products(4, 8, 16, rounds=1)
  assert all(
    0 < seconds < math.inf for side in times.values() for seconds in side
  )


def test_main_writes_after_every_round_and_names_what_is_left_out(
  tmp_path, monkeypatch, capsys
):
  output = tmp_path / 'train.json'
  monkeypatch.setattr(
    'sys.argv',
    [
      *('train', '--sizes', '9m', '20m', '--methods', 'adamw'),
      *('--batch-size', '1', '--seq-len', '8', '--gap', '4', '--minutes', '1'),
      *('--output', str(output), '--plot', str(tmp_path / 'train.png')),
    ],
  )
  totals = {'xla': {'seconds': 0.5, 'gflops': 20.0}}
  monkeypatch.setattr(products, 'measure', lambda *_: totals)
  side = racer_of('adamw').method
  monkeypatch.setitem(train.METHODS, 'adamw', lambda case: side)
  monkeypatch.setattr(
    harness.Clock, 'seconds_left', property(lambda self: self.left)
  )
  monkeypatch.setattr(harness.Clock, 'left', 1.0, raising=False)

  def share(clock, parts):
    del parts
    harness.Clock.left = 0.0
    return clock

  monkeypatch.setattr(harness.Clock, 'share', share)
  train.main()
  first, second = json.loads(output.read_text())['cases']
  assert first['rows'][0]['method'] == 'adamw' and first['rank'] == 32
  assert first['rows'][0]['steps'] == 1
  assert second['left_out'] == 'no time was left'
  assert 'LLaMA-20m:\n\nno time was left' in capsys.readouterr().out
