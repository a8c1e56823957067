"""Runs that are killed and stopped end as if they never were, bit for bit.

Scenes for every recipe, and among them every kind of step and of weights. The
whole run is made in this process, and so is the other but for its beginning,
which, in one scene of a recipe, is killed in a process of its own. Then a
signal stops it, and it goes on.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import pytest

import train_glue
import train_lm
import train_sft
from gnlorp_jax.compose import program
from gnlorp_jax.recipes.glue import recipe as glue_recipe
from gnlorp_jax.recipes.glue import settings as glue_settings
from gnlorp_jax.recipes.glue import tasks
from gnlorp_jax.recipes.pretrain import recipe as pretrain_recipe
from gnlorp_jax.recipes.pretrain import settings as pretrain_settings
from gnlorp_jax.recipes.sft import recipe as sft_recipe
from gnlorp_jax.recipes.sft import settings as sft_settings
from gnlorp_jax.training import metrics
from gnlorp_jax.training.checkpoint import Checkpointer
from tests import small_inputs

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures('compiled_once', 'built_once', 'logging_as_before'),
]

STEPS = 9
# Of all kernels two are projected: more of them take longer to compile.
USUAL = """
  --batch-size 8 --log-every 1 --checkpoint-every 3 --mesh.data 1
  --optim.rank 2 --optim.update-proj-gap 3 --model.hidden-size 16
  --model.intermediate-size 32 --model.num-heads 2 --model.num-layers 2
"""
LABELS = [
  *('--optim.param-labels', '(q|down)_proj/kernel', 'low_rank', '.*', 'full')
]
LM = f"""
  {USUAL} --steps {STEPS} --eval-every 3 --sample.num-tokens 4
  --model.vocab-size 300 --model.max-seq-len 16 --data.seq-len 16
"""
# Moments of 4,096 elements, the fewest that are kept in 8 bits.
SFT = f"""
  --steps {STEPS} --batch-size 8 --log-every 1 --checkpoint-every 3
  --mesh.data 1 --eval-every 3 --eval.generate 2 --eval.max-tokens 4
  --eval.temperature 1 --data demo --data.template none --data.limit 300
  --method lora
  --adapter.rank 2 --adapter.dropout 0.1 --adapter.rules (q|down)_proj/kernel
  --step.weight-bits 8
"""
GLUE = f"""
  {USUAL} --eval-batch-size 8 --epochs 3 --seeds 0,1 --keep all --export True
  --data.max-train-examples 24 --data.max-dev-examples 20 --dropout 0.1
  --method gradnormlorp --optim.learning-rate 0.001 --optim.rank 16
  --optim.moment-bits 8 --model.hidden-size 64 --model.intermediate-size 256
  --step.mode layerwise --step.weight-bits 8
"""

# Runs a program and sends it a signal when it begins to write a step: its
# metrics, or, if the step is one of a checkpoint, that checkpoint. Of several
# runs it is the last one that counts.
KILLED = """
import importlib, os, signal, sys
from gnlorp_jax.training import checkpoint, metrics

name, number, folder = sys.argv[1:4]

def kill_in(owner, moment, path):
  original = getattr(owner, moment)

  def killing(self, step, *args, **options):
    if step == int(number) and folder in str(path(self)):
      if moment == 'save':  # It goes on beside, in threads of its own.
        original(self, step, *args, **options)
      os.kill(os.getpid(), signal.SIGKILL)
    return original(self, step, *args, **options)

  setattr(owner, moment, killing)

if int(number) % 2:
  kill_in(metrics.MetricsWriter, 'write', lambda self: self._file.name)
else:
  kill_in(checkpoint.Checkpointer, 'save', lambda self: self._directory)
importlib.import_module(name).main(sys.argv[4:])
"""


class Scene(NamedTuple):
  """A program and its words.

  Attributes:
    script: The program.
    words: Of its command line.
    killed: The step in which it is killed: with its checkpoint half written if
      it is even (6), before its metrics are written if it is odd (7). None: it
      is only stopped.
    runs: Folders of its runs in the run directory. The last one is killed.
  """

  script: str
  words: list[str]
  killed: int | None
  runs: tuple[str, ...] = ('.',)


SCENES = {
  'language model': Scene('train_lm', [*LM.split(), *LABELS], 6),
  'masked language model, a layer at a time': Scene(
    'train_lm',
    [
      *('--objective', 'masked', *LM.split(), *LABELS),
      *('--model.hidden-dropout', '0.1'),
      # Stopped within a period.
      *('--sampling.draw', 'uniform', '--sampling.layers', '1'),
      *('--sampling.every', '3'),
    ],
    None,
  ),
  'language model, adapters that restart': Scene(
    'train_lm',
    [
      *LM.split(),
      *('--optim.name', 'adamw', '--optim.schedule', 'jagged'),
      *('--adapter.kind', 'lora', '--adapter.restart-every', '3'),
      *('--adapter.rules', '(q|down)_proj/kernel'),
    ],
    None,
  ),
  'conversations, LoRA with dropout on an 8-bit base of a folder': Scene(
    'train_sft',
    [*SFT.split(), '--model', 'FOLDER'],
    7,
  ),
  'GLUE: two seeds, in 8 bits, layer by layer': Scene(
    'train_glue',
    [*GLUE.split(), *LABELS],
    7,
    tuple(f'demo/gradnormlorp/lr0.001_seed{seed}' for seed in (0, 1)),
  ),
}


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """A file of text to train a language model on."""
  folder = tmp_path_factory.mktemp('text')
  small_inputs.write_text(folder / 'text.txt')
  return folder / 'text.txt'


@pytest.fixture(scope='module')
def model_folder(text):
  """A model to start from, and its tokenizer."""
  folder = text.parent / 'hf'
  small_inputs.write_model(folder, text, text.parent / 'cache')
  return str(folder)


MAINS = {
  'train_glue': train_glue.main,
  'train_lm': train_lm.main,
  'train_sft': train_sft.main,
}


def run_killed(scene, args, environment, last):
  """Runs a scene in a process that is killed, in the folder `last` at last."""
  done = subprocess.run(
    [
      *(sys.executable, '-c', KILLED, scene.script),
      *(str(scene.killed), scene.runs[-1].removeprefix('.'), *args),
    ],
    env=os.environ | environment,
    cwd=pathlib.Path(train_lm.__file__).parent,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  written = [row['step'] for row in rows_of(last)]
  assert written[-1] == 6
  # That of step 3 is whole; the next one may be.
  held = {path.name for path in (last / 'checkpoints').iterdir()}
  assert '3' in held and '9' not in held


def built(scene, args) -> program.Program:
  """What a scene computes."""
  if scene.script == 'train_lm':
    config = pretrain_settings.parse(args, '')
    return pretrain_recipe.prepare(config).planned.program
  if scene.script == 'train_sft':
    return sft_recipe.prepare(sft_settings.parse(args, '')).program
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
  name, text, model_folder, tmp_path, compiled_once, stopped_by_a_signal, capsys
):
  scene = SCENES[name]
  main = MAINS[scene.script]
  words = [model_folder if w == 'FOLDER' else w for w in scene.words]
  if scene.script == 'train_lm':
    words += ['--data.source', str(text)]
    words += ['--data.cache-dir', str(text.parent / 'cache')]
  whole, found = tmp_path / 'whole', tmp_path / 'found'
  main([*words, '--run-dir', str(whole)])
  args = [*words, '--run-dir', str(found)]
  last = found / scene.runs[-1]
  if scene.killed is not None:
    run_killed(scene, args, compiled_once, last)
  capsys.readouterr()
  stopped_by_a_signal(main, args, 7)
  said = ' '.join(''.join(capsys.readouterr()).split())
  assert ('Resuming ' in said) == (scene.killed is not None)
  assert f'SIGTERM: saved step 7 of {STEPS}' in said
  assert 'The same command continues.' in said
  main(args)

  like = built(scene, args).abstract_state
  for run in scene.runs:
    (state, *others), (expected, *expected_others) = (
      state_of(folder / run, like) for folder in (found, whole)
    )
    assert others == expected_others
    assert int(state.step) == STEPS
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
      assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), path
    assert rows_of(found / run) == rows_of(whole / run)
    for left in ('hf/model.safetensors', 'samples.jsonl'):
      if (whole / run / left).exists():
        expected = (whole / run / left).read_bytes()
        assert (found / run / left).read_bytes() == expected
    assert (whole / run / 'hf/model.safetensors').exists()

  # A finished run is not repeated.
  before = (last / 'metrics.jsonl').read_bytes()
  main(args)
  assert (last / 'metrics.jsonl').read_bytes() == before
  for result in last.glob('result.json'):
    assert json.loads(result.read_text())['last']['step'] == STEPS
