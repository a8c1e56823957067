"""Small runs of every kind, each of some seconds, that a campaign disturbs."""

import os
import pathlib
import sys
from typing import NamedTuple

from tests import small_inputs

ROOT = pathlib.Path(__file__).parents[2]
OUTPUT = 'run'  # The folder in which a command writes.

# Of all kernels two are projected: more of them take longer to compile.
_USUAL = '--batch-size 8 --log-every 1 --checkpoint-every 2'
_PROJECTED = """
  --optim.update-proj-gap 3 --optim.rank 2
  --optim.param-labels (q|down)_proj/kernel low_rank .* full
"""
_MODEL = """
  --model.hidden-size 16 --model.intermediate-size 32 --model.num-heads 2
  --model.num-layers 2
"""
_LM = f"""
  {_USUAL} {_MODEL} --steps 8 --eval-every 4 --sample.num-tokens 4
  --model.vocab-size 300 --model.max-seq-len 16 --data.seq-len 16
  --data.source TEXT --data.cache-dir cache
"""
_ADAPTER = '--adapter.rank 2 --adapter.rules (q|down)_proj/kernel'
_SFT = """
  --steps 8 --batch-size 8 --log-every 1 --checkpoint-every 2 --mesh.data 1
  --eval-every 4 --eval.generate 2 --eval.max-tokens 4 --data.template none
  --data demo --data.limit 200 --model FOLDER
"""
_GLUE = f"""
  {_USUAL} {_MODEL} --mesh.data 1 --eval-batch-size 8 --epochs 2 --keep all
  --export True --data.max-train-examples 24 --data.max-dev-examples 20
"""
_POOL = '--coreset.pool 16 --coreset.sketch 64'


class Configuration(NamedTuple):
  """A command that is run in an empty folder.

  Attributes:
    words: What follows ``python``, without where it writes.
    output: The option that says where.
    devices: How many devices a CPU is made to have.
    overwrites: Whether it runs again where it has run to its end.
  """

  words: str
  output: str = '--run-dir'
  devices: int = 1
  overwrites: bool = True

  def command(self, root: pathlib.Path) -> list[str]:
    """The command line.

    Args:
      root: The folder that `write_inputs` filled.
    """
    named = {
      'TEXT': f'{root}/text.txt',
      'SOURCES': f'wiki={root}/text.txt,rare={root}/rare.txt',
      'FOLDER': f'{root}/model',
      'EXPERTS': f'{root}/expert1,{root}/expert2',
    }
    words = [named.get(word, word) for word in self.words.split()]
    if words[0].endswith('.py'):
      words[0] = str(ROOT / words[0])
    return [sys.executable, *words, self.output, OUTPUT]

  def environment(self, root: pathlib.Path) -> dict[str, str]:
    """The variables of its process."""
    count = f'--xla_force_host_platform_device_count={self.devices}'
    return os.environ | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(root / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'XLA_FLAGS': count,
      'NPROC': '2',
      'OPENBLAS_NUM_THREADS': '1',
    }


CONFIGURATIONS = {
  'language model': Configuration(f'train_lm.py {_LM} {_PROJECTED}'),
  'language model, four devices': Configuration(
    f'train_lm.py {_LM} {_PROJECTED} --mesh.data 2 --mesh.fsdp 2', devices=4
  ),
  'layer by layer, 8-bit weights and moments': Configuration(
    f'train_lm.py {_LM} {_PROJECTED} --step.mode layerwise '
    '--step.weight-bits 8 --optim.moment-bits 8'
  ),
  'masked, drawn layers': Configuration(
    f'train_lm.py --objective masked {_LM} {_PROJECTED} '
    '--model.hidden-dropout 0.1 --sampling.draw uniform --sampling.layers 1 '
    '--sampling.every 3'
  ),
  'adapters that restart': Configuration(
    f'train_lm.py {_LM} {_ADAPTER} --optim.name adamw '
    '--optim.schedule jagged --adapter.kind lora --adapter.restart-every 3'
  ),
  'coresets': Configuration(
    f'train_lm.py {_LM.replace("TEXT", "SOURCES")} {_PROJECTED} {_POOL}'
  ),
  'weight normalisation around GaLore': Configuration(
    f'train_lm.py {_LM} {_PROJECTED} --optim.name galore '
    '--optim.weight-norm True'
  ),
  'conversations, LoRA on an 8-bit base': Configuration(
    f'train_sft.py {_SFT} {_ADAPTER} --method lora --step.weight-bits 8 '
    '--adapter.dropout 0.1'
  ),
  'conversations, packed, GaLore': Configuration(
    f'train_sft.py {_SFT} --method galore --optim.rank 2 --data.packing'
  ),
  'conversations, coresets': Configuration(
    f'train_sft.py {_SFT} {_ADAPTER} {_POOL} --method lora'
  ),
  'GLUE, two seeds, layer by layer in 8 bits': Configuration(
    f'train_glue.py {_GLUE} {_PROJECTED} --seeds 0,1 --method gradnormlorp '
    '--optim.learning-rate 0.001 --dropout 0.1 --step.mode layerwise '
    '--step.weight-bits 8'
  ),
  'GLUE, two methods and rates': Configuration(
    f'train_glue.py {_GLUE} --method lora,full '
    '--learning-rates 0.001,0.003 --adapter.rank 2'
  ),
  'merging': Configuration(
    '-m gnlorp_jax.merge --base FOLDER --experts EXPERTS --method doge '
    '--steps 20 --exclude embed',
    output='--out',
    overwrites=False,
  ),
}


def write_inputs(root: pathlib.Path) -> None:
  """Writes texts, a model and two experts into an empty folder."""
  small_inputs.write_text(root / 'text.txt')
  small_inputs.write_text(root / 'rare.txt', lines=40)
  for seed, name in enumerate(('model', 'expert1', 'expert2')):
    small_inputs.write_model(root / name, root / 'text.txt', root, seed)
