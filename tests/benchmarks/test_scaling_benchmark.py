"""How the cost grows: known power laws, counted bytes, and tiny runs."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.common import cases, harness, methods, programs, record, turns
from benchmarks.scaling import measure as scaling
from benchmarks.scaling import picture, plan_7b, state_bytes, tables
from gnlorp_jax.models import llama
from gnlorp_jax.models.families import llama as families_llama

V, D, F, L, R = 32, 16, 24, 1, 4
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
FOREVER = harness.Clock(math.inf)


@pytest.fixture
def tiny(monkeypatch):
  """Two presets, the second with twice the layers, and a smaller batch."""
  deep = llama.LlamaConfig(**{**vars(TINY), 'num_layers': 2 * L})
  presets = {'tiny': TINY, 'deep': deep}
  for module in (llama, families_llama):  # The face has a name of its own.
    monkeypatch.setattr(module, 'PRESETS', presets)
  for name, value in {
    'SIZES': tuple(presets),
    'RANKED': ('tiny', (4, 8)),
    'TIMED': tuple(presets),
    'TIMED_RANKED': ('tiny', (4, 8)),
    'TRAINED': ('tiny',),
    'TOKENS': (1, 8),
    'ROUNDS': (2, 2),
    'TURN': 1,
    'SMALL': TINY,
    'DEVICES': (1, 4),
  }.items():
    monkeypatch.setattr(scaling, name, value)


# Tables.


def test_a_power_law_is_found():
  sizes = [8.0, 1.0, 2.0]
  found = tables.fit(sizes, [3 * size**1.5 for size in sizes])
  assert found.exponent == pytest.approx(1.5)
  assert found.last == pytest.approx(1.5)
  assert found.deviation == pytest.approx(0, abs=1e-12)


def test_what_is_no_power_law_says_how_far_it_is_off():
  # Through (1, 1), (2, 2), (4, 16) the line has the slope of the ends, 2, and
  # lies a third of log 2 above, below and above: 1 -> 2^(-1/3), 2 -> 2^(5/3).
  found = tables.fit([1, 2, 4], [1, 2, 16])
  assert found.exponent == pytest.approx(2)
  assert found.last == pytest.approx(3)
  assert found.deviation == pytest.approx(1 - 2 ** (1 - 5 / 3))
  assert tables.fit([1], [1]) is None


class Racer:
  """Turns that are made up."""

  def __init__(self, name, seconds):
    self.name, self.method, self.first_s = name, self, 1.0
    self.compile_s, self.count = 2.0, turns.APART + sum(map(len, seconds))
    self.turns = [turns.Turn(np.array(part), None) for part in seconds]


def test_medians_and_ratios_of_known_times():
  ours = Racer('galore', [[3.0, 3.0, 9.0], [4.0, 4.0, 4.0], [2.0, 2.0, 2.0]])
  adamw = Racer('adamw', [[1.0] * 3, [2.0] * 3, [1.0] * 3])
  first, second = (
    {'method': racer.name, **scaling.timed(racer, adamw)}
    for racer in (ours, adamw)
  )
  assert first['median_s'] == 3.0 and first['quartiles_s'] == [2.5, 3.5]
  assert first['of_adamw'] == [2.0, 2.0, 2.5]  # Of 3, 2, 2.
  assert first['steps'] == 9 and second['median_s'] == 1.0
  assert scaling.timed(ours, None)['of_adamw'] is None
  # In a table, beside a size four times as large that takes as much longer.
  known = [
    {**row, 'step': 'optimizer', 'size': 'small', 'parameters': 1e6, 'rank': 8}
    for row in (first, second)
  ]
  rows = [{**row, 'against': 'parameters'} for row in known]
  rows += [
    {**row, 'size': 'large', 'parameters': 4e6, 'median_s': 4 * row['median_s']}
    for row in rows
  ]
  rows += [{**row, 'against': 'rank'} for row in known]
  rows.append({'step': 'optimizer', 'size': 'huge', 'absent': 'no memory'})
  found = {'time': {'rows': rows}}
  assert tables.tables('time', found) == {
    'optimizer step, ms; of AdamW': (
      '| model, 10^6 parameters | galore | adamw |\n'
      '| --- | --- | --- |\n'
      '| small, 1.0 | 3000.0; 2.00 [2.00, 2.50] | 1000.0 |\n'
      '| large, 4.0 | 12000.0; 2.00 [2.00, 2.50] | 4000.0 |\n'
      '| exponent | 1.00 (to 0%); 1.00 | 1.00 (to 0%); 1.00 |\n'
    ),
    'optimizer step of small by rank, ms; of AdamW': (
      '| rank | galore | adamw |\n'
      '| --- | --- | --- |\n'
      '| 8 | 3000.0; 2.00 [2.00, 2.50] | 1000.0 |\n'
    ),
  }
  assert len(picture.draw(found).axes[1].lines) == 2


# State.


@pytest.mark.usefixtures('tiny')
def test_state_bytes_against_parameters_and_rank(tmp_path):
  path = tmp_path / 'out.json'
  found = cases.measure('state', scaling.state_cases(), path, FOREVER)
  rows = found['state']['rows']
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
  assert by_name['tiny', 'galore', 8] > by_name['tiny', 'galore', R]
  assert ('tiny', 'adamw', 8) not in by_name
  assert by_name['deep', 'adamw', R] > adamw
  assert [row['parameters'] for row in rows if row['size'] == 'tiny'] == (
    [PARAMETERS] * (4 + 2 * 3)
  )
  by_size, by_rank = tables.tables('state', found).values()
  assert '| exponent | 1.00 (to 0%); 1.00 |' in by_size
  assert by_rank.startswith('| rank | galore | gradnormlorp | gradnormlorp, 8')
  # Each setting has a name of its own; rank 4 is there twice.
  names = scaling.sizes(found)
  assert len(names) == len(rows) - 3
  assert names[f'state: size=tiny, method=adamw, rank={R}: bytes'] == adamw


def test_a_part_replaces_its_own_rows_alone(tmp_path):
  path = tmp_path / 'out.json'
  record.write(path, {'x': {'rows': [{'a': 0}]}, 'y': {'rows': []}})
  chosen = [cases.Case({'a': a}, lambda: {'bytes': 1 / 3}) for a in (1, 2)]
  found = cases.measure('x', chosen, path, FOREVER, model='m')
  assert found['y'] == {'rows': []} and found['x']['model'] == 'm'
  assert found['x']['cores'] == harness.cores()
  assert found['x']['rows'] == [
    {'a': 1, 'bytes': 0.333333},
    {'a': 2, 'bytes': 0.333333},
  ]
  assert record.read(path) == found


def test_resumed_part_keeps_its_rows_and_their_commit(tmp_path):
  path = tmp_path / 'out.json'
  rows = [{'a': 1, 'bytes': 7}, {'a': 2, 'absent': 'left out'}]
  record.write(path, {'x': {'commit': 'before', 'rows': rows}})
  chosen = [cases.Case({'a': a}, lambda: {'bytes': 9}) for a in (1, 2)]
  found = cases.measure('x', chosen, path, FOREVER, resume=True)
  assert found['x']['rows'] == [
    {'a': 1, 'bytes': 7, 'commit': 'before'},
    {'a': 2, 'bytes': 9},
  ]
  assert found['x']['commit'] == record.commit()


SHAPES = jax.eval_shape(
  lambda: {
    'embed': {'embedding': jnp.zeros((40, 16), jnp.bfloat16)},
    'dense': {'kernel': jnp.zeros((2, 16, 24), jnp.bfloat16)},
    'norm': {'scale': jnp.zeros(16, jnp.bfloat16)},
  }
)
KEYS = ('embeddings', 'side', 'moment_bits', 'basis_bits')


def count(alias, rank, **changes):
  """The only rank's bytes of a setting."""
  setting = dict(zip(KEYS, ('full', 'short', None, None), strict=True))
  setting |= changes
  return state_bytes.row(alias, setting, SHAPES)['bytes'][rank]


def test_state_bytes_of_a_tiny_model(monkeypatch):
  monkeypatch.setattr(state_bytes, 'RANKS', (4,))
  counts = range(200)  # They and the statistics are no moments.
  full = 2 * 4 * (40 * 16 + 16)
  low, bases = 2 * 4 * (2 * 24 * 4), 4 * (2 * 16 * 4)
  assert count('galore', '4') - full - low - bases in counts
  lengths = 2 * 4 * (2 * 24)
  found = count('gradnormlorp', '4')
  assert found - full - low - lengths - bases in counts
  low, bases = 2 * 4 * (2 * 4 * 4), 4 * (2 * 16 * 4 + 2 * 24 * 4)
  assert count('galore', '4', side='both') - full - low - bases in counts
  low = 2 * 4 * (2 * 24 * 4 + 40 * 4 + 16)
  bases = 4 * (2 * 16 * 4 + 16 * 4)
  found = count('galore', '4', embeddings='projected')
  assert found - low - bases in counts
  assert (
    count('adamw', 'of its own') - 2 * 4 * (40 * 16 + 2 * 16 * 24 + 16)
    in counts
  )
  adam = 2 * 2 * (40 * 16 + 2 * 16 * 24 + 16)
  assert state_bytes.baseline(SHAPES) == adam


def test_every_setting_is_a_row(tmp_path, monkeypatch):
  monkeypatch.setattr(state_bytes, 'RANKS', (4,))
  chosen = list(state_bytes.all_cases(['apollo', 'adamw'], SHAPES))
  found = cases.measure('x', chosen, tmp_path / 'out.json', FOREVER)
  rows = found['x']['rows']
  # Two labels and sides, three numbers of bits; of adamw, the bits alone.
  assert [row['method'] for row in rows] == ['apollo'] * 12 + ['adamw'] * 3
  refused = [row for row in rows if 'absent' in row]
  assert {row['side'] for row in refused} == {'both'} and len(refused) == 6
  assert {row['absent'] for row in refused} == {
    "side='both' leaves no whole axis, along which this ..."
  }
  text = state_bytes.table(rows, state_bytes.baseline(SHAPES))
  assert text.count('| apollo | ') == 6 and '| adamw | full | - | 32 |' in text


def test_the_paper_is_reached_in_bold():
  known = {'method': 'gradnormlorp', 'embeddings': 'full', 'side': 'short'}
  known |= {'moment_bits': 8, 'basis_bits': 32}
  sizes = {'256': 2_700_000_000, '512': 2_900_000_000}
  rows = [
    {**known, 'bytes': sizes},
    {**known, 'method': 'galore', 'bytes': sizes},
    {**known, 'method': 'vlorp', 'bytes': {'of its own': 27_000_000_000}},
  ]
  lines = state_bytes.table(rows, 27_000_000_000).splitlines()
  assert lines[0].endswith(
    '| rank 256 | rank 512 | rank 1024 | rank of its own |'
  )
  assert lines[2:] == [
    '| gradnormlorp | full | short | 8 | 32 | **2.70 GB, 90.0%** '
    '| 2.90 GB, 89.3% |  |  |',
    '| galore | full | short | 8 | 32 | 2.70 GB, 90.0% '
    '| 2.90 GB, 89.3% |  |  |',
    '| vlorp | full | short | 8 | 32 |  |  |  | 27.00 GB, 0.0% |',
  ]


def test_the_yardstick_is_the_published_one():
  assert state_bytes.baseline(state_bytes.shapes_of('7b')) == 4 * 6_738_415_616


# Time.


def test_whole_races_on_tiny_weights(tiny):
  """Each kind of step really runs."""
  keys = [{'method': 'adamw', 'rank': R}]
  for what in scaling.STEP_MAKERS:
    (row,) = scaling.race(what, 'tiny', keys, FOREVER)
    low, high = row['quartiles_s']
    assert 0 < low <= row['median_s'] <= high
    assert row['steps'] == 2 and row['of_adamw'] == [1, 1, 1]
    assert row['parameters'] == PARAMETERS and row['rank'] == R


def test_times_are_beside_adamw(tiny, tmp_path, monkeypatch):
  program = jax.jit(lambda x: x + 1).lower(1.0)

  def maker(size):
    def make(key):
      if key['method'] == 'galore':
        raise RuntimeError('RESOURCE_EXHAUSTED: out of memory\nand more')
      return programs.Repeated(program, lambda compiled: compiled(1.0))

    return make

  monkeypatch.setattr(
    scaling, 'STEP_MAKERS', {'optimizer': maker, 'training': maker}
  )
  path = tmp_path / 'out.json'
  found = cases.measure('time', scaling.time_cases(), path, FOREVER)
  rows = found['time']['rows']
  assert {
    (row['step'], row['against'], row['size'], row['method'])
    for row in rows
    if 'absent' in row
  } == {
    ('optimizer', 'parameters', 'tiny', 'galore'),
    ('optimizer', 'parameters', 'deep', 'galore'),
    ('optimizer', 'rank', 'tiny', 'galore'),
  }
  known = [row for row in rows if 'absent' not in row]
  assert all(row['of_adamw'] and row['steps'] == 2 for row in known)
  assert list(tables.tables('time', found)) == [
    'optimizer step, ms; of AdamW',
    'optimizer step of tiny by rank, ms; of AdamW',
    'training step, ms; of AdamW',
  ]
  assert (
    '* step optimizer, against rank, size tiny, method galore, rank 8: '
    'RuntimeError: RESOURCE_EXHAUSTED: out of memory\n' in cases.absent(rows)
  )


# Devices.


@pytest.mark.usefixtures('tiny')
def test_devices_exchange_gradients():
  key = {'method': 'adamw', 'step': 'whole', 'rank': R, 'data': 4, 'fsdp': 1}
  copies = {**key, **scaling.device_row(key)}
  assert copies['parameter_bytes'] == 4 * PARAMETERS
  # Weights and both moments, whatever comes on top.
  assert copies['device_bytes'] > 3 * 4 * PARAMETERS
  assert copies['device_bytes'] > copies['temporary_bytes']
  # Every micro-batch sums all gradients, and a few numbers.
  extra = copies['bytes_per_step'] - 2 * 4 * PARAMETERS
  assert 0 <= extra <= 64
  assert copies['bytes_by_kind'] == {'all-reduce': copies['bytes_per_step']}
  with pytest.raises(methods.AbsentError, match='4 devices, not 64'):
    scaling.device_row({**key, 'data': 64})
  one = {**copies, 'data': 1, 'bytes_per_step': 0}
  found = {'devices': {'rows': [one, copies]}}
  table = tables.tables('devices', found)['devices']
  assert table.count('| adamw | whole |') == 2 and '| 2.00 |' in table
  assert len(scaling.sizes(found)) == 4
  planned = {**copies, 'size': 'tiny'}
  found['plan'] = {'rows': [planned, {**planned, 'bytes_per_step': 0}]}
  assert len(picture.draw(found).axes[2].lines) == 2


def test_every_case_has_a_name_of_its_own():
  for part, make in scaling.CASES.items():
    keys = [json.dumps(case.key, sort_keys=True) for case in make()]
    assert len(keys) == len(set(keys)) > 3, part


def test_without_the_compiler_for_gpus_the_row_says_so(monkeypatch):
  installed = scaling.accelerators, 'compiler_is_installed', lambda: False
  monkeypatch.setattr(*installed)
  with pytest.raises(methods.AbsentError, match='of the extra cuda'):
    next(scaling.plan_cases()).measure()
  monkeypatch.setattr(sys, 'argv', ['plan_7b'])
  with pytest.raises(SystemExit, match=r"pip install 'gnlorp_jax\[cuda\]'"):
    plan_7b.main()


def test_a_plan_adds_up_in_its_table():
  parts = {'weights': 2 * 2**30, 'moments': 2**29, 'bases': 0}
  row = {'run': 'a', 'components': parts, 'peak': 3 * 2**30}
  assert plan_7b.table([row, {'run': 'b', 'absent': 'no memory'}]) == (
    '| run | weights | moments | bases | block inputs | temporaries | peak |\n'
    '| --- | --- | --- | --- | --- | --- | --- |\n'
    '| a | 2.00 | 0.50 | 0.00 | 0.00 | 0.50 | 3.00 |\n'
  )
  row['components'] = {**parts, 'frozen_weights': 2**28}
  assert plan_7b.table([row]).endswith(
    '| a | 0.25 | 2.00 | 0.50 | 0.00 | 0.00 | 0.25 | 3.00 |\n'
  )


# The command.


def test_main_writes_file_plot_and_table(tiny, tmp_path, monkeypatch, capsys):
  output, plot = tmp_path / 'out.json', tmp_path / 'docs' / 'out.png'
  output.write_text(json.dumps({'time': {'rows': [], 'other': 1}}))
  arguments = ['state', '--output', str(output), '--plot', str(plot)]
  monkeypatch.setattr(sys, 'argv', ['scaling', '--minutes', '0', *arguments])
  platforms = jax.config.jax_platforms
  try:
    scaling.main()
  finally:
    jax.config.update('jax_platforms', platforms)
  found = json.loads(output.read_text())
  assert found['time'] == {'rows': [], 'other': 1}
  assert plot.stat().st_size > 1000
  assert capsys.readouterr().out.startswith(
    '* against parameters, size tiny, rank 4, method adamw: left out: out of'
  )


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
