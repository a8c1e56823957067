"""The step benchmark on tiny weights: rows, counted bytes, what cannot run."""

import argparse
import json

import jax
import numpy as np
import pytest

from benchmarks.common import harness, peers, turns
from benchmarks.common.methods import AbsentError
from benchmarks.step import measure as step
from benchmarks.step import step_methods
from benchmarks.step.step_methods import METHODS, Case, Data
from gnlorp_jax.models import llama

CASE = Case('tiny', 'float32', rank=4, gap=10)
BASES = 2 * 7 * 16 * 4  # layers, kernels, short axis, rank: numbers
# Coordinates: four square kernels, three of 16 x 24.
LOW = 2 * 4 * (4 * 16 + 3 * 24)
OUTPUTS = 2 * (4 * 16 + 2 * 24 + 16)
WEIGHTS = 2 * (4 * 16 * 16 + 3 * 16 * 24)
ROOM = 1e9  # Bytes, more than anything here takes.
JAX = ('floor', 'floor-layers', 'optax-galore', 'gradnormlorp', 'adamw')
TORCH = ('galore-torch', 'torch-adamw')


@pytest.fixture(scope='module', autouse=True)
def tiny_model():
  llama.PRESETS['tiny'] = llama.LlamaConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    max_seq_len=8,
  )
  yield
  del llama.PRESETS['tiny']


def run(folder, *names, case=CASE, before=()):
  entries = [*before, {**case._asdict(), 'rows': []}]
  args = argparse.Namespace(
    **{'device': 'cpu', 'methods': list(names), 'turn': 5},
    output=folder / 'step.json',
  )
  written = {'cases': entries}
  step.run_case(args, harness.Clock(1e3), written, ROOM)
  assert json.loads(args.output.read_text()) == written
  return {row['method']: row for row in entries[-1]['rows']}


@pytest.fixture(scope='module')
def rows(tmp_path_factory, one_torch_thread):
  return run(tmp_path_factory.mktemp('step'), *JAX, *TORCH)


@pytest.mark.slow
def test_rows_hold_times_and_ratios(rows):
  assert list(rows) == [*JAX, *TORCH]
  timed = [row for row in rows.values() if 'absent' not in row]
  for row in timed:
    assert set(row) == {
      *('method', 'state_bytes', 'peak_bytes', 'compile_s', 'first_step_s'),
      *('steps', 'median_s', 'quartiles_s', 'worst_per_median', 'visits'),
      *('max_per_median', 'refresh_s_per_step', 'refresh_from'),
      *('refreshing_steps', 'per'),
    }
    assert row['steps'] == 10 and row['visits'] == 1
    assert 0 < row['quartiles_s'][0] <= row['median_s']
    assert row['worst_per_median'] <= row['max_per_median']
    assert {'floor', 'optax-galore'} <= set(row['per'])
  assert rows['floor']['per']['floor'] == [1, 1, 1]
  # Steps 3 to 12 of GaLore hold one refresh, at step 11.
  assert rows['optax-galore']['refreshing_steps'] == 1 / 10
  assert rows['optax-galore']['refresh_from'] == turns.COUNTED
  assert rows['adamw']['refresh_from'] is None
  assert rows['gradnormlorp']['refreshing_steps'] > 1 / 10  # They take turns.


@pytest.mark.slow
def test_states_have_the_bytes_that_are_counted_by_hand(rows):
  for name in JAX:
    # Weights, gradients and state are arguments of the step.
    row = rows[name]
    assert row['peak_bytes'] >= 8 * WEIGHTS + row['state_bytes']
  counts = 400  # At most; they and the statistics are no moments.
  known = 4 * (BASES + 2 * LOW + 2 * OUTPUTS)
  assert 0 <= rows['gradnormlorp']['state_bytes'] - known <= counts
  # It compresses the longer axis: bases and coordinates change places.
  known = 4 * (LOW + 2 * BASES)
  assert 0 <= rows['optax-galore']['state_bytes'] - known <= counts
  assert 0 <= rows['adamw']['state_bytes'] - 8 * WEIGHTS <= counts
  assert rows['floor']['state_bytes'] == 4 * BASES
  assert rows['floor-layers']['state_bytes'] == 4 * BASES


@pytest.mark.slow
def test_states_of_pytorch(rows):
  pytest.importorskip('galore_torch')
  # And one float32 count for each matrix.
  assert rows['torch-adamw']['state_bytes'] == 8 * WEIGHTS + 4 * 14
  assert rows['torch-adamw']['compile_s'] is None
  assert rows['torch-adamw']['peak_bytes'] is None
  assert rows['galore-torch']['refreshing_steps'] == 1 / 10
  assert rows['galore-torch']['state_bytes'] == 4 * (BASES + 2 * LOW)


@pytest.mark.usefixtures('one_torch_thread')
def test_one_matrix_in_bfloat16(tmp_path):
  case = Case('16x24', 'bfloat16', rank=4, gap=1)
  rows = run(
    *(tmp_path, 'floor', 'floor-layers', 'optax-adamw', 'torch-adamw'),
    case=case,
  )
  assert rows['floor-layers']['absent'] == 'one matrix is no stack: see floor'
  # Two moments like the weights, two bytes each.
  assert 0 <= rows['optax-adamw']['state_bytes'] - 4 * 16 * 24 <= 4
  pytest.importorskip('torch')
  assert rows['torch-adamw']['state_bytes'] == 4 * 16 * 24 + 4


def test_layouts_hold_the_same_gradients():
  data = Data(CASE, 'cpu', ROOM)
  data.load('stacked')
  data.load('layers')
  stacks, layers = data.gradients['stacked'][1], data.gradients['layers'][1]
  assert len(data.gradients['layers']) == 3
  kernel = stacks['down_proj']['kernel']
  assert kernel.shape == (2, 24, 16)
  for i in range(2):
    np.testing.assert_array_equal(kernel[i], layers[f'down_proj_{i}']['kernel'])
  pytest.importorskip('torch')
  data.load('torch')
  tensors = data.gradients['torch'][1]
  assert len(tensors) == 14
  np.testing.assert_array_equal(tensors[-1].numpy(), kernel[1].T)


def test_a_missing_package_is_a_row_with_its_reason(tmp_path, monkeypatch):
  def missing(name):
    raise ModuleNotFoundError(f'No module named {name!r}')

  monkeypatch.setattr(peers.importlib, 'import_module', missing)
  row = run(tmp_path, 'torch-adamw')['torch-adamw']
  reason = "not installed: No module named 'torch'"
  assert row == {'method': 'torch-adamw', 'absent': reason}


def test_weights_that_a_failed_step_has_donated_are_made_anew(monkeypatch):
  data = Data(CASE, 'cpu', ROOM)
  method = METHODS['floor'](data)
  before = jax.device_get(data.weights['stacked'])

  def fail(weights, *_):
    for leaf in jax.tree.leaves(weights):
      leaf.delete()
    raise RuntimeError('out of memory')

  monkeypatch.setattr(method, '_step', fail)
  with pytest.raises(RuntimeError, match='^out of memory$'):
    method.step(0)
  jax.tree.map(np.testing.assert_array_equal, data.weights['stacked'], before)


def test_what_does_not_fit_the_memory_is_named():
  # One set of gradients: the memory is small.
  data = Data(CASE, 'cpu', 8 * WEIGHTS + 100)
  assert data.inputs == 1
  data.load('stacked')
  with pytest.raises(AbsentError) as error:
    data.reserve(90, 20)
  assert str(error.value) == (
    'would need 0.0 GB with those before it, weights and gradients included; '
    'a case may take 0.0 GB'
  )
  data.reserve(90, 10)


def test_what_does_not_fit_the_time_is_left_out(tmp_path):
  row = {'method': 'fira', 'first_step_s': 6e5, 'compile_s': 1.0}
  entry = {**CASE._asdict(), 'rows': [row]}
  # SVDs of 14 matrices, four of seven square.
  factoring = 2 * (4 * 16**3 + 3 * 16 * 16 * 24)
  other = Case('32x32', 'float32', 4, 20)
  assert step.expected_s('fira', other, [entry]) == pytest.approx(
    1 + 6e5 * 32**3 / factoring
  )
  assert step.expected_s('floor', other, [entry]) == 0
  found = run(tmp_path, 'fira', before=[entry])['fira']
  assert found['absent'].startswith(
    'left out, needs about 600001 s, the case has '
  )


def hand_made(method, median, **more):
  return {
    **{'method': method, 'state_bytes': 1_500_000, 'peak_bytes': None},
    **{'compile_s': None, 'first_step_s': 0.5, 'steps': 20},
    **{'median_s': median, 'quartiles_s': [0.9 * median, 1.1 * median]},
    **{'worst_per_median': 1.25, 'refresh_s_per_step': None},
    **{'refresh_from': None, 'per': {}, **more},
  }


def test_table_and_picture_of_known_rows(tmp_path):
  first = {'refresh_s_per_step': 0.0125, 'refresh_from': turns.FIRST}
  ratio = {'per': {'floor': [1.5, 2.0, 2.5]}}
  entry = {
    **CASE._asdict(),
    'rows': [
      hand_made('floor', 0.02, per={'floor': [1, 1, 1]}),
      hand_made('galore', 0.005, **first, **ratio),
      {'method': 'fira', 'absent': 'not today'},
    ],
  }
  assert step.table(entry).splitlines()[2:] == [
    '| floor | 20.0 [18.0, 22.0] | 1.00 | - | - | - | 1.25 | - | 0.50 | - '
    '| 1.5 | - | 20 |',
    '| galore | 5.000 [4.500, 5.500] | 2.00 | - | - | - | 1.25 | 12.5 (first) '
    '| 0.50 | - | 1.5 | - | 20 |',
    '',
    '* fira: absent, not today',
  ]
  # They grow as ours gets faster.
  assert step.ratios({'cases': [entry]}) == {
    'step tiny float32 rank 4: floor / galore': (1 / 2.5, 1 / 2.0, 1 / 1.5)
  }
  path = tmp_path / 'folder' / 'a.png'
  step.plot([entry], path)
  assert path.stat().st_size > 1000


def test_shapes_and_the_order_of_cases():
  cases = step.make_cases(
    ['130m', '8x12'], ['float32', 'bfloat16'], [4, 2], gap=9
  )
  assert [str(case) for case in cases] == [
    *('130m float32 rank 256', '8x12 float32 rank 4', '8x12 float32 rank 2'),
    *('130m bfloat16 rank 256', '8x12 bfloat16 rank 4'),
    '8x12 bfloat16 rank 2',
  ]
  (tiny,) = step.make_cases(['tiny'], ['float32'], [2, 3], gap=10)
  assert tiny == CASE  # A quarter of 16.
  assert tiny.weight_bytes == 4 * WEIGHTS
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
  default = list(step.DEFAULT)
  assert harness.select(default, step_methods.METHODS) == default


def test_the_command_writes_file_tables_and_picture(
  tmp_path, monkeypatch, capsys
):
  output, picture = tmp_path / 'folder' / 'step.json', tmp_path / 'step.png'
  arguments = [
    *('--shapes', '8x12', '--dtypes', 'float32', '--ranks', '2', '30'),
    *('--gap', '4', '--turn', '2', '--minutes', '1000'),
    *('--methods', 'floor', 'adamw', '--output', str(output)),
  ]
  monkeypatch.setattr('sys.argv', ['step', *arguments, '--plot', str(picture)])
  step.main()
  written = json.loads(output.read_text())
  assert [len(entry['rows']) for entry in written['cases']] == [2, 0]
  why = 'the shorter side of a matrix is 8'
  assert written['cases'][1]['left_out'] == why
  assert len(step.ratios(written)) == 1
  text = capsys.readouterr().out
  assert text.startswith('8x12 float32 rank 2, T = 4\n\n| method |')
  assert text.count('\n| adamw | ') == 1
  assert text.endswith(f'8x12 float32 rank 30, T = 4\n\nleft out, {why}\n\n')
  assert picture.stat().st_size > 1000
  monkeypatch.setattr('sys.argv', ['step', '--gap', '0'])
  with pytest.raises(SystemExit):
    step.main()
  error = capsys.readouterr().err
  assert error.endswith('argument --gap: must be at least 1, got 0\n')
