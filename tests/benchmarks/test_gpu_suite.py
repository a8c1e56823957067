"""The GPU suite's arguments, time and report, with made-up scripts."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

SUITE = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'gpu_suite.sh'

# Stands for the interpreter: notes its words, and does as the script's file in
# the folder `acts` says with $output set.
STUB = """#!/usr/bin/env bash
case $1 in
  --version) echo 'Python 3'; exit ;;
  -) cat > /dev/null; echo 'jax: not installed'; exit ;;
esac
echo "$*" >> {folder}/calls
while [[ $1 != --output ]]; do module=${module:-$2}; shift; done
output=$2
source {folder}/acts/$module
"""


@pytest.fixture
def suite(tmp_path):
  """Runs a copy of the suite on scripts that do as told."""
  benchmarks = tmp_path / 'tree' / 'benchmarks'
  benchmarks.mkdir(parents=True)
  shutil.copy(SUITE, benchmarks)
  acts = tmp_path / 'acts'
  acts.mkdir()
  python = tmp_path / 'python'
  python.write_text(STUB.replace('{folder}', str(tmp_path)))
  python.chmod(0o755)

  def run(scripts=None, *arguments, **environment):
    for name, act in (scripts or {}).items():
      file = benchmarks / f'{name.replace(".", "/")}.py'
      file.parent.mkdir(exist_ok=True)
      file.write_text("PLOT = 'docs/x.png'\n")
      (acts / f'benchmarks.{name}').write_text(act)
    found = subprocess.run(
      [benchmarks / 'gpu_suite.sh', *arguments],
      env={**os.environ, 'PYTHON': str(python), **environment},
      capture_output=True,
      text=True,
      check=False,
    )
    calls = tmp_path / 'calls'
    lines = calls.read_text().splitlines() if calls.exists() else []
    return found, lines

  return run


def option(call, name):
  """The word after an option."""
  words = call.split()
  return words[words.index(name) + 1]


def test_each_script_runs_and_the_report_says_what_came_of_it(suite, tmp_path):
  found, calls = suite(
    {
      'train.measure': 'echo {} > $output',
      'train.gpu_layerwise': 'echo {} > $output; exit 124',
      'step.measure': 'echo some; echo "RuntimeError: no kernel" >&2; exit 1',
    },
    RESULTS=str(tmp_path / 'results'),
  )
  assert found.returncode == 0
  assert found.stdout.startswith('Python 3\njax: not installed\n')
  report = found.stdout.rpartition('== ')[2].splitlines()[1:]
  report[1] = re.sub(r'\d+ s', 'N s', report[1])
  assert report == [
    'train: gpu_train.json',
    'layerwise: gpu_layerwise.json, not done after N s; what was done is in it',
    'step: nothing written, failed with status 1: RuntimeError: no kernel',
    'refresh: skipped, there is no benchmarks/refresh/measure.py',
  ]
  assert [call.split()[1] for call in calls] == [
    *('benchmarks.train.measure', 'benchmarks.train.gpu_layerwise'),
    'benchmarks.step.measure',
  ]
  results = tmp_path / 'results'
  for call, name in zip(calls, ('train', 'layerwise', 'step'), strict=True):
    assert option(call, '--output') == str(results / f'gpu_{name}.json')
    # A GPU's plot leaves those of the documents alone.
    assert option(call, '--plot') == str(results / f'gpu_{name}.png')
  assert option(calls[0], '--device') == 'gpu'
  assert '--part memory_7b_24gb' in calls[1]
  assert 'no kernel' in (results / 'gpu_step.log').read_text()


def test_time_is_shared_and_what_is_left_goes_to_the_next(suite):
  acts = {f'{name}.measure': '' for name in ('train', 'step', 'refresh')}
  _, calls = suite(acts, SUITE_MINUTES='10')
  minutes = [float(option(call, '--minutes')) for call in calls]
  # 80 % of the shares: 44, and, as nothing before took long, 23 of 34, all.
  expected = [0.8 * 10 * share for share in (0.44, 23 / 34, 1)]
  assert minutes == pytest.approx(expected, rel=0.02)


def test_tiny_runs_have_files_of_their_own(suite):
  acts = {'train.measure': 'echo {} > $output'}
  found, (call,) = suite(acts, DEVICE='cpu', TINY='1')
  assert '--sizes 9m' in call and '--device cpu' in call
  assert 'train: cpu_tiny_train.json' in found.stdout


@pytest.mark.parametrize(
  ('arguments', 'environment', 'text'),
  [
    ((), {'DEVICE': 'tpu'}, "DEVICE is 'tpu'; use gpu, or cpu with TINY=1."),
    ((), {'DEVICE': 'cpu'}, 'add TINY=1'),
    ((), {'SUITE_MINUTES': '0'}, "SUITE_MINUTES is '0'; use a whole number"),
    ((), {'SUITE_MINUTES': '1.5'}, "SUITE_MINUTES is '1.5'"),
    (('train',), {}, "No argument is known, got 'train'"),
  ],
)
def test_mistakes_are_named(suite, arguments, environment, text):
  found, calls = suite(None, *arguments, **environment)
  assert found.returncode == 2
  assert text in found.stderr
  assert not calls
