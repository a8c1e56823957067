"""Folders of a few tensors, of no architecture that the library knows."""

import contextlib
import json

import numpy as np
import safetensors.numpy

from gnlorp_jax.recipes.merge import recipe
from gnlorp_jax.recipes.merge.settings import MergeConfig

SHAPES = {
  'embed.weight': (20, 8),
  'layers.0.q.weight': (8, 8),
  'layers.0.q.bias': (8,),
  'layers.1.q.weight': (8, 8),
  'layers.1.q.bias': (8,),
  'norm.scale': (),
}
CONFIG = {'model_type': 'nothing', 'hidden_size': 8}


def drawn(seed, shapes=SHAPES, like=None, size=1e-2):
  """Random tensors, or tensors like others, away from them by a size."""
  rng = np.random.default_rng(seed)
  tensors = {
    name: np.array(rng.standard_normal(shape), np.float32)
    for name, shape in shapes.items()
  }
  if like is None:
    return tensors
  return {
    name: np.asarray(like[name] + np.float32(size) * tensors[name])
    for name in like
  }


def write(folder, tensors, config=CONFIG, files=()):
  """Writes a folder; returns its path as text."""
  folder.mkdir(parents=True)
  safetensors.numpy.save_file(
    tensors, folder / 'model.safetensors', metadata={'format': 'pt'}
  )
  (folder / 'config.json').write_text(json.dumps(config))
  for name in files:
    (folder / name).write_text(f'{name} of {folder.name}')
  return str(folder)


def write_lora(folder, factors, **fields):
  """Writes a folder of PEFT; factors are pairs by the name of a module."""
  folder.mkdir(parents=True)
  tensors = {}
  for module, (a, b) in factors.items():
    tensors[f'base_model.model.{module}.lora_A.weight'] = a
    tensors[f'base_model.model.{module}.lora_B.weight'] = b
  safetensors.numpy.save_file(tensors, folder / 'adapter_model.safetensors')
  config = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4} | fields
  (folder / 'adapter_config.json').write_text(json.dumps(config))
  return str(folder)


def read(folder):
  """All tensors of a folder, of all its files."""
  found = {}
  for path in sorted(folder.glob('model*.safetensors')):
    found |= safetensors.numpy.load_file(path)
  return found


@contextlib.contextmanager
def silent(title):
  yield lambda done, total: None


def merge(out, base, experts, **fields):
  """Merges; returns what the recipe does."""
  config = MergeConfig(
    base=str(base), experts=tuple(map(str, experts)), out=str(out), **fields
  )
  return recipe.merge(config, silent)
