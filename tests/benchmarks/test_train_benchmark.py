"""The comparison of whole training steps on a tiny model."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.common import harness, peers, turns
from benchmarks.common.methods import AbsentError
from benchmarks.train import measure as train
from benchmarks.train import products, train_sides
from gnlorp_jax.models import llama

CONFIG = llama.LlamaConfig(
  vocab_size=64,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  max_seq_len=16,
)
CASE = train_sides.Case(
  *(CONFIG, 2, 8),
  peers.Setting(learning_rate=1e-2, rank=4, gap=4),
  *(16, 'cpu'),
)
WEIGHTS = 2 * (4 * 16 * 16 + 3 * 16 * 24)
OTHERS = 2 * 64 * 16 + 5 * 16  # Embedding and head, and the norms.


def compare(*names, minutes=10.0):
  saved = []
  rows = train.compare(
    list(names), CASE, harness.Clock(minutes), 2, saved.append
  )
  assert saved[-1] == rows
  return {known['method']: known for known in rows}


def test_rows_of_this_package():
  rows = compare('gradnormlorp', 'adamw', 'optax-galore', 'optax-adafactor')
  for known in rows.values():
    assert known['steps'] == 4 and known['intervals'] == 1
    assert known['tokens_per_second'] == pytest.approx(16 / known['mean_s'])
    assert known['peak_bytes'] > 0 and known['compile_s'] > 0
    assert 1 <= known['worst_per_median']
    assert set(known['speed_per']) == {'adamw'}
  assert rows['adamw']['speed_per']['adamw'] == {
    'mean': 1.0,
    'quartiles': [1.0, 1.0, 1.0],
  }
  # The same weights and batch.
  losses = [known['loss'] for known in rows.values()]
  assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
  counts = 200  # And statistics: no moments.
  adam = 8 * (WEIGHTS + OTHERS)
  assert 0 <= rows['adamw']['state_bytes'] - adam <= counts
  # Bases, and moments of the coordinates; optax projects the longer axis.
  bases = 2 * 4 * (4 * 16 + 3 * 24)
  low = 2 * 4 * 7 * 16
  known = 4 * (bases + 2 * low) + 8 * OTHERS
  assert 0 <= rows['optax-galore']['state_bytes'] - known <= counts
  text = train.table({'size': 'tiny', 'rows': list(rows.values())})
  assert text.count('\n| ') == 2 + 4 and '| optax-galore |' in text


@pytest.mark.usefixtures('one_torch_thread')
def test_pytorch_computes_the_same(tmp_path):
  pytest.importorskip('galore_torch')
  rows = compare(
    *('galore', 'galore-torch', 'adamw', 'torch-adamw', 'torch-adamw-fused')
  )
  losses = [known['loss'] for known in rows.values()]
  assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)
  assert set(rows['galore']['speed_per']) == set(train.PEERS)
  # Other frameworks count steps too, 4 bytes a matrix.
  difference = rows['torch-adamw']['state_bytes'] - rows['adamw']['state_bytes']
  assert abs(difference) < 300
  entry = {
    **{'size': 't', 'batch_size': 2, 'seq_len': 8, 'dtype': 'float32'},
    **{'gap': 4, 'loss_chunk': 16},
  }
  known = {'cases': [{**entry, 'rows': list(rows.values())}]}
  case = 'train t float32 2 x 8, T=4, chunk 16'
  named = train.ratios(known)
  assert set(named) == {
    f'{case}: galore / galore-torch',
    f'{case}: galore / torch-adamw',
    f'{case}: galore / torch-adamw-fused',
    f'{case}: galore / adamw',
    f'{case}: adamw / galore-torch',
    f'{case}: adamw / torch-adamw',
    f'{case}: adamw / torch-adamw-fused',
  }
  assert all(low <= mid <= high for low, mid, high in named.values())
  assert (
    train.sizes(known)[f'{case}: adamw, state_bytes']
    == (rows['adamw']['state_bytes'])
  )
  path = tmp_path / 'folder' / 'a.png'
  train.plot(known['cases'], path)
  assert path.stat().st_size > 1000


def test_speed_is_the_inverse_ratio_of_the_seconds():
  class Side:
    state_bytes, peak_bytes, compile_s, loss = 8, None, None, 1.0

    def step(self, index):
      del index

    def refreshes(self, steps):
      del steps
      return 0.0

  racers = []
  for name, seconds in {'adamw': 0.1, 'galore-torch': 0.3}.items():
    racer = turns.Racer(name, Side(), 1)
    # One step of each has a refresh, which the mean shows.
    racer.turns = [
      turns.Turn(np.array([seconds] * 3 + [4 * seconds]), np.zeros(4, bool))
    ]
    racers.append(racer)
  ours, theirs = train.with_ratios(racers, CASE)
  assert ours['speed_per']['galore-torch']['mean'] == pytest.approx(3)
  assert ours['speed_per']['galore-torch']['quartiles'] == (
    pytest.approx([3, 3, 3])
  )
  assert theirs['mean_s'] == pytest.approx(0.3 * 7 / 4)
  assert theirs['median_s'] == pytest.approx(0.3)
  assert theirs['worst_per_median'] == pytest.approx(4)
  assert ours['tokens_per_second'] == pytest.approx(16 / (0.1 * 7 / 4))


def test_what_fails_is_a_row_and_the_others_go_on(monkeypatch):
  def fail(case):
    raise RuntimeError('out of memory:\nlong explanation')

  def absent(case):
    raise AbsentError('not installed: No module named torch')

  monkeypatch.setitem(train.METHODS, 'fira', fail)
  monkeypatch.setitem(train.METHODS, 'torch-adamw', absent)
  rows = compare('adamw', 'torch-adamw', 'fira')
  assert rows['fira'] == {'method': 'fira', 'absent': 'out of memory:'}
  assert rows['adamw']['steps'] == 4
  text = train.table({'size': 'tiny', 'rows': list(rows.values())})
  assert '* torch-adamw: absent, not installed: No module named torch' in text


def test_a_method_that_fails_later_leaves_the_race(monkeypatch):
  take_turn = turns.Racer.turn

  def turn(racer, steps):
    if racer.name == 'galore' and racer.turns:
      raise RuntimeError('out of memory at a refresh')
    take_turn(racer, steps)

  monkeypatch.setattr(turns.Racer, 'turn', turn)
  rows = compare('galore', 'adamw')
  assert rows['galore']['absent'] == 'out of memory at a refresh'
  assert rows['adamw']['steps'] == 4


def test_without_time_one_method_takes_one_turn():
  rows = compare('adamw', 'galore', minutes=0.0)
  assert rows['adamw']['intervals'] == 0.5
  assert rows['galore']['absent'] == 'no time was left to build it'


@pytest.mark.parametrize(
  'options, reason',
  [
    (['--turn', '0'], '--turn 0 must be at least 1.'),
    (['--rank', '500'], '--rank 500 must be at most the width of 20m, 256.'),
    (['--minutes', 'nan'], '--minutes nan must be finite, 0 or more.'),
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
      *('--batch-size', '1', '--seq-len', '8', '--vocab', '64'),
      *('--gap', '4', '--turn', '2', '--minutes', '1', '--no-products'),
      *('--output', str(output), '--plot', str(tmp_path / 'train.png')),
    ],
  )
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
  assert second['left_out'] == 'no time was left'
  assert 'LLaMA-20m: no time was left' in capsys.readouterr().out


def test_unknown_method_names_the_known_ones():
  with pytest.raises(ValueError, match="^No method is called 'gallore'; there"):
    harness.select(['gallore'], train.METHODS)
  names = harness.select(['torch-adamw', 'adam*'], train.METHODS)
  assert names == ['torch-adamw', 'adamw']


def test_losses_of_jax_are_float32():
  side = train_sides.METHODS['adamw'](CASE)
  side.step(0)
  assert isinstance(side.loss, float) and jnp.isfinite(side.loss)
