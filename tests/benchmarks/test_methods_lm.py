"""The protocol of the recorded curves, on a tiny model, and what uses it."""

import json
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.quality import (
  int8_weights,
  methods_lm,
  protocol,
  reference_curves,
)
from gnlorp_jax.models import llama

CONFIG = llama.LlamaConfig(
  vocab_size=32,
  hidden_size=8,
  intermediate_size=12,
  num_layers=1,
  num_heads=1,
  max_seq_len=8,
)
STEPS = 4
FIELDS = {
  *('method', 'learning_rate', 'seed', 'outcome', 'eval', 'train'),
  *('state_bytes', 'skipped_steps', 'seconds', 'cpu_seconds', 'date'),
  'commit',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Batches of a few tokens, which a few steps can learn; 99 is unknown."""
  found = tmp_path_factory.mktemp('reference')
  tokens = np.random.default_rng(0).integers(0, 5, (400, 2, 8))
  tokens[:, 0, 0] = 99
  np.savez(found / 'tokens.npz', tokens=tokens)
  return found


@pytest.fixture
def call(folder, tmp_path):
  """The command of a module on these batches; the rows of its file."""

  def call(module, *options):
    common = {
      '--reference': folder,
      '--steps': STEPS,
      '--output': tmp_path / 'out.json',
    }
    if module.COMPARISON.plot:
      common['--plot'] = tmp_path / 'out.png'
    words = [str(word) for pair in common.items() for word in pair]
    module.main([*words, *options], CONFIG)
    return json.loads((tmp_path / 'out.json').read_text())['rows']

  return call


@jax.jit
def value_and_grad(params, tokens):
  def loss(params):
    logits = llama.make(CONFIG).apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()

  return jax.value_and_grad(loss)(params)


@pytest.fixture(scope='module')
def by_hand(folder):
  """Steps of momentum with peak rate 0.5: losses, both evaluations, weights."""
  with np.load(folder / 'tokens.npz') as archive:
    tokens = np.where(archive['tokens'] < 32, archive['tokens'], 2)
  params = protocol.initial_params(CONFIG)
  velocity = jax.tree.map(np.zeros_like, params)

  def evaluate():
    return np.mean([value_and_grad(params, rows)[0] for rows in tokens[380:]])

  losses, evals = [], [evaluate()]
  # The first step is a tenth of the four and warms up; then comes the cosine.
  for rows, share in zip(tokens, (1, 1, 0.775, 0.325), strict=False):
    loss, grads = value_and_grad(params, rows)
    losses.append(float(loss))
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
    moves = optax.tree.scale(0.5 * share, velocity)
    params = jax.tree.map(operator.sub, params, moves)
  return losses, [*evals, evaluate()], params


def momentum(schedule, **options):
  del options
  return optax.sgd(schedule, momentum=0.9)


def test_one_executable_serves_all_rates_and_rows_say_how_they_ended(
  call, by_hand, tmp_path, monkeypatch, capsys
):
  traced = []

  def make(schedule):
    traced.append(schedule)
    return momentum(schedule)

  methods = {'momentum': protocol.Method(make, (0.5, 1e30, 0.25))}
  monkeypatch.setattr(methods_lm, 'METHODS', methods)
  rows = call(methods_lm)
  assert [row['learning_rate'] for row in rows] == [0.25, 0.5, 1e30]
  assert len(traced) == 2  # For the first state, and for the executable.
  for row in rows:
    assert row.keys() == FIELDS
    assert [step for step, _ in row['train']] == [*range(1, STEPS + 1)]
    assert [step for step, _ in row['eval']] == [0, STEPS]
  for name, expected in zip(('train', 'eval'), by_hand[:2], strict=True):
    found = [loss for _, loss in rows[1][name]]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # A rate that were compiled in would give equal curves.
    assert rows[0][name][-1] != rows[1][name][-1]
  assert rows[1]['outcome'] == 'trained'
  # Its first step left no finite gradient to the others.
  assert rows[2]['outcome'] == f'{STEPS - 1} steps had no finite gradient'
  leaves = jax.tree.leaves(protocol.initial_params(CONFIG))
  velocity = 4 * sum(leaf.size for leaf in leaves)
  assert velocity < sum(rows[0]['state_bytes'].values()) < velocity + 10
  captured = capsys.readouterr()
  assert f'1e+30: {rows[2]["outcome"]} |' in captured.out
  # The likeliest rates first.
  taken = re.findall(', rate (.*?),', captured.err)
  assert taken == ['0.5', '1e+30', '0.25']
  assert (tmp_path / 'out.png').stat().st_size > 10_000


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      ('--steps', '381'),
      '--steps 381 must be in [2, 380]: the batches after these are those of '
      'the evaluation.',
    ),
    ((), '--reference is missing: the folder with tokens.npz.'),
    (
      ('--reference', 'x', '--methods', 'adamax'),
      "No method is called 'adamax'; there are gradnormlorp, gradnormlorp, 8",
    ),
  ],
)
def test_bad_options(capsys, options, message):
  with pytest.raises(SystemExit):
    methods_lm.main(list(options))
  assert message in ' '.join(capsys.readouterr().err.split())


def test_schedule_is_that_of_the_recorded_runs():
  found = protocol.schedule(2.0)(np.arange(300))
  np.testing.assert_allclose(found[:31:10], [2 / 30, 22 / 30, 42 / 30, 2.0])
  np.testing.assert_allclose(found[165], 2 * (0.1 + 0.9 / 2), rtol=1e-6)
  assert found[-1] == pytest.approx(0.2, rel=1e-3)


def test_kernels_in_int8_train_layer_by_layer(call, by_hand, monkeypatch):
  name = 'galore, int8, nearest'
  monkeypatch.setattr(int8_weights, 'OPTIMIZERS', {'galore': momentum})
  method = int8_weights.METHODS[name]._replace(rates=(0.5,))
  monkeypatch.setitem(int8_weights.METHODS, name, method)
  (row,) = call(int8_weights, '--methods', name)
  assert (row['method'], row['outcome']) == (name, 'trained')
  found = np.array([loss for _, loss in row['train']])
  np.testing.assert_allclose(found, by_hand[0], atol=5e-3)
  assert np.abs(found - by_hand[0]).max() > 1e-6  # They are rounded.
  start, end = protocol.initial_params(CONFIG)['layers'], by_hand[2]['layers']
  assert row['layer_bytes'] < 2 * sum(x.size for x in jax.tree.leaves(start))
  moved = int8_weights.distance_moved(end, start)
  assert row['moved'] == pytest.approx(moved, rel=0.02)


def test_what_kernels_moved():
  start = {'kernel': jnp.array([3.0, 4.0]), 'scale': jnp.array([9.0])}
  end = {'kernel': jnp.array([3.0, 5.0]), 'scale': jnp.array([0.0])}
  assert int8_weights.distance_moved(end, start) == pytest.approx(1 / 5)


def row_of(method, rate, loss, **fields):
  return {
    'method': method,
    'learning_rate': rate,
    'seed': 0,
    'outcome': 'trained',
    'eval': [[300, loss]],
    **fields,
  }


def test_table_of_kernels():
  def kept(method, loss, moved, size=100):
    return row_of(method, 5e-3, loss, moved=moved, layer_bytes=size)

  rows = [
    kept('galore, float32', 4.0, 0.5),
    kept('galore, int8, nearest', 4.25, 0.25, 25),
    kept('gradnormlorp, float32', 3.0, 0.75),
    # There is nothing to compare it with.
    row_of('galore, int8, nearest', 1e-3, 9.0, moved=0, layer_bytes=25),
  ]
  assert int8_weights.table(rows) == (
    '| kernels | bytes of the blocks | galore, lr 0.005 | moved '
    '| gradnormlorp, lr 0.005 | moved |\n'
    '| --- | --- | --- | --- | --- | --- |\n'
    '| float32 | 100 | 4.0000 | 0.500 | 3.0000 | 0.750 |\n'
    '| int8, nearest | 25 | +0.2500 | 0.250 | - | - |\n'
  )


def test_differences_to_the_recorded_curves(tmp_path):
  (tmp_path / 'adamw_seed0.json').write_text(
    json.dumps({'eval_loss': 6.5, 'train_loss': [9.0] * 300})
  )
  losses = np.full(300, 9.0)
  losses[[59, 60, 200]] -= 0.25, 0.5, 0.00012
  found = reference_curves.differences(
    'adamw', protocol.Trained(CONFIG, losses, None), tmp_path
  )
  assert found == {
    'recorded_eval_loss': 6.5,
    'largest_difference': {'60': 0.25, '100': 0.5, '300': 0.5},
  }
  rows = [
    row_of('gradnormlorp_exact', 1e-2, 6.75),
    row_of('adamw', 2e-3, 6.25, **found),
  ]
  assert reference_curves.table(rows).splitlines()[2:] == [
    '| adamw | 0.002 | 6.2500 | 6.5000 | -0.2500 | 2.5e-1 | 5.0e-1 | 5.0e-1 |',
    '| gradnormlorp_exact | 0.01 | 6.7500 | - | - | - | - | - |',
  ]
  other = protocol.Trained(CONFIG, losses, None)
  assert reference_curves.differences('gradnormlorp_exact', other, None) == {}
