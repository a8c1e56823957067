"""The comparison of refreshes, on small matrices and a tiny model."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import scipy.fft

from benchmarks.common import harness, programs
from benchmarks.refresh import fits, measure, picture, runs, tables
from gnlorp_jax import config
from gnlorp_jax.models import llama
from gnlorp_jax.optim import inspect
from gnlorp_jax.optim.parts.orthonormal import FILL
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
SHAPE = M, N = 24, 16  # One for all, so that fits compile once.
RANK = 4  # A quarter of the axis.


def matrix(seed=0):
  """Known singular values and vectors, and their product in float32."""
  rng = np.random.default_rng(seed)
  left_MN, _ = np.linalg.qr(rng.normal(size=SHAPE))
  right_NN, _ = np.linalg.qr(rng.normal(size=(N, N)))
  values_N = 0.7 ** np.arange(N)
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
  filled_NR, upper_RR = np.linalg.qr(wanted_NR + FILL * basis_NR)
  return filled_NR * np.sign(np.diag(upper_RR))


def energy_of(row, way):
  """A row's only energy of a way; five digits are kept."""
  (found,) = row['energy'][tables.WAYS.index(way)]
  return found


def overlap_of(row, way):
  """The same of its overlap, which has four."""
  (found,) = row['overlap'][tables.WAYS.index(way)]
  return found


# Energy and overlap.


def test_each_way_captures_what_it_spans():
  values_N, right_NN, grad_MN = matrix()
  (row,) = fits.energy_rows({7: grad_MN}, [RANK])
  best = np.sum(values_N[:RANK] ** 2) / np.sum(values_N**2)
  assert row['best'] == [pytest.approx(best, abs=1e-5)]
  assert (row['step'], row['shape']) == (7, [M, N])
  for way in ('exact', 'eigh'):
    assert energy_of(row, way) == pytest.approx(1, abs=1e-5)
    assert overlap_of(row, way) == pytest.approx(1, abs=1e-4)
  start_NR = np.asarray(svd.random_basis(grad_MN.shape, RANK))
  basis_NR = iterated(grad_MN, start_NR)
  first = energy_of(row, 'power first')
  assert first == pytest.approx(share(grad_MN, basis_NR) / best, abs=2e-5)
  cosines = np.linalg.svd(basis_NR.T @ right_NN[:, :RANK], compute_uv=False)
  assert overlap_of(row, 'power first') == pytest.approx(
    np.mean(cosines**2), abs=1e-4
  )
  transformed_MN = scipy.fft.dct(np.float64(grad_MN), norm='ortho')
  chosen = np.argsort(-np.sum(np.abs(transformed_MN), axis=0))[:RANK]
  inside = np.sum(transformed_MN[:, chosen] ** 2) / np.sum(grad_MN**2)
  assert energy_of(row, 'dct') == pytest.approx(inside / best, abs=2e-5)
  projection = fits.FITS['random']
  basis = projection.init(grad_MN.shape, RANK, 0)
  basis = projection.refresh(grad_MN, basis, 7)
  directions_RN = projection.project_back(np.eye(RANK, dtype='f'), basis)
  assert energy_of(row, 'random') == pytest.approx(
    share(grad_MN, directions_RN.T) / best, abs=2e-5
  )
  for way in ('power warm', 'stale'):
    assert row['energy'][tables.WAYS.index(way)] == []


def test_warm_and_stale_bases_come_from_the_gradient_before():
  grads = {1: matrix(1)[2], 5: matrix(2)[2], 9: matrix(3)[2]}
  rows = fits.energy_rows(dict(reversed(grads.items())), [RANK])
  assert [row['step'] for row in rows] == [1, 5, 9]
  basis_NR = np.asarray(svd.random_basis(SHAPE, RANK))
  for row in rows:
    grad_MN = grads[row['step']]
    basis_NR = iterated(grad_MN, basis_NR)
    if row['step'] == 1:
      continue
    (best,) = row['best']
    assert energy_of(row, 'power warm') == pytest.approx(
      share(grad_MN, basis_NR) / best, abs=2e-5
    )
    stale_NR = np.linalg.svd(grads[row['step'] - 4])[2][:RANK].T
    assert energy_of(row, 'stale') == pytest.approx(
      share(grad_MN, stale_NR) / best, abs=2e-5
    )


@pytest.mark.parametrize('bad', [0.0, np.nan])
def test_a_gradient_that_fits_no_basis_is_a_row_with_its_reason(bad):
  _, _, grad_MN = matrix()
  rows = fits.energy_rows({1: grad_MN, 2: bad * grad_MN, 3: grad_MN}, [RANK])
  assert rows[1]['absent'] == 'the gradient is zero or not finite'
  assert energy_of(rows[2], 'stale') == pytest.approx(1, abs=1e-5)


def test_synthetic_matrices_have_the_noise_that_is_said():
  grad_MN = fits.synthetic(400, 80)
  assert grad_MN.shape == (400, 80) and grad_MN.dtype == np.float32
  np.testing.assert_array_equal(grad_MN, fits.synthetic(400, 80))
  values_N = np.linalg.svd(np.float64(grad_MN), compute_uv=False) ** 2
  # A product of rank 20 and a tenth of noise, of which a part lies inside.
  rest = np.sum(values_N[20:]) / np.sum(values_N)
  assert 0.5 * fits.NOISE < rest < fits.NOISE


# Time.


@pytest.fixture
def three_rounds(monkeypatch):
  monkeypatch.setattr(fits, 'MOST_ROUNDS', 3)


@pytest.mark.usefixtures('three_rounds')
def test_times_of_all_fits_and_their_ratios():
  slowness = {}
  row = fits.time_row(matrix()[2], RANK, slowness, harness.Clock(1))
  assert set(row) == set(fits.FITS) == set(slowness)
  for name, fit in row.items():
    low, middle, high = fit['seconds']
    assert 0 < low <= middle <= high
    assert fit['rounds'] == 3 and fit['compile_seconds'] >= 0
    assert slowness[name] == pytest.approx(middle / (M * N**2))
  assert row['exact']['ratio'] == [1, 1, 1]


@pytest.mark.usefixtures('three_rounds')
def test_fits_that_take_too_long_or_fail_leave_the_others(monkeypatch):
  class Broken:
    def lower(self, *_):
      raise RuntimeError('no kernel\nand a long story')

  monkeypatch.setitem(fits.JITTED, 'eigh', Broken())
  clock = harness.Clock(1)
  row = fits.time_row(matrix()[2], RANK, {'exact': 1.0}, clock)
  absent = {'absent': f'left out: about {M * N**2}.0 s a refresh'}
  assert row['exact'] == absent
  assert row['eigh'] == {'absent': 'RuntimeError: no kernel'}
  assert row['power']['ratio'] is None and row['power']['rounds'] == 3
  row = {'shape': [M, N], 'rank': RANK, 'matrix': 'synthetic', **row}
  assert '| 24 x 16 | 4 | synthetic | - | - |' in tables.time_table([row])
  assert (
    '* fit eigh, shape [24, 16], rank 4: RuntimeError: no kernel\n'
    in tables.absent([row])
  )


def test_a_fit_that_is_repeated_has_the_ratio_of_one(monkeypatch):
  class Racer:
    def __init__(self, repeats, seconds):
      self.method = programs.Repeated.__new__(programs.Repeated)
      self.method.repeats, self.method.compile_s = repeats, 0.25
      self.turns = [fits.turns.Turn(np.array([s]), None) for s in seconds]

  made = {
    'exact': Racer(1, (2.0, 4.0, 2.0)),
    'eigh': Racer(10, (10.0, 5.0, 5.0)),
  }
  monkeypatch.setattr(fits, 'FITS', dict.fromkeys(made))
  monkeypatch.setattr(fits, 'racer', lambda name, *_: made[name])
  monkeypatch.setattr(fits.turns, 'rounds', lambda *_, **__: None)
  row = fits.time_row(matrix()[2], RANK, {}, harness.Clock(1))
  # Of 1, 0.5 and 0.5 s, beside 2, 4 and 2 s.
  assert row['eigh'] == {
    **{'seconds': [0.5, 0.5, 0.75], 'ratio': [0.1875, 0.25, 0.375]},
    **{'rounds': 3, 'compile_seconds': 0.25},
  }


# Whole runs.


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """Options of a tiny run: its batches and its text."""
  folder = tmp_path_factory.mktemp('text')
  words = np.random.default_rng(0).integers(0, 50, 20_000)
  path = folder / 'text.txt'
  path.write_text(' '.join(f'word{word}' for word in words))
  source = config.DataConfig(source=str(path), seq_len=8, cache_dir=str(folder))
  return {'steps': 5, 'batch_size': 4, 'model': TINY, 'data': source}


@pytest.fixture(scope='module')
def prepared(text):
  """The run, whose training step is compiled once."""
  optim = config.OptimConfig(name='adamw', rank=None)
  one = config.MeshConfig(data=1)
  return recipe.prepare(
    config.TrainConfig(eval_batches=2, optim=optim, mesh=one, **text)
  )


def test_saved_gradients_are_those_of_the_batch_at_hand(prepared, tmp_path):
  path = tmp_path / 'folder' / 'tiny.npz'
  row = runs.save_gradients(prepared, 2, path, harness.Clock(10))
  assert row['steps'] == [1, 3, 5] and len(row['losses']) == 3
  assert row['batch_tokens'] == 32 and 'left_out' not in row
  found = runs.read_gradients(path)
  assert set(found) == {(k, kind) for k in (0, 1) for kind in runs.KINDS}
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
  path.unlink()
  row = runs.save_gradients(prepared, 2, path, harness.Clock(0))
  assert row['steps'] == [] and row['left_out'].startswith('steps from 1 on')
  assert not path.exists()


def test_a_run_ends_with_the_mean_loss_of_held_out_text(prepared):
  row = runs.trained(prepared)
  run = recipe.make_run(prepared, prepared.config)
  params, losses = runs.train(run, harness.Clock(10))
  assert row['train_loss'] == pytest.approx(np.mean(losses))
  batches = data.evaluation_batches(prepared.config, prepared.text)()
  loss = jax.jit(prepared.program.objective.loss)
  sums = [loss(params, next(batches)) for _ in range(2)]
  batches.close()
  losses, weights = np.float64(sums).T
  assert row['eval_loss'] == pytest.approx(losses.sum() / weights.sum())


def test_ways_differ_in_what_they_keep(text):
  kept = {}
  for way, variant in runs.variants(TINY.hidden_size).items():
    optim = dataclasses.replace(runs.loss_optimizer(variant), rank=4)
    program = recipe.plan(config.TrainConfig(optim=optim, **text)).program
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
  rank, n = runs.RANK, 128
  scale = runs.variants(n)['random']['scale']
  low_MR = np.random.default_rng(0).choice([-1, 1], (500, rank)).astype('f')
  lengths = {}
  for name in ('exact', 'random'):
    projection = fits.FITS[name]
    basis = projection.init((500, n), rank, 0)
    lengths[name] = np.linalg.norm(projection.project_back(low_MR, basis))
  assert scale * lengths['random'] == pytest.approx(
    runs.SCALE * lengths['exact'], rel=0.1
  )


@pytest.fixture
def small(monkeypatch, tmp_path):
  """One small shape, and the options that keep files in a folder."""
  monkeypatch.setattr(fits, 'SHAPES', (SHAPE,))
  monkeypatch.setattr(fits, 'SYNTHETIC_SHAPES', (SHAPE,))
  monkeypatch.setattr(fits, 'MOST_ROUNDS', 3)
  for module in (fits, tables):
    monkeypatch.setattr(module, 'CURVE', tables.SHARES)
  monkeypatch.setattr(harness, 'BUSY', math.inf)
  platforms = jax.config.jax_platforms
  yield [
    *('--output', str(tmp_path / 'results' / 'refresh.json')),
    *('--plot', str(tmp_path / 'docs' / 'refresh.png')),
    *('--gradients', str(tmp_path)),
    *('--size', '9m', '60m'),
  ]
  jax.config.update('jax_platforms', platforms)


def test_parts_are_added_to_one_file(small, tmp_path, capsys):
  grads = {f'{number}/0/up': matrix(number)[2] for number in (1, 2, 3)}
  np.savez(tmp_path / '9m.npz', **grads)
  path = tmp_path / 'results' / 'refresh.json'
  measure.main(['energy', *small])
  rows = json.loads(path.read_text())['energy']['rows']
  names = [(row['size'], row.get('step')) for row in rows]
  assert names == [
    *(('9m', 1), ('9m', 2), ('9m', 3), ('60m', None), ('synthetic', 0))
  ]
  # A run of `save` that fails is a row.
  none = ('--data.source', str(tmp_path / 'none.txt'))
  measure.main(['save', 'time', *small, *none])
  results = json.loads(path.read_text())
  assert results['energy']['rows'] == rows
  rows = results['time']['rows']
  assert [(row['shape'], row['rank']) for row in rows] == [
    ([M, N], RANK),
    ([M, N], 1),
  ]
  assert {row['matrix'] for row in rows} == {'gradient: 9m 0/up'}
  assert results['time']['options']['source'] == 'none.txt'
  rows = results['save']['rows']
  assert [row['size'] for row in rows] == ['9m', '60m']
  assert all('none.txt' in row['absent'] for row in rows)
  text = capsys.readouterr().out
  # Two of three gradients: the first has no warm start.
  values_N = 0.7 ** (2 * np.arange(16))
  best = f'{np.sum(values_N[:4]) / np.sum(values_N):.3f}'
  assert f'| 9m | 24 x 16 | 2 | 4 | {best} | 1.000 [1.000], 1.00 |' in text
  assert '* size 60m: no gradients: run `save` first' in text
  assert (tmp_path / 'docs' / 'refresh.png').stat().st_size > 10_000
  figure = picture.draw(results)
  assert len(figure.axes) == 2
  # The best and seven ways.
  assert len(figure.axes[1].lines) == 1 + len(tables.WAYS)


def test_what_no_longer_fits_is_named(small, capsys):
  measure.main(['--minutes', '0', 'energy', 'time', 'loss', *small])
  text = capsys.readouterr().out
  assert '* size synthetic, kind 24 x 16: left out: out of time' in text
  assert '* shape [24, 16], rank 1: left out: out of time' in text
  assert '* way random, seed 1: left out: out of time' in text


def test_losses_are_compared_seed_by_seed():
  rows = [
    {'way': 'exact', 'seed': 0, 'eval_loss': 5.0},
    {'way': 'power', 'seed': 0, 'eval_loss': 4.75},
    {'way': 'exact', 'seed': 1, 'eval_loss': 6.0},
    {'way': 'power', 'seed': 1, 'absent': 'left out: out of time'},
  ]
  assert tables.tables({'loss': {'rows': rows}})['loss'] == (
    '| basis | seed 0 | seed 1 | less exact |\n'
    '| --- | --- | --- | --- |\n'
    '| exact | 5.0000 | 6.0000 | - |\n'
    '| power | 4.7500 | - | -0.2500 |\n'
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['speed'], "no part 'speed'; there are save, energy, time, loss."),
    (['--gap', '1', '2'], '--gap has 2 values for 1 sizes'),
    (['--gap', '0'], '--gap 0 must be at least 1'),
  ],
)
def test_mistakes_of_the_command_line(options, message, capsys):
  with pytest.raises(SystemExit):
    measure.parse(options)
  # Long lines are wrapped.
  assert message in ' '.join(capsys.readouterr().err.split())


def test_one_gap_serves_all_sizes():
  args = measure.parse(['--size', '9m', '60m', '--gap', '7'])
  assert args.gap == [7, 7] and measure.options(args)['batch_size'] == 8
