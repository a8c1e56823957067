"""The step benchmark on tiny weights: rows, counted bytes, what cannot run."""

import json
import types

import jax
import numpy as np
import pytest

from benchmarks.common import harness, peers, turns
from benchmarks.step import measure as step
from benchmarks.step import step_methods
from benchmarks.step.step_methods import METHODS, Case, Data
from gnlorp_jax.models import llama

CASE = Case('tiny', 'float32', rank=4, gap=20)
BASES = 2 * 7 * 16 * 4  # layers, kernels, short axis, rank: numbers
# Coordinates: four square kernels, three of 16 x 24.
LOW = 2 * 4 * (4 * 16 + 3 * 24)
OUTPUTS = 2 * (4 * 16 + 2 * 24 + 16)
WEIGHTS = 2 * (4 * 16 * 16 + 3 * 16 * 24)
ROOM = 1e9  # Bytes, more than anything here takes.


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  model = llama.LlamaConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    max_seq_len=8,
  )
  monkeypatch.setitem(llama.PRESETS, 'tiny', model)


class Still:
  """A clock that stands still: results do not hang on the machine's load."""

  def __init__(self, seconds_left):
    self.seconds_left = seconds_left

  def share(self, parts):
    del parts
    return self


def runner(*names, limit=ROOM, pace=None):
  return step.Runner(list(names), 10, 'cpu', limit, pace or step.Pace())


def run(*names, case=CASE, **options):
  saved = []
  rows = step.run_case(
    case, runner(*names, **options), Still(1e6), saved.append
  )
  assert saved[-1] == rows
  return {row['method']: row for row in rows}


def test_rows_hold_times_ratios_and_bytes():
  names = ['floor', 'floor-layers', 'optax-galore', 'gradnormlorp', 'adamw']
  rows = run(*names)
  assert list(rows) == names
  for row in rows.values():
    assert set(row) == {
      *('shape', 'dtype', 'rank', 'gap', 'group', 'method', 'state_bytes'),
      *('peak_bytes', 'compile_s', 'first_step_s', 'steps', 'median_s'),
      *('quartiles_s', 'worst_per_median', 'max_per_median', 'visits'),
      *('refresh_s_per_step', 'refresh_from', 'refreshing_steps', 'per'),
    }
    assert row['steps'] == 20 and row['visits'] == 1
    assert 0 < row['quartiles_s'][0] <= row['median_s']
    assert 1 <= row['worst_per_median'] <= row['max_per_median']
    assert set(row['per']) == {'floor', 'optax-galore'}
    # Weights, gradients and state are arguments of the step.
    assert row['peak_bytes'] >= 8 * WEIGHTS + row['state_bytes']
  assert rows['floor']['per']['floor'] == [1, 1, 1]
  # Steps 3 to 22 of GaLore hold one refresh, at step 21.
  assert rows['optax-galore']['refreshing_steps'] == 1 / 20
  assert rows['optax-galore']['refresh_from'] == turns.COUNTED
  assert rows['adamw']['refresh_from'] is None
  # 14 matrices take turns.
  assert rows['gradnormlorp']['refreshing_steps'] == 14 / 20
  assert rows['gradnormlorp']['refresh_from'] == turns.COUNTED
  counts = 400  # At most; they and the statistics are no moments.
  known = 4 * (BASES + 2 * LOW + 2 * OUTPUTS)
  assert 0 <= rows['gradnormlorp']['state_bytes'] - known <= counts
  # It compresses the longer axis: bases and coordinates change places.
  known = 4 * (LOW + 2 * BASES)
  assert 0 <= rows['optax-galore']['state_bytes'] - known <= counts
  assert 0 <= rows['adamw']['state_bytes'] - 8 * WEIGHTS <= counts
  assert rows['floor']['state_bytes'] == 4 * BASES
  assert rows['floor-layers']['state_bytes'] == 4 * BASES


def test_ratios_grow_as_ours_gets_faster():
  rows = list(run('floor', 'adamw', 'optax-adamw').values())
  found = step.ratios({'rows': rows})
  assert list(found) == ['step tiny float32 rank 4: floor / adamw']
  low, median, high = rows[1]['per']['floor']
  (values,) = found.values()
  assert values == (1 / high, 1 / median, 1 / low)


def test_one_matrix_in_bfloat16_whose_refresh_is_the_first_step():
  case = Case('16x24', 'bfloat16', rank=4, gap=100)
  rows = run('floor', 'floor-layers', 'galore', 'optax-adamw', case=case)
  assert rows['floor-layers']['absent'] == 'one matrix is no stack: see floor'
  row = rows['galore']
  assert row['steps'] == 100 and row['refreshing_steps'] == 1 / 100
  # Two moments like the weights, two bytes each.
  assert 0 <= rows['optax-adamw']['state_bytes'] - 4 * 16 * 24 <= 4
  data = Data(case._replace(gap=1000), 'cpu', ROOM)
  racer = turns.Racer('galore', METHODS['galore'](data), data.inputs)
  racer.turn(3)
  known = step.row_of(racer, [racer], gap=1000)
  assert known['refresh_from'] == turns.FIRST
  extra = racer.first_s - known['median_s']
  assert known['refresh_s_per_step'] == pytest.approx(extra / 1000)
  assert known['max_per_median'] >= racer.first_s / known['median_s']
  (kernel,) = jax.tree.leaves(data.weights('layers'))
  assert kernel.shape == (16, 24) and kernel.dtype == 'bfloat16'
  assert kernel is jax.tree.leaves(data.weights('stacked'))[0]


def test_layouts_hold_the_same_gradients():
  data = Data(CASE, 'cpu', ROOM)
  stacks, layers = data.gradients('stacked')[1], data.gradients('layers')[1]
  assert len(data.gradients('layers')) == 3
  kernel = stacks['down_proj']['kernel']
  assert kernel.shape == (2, 24, 16)
  for i in range(2):
    np.testing.assert_array_equal(kernel[i], layers[f'down_proj_{i}']['kernel'])
  pytest.importorskip('torch')
  tensors = data.gradients('torch')[1]
  assert len(tensors) == 14
  np.testing.assert_array_equal(tensors[-1].numpy(), kernel[1].T)


@pytest.mark.usefixtures('one_torch_thread')
def test_torch_adamw():
  row = run('torch-adamw')['torch-adamw']
  # And one float32 count for each matrix.
  assert row['state_bytes'] == 8 * WEIGHTS + 4 * 14
  assert row['compile_s'] is None and row['peak_bytes'] is None
  row = run('torch-adamw', case=CASE._replace(dtype='bfloat16'))['torch-adamw']
  assert row['state_bytes'] == 4 * WEIGHTS + 4 * 14


@pytest.mark.usefixtures('one_torch_thread')
def test_galore_torch():
  pytest.importorskip('galore_torch')
  row = run('galore-torch')['galore-torch']
  assert row['refreshing_steps'] == 1 / 20
  assert row['state_bytes'] == 4 * (BASES + 2 * LOW)


def test_a_missing_package_is_a_row_with_its_reason(monkeypatch):
  def missing(name):
    raise ModuleNotFoundError(f'No module named {name!r}')

  monkeypatch.setattr(peers.importlib, 'import_module', missing)
  row = run('torch-adamw')['torch-adamw']
  reason = "not installed: No module named 'torch'"
  assert row == {
    **CASE._asdict(),
    **{'method': 'torch-adamw', 'absent': reason, 'group': 1},
  }
  text = step.table({'rows': [row], 'left_out': {}})
  assert f'* torch-adamw: absent, {reason}\n' in text


class Failing:
  """Adamw until a step fails after the weights were donated."""

  def __init__(self, data, good_steps):
    self._inner = METHODS['adamw'](data)
    self._data, self._left = data, good_steps

  def __getattr__(self, name):
    return getattr(self._inner, name)

  def step(self, index):
    self._left -= 1
    if self._left >= 0:
      return self._inner.step(index)
    for leaf in jax.tree.leaves(self._data.weights('stacked')):
      leaf.delete()
    raise RuntimeError('out of memory\nand much more')


@pytest.mark.parametrize('good_steps', [0, 15])
def test_a_failure_is_a_row_and_the_others_go_on(monkeypatch, good_steps):
  monkeypatch.setitem(METHODS, 'fails', lambda data: Failing(data, good_steps))
  rows = run('floor', 'fails', 'adamw')
  assert rows['fails']['error'] == 'RuntimeError: out of memory'
  assert 'median_s' not in rows['fails']
  assert rows['floor']['steps'] == rows['adamw']['steps'] == 20
  text = step.table({'rows': list(rows.values()), 'left_out': {}})
  assert '* fails: failed, RuntimeError: out of memory\n' in text


def needs(name):
  """Bytes of the state, and of what a step needs beside its arguments."""
  data = Data(CASE, 'cpu', ROOM)
  method = METHODS[name](data)
  return method.state_bytes, method.peak_bytes - method._arguments


def test_what_does_not_fit_together_runs_in_groups(monkeypatch):
  monkeypatch.setitem(METHODS, 'second', METHODS['adamw'])
  names = ['floor', 'second', 'adamw']
  floor, adamw = needs('floor'), needs('adamw')
  # One set of gradients: the memory is small.
  limit = 8 * WEIGHTS + floor[0] + max(sum(adamw), floor[1])
  rows = run(*names, limit=limit)
  assert [row['group'] for row in rows.values()] == [1, 1, 2]
  assert set(rows['adamw']['per']) == {'floor'}  # It ran again.
  text = step.table({'rows': list(rows.values()), 'left_out': {}})
  assert 'Timed in turns were: floor, second; adamw.' in text
  rows = run('adamw', 'floor', limit=8 * WEIGHTS + sum(floor))
  assert rows['adamw']['absent'].startswith('would need 0.0 GB, weights and')
  assert rows['floor']['steps'] == 20
  rows = run('floor', 'adamw', limit=1)
  assert all('absent' in row for row in rows.values())


def test_what_does_not_fit_the_time_is_left_out():
  pace = step.Pace()
  row = {'method': 'galore', 'first_step_s': 10.0, 'median_s': 0.5}
  pace.note(CASE, row | {'compile_s': 1.0})
  assert pace.seconds('galore', CASE) == 1 + 10 + 5 * 0.5
  # All sides twice as long: SVDs take 8 times as long, products 4 times; half
  # as many layers, and one kernel of four of the square ones.
  factoring = 2 * (4 * 16**3 + 3 * 16 * 16 * 24)
  other = Case('32x32', 'float32', 4, 20)
  assert pace.seconds('galore', other) == pytest.approx(
    1 + 10 * 32**3 / factoring + 5 * 0.5 * 32**2 / WEIGHTS
  )
  assert pace.seconds('floor', other) == 0
  clock = Still(6.0)
  rows = {}
  build = step.build(
    *(['galore', 'floor'], Data(CASE, 'cpu', ROOM), clock, pace),
    lambda row: rows.update({row['method']: row}),
  )
  assert [racer.name for racer in build[0]] == ['floor']
  assert rows['galore']['absent'] == (
    'left out: needs about 14 s, the case has 6 s'
  )
  pace.note(CASE, row | {'compile_s': 1.0, 'method': 'floor'})
  why = step.left_out(CASE, runner('floor', 'galore', pace=pace), clock)
  assert why == 'needs 27 s at least, its share is 6 s'
  none = Still(0.0)
  assert step.left_out(CASE, runner('floor'), none) == 'the time is up'
  case = CASE._replace(rank=17)
  why = step.left_out(case, runner('floor'), clock)
  assert why == 'the shorter side of a matrix is 16'
  assert step.left_out(CASE, runner('adamw', 'fira'), clock) is None


def racer_of(*known, first_refreshed=False, first_s=0.0):
  return types.SimpleNamespace(
    turns=list(known), first_refreshed=first_refreshed, first_s=first_s
  )


def test_worst_step_and_refresh_cost_of_known_times():
  plain, refresh = 0.1, 0.3
  usual = np.array([plain, plain, refresh, plain])
  flags = np.array([False, False, True, False])
  disturbed = usual.copy()
  disturbed[0] = 1.0  # Something else ran; its place was fine before.
  racer = racer_of(turns.Turn(usual, flags), turns.Turn(disturbed, flags))
  worst, largest, visits = turns.worst_step(racer, gap=4)
  assert worst == pytest.approx(0.3 / 0.2)  # Median of the second: 0.2.
  assert largest == pytest.approx(1.0 / 0.2)
  assert visits == 2
  cost, source = turns.refresh_cost(racer, gap=4)
  assert cost == pytest.approx((refresh - plain) / 4)
  assert source == turns.COUNTED
  none = turns.Turn(np.array([0.1, 0.2, 0.1]), np.zeros(3, bool))
  racer = racer_of(none, first_refreshed=True, first_s=2.1)
  cost, source = turns.refresh_cost(racer, gap=100)
  assert cost == pytest.approx(2.0 / 100)
  assert source == turns.FIRST
  assert turns.worst_step(racer, gap=100) == (
    pytest.approx(21),
    pytest.approx(21),
    1,
  )
  racer = racer_of(none, first_s=2.1)  # Like AdamW's.
  assert turns.refresh_cost(racer, gap=100) == (None, None)
  assert turns.worst_step(racer, gap=100)[0] == pytest.approx(2)
  always = turns.Turn(np.array([0.1, 0.2]), np.ones(2, bool))
  assert turns.refresh_cost(racer_of(always), gap=100) == (None, None)


def test_ratios_of_turns():
  flags = np.zeros(2, bool)
  mine = [turns.Turn(np.array([x, x]), flags) for x in (1.0, 2.0, 6.0, 9.0)]
  other = [turns.Turn(np.array([2.0, 2.0]), flags)] * 3
  assert turns.ratio_quartiles(mine, other) == [0.75, 1.0, 2.0]


def test_everyone_comes_once_in_a_round_and_in_other_places():
  orders = [''.join(turns.order('abcd', rounds)) for rounds in range(4)]
  assert orders == ['abcd', 'adcb', 'cdab', 'cbad']
  seven = {turns.order('abcdefg', rounds)[0] for rounds in range(0, 14, 2)}
  assert seven == set('abcdefg')


def test_shapes_and_the_order_of_cases():
  cases = step.make_cases(
    ['130m', '8x12'], ['float32', 'bfloat16'], [4, 2], gap=9
  )
  assert [str(case) for case in cases] == [
    *('130m float32 rank 256', '8x12 float32 rank 4', '8x12 float32 rank 2'),
    *('130m bfloat16 rank 256', '8x12 bfloat16 rank 4'),
    '8x12 bfloat16 rank 2',
  ]
  (tiny,) = step.make_cases(['tiny'], ['float32'], [2, 3], gap=20)
  assert tiny == CASE  # A quarter of 16.
  assert tiny.weights == WEIGHTS
  with pytest.raises(ValueError) as error:
    step_methods.kernels_of('4096')
  assert str(error.value) == (
    "No shape '4096': give INxOUT, such as 4096x11008, or one of "
    + ', '.join(llama.PRESETS)
    + '.'
  )


def test_unknown_method_names_the_known_ones():
  with pytest.raises(ValueError) as error:
    harness.select(['gallore'], step_methods.METHODS)
  assert str(error.value) == (
    "No method is called 'gallore'; there are " + ', '.join(METHODS) + '.'
  )
  names = harness.select(['torch*', 'floor', '*adamw'], step_methods.METHODS)
  assert names[:3] == ['torch-adamw', 'torch-adamw-fused', 'floor']
  assert len(names) == len(set(names))
  default = list(step_methods.DEFAULT)
  assert harness.select(default, step_methods.METHODS) == default


def test_the_command_writes_file_tables_and_picture(
  tmp_path, monkeypatch, capsys
):
  output, picture = tmp_path / 'folder' / 'step.json', tmp_path / 'step.png'
  arguments = [
    *('--shapes', 'tiny', '8x12', '--dtypes', 'float32', '--ranks', '2', '30'),
    *('--gap', '6', '--turn', '3', '--minutes', '1000'),
    *('--methods', 'floor', 'adamw', '--output', str(output)),
  ]
  monkeypatch.setattr('sys.argv', ['step', *arguments, '--plot', str(picture)])
  step.main()
  written = json.loads(output.read_text())
  assert len(written['rows']) == 4
  assert written['left_out'] == {
    '8x12 float32 rank 30': 'the shorter side of a matrix is 8'
  }
  assert len(step.ratios(written)) == 2
  text = capsys.readouterr().out
  assert 'tiny float32 rank 4, T = 6\n' in text
  assert '8x12 float32 rank 2, T = 6\n' in text
  assert text.count('\n| adamw | ') == 2
  assert text.endswith(
    '* Case 8x12 float32 rank 30: left out, the shorter side of a matrix is 8\n'
  )
  assert picture.stat().st_size > 1000
  monkeypatch.setattr('sys.argv', ['step', '--gap', '0'])
  with pytest.raises(SystemExit):
    step.main()
  assert '--gap must be at least 1, got 0.' in capsys.readouterr().err
