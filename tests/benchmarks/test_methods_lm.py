"""The comparison of all methods, on a tiny model: rows, merge, reuse."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.quality import methods_lm, reference_curves
from gnlorp_jax import optim
from gnlorp_jax.models import llama

CONFIG = llama.LlamaConfig(
  vocab_size=50,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  max_seq_len=8,
)
STEPS = 4
FIELDS = {
  'method',
  'learning_rate',
  'steps',
  'outcome',
  'eval_loss',
  'untrained_eval_loss',
  'train_loss',
  'state_bytes',
  'compile_seconds',
  'seconds',
  'commit',
}


@pytest.fixture
def traced(monkeypatch):
  """Two tiny methods; the list gets a name whenever one is traced."""
  found = []

  def factory(name, make, rate):
    peak = jax.eval_shape(rate, jnp.zeros([], jnp.int32))
    assert peak.dtype == jnp.float32
    found.append(name)
    return make(rate)

  methods = {
    'low_rank': (
      functools.partial(
        factory,
        'low_rank',
        lambda rate: optim.galore(rate, 4, 2, skip_nonfinite=False),
      ),
      (1e-2, 2e-2, 5e-3),
    ),
    'full': (
      functools.partial(
        factory, 'full', lambda rate: optim.adamw(rate, skip_nonfinite=False)
      ),
      (1e-2, 1e30, 5e-3),
    ),
  }
  monkeypatch.setattr(methods_lm, 'METHODS', methods)
  return found


def random_tokens():
  """A tenth of the vocabulary, which a few steps can learn."""
  return np.random.default_rng(0).integers(0, 5, (400, 2, 8))


@pytest.fixture
def call(tmp_path):
  """`main` in a folder of its own."""
  tokens = random_tokens()
  np.savez(tmp_path / 'tokens.npz', tokens=tokens)

  def call(*options):
    common = {
      '--reference': tmp_path,
      '--steps': STEPS,
      '--output': tmp_path / 'out.json',
      '--plot': tmp_path / 'out.png',
    }
    words = [str(word) for pair in common.items() for word in pair]
    methods_lm.main([*words, *options], CONFIG)
    path = tmp_path / 'out.json'
    return json.loads(path.read_text()) if path.exists() else None

  return call


@jax.jit
def value_and_grad(params, rows):
  batch = reference_curves.split(rows)
  return jax.value_and_grad(methods_lm.loss_fn)(params, batch, CONFIG)


def test_loss_and_gradients_are_those_of_the_reference_protocol():
  params = reference_curves.initial_params(CONFIG)
  rows = np.random.default_rng(1).integers(0, 50, (3, 8))

  def expected_loss(params):
    batch = reference_curves.split(rows)
    total, count = reference_curves.loss_fn(params, batch, CONFIG)
    return total / count

  # Scaled up: untrained logits are too small to test a softmax with.
  params['lm_head']['kernel'] *= 50
  loss, grads = value_and_grad(params, rows)
  expected, expected_grads = jax.jit(jax.value_and_grad(expected_loss))(params)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  jax.tree.map(
    lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6),
    grads,
    expected_grads,
  )


def assert_follows_single_steps(row):
  """One step after the other, with a rate that is a Python number."""
  peak = row['learning_rate']
  tx = optim.galore(reference_curves.schedule(peak, STEPS, 1), 4, 2)
  params = reference_curves.initial_params(CONFIG)
  state = tx.init(params)
  update = jax.jit(tx.update)
  batches = random_tokens()[:STEPS]
  for batch, loss in zip(batches, row['train_loss'], strict=True):
    found, grads = value_and_grad(params, batch)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    updates, state = update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)


def test_one_executable_serves_all_rates_and_rows_say_how_they_ended(
  traced, call, capsys
):
  rows = call()
  assert [(row['method'], row['learning_rate']) for row in rows] == [
    ('low_rank', 5e-3),
    ('low_rank', 1e-2),
    ('low_rank', 2e-2),
    ('full', 5e-3),
    ('full', 1e-2),
    ('full', 1e30),
  ]
  for row in rows:
    assert row.keys() == FIELDS
    assert len(row['train_loss']) == row['steps'] == STEPS
    assert row['untrained_eval_loss'] == pytest.approx(np.log(50), abs=0.1)
  adam = 2 * sum(
    leaf.size
    for leaf in jax.tree.leaves(reference_curves.initial_params(CONFIG))
  )
  assert 4 * adam < rows[3]['state_bytes'] < 4 * adam + 100
  assert {row['outcome'] for row in rows[:-1]} == {'trained'}
  assert rows[-1]['outcome'].startswith('not finite from step ')
  assert rows[-1]['eval_loss'] is rows[-1]['train_loss'][-1] is None
  shown = capsys.readouterr().out
  assert f'1e+30: {rows[-1]["outcome"]}' in shown
  # Likeliest rates first.
  progress = [line for line in shown.splitlines() if '/6 ' in line]
  assert [line.split(':')[0] for line in progress[:3]] == [
    '1/6 low_rank, lr 0.01',
    '2/6 full, lr 0.01',
    '3/6 low_rank, lr 0.02',
  ]
  # Each method: the first state, the executable, and the shapes of the state
  # for each row.
  assert sorted(traced) == ['full'] * 5 + ['low_rank'] * 5
  # A rate that were compiled in would give equal curves.
  assert len({tuple(row['train_loss']) for row in rows[:3]}) == 3
  assert_follows_single_steps(rows[0])


@pytest.mark.parametrize(
  ('evaluation', 'train', 'words'),
  [
    (3.0, [4.0, 3.5], 'trained'),
    (4.5, [4.0, 4.2], 'above the untrained loss'),
    (np.nan, [4.0, 3.5], 'not finite after the last step'),
    (np.nan, [4.0, np.inf], 'not finite from step 2'),
  ],
)
def test_outcome(evaluation, train, words):
  assert methods_lm.outcome(evaluation, np.array(train), 4.0) == words


def test_report_merges_and_nothing_runs_twice(traced, call, tmp_path):
  call('--process', '1/2')
  assert set(traced) == {'low_rank'}
  traced.clear()
  call('--process', '2/2')
  assert set(traced) == {'full'}
  traced.clear()
  rows = call('--report')
  assert [row['method'] for row in rows] == ['low_rank'] * 3 + ['full'] * 3
  assert call('--report') == rows  # The parts are still there.
  assert call() == rows
  assert traced == []
  (tmp_path / 'out.1of2.json').unlink()
  (tmp_path / 'out.json').unlink()
  assert call('--minutes', '0') == rows[3:]  # No time for the others.
  assert traced == []
  assert (tmp_path / 'out.png').stat().st_size > 10_000


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      ('--steps', '381'),
      '--steps 381 must be in [2, 380]: the batches after these are those of '
      'the evaluation.',
    ),
    (('--process', '3/2'), '--process 3/2 must be k/n with 1 <= k <= n.'),
  ],
)
def test_bad_options(call, capsys, options, message):
  with pytest.raises(SystemExit):
    call(*options)
  assert message in ' '.join(capsys.readouterr().err.split())
