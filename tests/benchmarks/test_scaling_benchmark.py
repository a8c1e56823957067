"""How the cost grows: known power laws, counted bytes, and tiny runs."""

import json
import math
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks.common import harness, methods, record
from benchmarks.scaling import measure as scaling
from benchmarks.scaling import scaling_report
from gnlorp_jax.models import llama
from gnlorp_jax.models.families import llama as families_llama

V, D, F, L, R = 96, 32, 48, 2, 8
TINY = llama.LlamaConfig(
  vocab_size=V,
  hidden_size=D,
  intermediate_size=F,
  num_layers=L,
  num_heads=2,
  max_seq_len=128,
)
KERNELS = L * (4 * D * D + 3 * D * F)
PARAMETERS = KERNELS + 2 * V * D + (2 * L + 1) * D


@pytest.fixture
def tiny(monkeypatch):
  """Two presets, the second with twice the layers, and a smaller batch."""
  deep = llama.LlamaConfig(**{**vars(TINY), 'num_layers': 2 * L})
  presets = {'tiny': TINY, 'deep': deep}
  for module in (llama, families_llama):  # The face has a name of its own.
    monkeypatch.setattr(module, 'PRESETS', presets)
  for name, value in {
    'SIZES': tuple(presets),
    'RANKED': ('tiny', (4, 16)),
    'TIMED': tuple(presets),
    'TIMED_RANKED': ('tiny', (4, 16)),
    'TRAINED': ('tiny',),
    'TOKENS': (1, 8),
    'ROUNDS': (2, 2),
    'TURN': 1,
    'SMALL': TINY,
    'DEVICES': (1, 4),
  }.items():
    monkeypatch.setattr(scaling, name, value)


def run(part):
  """A part's rows and table."""
  saved = []
  scaling.measure(part, harness.Clock(10), saved.append)
  found = {'parts': {part: saved[-1]}}
  return saved[-1]['rows'], scaling_report.tables(found, part), found


def test_a_power_law_is_found():
  sizes = [8.0, 1.0, 2.0]
  found = scaling_report.fit(sizes, [3 * size**1.5 for size in sizes])
  assert found.exponent == pytest.approx(1.5)
  assert found.last == pytest.approx(1.5)
  assert found.deviation == pytest.approx(0, abs=1e-12)


def test_what_is_no_power_law_says_how_far_it_is_off():
  # Through (1, 1), (2, 2), (4, 16) the line has the slope of the ends, 2, and
  # lies a third of log 2 above, below and above: 1 -> 2^(-1/3), 2 -> 2^(5/3).
  found = scaling_report.fit([1, 2, 4], [1, 2, 16])
  assert found.exponent == pytest.approx(2)
  assert found.last == pytest.approx(3)
  assert found.deviation == pytest.approx(1 - 2 ** (1 - 5 / 3))
  assert scaling_report.fit([1], [1]) is None


@pytest.mark.usefixtures('tiny')
def test_state_bytes_against_parameters_and_rank():
  rows, table, found = run('state')
  by_name = {
    (row['size'], row['method'], row['rank']): row['bytes'] for row in rows
  }
  adamw = by_name['tiny', 'adamw', R]
  counts = 400  # At most: they and the statistics are no moments.
  assert 0 <= adamw - 8 * PARAMETERS <= counts
  low = L * R * (4 * D + 3 * F)  # Along the longer axis.
  bases = L * R * 7 * D
  expected = 8 * (PARAMETERS - KERNELS + low) + 4 * bases
  assert 0 <= by_name['tiny', 'galore', R] - expected <= counts
  assert by_name['tiny', 'galore', 16] > by_name['tiny', 'galore', R]
  assert ('tiny', 'adamw', 16) not in by_name
  assert by_name['deep', 'adamw', R] > adamw
  assert [row['parameters'] for row in rows if row['size'] == 'tiny'] == (
    [PARAMETERS] * (4 + 2 * 3)
  )
  assert '| exponent | 1.00 (to 0%); 1.00 |' in table
  assert 'Of tiny by rank, MB:' in table
  # Each row has a name of its own.
  names = scaling.sizes(found)
  assert len(names) == len(rows)
  name = f'state: size=tiny, method=adamw, rank={R}: bytes'
  assert names[name] == adamw


@pytest.mark.usefixtures('tiny')
def test_times_are_beside_adamw(monkeypatch):
  # Under every name the one that compiles in no time.
  names = dict.fromkeys(scaling.METHODS, ('adamw', {}))
  monkeypatch.setattr(scaling, 'METHODS', names)
  rows, table, found = run('time')
  assert all(row['steps'] == 2 for row in rows)
  steps = {(row['step'], row['against'], row['size']) for row in rows}
  assert steps == {
    ('optimizer', 'parameters', 'tiny'),
    ('optimizer', 'parameters', 'deep'),
    ('optimizer', 'rank', 'tiny'),
    ('training', 'parameters', 'tiny'),
  }
  for row in rows:
    low, high = row['quartiles_s']
    assert 0 < low <= row['median_s'] <= high
    assert row['parameters'] >= PARAMETERS
    if row['method'] == 'adamw':
      assert row['of_adamw'] == [1, 1, 1]
  assert table.count('| exponent |') == 2
  assert 'The optimizer step, tiny by rank, ms; of AdamW:' in table
  assert len(scaling_report.plot(found).axes) == 3


def racer(method, turns):
  return types.SimpleNamespace(
    key={'method': method}, turns=turns, first_s=1.0, compile_s=2.0
  )


def test_medians_and_ratios_of_known_times():
  ours = racer('galore', [[3.0, 3.0, 9.0], [4.0, 4.0, 4.0], [2.0, 2.0, 2.0]])
  adamw = racer('adamw', [[1.0] * 3, [2.0] * 3, [1.0] * 3])
  first, second = scaling_report.timed_rows([ours, adamw], 7)
  assert first['median_s'] == 3.0 and first['quartiles_s'] == [2.5, 3.5]
  assert first['of_adamw'] == [2.0, 2.0, 2.5]  # Of 3, 2, 2.
  assert (first['steps'], first['parameters']) == (9, 7)
  assert second['median_s'] == 1.0
  assert scaling_report.timed_rows([ours], 7)[0]['of_adamw'] is None


def test_what_fails_is_a_row_and_the_rest_goes_on(monkeypatch):
  def make(key):
    if key['method'] == 'galore':
      raise RuntimeError('RESOURCE_EXHAUSTED: out of memory\nand more')
    return scaling.Racer(key, 0.0, lambda: None)

  keys = [{'method': 'galore'}, {'method': 'adamw'}]
  rows = scaling.race(keys, make, 1, harness.Clock(0))
  assert [row['method'] for row in rows] == ['adamw', 'galore']
  assert rows[1]['error'] == 'RuntimeError: RESOURCE_EXHAUSTED: out of memory'
  assert rows[0]['steps'] == scaling.ROUNDS[0] * scaling.TURN

  def absent(clock):
    raise methods.AbsentError('not installed')

  cases = [scaling.Case({'method': 'galore'}, absent)]
  monkeypatch.setitem(scaling.CASES, 'plan', lambda: iter(cases))
  rows, table, _ = run('plan')
  (row,) = rows
  assert row['absent'] == 'not installed' and row['commit'] == record.commit()
  assert '* method galore: not installed' in table


@pytest.mark.usefixtures('tiny')
def test_what_no_longer_fits_is_named():
  saved = []
  scaling.measure('state', harness.Clock(0), saved.append)
  assert not saved[-1]['rows']
  assert len(saved[-1]['left_out']) == len(list(scaling.state_cases()))
  table = scaling_report.tables({'parts': {'state': saved[-1]}}, 'state')
  assert 'size tiny, method adamw, rank 8: left out, no time' in table


@pytest.mark.usefixtures('tiny')
def test_an_interrupted_part_goes_on():
  rows, _, _ = run('state')
  marked = [{**row, 'commit': 'earlier'} for row in rows[:-1]]
  saved = []
  scaling.measure('state', harness.Clock(10), saved.append, marked)
  assert saved[-1]['rows'] == [*marked, rows[-1]]
  scaling.measure('state', harness.Clock(0), saved.append, marked)
  assert saved[-1]['rows'] == marked
  assert len(saved[-1]['left_out']) == 1


@pytest.mark.usefixtures('tiny')
def test_devices_share_the_state_and_exchange_gradients():
  def row(**changes):
    key = {'method': 'adamw', 'step': 'whole', 'rank': R, 'data': 1, 'fsdp': 1}
    (found,) = scaling.device_row({**key, **changes})
    return found

  one, copies = row(), row(data=4)
  assert one['bytes_per_step'] == 0 and one['collectives'] == []
  assert one['parameters'] == PARAMETERS
  assert one['parameter_bytes'] == 4 * PARAMETERS
  # Every micro-batch sums all gradients, and a few numbers.
  extra = copies['bytes_per_step'] - 2 * 4 * PARAMETERS
  assert 0 <= extra <= 64
  assert copies['bytes_by_kind'] == {'all-reduce': copies['bytes_per_step']}
  assert copies['device_bytes'] < one['device_bytes']
  with pytest.raises(methods.AbsentError, match='4 devices, not 64'):
    row(data=64)
  found = {'parts': {'devices': {'rows': [one, copies], 'left_out': []}}}
  table = scaling_report.tables(found, 'devices')
  assert table.count('| adamw | whole |') == 2 and '| 2.00 |' in table
  assert len(scaling_report.plot(found).axes[2].lines) == 1
  assert len(scaling.sizes(found)) == 4


def test_every_case_has_a_name_of_its_own():
  for part, cases in scaling.CASES.items():
    keys = [json.dumps(case.key, sort_keys=True) for case in cases()]
    assert len(keys) == len(set(keys)) > 3, part


def test_without_the_compiler_for_gpus_the_row_says_so(monkeypatch):
  monkeypatch.setattr(
    scaling.accelerators, 'compiler_is_installed', lambda: False
  )
  case = next(scaling.plan_cases())
  with pytest.raises(methods.AbsentError, match='of the extra cuda'):
    case.measure(harness.Clock(1))


def test_main_writes_file_plot_and_table(tiny, tmp_path, monkeypatch, capsys):
  output, plot = tmp_path / 'out.json', tmp_path / 'docs' / 'out.png'
  output.write_text(json.dumps({'parts': {'time': {'rows': [], 'other': 1}}}))
  arguments = ['state', '--output', str(output), '--plot', str(plot)]
  monkeypatch.setattr(sys, 'argv', ['scaling', *arguments])
  platforms = jax.config.jax_platforms
  try:
    scaling.main()
  finally:
    jax.config.update('jax_platforms', platforms)
  found = json.loads(output.read_text())
  assert found['parts']['time'] == {'rows': [], 'other': 1}
  assert found['parts']['state']['environment']['cores'] == harness.cores()
  assert plot.stat().st_size > 1000
  assert capsys.readouterr().out.startswith('Optimizer state, MB:')


def test_an_unknown_part_names_the_known_ones(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['scaling', 'tme'])
  with pytest.raises(SystemExit) as stop:
    scaling.main()
  assert stop.value.code == 2
  text = "no part 'tme'; there are state, time, devices, plan."
  assert text in ' '.join(capsys.readouterr().err.split())


def test_the_ranks_are_a_quarter_of_the_width():
  assert scaling.quarter('60m') == 128
  for size in scaling.SIZES:
    assert scaling.quarter(size) == llama.PRESETS[size].hidden_size / 4


def test_parameters_of_a_tree():
  tree = {'a': np.zeros((2, 3)), 'b': np.zeros(())}
  assert scaling.count_parameters(tree) == 7
  assert math.isclose(scaling.count_parameters([]), 0)
