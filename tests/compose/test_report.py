"""What a run takes, by component: bytes by hand count."""

import dataclasses

import jax
import numpy as np
import pytest

from gnlorp_jax import optim
from gnlorp_jax.compose import program, report
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  OptimConfig,
  StepConfig,
)
from gnlorp_jax.models import llama
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig

D, F, V, L, R = 16, 24, 300, 2, 4  # Width, feed-forward, vocabulary, ...


def settings(name='gradnormlorp', model=None, clip=None, **changes):
  return TrainConfig(
    model=dataclasses.replace(
      llama.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=2,
        max_seq_len=8,
      ),
      **(model or {}),
    ),
    data=DataConfig(seq_len=8),
    optim=OptimConfig(name=name, rank=R, clip_global_norm=clip),
    **changes,
  )


def program_of(config):
  return recipe.plan(config, jax.devices()[:1]).program


def memory_of(config):
  return report.memory(program_of(config), config.step, config.optim)


# Entries by hand. Projected per layer: q, k, v, o (D x D), gate, up (D x F),
# down (F x D). Not projected: embedding, head, two norms a layer, last norm.
PROJECTED = L * (4 * D * D + 3 * D * F)
FULL = 2 * V * D + 2 * L * D + D
# All compress the axis of length D: the other one has D or F entries.
LOW_RANK = L * (4 * D * R + 3 * F * R)
BASES = L * 7 * D * R
MAGNITUDES = L * (4 * D + 2 * F + D)  # One per output unit.


@pytest.mark.parametrize(
  ('name', 'moments', 'bases'),
  [
    ('gradnormlorp', 2 * (FULL + LOW_RANK + MAGNITUDES), BASES),
    ('galore', 2 * (FULL + LOW_RANK), BASES),
    ('adamw', 2 * (FULL + PROJECTED), 0),
  ],
)
def test_memory_is_that_of_a_count_by_hand(name, moments, bases):
  table = memory_of(settings(name))
  entries = PROJECTED + FULL
  other = table.pop('other')
  assert table == {
    'parameters': {'this run': 4 * entries, 'adamw': 4 * entries},
    'gradients': {'this run': 4 * entries, 'adamw': 4 * entries},
    'moments': {'this run': 4 * moments, 'adamw': 8 * entries},
    'bases': {'this run': 4 * bases, 'adamw': 0},
  }
  # Counts and statistics: when a refresh is due, how many there were, overlap
  # and energy of each kernel and layer.
  assert other['adamw'] == 0
  assert other['this run'] < 4 * (L * 7 * 4 + 20)


def test_memory_of_bfloat16_parameters_keeps_float32_moments():
  table = memory_of(settings(model={'param_dtype': 'bfloat16'}))
  entries = PROJECTED + FULL
  assert table['parameters'] == {'this run': 2 * entries, 'adamw': 2 * entries}
  assert table['gradients'] == {'this run': 2 * entries, 'adamw': 2 * entries}
  moments = 2 * (FULL + LOW_RANK + MAGNITUDES)
  assert table['moments'] == {'this run': 4 * moments, 'adamw': 8 * entries}


@pytest.mark.parametrize('mode', ['whole', 'layerwise'])
def test_memory_of_adapters_is_that_of_what_trains(mode):
  """Beside it the base, of which there is no gradient and no moment."""
  table = memory_of(
    settings(
      'adamw',
      adapter=AdapterOptions(kind='lora', rank=R),
      step=StepConfig(mode=mode),
    )
  )
  factors = L * R * (4 * 2 * D + 3 * (D + F))
  entries = PROJECTED + FULL
  assert table['parameters'] == {
    'this run': 4 * (entries + factors),
    'adamw': 4 * entries,
  }
  held = factors if mode == 'whole' else factors // L
  assert table['gradients'] == {'this run': 4 * held, 'adamw': 4 * entries}
  assert table['moments'] == {'this run': 8 * factors, 'adamw': 8 * entries}


def test_number_of_parameters_is_that_of_the_model():
  built = program_of(settings(adapter=AdapterOptions(kind='lora')))
  assert report.num_params(built) == PROJECTED + FULL


def test_number_of_trained_weights_counts_no_scales_of_codes():
  """Neither those of 8-bit kernels, nor what adapters leave frozen."""
  coded = StepConfig(mode='layerwise', weight_bits=8)
  built = program_of(settings(step=coded))
  assert report.num_trained(built) == PROJECTED + FULL
  adapter = AdapterOptions(kind='lora', rank=R)
  built = program_of(settings('adamw', adapter=adapter, step=coded))
  assert report.num_trained(built) == L * R * (4 * 2 * D + 3 * (D + F))


def test_table_adds_up():
  found = memory_of(settings('galore'))
  table = report.memory_table(found, 'galore')
  assert [column.header for column in table.columns] == [
    'component', 'this run (galore)', 'all weights by AdamW',
  ]  # fmt: skip
  *names, last = table.columns[0].cells
  assert names == list(found) and last == 'total'
  for column, key in ((1, 'this run'), (2, 'adamw')):
    *shown, total = table.columns[column].cells
    sizes = [sizes[key] for sizes in found.values()]
    assert shown == [optim.inspect.format_bytes(size) for size in sizes]
    assert total == optim.inspect.format_bytes(sum(sizes))


# Kernels in 8 bits.

EIGHT = StepConfig(mode='layerwise', weight_bits=8)
WIDE = {
  'vocab_size': 60,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_layers': 3,
}
# Entries by hand, and blocks of 256 in a layer.
PROJECTED_8 = 3 * (4 * 32 * 32 + 3 * 32 * 48)
BLOCKS_8 = 3 * (4 * 4 + 3 * 6)
NORMS_8 = 2 * 3 * 32
OUTSIDE_8 = 2 * 60 * 32 + 32


@pytest.mark.parametrize('clip', [None, 1.0])
def test_memory_of_8_bits_is_that_of_a_count_by_hand(clip):
  table = memory_of(settings('galore', WIDE, clip, step=EIGHT))
  entries = PROJECTED_8 + NORMS_8 + OUTSIDE_8
  one = (PROJECTED_8 + NORMS_8) // 3
  assert table['parameters'] == {
    'this run': PROJECTED_8 + 8 * BLOCKS_8 + 4 * (NORMS_8 + OUTSIDE_8),
    'adamw': 4 * entries,
  }
  # Waiting for the norm: what is left of the projected kernels, R of 32 rows.
  rest = 3 * R * (4 * 32 + 3 * 48) + NORMS_8 if clip else 0
  assert table['gradients'] == {
    'this run': 4 * (OUTSIDE_8 + one + rest),
    'adamw': 4 * entries,
  }
  assert table['moments']['adamw'] == 8 * entries


def test_report_of_8_bits_counts_the_state_of_the_run():
  config = settings(model=WIDE | {'param_dtype': 'bfloat16'}, step=EIGHT)
  rows = program.report(recipe.plan(config.on_one_device(), 1).program)
  entries = PROJECTED_8 + NORMS_8 + OUTSIDE_8
  assert sum(np.prod(row.shape) for row in rows) == entries
  state = program_of(config).abstract_state.opt_state
  # Beside what belongs to a parameter there are some counts.
  rest = optim.inspect.tree_bytes(state) - sum(row.state_bytes for row in rows)
  assert 0 <= rest < 64
