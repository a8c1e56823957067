"""The oracle's inputs and outputs: see tests/golden/README.md."""

import functools
import pathlib

import numpy as np

PATH = pathlib.Path(__file__).parents[1] / 'golden' / 'doge_oracle.npz'
MATRICES = tuple(f'encoder.layers.0.{x}.weight' for x in ('down', 'q', 'up'))
VARIANTS = {
  'code': {},
  'full': {'inner': 'full'},
  'subspace': {'project': 'subspace'},
  'steps10': {'steps': 10},
}


@functools.cache
def arrays():
  with np.load(PATH) as saved:
    return dict(saved)


def base():
  return _under('base/')


def expert(index):
  return _under(f'expert{index}/')


def taus():
  """Task vectors of the matrices that are merged, float64."""
  return {
    name: np.stack([expert(i)[name] - base()[name] for i in range(3)])
    for name in MATRICES
  }


def _under(prefix):
  return {
    name.removeprefix(prefix): array
    for name, array in arrays().items()
    if name.startswith(prefix)
  }
