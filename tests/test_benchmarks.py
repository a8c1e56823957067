"""The benchmarks on tiny weights: fields, counted bytes, and the arithmetic."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
  finetune_step,
  methods,
  optimizer_step,
  record,
  state_bytes,
)
from benchmarks.optimizer_step import Sizes, Turn

TINY = Sizes(layers=2, hidden=16, intermediate=24, rank=4, gap=20)
BASES = 2 * 7 * 16 * 4  # layers, kernels, short axis, rank: numbers
# Coordinates: four square kernels, three of 16 x 24.
LOW = 2 * 4 * (4 * 16 + 3 * 24)
OUTPUTS = 2 * (4 * 16 + 2 * 24 + 16)
WEIGHTS = 2 * (4 * 16 * 16 + 3 * 16 * 24)


def run(*names):
  saved = []
  rows = optimizer_step.benchmark(list(names), TINY, 0, 10, saved.append)
  assert saved[-1] == rows
  # One save for each method built, one for each round.
  assert len(saved) == len(names) + 2
  return {known['method']: known for known in rows}


def test_step_rows_hold_times_ratios_and_bytes(tmp_path):
  names = ['floor', 'floor-layers', 'optax-galore', 'gradnormlorp', 'adamw']
  rows = run(*names)
  path = tmp_path / 'folder' / 'steps.json'
  record.write_json(path, {'rows': list(rows.values())})
  assert json.loads(path.read_text()) == {'rows': list(rows.values())}
  assert list(rows) == names
  for known in rows.values():
    assert set(known) == {
      *('method', 'state_bytes', 'compile_s', 'first_step_s', 'steps'),
      *('median_s', 'quartiles_s', 'worst_per_median', 'max_per_median'),
      *('visits', 'refresh_s_per_step', 'refresh_from', 'refreshing_steps'),
      *('median_per_floor', 'median_per_optax-galore'),
      'refresh_per_optax-galore',
    }
    assert known['steps'] == 20 and known['visits'] == 1
    assert 0 < known['quartiles_s'][0] <= known['median_s']
    assert 1 <= known['worst_per_median'] <= known['max_per_median']
  assert rows['floor']['median_per_floor'] == 1
  # Steps 2 to 21 of GaLore hold one refresh, at step 21.
  assert rows['optax-galore']['refreshing_steps'] == 1 / 20
  assert rows['optax-galore']['refresh_from'] == 'steps with a refresh'
  assert rows['adamw']['refresh_from'] == 'mean less median'
  # 14 matrices take turns.
  assert rows['gradnormlorp']['refreshing_steps'] == 14 / 20
  assert rows['gradnormlorp']['refresh_from'] == 'steps with a refresh'
  counts = 400  # At most; they and the statistics are no moments.
  known = 4 * (BASES + 2 * LOW + 2 * OUTPUTS)
  assert 0 <= rows['gradnormlorp']['state_bytes'] - known <= counts
  # It compresses the longer axis: bases and coordinates change places.
  known = 4 * (LOW + 2 * BASES)
  assert 0 <= rows['optax-galore']['state_bytes'] - known <= counts
  assert 0 <= rows['adamw']['state_bytes'] - 8 * WEIGHTS <= counts
  assert rows['floor']['state_bytes'] == 4 * BASES
  assert rows['floor-layers']['state_bytes'] == 4 * BASES
  text = optimizer_step.table(list(rows.values()))
  assert text.count('\n| ') == 5
  goals = optimizer_step.goals(list(rows.values()))
  # galore-torch did not run.
  assert [goal['goal'] for goal in goals if goal['value'] is None] == [
    "refreshes, of galore-torch's",
    "median, of galore-torch's",
  ]
  assert 'not measured' in optimizer_step.goal_table(goals)


@pytest.fixture
def one_torch_thread(monkeypatch):
  torch = pytest.importorskip('torch')
  threads = torch.get_num_threads()
  monkeypatch.setattr(optimizer_step, 'cores', lambda: 1)
  yield
  torch.set_num_threads(threads)


@pytest.mark.usefixtures('one_torch_thread')
def test_torch_adamw():
  known = run('torch-adamw')['torch-adamw']
  # And one float32 count for each matrix.
  assert known['state_bytes'] == 8 * WEIGHTS + 4 * 14
  assert known['compile_s'] is None


@pytest.mark.usefixtures('one_torch_thread')
def test_galore_torch():
  pytest.importorskip('galore_torch')
  known = run('galore-torch')['galore-torch']
  assert known['refreshing_steps'] == 1 / 20
  assert known['state_bytes'] == 4 * (BASES + 2 * LOW)


def test_a_missing_package_is_a_row_with_its_reason(monkeypatch):
  def missing(name):
    raise ModuleNotFoundError(f'No module named {name!r}')

  monkeypatch.setattr(optimizer_step.importlib, 'import_module', missing)
  rows = optimizer_step.benchmark(
    ['torch-adamw'], TINY, 0, 2, lambda rows: None
  )
  reason = "not installed: No module named 'torch'"
  assert rows == [{'method': 'torch-adamw', 'absent': reason}]
  assert f'* torch-adamw: absent, {reason}' in optimizer_step.table(rows)


def test_worst_step_and_refresh_cost_of_known_times():
  plain, refresh = 0.1, 0.3
  usual = np.array([plain, plain, refresh, plain])
  flags = np.array([False, False, True, False])
  disturbed = usual.copy()
  disturbed[0] = 1.0  # Something else ran; its place was fine before.
  turns = [Turn(usual, flags), Turn(disturbed, flags)]
  worst, largest, visits = optimizer_step.worst_step(turns, gap=4)
  assert worst == pytest.approx(0.3 / 0.2)  # Median of the second: 0.2.
  assert largest == pytest.approx(1.0 / 0.2)
  assert visits == 2
  cost, source = optimizer_step.refresh_cost(turns, gap=4)
  assert cost == pytest.approx((refresh - plain) / 4)
  assert source == 'steps with a refresh'
  none = [Turn(usual, np.zeros(4, bool))]
  cost, source = optimizer_step.refresh_cost(none, gap=4)
  assert cost == pytest.approx(0.15 - plain)
  assert source == 'mean less median'


def test_unknown_method_names_the_known_ones():
  with pytest.raises(ValueError) as error:
    optimizer_step.select(['gallore'])
  assert str(error.value) == (
    "No method is called 'gallore'; there are "
    + ', '.join(optimizer_step.METHODS)
    + '.'
  )
  assert optimizer_step.select(['torch*', 'floor']) == ['floor', 'torch-adamw']


def test_options_that_a_method_lacks():
  with pytest.raises(methods.AbsentError, match='^adamw has no option side$'):
    methods.build('adamw', {'side': 'both'}, learning_rate=1.0)
  methods.build('adamw', {'side': 'short'}, learning_rate=1.0, rank=4)
  with pytest.raises(methods.AbsentError) as error:
    methods.build('galore', {'side': 'up'}, learning_rate=1.0)
  assert str(error.value).startswith(
    "galore refuses {'side': 'up'}: Unknown side 'up'; expected one of"
  )


SHAPES = jax.eval_shape(
  lambda: {
    'embed': {'embedding': jnp.zeros((40, 16), jnp.bfloat16)},
    'dense': {'kernel': jnp.zeros((2, 16, 24), jnp.bfloat16)},
    'norm': {'scale': jnp.zeros(16, jnp.bfloat16)},
  }
)


def count(alias, **changes):
  known = {
    **{'embeddings': 'full', 'rank': 4, 'side': 'short'},
    **{'moment_bits': None, 'basis_bits': None},
  }
  return state_bytes.row(alias, known | changes, SHAPES)


def test_state_bytes_of_a_tiny_model():
  full = 2 * 4 * (40 * 16 + 16)
  known = count('galore')
  assert known['moments_bytes'] == full + 2 * 4 * (2 * 24 * 4)
  assert known['bases_bytes'] == 4 * (2 * 16 * 4)
  known = count('galore', side='both')
  assert known['moments_bytes'] == full + 2 * 4 * (2 * 4 * 4)
  assert known['bases_bytes'] == 4 * (2 * 16 * 4 + 2 * 24 * 4)
  known = count('galore', embeddings='projected')
  assert known['moments_bytes'] == 2 * 4 * (2 * 24 * 4 + 40 * 4 + 16)
  assert known['bases_bytes'] == 4 * (2 * 16 * 4 + 16 * 4)
  known = count('gradnormlorp')
  assert known['moments_bytes'] == full + 2 * 4 * (2 * 24 * 4 + 2 * 24)
  parts = ('moments', 'bases', 'other')
  assert known['bytes'] == sum(known[f'{part}_bytes'] for part in parts)
  adam = 2 * 2 * (40 * 16 + 2 * 16 * 24 + 16)
  assert state_bytes.baseline(SHAPES) == adam
  assert known['saving'] == pytest.approx(1 - known['bytes'] / adam)


def test_every_setting_that_exists_has_a_row():
  saved = []
  rows, absent = state_bytes.benchmark(
    ['gradnormlorp', 'adamw'], SHAPES, lambda *found: saved.append(len(found))
  )
  assert len(saved) == len(rows) + len(absent)
  assert {known['method'] for known in rows} == {'gradnormlorp', 'adamw'}
  assert {known['rank'] for known in rows if known['method'] == 'adamw'} == {
    None
  }
  for known in rows:
    speaks_of_it = (
      known['method'] == 'gradnormlorp' and known['moment_bits'] == 8
    )
    assert (known['reaches_paper'] is not None) == speaks_of_it
  text = state_bytes.table(rows)
  assert text.count('rank 512') == 1 and '| adamw | full |' in text


def test_the_paper_is_reached_in_bold():
  known = count('gradnormlorp') | {'moment_bits': 8, 'rank': 256}
  known |= {'saving': 0.9, 'bytes': 2_700_000_000, 'reaches_paper': True}
  assert '**2.70 GB, 90.0%**' in state_bytes.table([known])


def test_the_yardstick_is_the_published_one():
  assert state_bytes.baseline(state_bytes.shapes_of('7b')) == 4 * 6_738_415_616


def test_fine_tuning_beside_pytorch_computes_the_same(tmp_path, monkeypatch):
  pytest.importorskip('torch')
  output = tmp_path / 'speed.json'
  arguments = ['--rounds', '2', '--turn', '2', '--dropout', '0.0']
  monkeypatch.setattr(
    'sys.argv', ['finetune_step', *arguments, '--output', str(output)]
  )
  finetune_step.main()
  (row,) = json.loads(output.read_text())['rows']
  assert row['loss_difference'] < 1e-4
  low, middle, high = row['ratio']
  assert 0 < low <= middle <= high
  assert [len(turns) for turns in row['seconds'].values()] == [2, 2]
