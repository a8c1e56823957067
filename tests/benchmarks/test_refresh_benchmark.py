"""The comparison of refreshes, on small matrices and a tiny model."""

import argparse
import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import scipy.fft

from benchmarks.common import harness
from benchmarks.refresh import measure as refresh
from benchmarks.refresh import refresh_report, refresh_runs
from gnlorp_jax import config
from gnlorp_jax.models import llama
from gnlorp_jax.optim import inspect
from gnlorp_jax.optim.projections import svd
from gnlorp_jax.recipes.pretrain import data, recipe

TINY = llama.LlamaConfig(
  vocab_size=300,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=2,
  max_seq_len=8,
)
RANK = 3


def matrix(m=20, n=12, seed=0):
  """Known singular values and vectors, and their product in float32."""
  rng = np.random.default_rng(seed)
  left_MN, _ = np.linalg.qr(rng.normal(size=(m, n)))
  right_NN, _ = np.linalg.qr(rng.normal(size=(n, n)))
  values_N = 0.7 ** np.arange(n)
  grad_MN = ((left_MN * values_N) @ right_NN.T).astype(np.float32)
  return values_N, right_NN, grad_MN


def share(grad_MN, columns_NR):
  """Energy by least squares: no basis is orthonormalised."""
  grad_MN, columns_NR = np.float64(grad_MN), np.float64(columns_NR)
  found_RM, *_ = np.linalg.lstsq(columns_NR, grad_MN.T)
  rest = np.linalg.norm(grad_MN.T - columns_NR @ found_RM)
  return 1 - (rest / np.linalg.norm(grad_MN)) ** 2


def iterated(grad_MN, basis_NR):
  """One block power iteration in float64, orthonormalised by QR.

  A thousandth of the old basis is left in the new one, as the library does.
  """
  grad_MN = np.float64(grad_MN)
  left_MR, upper_RR = np.linalg.qr(grad_MN @ basis_NR)
  wanted_NR = grad_MN.T @ left_MR * np.sign(np.diag(upper_RR))
  wanted_NR /= np.linalg.norm(wanted_NR, axis=0)
  filled_NR, upper_RR = np.linalg.qr(wanted_NR + svd.FILL * basis_NR)
  return filled_NR * np.sign(np.diag(upper_RR))


def clock(minutes=1.0):
  return harness.Clock(minutes)


# Energy and overlap.


def test_exact_ways_reach_the_known_best_and_the_known_subspace():
  values_N, right_NN, grad_MN = matrix()
  (row,) = refresh.energy_rows({1: grad_MN}, [RANK])
  best = np.sum(values_N[:RANK] ** 2) / np.sum(values_N**2)
  assert row['best'][RANK] == pytest.approx(best, rel=1e-6)
  assert row['shape'] == [20, 12]
  for way in ('exact', 'eigh'):
    assert row['energy'][way][RANK] == pytest.approx(1, abs=1e-6)
    assert row['overlap'][way][RANK] == pytest.approx(1, abs=1e-6)
  start_NR = np.asarray(svd.random_basis(grad_MN.shape, RANK))
  basis_NR = iterated(grad_MN, start_NR)
  assert row['energy']['power first'][RANK] == pytest.approx(
    share(grad_MN, basis_NR) / best, abs=1e-5
  )
  cosines = np.linalg.svd(basis_NR.T @ right_NN[:, :RANK], compute_uv=False)
  assert row['overlap']['power first'][RANK] == pytest.approx(
    np.mean(cosines**2), abs=1e-5
  )
  assert row['energy']['power warm'] == row['energy']['stale'] == {}


def test_cosine_columns_and_random_directions_capture_what_they_span():
  values_N, _, grad_MN = matrix()
  (row,) = refresh.energy_rows({7: grad_MN}, [RANK])
  best = np.sum(values_N[:RANK] ** 2) / np.sum(values_N**2)
  transformed_MN = scipy.fft.dct(np.float64(grad_MN), norm='ortho')
  chosen = np.argsort(-np.sum(np.abs(transformed_MN), axis=0))[:RANK]
  inside = np.sum(transformed_MN[:, chosen] ** 2) / np.sum(grad_MN**2)
  assert row['energy']['dct'][RANK] == pytest.approx(inside / best, abs=1e-5)
  projection = refresh.FITS['random']
  basis = projection.init(grad_MN.shape, RANK, 0)
  basis = projection.refresh(grad_MN, basis, 7)
  directions_RN = projection.project_back(np.eye(RANK, dtype='f'), basis)
  assert row['energy']['random'][RANK] == pytest.approx(
    share(grad_MN, directions_RN.T) / best, abs=1e-5
  )


def test_warm_and_stale_bases_come_from_the_gradient_before():
  grads = {1: matrix(seed=1)[2], 5: matrix(seed=2)[2], 9: matrix(seed=3)[2]}
  rows = refresh.energy_rows(dict(reversed(grads.items())), [RANK])
  assert [row['step'] for row in rows] == [1, 5, 9]
  basis_NR = np.asarray(svd.random_basis(grads[1].shape, RANK))
  for row in rows:
    basis_NR = iterated(grads[row['step']], basis_NR)
    if row['step'] == 1:
      continue
    best = row['best'][RANK]
    assert row['energy']['power warm'][RANK] == pytest.approx(
      share(grads[row['step']], basis_NR) / best, abs=1e-5
    )
    before = grads[row['step'] - 4]
    stale_NR = np.linalg.svd(before)[2][:RANK].T
    assert row['energy']['stale'][RANK] == pytest.approx(
      share(grads[row['step']], stale_NR) / best, abs=1e-5
    )


@pytest.mark.parametrize('bad', [0.0, np.nan])
def test_a_gradient_that_fits_no_basis_is_a_row_with_its_reason(bad):
  _, _, grad_MN = matrix()
  rows = refresh.energy_rows({1: grad_MN, 2: bad * grad_MN, 3: grad_MN}, [2])
  assert rows[1]['absent'] == 'the gradient is zero or not finite'
  assert rows[2]['energy']['stale'][2] == pytest.approx(1, abs=1e-6)


def test_synthetic_matrices_have_the_noise_that_is_said():
  grad_MN = refresh.synthetic(400, 80)
  assert grad_MN.shape == (400, 80) and grad_MN.dtype == np.float32
  np.testing.assert_array_equal(grad_MN, refresh.synthetic(400, 80))
  values_N = np.linalg.svd(np.float64(grad_MN), compute_uv=False) ** 2
  # A product of rank 20 and a tenth of noise, of which a part lies inside.
  rest = np.sum(values_N[20:]) / np.sum(values_N)
  assert 0.5 * refresh.NOISE < rest < refresh.NOISE


# Time.


def test_times_of_all_fits_and_their_ratios():
  slowness = {}
  row = refresh.time_row(matrix()[2], RANK, 3, clock(), slowness)
  assert set(row) == set(refresh.FITS) == set(slowness)
  for name, fit in row.items():
    low, middle, high = fit['seconds']
    assert 0 < low <= middle <= high
    assert fit['rounds'] == 3 and fit['compile_seconds'] >= 0
    assert slowness[name] == pytest.approx(middle / (20 * 12**2))
  assert row['exact']['ratio'] == [1, 1, 1]


def test_fits_that_take_too_long_or_fail_leave_the_others(monkeypatch):
  class Broken:
    def lower(self, *_):
      raise RuntimeError('no kernel\nand a long story')

  monkeypatch.setitem(refresh.JITTED, 'eigh', Broken())
  row = refresh.time_row(matrix()[2], RANK, 3, clock(), {'exact': 1.0})
  size = 20 * 12**2
  assert row['exact'] == {'absent': f'left out: about {size}.0 s a refresh'}
  assert row['eigh'] == {'absent': 'RuntimeError: no kernel'}
  assert row['power']['ratio'] is None and row['power']['rounds'] == 3
  row |= {'shape': [20, 12], 'rank': RANK, 'matrix': 'synthetic'}
  text = refresh_report.time_table([row])
  assert '| 20 x 12 | 3 | synthetic | - | - |' in text
  assert '* rank 3, way eigh, [20, 12]: absent, RuntimeError: no kernel' in text


# Whole runs.


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  """Makes the settings of a tiny run."""
  folder = tmp_path_factory.mktemp('text')
  words = np.random.default_rng(0).integers(0, 50, 20_000)
  text = ' '.join(f'word{word}' for word in words)
  (folder / 'text.txt').write_text(text)

  def make(steps, **options):
    return config.TrainConfig(
      steps=steps,
      batch_size=4,
      model=TINY,
      data=config.DataConfig(
        source=str(folder / 'text.txt'), seq_len=8, cache_dir=str(folder)
      ),
      **options,
    )

  return make


@pytest.mark.usefixtures('compiled_once')
def test_saved_gradients_are_those_of_the_batch_at_hand(settings, tmp_path):
  path = tmp_path / 'folder' / 'tiny.npz'
  prepared = recipe.prepare(settings(5))
  row = refresh_runs.save_gradients(prepared, 2, path, clock(10))
  assert row['steps'] == [1, 3, 5] and len(row['losses']) == 3
  assert row['batch_tokens'] == 32 and 'left_out' not in row
  found = refresh_runs.read_gradients(path)
  assert set(found) == {
    (k, kind) for k in (0, 1) for kind in refresh_runs.KINDS
  }
  run = recipe.make_run(prepared, prepared.config)
  batch = next(run.batches)
  run.batches.close()

  def mean_loss(params):
    loss, weight = prepared.program.objective.loss(params, batch)
    return loss / weight

  state, _ = run.start()
  layers = jax.jit(jax.grad(mean_loss))(state.params)['layers']
  for (layer, kind), grads in found.items():
    assert list(grads) == [1, 3, 5]
    group = 'mlp' if kind in ('gate', 'up', 'down') else 'attn'
    wanted = np.asarray(layers[group][f'{kind}_proj']['kernel'][layer])
    wanted = wanted if kind == 'down' else wanted.T
    assert grads[1].shape == ((24, 16) if group == 'mlp' else (16, 16))
    np.testing.assert_allclose(grads[1], wanted, rtol=1e-3, atol=1e-6)
    assert not np.allclose(grads[3], grads[1])
  row = refresh_runs.save_gradients(prepared, 2, path, clock(0))
  assert row['steps'] == [] and row['left_out'].startswith('steps from 1 on')


@pytest.mark.usefixtures('compiled_once')
def test_a_run_ends_with_the_mean_loss_of_held_out_text(settings):
  prepared = recipe.prepare(settings(5, eval_batches=2))
  row = refresh_runs.loss_row(prepared)
  run = recipe.make_run(prepared, prepared.config)
  params, losses = refresh_runs.train(run)
  assert row['train_loss'] == pytest.approx(np.mean(losses))
  batches = data.evaluation_batches(prepared.config, prepared.text)()
  loss = prepared.program.objective.loss
  sums = [loss(params, next(batches)) for _ in range(2)]
  batches.close()
  losses, weights = np.float64(sums).T
  assert row['eval_loss'] == pytest.approx(losses.sum() / weights.sum())


def test_ways_differ_in_what_they_keep(settings):
  kept = {}
  for way, variant in refresh_runs.variants(TINY.hidden_size).items():
    optim = refresh_runs.loss_optimizer(variant, 1e-2)
    optim = dataclasses.replace(optim, rank=4)
    program = recipe.plan(settings(6, optim=optim)).program
    state = program.abstract_state.opt_state
    kept[way] = inspect.state_bytes(state)['bases']
  # Two layers of seven kernels, whose shorter axis is 16 throughout.
  floats = 2 * 7 * 16 * 4 * 4
  assert kept == {
    **dict.fromkeys(('exact', 'eigh', 'power'), floats),
    **{'power, first step only': floats, 'dct': 2 * 7 * 4 * 4},
    'random': 2 * 7 * 4,
  }


def test_random_bases_get_a_scale_that_makes_updates_as_long():
  rank, n = refresh_runs.RANK, 128
  scale = refresh_runs.variants(n)['random']['scale']
  low_MR = np.random.default_rng(0).choice([-1, 1], (500, rank)).astype('f')
  lengths = {}
  for name in ('exact', 'random'):
    projection = refresh.FITS[name]
    basis = projection.init((500, n), rank, 0)
    lengths[name] = np.linalg.norm(projection.project_back(low_MR, basis))
  assert scale * lengths['random'] == pytest.approx(
    refresh_runs.SCALE * lengths['exact'], rel=0.1
  )


@pytest.fixture
def small(monkeypatch, tmp_path):
  """Small shapes, and the options that keep files in a folder."""
  monkeypatch.setattr(refresh, 'SHAPES', ((16, 16), (24, 16)))
  monkeypatch.setattr(refresh, 'SYNTHETIC', ((32, 16),))
  monkeypatch.setattr(refresh, 'CURVE', refresh.SHARES)
  monkeypatch.setattr(refresh.harness, 'BUSY', math.inf)
  platforms = jax.config.jax_platforms
  yield [
    *('--output', str(tmp_path / 'results' / 'refresh.json')),
    *('--plot', str(tmp_path / 'docs' / 'refresh.png')),
    *('--gradients', str(tmp_path)),
    *('--rounds', '3', '--size', '9m', '60m'),
  ]
  jax.config.update('jax_platforms', platforms)


def test_parts_are_added_to_one_file(small, tmp_path, capsys):
  grads = {f'{number}/0/up': matrix(24, 16, number)[2] for number in (1, 2, 3)}
  np.savez(tmp_path / '9m.npz', **grads)
  path = tmp_path / 'results' / 'refresh.json'
  refresh.main(['energy', *small])
  rows = json.loads(path.read_text())['energy']['rows']
  names = [(row['size'], row.get('step')) for row in rows]
  assert names == [
    *(('9m', 1), ('9m', 2), ('9m', 3), ('60m', None), ('synthetic', 0))
  ]
  refresh.main(['time', *small])
  results = json.loads(path.read_text())
  assert results['energy']['rows'] == rows
  sources = {
    tuple(row['shape']): row['matrix'] for row in results['time']['rows']
  }
  assert sources == {(16, 16): 'synthetic', (24, 16): 'gradient: 9m 0/up'}
  assert [row['rank'] for row in results['time']['rows']] == [4, 4, 1, 1]
  assert results['time']['options']['source'] == 'stdlib'
  text = capsys.readouterr().out
  # Two of three gradients: the first has no warm start.
  values_N = 0.7 ** (2 * np.arange(16))
  best = f'{np.sum(values_N[:4]) / np.sum(values_N):.3f}'
  assert f'| 9m | 24 x 16 | 2 | 4 | {best} | 1.000 [1.000], 1.00 |' in text
  assert '* size 60m: absent, no gradients: run `save` first' in text
  assert (tmp_path / 'docs' / 'refresh.png').stat().st_size > 10_000


def test_what_no_longer_fits_is_named(small, tmp_path, capsys):
  refresh.main(['--minutes', '0', 'energy', 'time', 'loss', *small])
  text = capsys.readouterr().out
  assert '* size synthetic, kind 32 x 16: absent, left out: out of time' in text
  assert '* shape [24, 16], rank 1: absent, left out: out of time' in text
  assert '* way random, seed 1: absent, left out: out of time' in text


def test_a_run_that_fails_is_a_row(small, tmp_path, capsys):
  refresh.main(['save', '--data.source', str(tmp_path / 'none.txt'), *small])
  results = json.loads((tmp_path / 'results' / 'refresh.json').read_text())
  rows = results['save']['rows']
  assert [row['size'] for row in rows] == ['9m', '60m']
  assert all('none.txt' in row['absent'] for row in rows)


def test_losses_are_compared_seed_by_seed():
  rows = [
    {'way': 'exact', 'seed': 0, 'eval_loss': 5.0},
    {'way': 'power', 'seed': 0, 'eval_loss': 4.75},
    {'way': 'exact', 'seed': 1, 'eval_loss': 6.0},
    {'way': 'power', 'seed': 1, 'absent': 'left out: out of time'},
  ]
  assert refresh_report.loss_table(rows) == (
    '| basis | seed 0 | seed 1 | less exact |\n'
    '| --- | --- | --- | --- |\n'
    '| exact | 5.0000 | 6.0000 | - |\n'
    '| power | 4.7500 | - | -0.2500 |\n\n'
    '* way power, seed 1: absent, left out: out of time\n'
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['speed'], "'speed' is no part: choose of save, energy, time, loss"),
    (['--gap', '1', '2'], '--gap has 2 values for 1 sizes'),
    (['--gap', '0'], '--gap 0 must be at least 1'),
    (['--eval-batches', '0'], '--eval-batches 0 must be at least 1'),
  ],
)
def test_mistakes_of_the_command_line(options, message, capsys):
  with pytest.raises(SystemExit):
    refresh.parse(options)
  assert message in capsys.readouterr().err


def test_one_gap_serves_all_sizes():
  args = refresh.parse(['--size', '9m', '60m', '--gap', '7'])
  assert isinstance(args, argparse.Namespace) and args.gap == [7, 7]
