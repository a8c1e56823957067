"""The regression check on records that are made up."""

import json
import sys
import types

import pytest

import benchmarks
from benchmarks import check
from benchmarks.scaling import measure as scaling

HALF = {'fast': (1.9, 2.0, 2.1), 'slow': (0.4, 0.5, 0.6)}
MACHINE = {'cpu': 'C', 'cores': 2, 'versions': {'jax': '1'}}

# A benchmark that copies what its options name to where it is told to.
FAKE = """
import argparse, json, pathlib
RESULTS = pathlib.Path(__file__).with_name('recorded.json')

def ratios(record):
  return {name: tuple(value) for name, value in record['ratios'].items()}

def sizes(record):
  return record['sizes']

def main():
  parser = argparse.ArgumentParser()
  for name in ('--device', '--minutes', '--output', '--fresh'):
    parser.add_argument(name)
  args = parser.parse_args()
  fresh = pathlib.Path(args.fresh).read_text()
  if fresh == 'fail':
    raise SystemExit(3)
  pathlib.Path(args.output).write_text(fresh)
"""


@pytest.mark.parametrize(
  ('now', 'verdict'),
  [
    ((1.90, 2.00, 2.10), 'same'),
    ((1.60, 1.70, 1.89), 'WORSE'),
    ((1.60, 1.70, 1.90), 'same'),  # The spreads touch.
    ((1.88, 1.89, 1.895), 'WORSE'),
    ((1.60, 1.89, 1.91), 'same'),
    ((2.12, 2.20, 2.30), 'better'),
    ((2.11, 2.11, 2.12), 'better'),
    ((2.10, 2.20, 2.30), 'same'),
  ],
)
def test_a_ratio_is_worse_beyond_both_spreads_and_five_percent(now, verdict):
  assert check.judge_ratio((1.9, 2.0, 2.1), now) == verdict


def test_a_small_drop_is_none_however_narrow_the_spreads():
  assert check.judge_ratio((2.0, 2.0, 2.0), (1.91, 1.91, 1.91)) == 'same'
  assert check.judge_ratio((2.0, 2.0, 2.0), (1.89, 1.89, 1.89)) == 'WORSE'


def test_one_byte_more_is_worse():
  assert check.judge_bytes(10, 11) == 'WORSE'
  assert check.judge_bytes(10, 10) == 'same'
  assert check.judge_bytes(10, 9) == 'better'


def test_what_only_one_record_has_is_named():
  module = types.SimpleNamespace(ratios=lambda found: found['ratios'])
  fresh = {'ratios': {'fast': HALF['fast'], 'other': (1, 1, 1)}}
  found = check.compare(module, {'ratios': HALF}, fresh)
  assert [line.name for line in found.lines] == ['fast']
  assert (found.missing, found.new) == (['slow'], ['other'])
  text = check.report('step', found)
  assert '| fast | 2.000 [1.900, 2.100] | 2.000 [1.900, 2.100] | same |' in text
  assert 'Recorded, not in this run: slow.' in text
  assert 'In this run, not recorded: other.' in text


def test_of_many_missing_names_the_first_are_given():
  found = check.Outcome(missing=[f'n{i}' for i in range(10)])
  text = check.report('step', found)
  assert 'not in this run: n0; n1; n2; n3; n4; n5; n6; n7; and 2 more.' in text


def test_another_machine_or_package_is_stated():
  parts = {'parts': {'a': {'environment': MACHINE}}}
  assert check.differences(parts, MACHINE) == []
  other = {**MACHINE, 'cores': 4, 'versions': {'jax': '2'}}
  assert check.differences(parts, {'environment': other}) == [
    'cores: recorded 2, now 4',
    'jax: recorded 1, now 2',
  ]


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """Runs the check with a made-up benchmark; returns its exit status."""
  package = tmp_path / 'benchmarks' / 'fake_benchmark'
  package.mkdir(parents=True)
  (package.parent / '__init__.py').touch()
  (package / 'measure.py').write_text(FAKE)
  run_main = 'from benchmarks.fake_benchmark.measure import main\nmain()'
  (package / '__main__.py').write_text(run_main)
  recorded = {'ratios': HALF, 'sizes': {'state': 10}, 'environment': MACHINE}
  (package / 'recorded.json').write_text(json.dumps(recorded))
  # A process of its own finds this package where it starts.
  monkeypatch.chdir(tmp_path)
  places = [*benchmarks.__path__, str(package.parent)]
  monkeypatch.setattr(benchmarks, '__path__', places)
  fresh = tmp_path / 'fresh.json'
  options = {'fake_benchmark': ('--fresh', str(fresh))}
  monkeypatch.setattr(check, 'CHECKS', options)
  monkeypatch.setattr(sys, 'argv', ['check', '--minutes', '0.1'])

  def run(changes):
    fresh.write_text(
      changes
      if isinstance(changes, str)
      else json.dumps({**recorded, **changes})
    )
    with pytest.raises(SystemExit) as stop:
      check.main()
    return stop.value.code

  yield run
  for name in ('fake_benchmark', 'fake_benchmark.measure'):
    sys.modules.pop(f'benchmarks.{name}', None)


def test_nothing_changed(fake, capsys):
  assert fake({}) == 0
  text = capsys.readouterr().out
  assert '0 of 3 got worse.' in text and 'WORSE' not in text


def test_a_slower_step_fails(fake, capsys):
  assert fake({'ratios': {**HALF, 'fast': (1.0, 1.1, 1.2)}}) == 1
  text = capsys.readouterr().out
  # What is worse comes first.
  first = [line for line in text.splitlines() if line.startswith('| ')][2]
  assert first == (
    '| fast | 2.000 [1.900, 2.100] | 1.100 [1.000, 1.200] | WORSE |'
  )
  assert '1 of 3 got worse.' in text


def test_a_larger_state_fails(fake, capsys):
  assert fake({'sizes': {'state': 11}}) == 1
  assert '| state | 10 | 11 | WORSE |' in capsys.readouterr().out


def test_a_faster_step_does_not(fake):
  assert fake({'ratios': {**HALF, 'fast': (3.0, 3.1, 3.2)}}) == 0


def test_nothing_to_compare(fake, capsys):
  assert fake({'ratios': {}, 'sizes': {}}) == 2
  assert 'Recorded, not in this run: fast; slow' in capsys.readouterr().out


def test_a_benchmark_that_fails_is_no_success(fake, capsys):
  assert fake('fail') == 2
  assert 'Not compared: ended with code 3.' in capsys.readouterr().out


def test_what_is_not_there_is_said(monkeypatch, tmp_path):
  found = check.check('no_such_benchmark', (), 'cpu', 1)
  assert 'No module named' in found.failure
  monkeypatch.setattr(scaling, 'RESULTS', tmp_path / 'none.json')
  found = check.check('scaling', (), 'gpu', 1)
  path = tmp_path / 'gpu_none.json'
  assert found.failure == f'nothing is recorded: there is no {path}'


def test_an_unknown_check_names_the_known_ones(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['check', 'stepp'])
  with pytest.raises(SystemExit) as stop:
    check.main()
  assert stop.value.code == 2
  text = f"no check 'stepp'; there are {', '.join(check.CHECKS)}."
  assert text in ' '.join(capsys.readouterr().err.split())
