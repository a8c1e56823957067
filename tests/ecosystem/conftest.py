"""Optimizers and a small tree of parameters for the tests of this folder."""

import jax
import numpy as np
import pytest

from gnlorp_jax import optim

LOW_RANK = {'rank': 3, 'update_proj_gap': 2}
# Beside the defaults; bases are refitted within three steps.
OPTIONS = {
  'adamw': {},
  'apollo_mini': {'update_proj_gap': 2},
  'ldadam': {'rank': 3},
  'muon': {},
  'racs': {},
  'scale': {},
  'sinkgd': {},
  'vlorp': {**LOW_RANK, 'granularity': 2},
  'projfactor': {**LOW_RANK, 'granularity': 2},
}


def _random(shapes, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: rng.standard_normal(shape).astype(np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


SHAPES = {
  'a': {'bias': (8,), 'kernel': (12, 8)},
  'b': {'kernel': (8, 8)},
}


@pytest.fixture(scope='session')
def make():
  """Makes an alias by its name, with options of its own and more."""

  def build(name, learning_rate=1e-2, **options):
    given = {**OPTIONS.get(name, LOW_RANK), 'weight_decay': 0.1, **options}
    return getattr(optim, name)(learning_rate, **given)

  return build


@pytest.fixture(scope='session')
def params():
  """Two kernels, one of them square, and a bias, on the host."""
  return _random(SHAPES, 0)


@pytest.fixture(scope='session')
def stacked(params):
  """Gradients of three steps, stacked."""
  grads = [_random(SHAPES, 1 + step) for step in range(3)]
  return jax.tree.map(lambda *steps: np.stack(steps), *grads)
