"""Rows of packed documents, each of which is read by itself."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gnlorp_jax.compose import optimizer
from gnlorp_jax.compose.settings import OptimConfig, StepConfig
from gnlorp_jax.models.families.smollm3 import SmolLM3Config
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig

LENGTHS = (7, 2, 11)
T = sum(LENGTHS)
# Its layers differ in their rotary positions and in their windows.
CONFIG = TrainConfig(
  model=SmolLM3Config(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=2,
    max_seq_len=T,
    rope_layers=(True, False, True),
    sliding_window=5,
    sliding_layers=(False, True, False),
    initializer_std=0.3,
  ),
  data=DataConfig(seq_len=T, document_mask=True),
  batch_size=2,
  steps=4,
  optim=OptimConfig(name='adamw', learning_rate=1e-2, clip_global_norm=None),
)


@functools.cache
def planned(mode):
  config = dataclasses.replace(CONFIG, step=StepConfig(mode=mode))
  return recipe.plan(config, jax.devices()[:1])


def batch():
  rng = np.random.default_rng(0)
  segments = np.repeat([1, 2, 3], LENGTHS)[None].repeat(2, axis=0)
  is_last = np.diff(segments, axis=1, append=0) != 0
  return {
    'inputs': rng.integers(0, 300, (2, T)).astype(np.int32),
    'targets': rng.integers(0, 300, (2, T)).astype(np.int32),
    'weights': np.float32(~is_last),
    'segments': segments.astype(np.int32),
  }


def start(mode):
  program = planned(mode).program
  numbers = optimizer.numbers(CONFIG.optim, CONFIG.steps)
  state, _ = program.start(jax.random.key(0), numbers)
  return program, state


def test_abstract_batch_has_what_the_step_reads():
  abstract = planned('whole').abstract_batch
  assert {k: (v.shape, v.dtype) for k, v in abstract.items()} == {
    k: (v.shape, v.dtype) for k, v in batch().items()
  }


def test_layer_by_layer_is_the_whole_step():
  after = []
  for mode in ('whole', 'layerwise'):
    program, state = start(mode)
    state, metrics = program.train_step(state, batch(), {})
    after.append((float(metrics['loss']), jax.device_get(state.params)))
  (loss, params), (other_loss, other) = after
  assert loss == pytest.approx(other_loss, rel=1e-6)
  for x, y in zip(*map(jax.tree.leaves, (params, other)), strict=True):
    # Adam's first steps are signs of gradients, times the rate: float32 sums in
    # another order may turn those that are nearly zero.
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_loss_of_a_row_is_that_of_its_documents_alone():
  program, state = start('whole')
  row = batch()
  total, count = program.eval_step(state.params, row, {})
  sums = []
  at = 0
  for length in LENGTHS:
    alone = {k: np.zeros_like(x) for k, x in row.items()}
    for name in ('inputs', 'targets', 'weights'):
      alone[name][:, :length] = row[name][:, at : at + length]
    sums.append(program.eval_step(state.params, alone, {}))
    at += length
  losses, counts = np.array(sums).T
  assert counts.sum() == count == 2 * (T - 3)
  np.testing.assert_allclose(losses.sum(), total, rtol=1e-6)
