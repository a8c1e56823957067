"""Several processes train what one process trains, and end as one.

Two processes with two forced devices each, joined by JAX, against this one with
four. A pair of processes is started once and given one scene after the other.
"""

import contextlib
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest

import train_glue
import train_lm
import train_sft
from gnlorp_jax.training import metrics

pytestmark = pytest.mark.usefixtures('compiled_once', 'logging_as_before')

ROOT = pathlib.Path(__file__).parents[1]
MAINS = {
  'train_lm': train_lm.main,
  'train_sft': train_sft.main,
  'train_glue': train_glue.main,
}
STEPS = 4
HEARTBEAT = 10
# Of all kernels two are projected: more of them take longer to compile.
USUAL = """
  --batch-size 8 --log-every 1 --checkpoint-every 2 --optim.rank 2
  --optim.update-proj-gap 3 --model.hidden-size 16
  --model.intermediate-size 32 --model.num-heads 2 --model.num-layers 2
  --optim.param-labels (q|down)_proj/kernel low_rank .* full
"""
LM = f"""
  {USUAL} --steps {STEPS} --eval-every 2 --eval-batches 2
  --sample.num-tokens 4 --model.vocab-size 300 --model.max-seq-len 16
  --data.seq-len 16
"""
SFT = f"""
  --steps {STEPS} --batch-size 8 --log-every 1 --checkpoint-every 2
  --eval-every 2 --eval.generate 2 --eval.max-tokens 4 --eval.temperature 1
  --data demo --data.template none --data.limit 300 --data.packing
  --method lora
  --adapter.rank 2 --adapter.dropout 0.1 --adapter.rules (q|down)_proj/kernel
  --step.weight-bits 8
"""
GLUE = f"""
  {USUAL} --eval-batch-size 8 --epochs 2 --seeds 0,1 --export True
  --data.max-train-examples 21 --data.max-dev-examples 19 --dropout 0.1
  --method gradnormlorp --optim.learning-rate 0.001
"""

# Runs scenes that come in, line by line; says how each ended. A signal is sent
# when a process asks for the so-manieth time whether another got one.
DRIVER = """
import importlib, json, os, sys
from gnlorp_jax.training import distributed

index = int(sys.argv[1])
agree = distributed.Stop.agree
for line in sys.stdin:
  scene, calls = json.loads(line), []

  def counted(self, received):
    calls.append(received)
    if scene['signal'] and scene['signal'][:2] == [index, len(calls)]:
      os.kill(os.getpid(), scene['signal'][2])
    return agree(self, received)

  distributed.Stop.agree = counted
  status = 0
  try:
    importlib.import_module(scene['script']).main(scene['words'])
  except SystemExit as end:
    status = end.code
  print('@@', status, flush=True)
"""


class End(NamedTuple):
  """How a process ended a scene: its status, and what it wrote."""

  status: int
  text: str


class Pair:
  """Two processes with two devices each, one of the two given first."""

  def __init__(self, environment, seconds=300):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    self._words = [
      *('--processes.coordinator-address', f'localhost:{port}'),
      *('--processes.num-processes', '2'),
      *('--processes.heartbeat-seconds', str(HEARTBEAT)),
    ]
    flags = os.environ['XLA_FLAGS'].replace('count=4', 'count=2')
    self.processes = [
      subprocess.Popen(
        [sys.executable, '-c', DRIVER, str(index)],
        cwd=ROOT,
        env=os.environ | environment | {'XLA_FLAGS': flags},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for index in range(2)
    ]
    self._timer = threading.Timer(seconds, self._kill)
    self._timer.start()

  def run(self, script, words, own=((), ()), sent=None):
    """Runs a scene in both; how each ended it."""
    for index, process in enumerate(self.processes):
      all_words = [*words, *own[index], *self._words]
      all_words += ['--processes.process-id', str(index)]
      scene = {'script': script, 'words': all_words, 'signal': sent}
      process.stdin.write(json.dumps(scene) + '\n')
      process.stdin.flush()
    return [self._end(process) for process in self.processes]

  def _end(self, process):
    lines = []
    for line in process.stdout:
      if line.startswith('@@'):
        return End(int(line.split()[1]), ''.join(lines))
      lines.append(line)
    return End(process.wait(), ''.join(lines))

  def close(self):
    """Lets both end by themselves, as programs do."""
    for process in self.processes:
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    statuses = [process.wait() for process in self.processes]
    for process in self.processes:
      process.stdout.close()
    self._timer.cancel()
    return statuses

  def _kill(self):
    for process in self.processes:
      process.kill()


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """Some text, and where its tokens are kept."""
  folder = tmp_path_factory.mktemp('text')
  source = ROOT / 'gnlorp_jax' / 'training' / 'sharding.py'
  (folder / 'a.txt').write_text(source.read_text() * 6)
  return [
    *('--data.source', str(folder / 'a.txt')),
    *('--data.cache-dir', str(folder / 'cache')),
  ]


@pytest.fixture
def pair(compiled_once):
  """A pair of processes of a test's own."""
  started = Pair({})
  yield started
  started._kill()
  started.close()


def rows_of(run_dir):
  return metrics.read_metrics(run_dir / 'metrics.jsonl')


def assert_same_rows(found, wanted, tolerance=1e-6):
  """Equal losses and norms, up to the order of sums; the same counts."""
  assert [row['step'] for row in found] == [row['step'] for row in wanted]
  compared = 0
  for row, other in zip(found, wanted, strict=True):
    for name in ('train/weight_sum', 'train/tokens', 'coreset/picked/text'):
      assert row.get(name) == other.get(name), (row['step'], name)
    for name in ('train/loss', 'eval/loss', 'train/weight_norm'):
      if name in other:
        compared += 1
        assert math.isclose(row[name], other[name], rel_tol=tolerance), (
          row['step'],
          name,
        )
  assert compared


def assert_same_files(found, wanted):
  """The same files in both, one event file among them."""

  def names(folder):
    paths = (path.relative_to(folder) for path in folder.rglob('*'))
    return sorted(
      'events' if path.name.startswith('events') else str(path)
      for path in paths
      if path.parts[0] != 'checkpoints' and path.parts[0] != 'best'
    )

  assert names(found) == names(wanted)
  assert names(found).count('events') == 1


def test_two_processes_train_what_one_does(pair, text, tmp_path):
  words = [*LM.split(), *text, '--sample.num-tokens', '0']
  ends = pair.run('train_lm', [*words, '--run-dir', str(tmp_path / 'two')])
  assert [end.status for end in ends] == [0, 0], ends
  train_lm.main([*words, '--run-dir', str(tmp_path / 'one')])
  assert_same_rows(rows_of(tmp_path / 'two'), rows_of(tmp_path / 'one'))
  assert_same_files(tmp_path / 'two', tmp_path / 'one')
  # Process 0 tells of the run, the other of nothing.
  assert 'Validation loss' in ends[0].text
  assert 'loss' not in ends[1].text

  # What cannot be one run is told, by one of them, and both are alive.
  ends = pair.run(
    'train_lm',
    [*words, '--run-dir', str(tmp_path / 'other')],
    own=(['--seed', '1'], ['--seed', '2', '--optim.rank', '3']),
  )
  assert [end.status for end in ends] == [2, 2]
  assert ends[0].text.splitlines()[-1] == (
    'error: Processes of one run differ in settings: optim.rank 2 in process '
    '0, 3 in process 1; seed 1 in process 0, 2 in process 1. Start all with '
    'the same command, code and data.'
  )
  assert 'error' not in ends[1].text
  assert not (tmp_path / 'other').exists()

  # As is what one of them lacks. Here settings are the same, files are not.
  ends = pair.run(
    'train_lm',
    [*words, '--run-dir', str(tmp_path / 'other')],
    own=([], ['--data.cache-dir', '/dev/null/cache']),
  )
  assert [end.status for end in ends] == [2, 2]
  (line,) = [x for x in ends[0].text.splitlines() if x.startswith('error: ')]
  assert line.startswith('error: Process 1: ')
  assert '/dev/null' in line
  assert pair.close() == [0, 0]


SCENES = {
  'fully sharded': (
    'train_lm',
    f'{LM} --model.hidden-size 128 --mesh.data 2 --mesh.fsdp 2',
  ),
  'layer by layer, in 8 bits': (
    'train_lm',
    f"""{LM} --step.mode layerwise --step.weight-bits 8 --micro-batches 2
    --model.hidden-size 64 --mesh.data 2 --mesh.fsdp 2""",
  ),
  'a coreset': ('train_lm', f'{LM} --coreset.pool 16'),
  'packed conversations, LoRA on an 8-bit base': ('train_sft', SFT),
  'GLUE, two seeds': ('train_glue', GLUE),
}


@pytest.fixture(scope='module')
def lasting_pair(compiled_once):
  """A pair of processes that all scenes share."""
  started = Pair({}, seconds=900)
  yield started
  assert started.close() == [0, 0]


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize('name', SCENES)
def test_scenes_are_those_of_one_process(name, lasting_pair, text, tmp_path):
  script, words = SCENES[name]
  words = [*words.split(), *(text if script == 'train_lm' else [])]
  ends = lasting_pair.run(script, [*words, '--run-dir', str(tmp_path / 'two')])
  assert [end.status for end in ends] == [0, 0], ends
  MAINS[script]([*words, '--run-dir', str(tmp_path / 'one')])
  found = sorted((tmp_path / 'two').rglob('metrics.jsonl'))
  wanted = sorted((tmp_path / 'one').rglob('metrics.jsonl'))
  assert len(found) == len(wanted) >= 1
  for one, two in zip(wanted, found, strict=True):
    assert_same_rows(rows_of(two.parent), rows_of(one.parent))
    assert_same_files(two.parent, one.parent)
    if script == 'train_lm':
      samples = [
        (path.parent / 'sample.txt').read_text() for path in (one, two)
      ]
      assert samples[0] == samples[1]


@pytest.mark.slow
@pytest.mark.by_hand
def test_a_signal_to_one_stops_all_and_any_number_goes_on(
  lasting_pair, text, tmp_path, stopped_by_a_signal
):
  words = [*LM.split(), *text, '--model.hidden-size', '128']
  words += ['--mesh.data', '2', '--mesh.fsdp', '2', '--steps', '6']
  words += ['--eval-every', '6', '--checkpoint-every', '6']
  words += ['--eval-batches', '4']
  parts = [*words, '--run-dir', str(tmp_path / 'parts')]
  # Noted before a batch of the first evaluation, told at the next, known to all
  # at the third; of the steps behind its four batches likewise.
  for call, number in ((1, 0), (5, 3)):
    ends = lasting_pair.run('train_lm', parts, sent=[1, call, signal.SIGTERM])
    assert [end.status for end in ends] == [128 + signal.SIGTERM] * 2, ends
    said = f'SIGTERM: saved step {number} of 6 in'
    assert [end.text.count(said) for end in ends] == [1, 0]
  stopped_by_a_signal(train_lm.main, parts, 4)
  ends = lasting_pair.run('train_lm', parts)
  assert [end.status for end in ends] == [0, 0], ends
  assert 'at step 4.' in ends[0].text
  train_lm.main([*words, '--run-dir', str(tmp_path / 'whole')])
  assert_same_rows(
    rows_of(tmp_path / 'parts'), rows_of(tmp_path / 'whole'), 1e-5
  )


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize('killed', [1, 0])
def test_who_waits_for_a_process_that_is_gone_ends(
  killed, pair, text, tmp_path
):
  words = [*LM.split(), *text, '--steps', '500', '--eval-every', '500']
  words += ['--run-dir', str(tmp_path)]
  ends = pair.run('train_lm', words, sent=[killed, 6, signal.SIGKILL])
  ended = time.time()
  assert ends[killed].status == -signal.SIGKILL
  # Where a collective fails, it is told. Where it never ends, Python cannot end
  # it either: JAX's heartbeat does.
  left = ends[1 - killed]
  assert (left.status, True) in (
    (2, 'Another process of this run ended' in left.text),
    (-signal.SIGABRT, 'indicates that another task died' in left.text),
  ), left
  # Rows are written until the kill.
  last_row = (tmp_path / 'metrics.jsonl').stat().st_mtime
  assert ended - last_row < 3 * HEARTBEAT
