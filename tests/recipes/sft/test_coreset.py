"""Instruction tuning on a choice of a pool, of conversations of two sources."""

import dataclasses
import json

import numpy as np
import pytest

from gnlorp_jax.compose.coreset_settings import CoresetOptions
from gnlorp_jax.compose.settings import AdapterOptions, MeshConfig, StepConfig
from gnlorp_jax.recipes.sft import data, recipe, report
from gnlorp_jax.recipes.sft.settings import (
  ChatDataConfig,
  SftConfig,
  SftEvalOptions,
)
from gnlorp_jax.training import loop
from gnlorp_jax.training.interrupt import StopRequest
from tests.compose import small_lm


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('chat')
  for name, number in (('many', 30), ('few', 6)):
    records = [
      {'prompt': f'{name} {i}:', 'completion': f' {name[0] * (3 + i % 9)}'}
      for i in range(number)
    ]
    text = '\n'.join(map(json.dumps, records))
    (path / f'{name}.jsonl').write_text(text)
  return SftConfig(
    run_dir=str(path / 'run'),
    init_from=small_lm.write(path / 'model'),
    method='lora',
    adapter=AdapterOptions(rank=2, dropout=0.1),
    step=StepConfig(mode='layerwise'),
    mesh=MeshConfig(data=1),
    batch_size=2,
    epochs=1,
    log_every=1,
    checkpoint_every=1,
    export='none',
    coreset=CoresetOptions(pool=4),
    data=ChatDataConfig(
      source=f'{path / "many.jsonl"},{path / "few.jsonl"}',
      template='none',
      val_size=2,
      max_length=40,
    ),
    eval=SftEvalOptions(generate=0),
  )


def test_rows_are_of_one_source_and_small_ones_are_kept(config):
  prepared = recipe.prepare(config)
  batches = data.training_batches(config, prepared.chat)
  sizes = batches.rows_by_source(2)
  assert prepared.config.steps == -(-sum(sizes) // 4)
  assert sizes[1] < sizes[0]
  with StopRequest() as stop:
    outcome = loop.train(recipe.make_run(prepared, prepared.config), stop)
  summary = report.finish(prepared, prepared.config, outcome)
  found = summary['coreset']
  assert found['picked/few'] == found['offered/few'] == sizes[1]
  assert found['offered/many'] == sizes[0]
  assert np.isfinite(summary['last']['loss'])


def test_without_a_pool_batches_are_what_they_were(config):
  plain = dataclasses.replace(config, coreset=CoresetOptions())
  prepared = recipe.prepare(plain)
  batch = next(data.training_batches(plain, prepared.chat))
  assert 'source' not in batch
  assert len(batch['inputs']) == 2
  assert recipe.make_run(prepared, prepared.config).select is None
