"""Runs that are killed and stopped end as if they never were, bit for bit.

One scene for every recipe and kind of step. The whole run is made in this
process, the other in processes of its own: killed between two checkpoints,
stopped by a signal, and let end.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import pytest

import train_glue
import train_lm
from gnlorp_jax.compose import program
from gnlorp_jax.recipes.glue import recipe as glue_recipe
from gnlorp_jax.recipes.glue import settings as glue_settings
from gnlorp_jax.recipes.glue import tasks
from gnlorp_jax.recipes.pretrain import recipe as pretrain_recipe
from gnlorp_jax.recipes.pretrain import settings as pretrain_settings
from gnlorp_jax.training import metrics
from gnlorp_jax.training.checkpoint import Checkpointer

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures('compiled_once', 'logging_as_before'),
]

STEPS = 9
GLUE = """
  --batch-size 8 --eval-batch-size 8 --epochs 3 --log-every 1 --mesh.data 1
  --data.max-train-examples 24 --data.max-dev-examples 20 --checkpoint-every 2
  --optim.rank 2 --adapter.rank 2 --optim.update-proj-gap 2 --dropout 0.1
  --adapter.dropout 0.1 --optim.learning-rate 0.001 --keep all
  --model.hidden-size 32 --model.intermediate-size 64 --model.num-heads 2
"""
LM = """
  --steps 9 --batch-size 8 --eval-every 3 --checkpoint-every 2 --log-every 1
  --mesh.data 1 --sample.num-tokens 4 --optim.rank 4 --optim.update-proj-gap 3
  --model.vocab-size 300 --model.hidden-size 32 --model.intermediate-size 48
  --model.num-layers 2 --model.num-heads 2 --model.max-seq-len 16
  --data.seq-len 16
"""

# Runs a program and sends it a signal when it begins to write a step's metrics.
SIGNALLED = """
import importlib, os, sys
from gnlorp_jax.training import metrics

name, number, signal = sys.argv[1:4]
write = metrics.MetricsWriter.write

def shooting(self, step, values):
  if step == int(number) and 'train/loss' in values:
    os.kill(os.getpid(), int(signal))
  return write(self, step, values)

metrics.MetricsWriter.write = shooting
importlib.import_module(name).main(sys.argv[4:])
"""


class Scene(NamedTuple):
  """A program, its words, and where the run is in the run directory."""

  script: str
  words: str
  run: str = '.'


SCENES = {
  'glue, full, whole steps': Scene(
    'train_glue', f'{GLUE} --method full', 'demo/full/lr0.001_seed0'
  ),
  'glue, 8-bit GradNormLoRP, layer by layer': Scene(
    'train_glue',
    # Moments of 4,096 elements, the fewest that are kept in 8 bits.
    f'{GLUE} --method gradnormlorp --optim.rank 16 --optim.moment-bits 8 '
    '--model.hidden-size 64 --model.intermediate-size 256 '
    '--step.mode layerwise --step.weight-bits 8',
    'demo/gradnormlorp/lr0.001_seed0',
  ),
  'glue, LoRA on an 8-bit base': Scene(
    'train_glue',
    f'{GLUE} --method lora --step.weight-bits 8',
    'demo/lora/lr0.001_seed0',
  ),
  'language model': Scene('train_lm', LM),
}


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """Words of the command line about the text to train a language model on."""
  folder = tmp_path_factory.mktemp('text')
  rng = random.Random(0)
  words = [
    ''.join(rng.choices('abcdefghij', k=rng.randint(2, 6))) for _ in range(50)
  ]
  lines = [' '.join(rng.choices(words, k=8)) for _ in range(400)]
  (folder / 'text.txt').write_text('\n'.join(lines))
  return [
    *('--data.source', str(folder / 'text.txt')),
    *('--data.cache-dir', str(folder / 'cache')),
  ]


def run_main(scene, args):
  module = {'train_glue': train_glue, 'train_lm': train_lm}[scene.script]
  module.main(args)


def run_signalled(scene, args, environment, number, kind):
  """Runs a scene in a process that a signal reaches at a step."""
  return subprocess.run(
    [
      *(sys.executable, '-c', SIGNALLED, scene.script),
      *(str(number), str(int(kind)), *args),
    ],
    env=os.environ | environment,
    cwd=pathlib.Path(train_lm.__file__).parent,
    capture_output=True,
    text=True,
    timeout=600,
  )


def built(scene, args) -> program.Program:
  """What a scene computes."""
  if scene.script == 'train_lm':
    config = pretrain_settings.parse(args, '')
    return pretrain_recipe.prepare(config).planned.program
  config = glue_settings.parse(args, '')
  data = tasks.load_task(config, tasks.find_tasks(config)[0])
  return glue_recipe.prepare(config, data, config.method_names[0]).program


def rows_of(folder):
  """The metrics, apart from measured time."""
  rows = metrics.read_metrics(folder / 'metrics.jsonl')
  timed = ('train/tokens_per_second', 'train/mfu')
  return [{n: v for n, v in row.items() if n not in timed} for row in rows]


def state_of(folder, like):
  with Checkpointer(folder / 'checkpoints', read_only=True) as saved:
    state, position, _ = saved.restore_latest(like)
  record = position.pop('record')
  for name in ('wall_seconds', 'seconds_per_step'):
    record.pop(name)
  return jax.device_get(state), position, record


@pytest.mark.parametrize('name', SCENES)
def test_killed_and_stopped_run_ends_as_the_whole_one(
  name, text, tmp_path, compiled_once
):
  scene = SCENES[name]
  words = scene.words.split()
  if scene.script == 'train_lm':
    words += text
  whole, found = tmp_path / 'whole', tmp_path / 'found'
  run_main(scene, [*words, '--run-dir', str(whole)])
  args = [*words, '--run-dir', str(found)]
  run_folder, whole_folder = found / scene.run, whole / scene.run

  # Between two checkpoints: that of step 4 may be whole, that of step 6 is not.
  done = run_signalled(scene, args, compiled_once, 6, signal.SIGKILL)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert [row['step'] for row in rows_of(run_folder)][-1] == 5
  done = run_signalled(scene, args, compiled_once, 7, signal.SIGTERM)
  assert done.returncode == 128 + signal.SIGTERM, done.stderr
  said = ' '.join((done.stdout + done.stderr).split())
  assert 'Resuming ' in said and f'SIGTERM: saved step 7 of {STEPS}' in said
  assert 'Traceback' not in said
  run_main(scene, args)

  like = built(scene, args).abstract_state
  (state, *others), (expected, *expected_others) = (
    state_of(folder, like) for folder in (run_folder, whole_folder)
  )
  assert others == expected_others
  assert int(state.step) == STEPS
  leaves = jax.tree_util.tree_leaves_with_path(state)
  for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), path
  assert rows_of(run_folder) == rows_of(whole_folder)
  weights = 'hf/model.safetensors'
  assert (run_folder / weights).read_bytes() == (
    whole_folder / weights
  ).read_bytes()

  # A finished run is not repeated.
  before = (run_folder / 'metrics.jsonl').read_bytes()
  run_main(scene, args)
  assert (run_folder / 'metrics.jsonl').read_bytes() == before
  for result in run_folder.glob('result.json'):
    assert json.loads(result.read_text())['last']['step'] == STEPS
