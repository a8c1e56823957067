"""Tasks that a model is asked while it trains."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gnlorp_jax.compose import scores
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  StepConfig,
  TaskOptions,
)
from gnlorp_jax.models import scoring
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig
from tests.compose import small_lm

QUESTIONS = [
  {'question': 'Predators eat', 'choices': ['lions', 'bunnies'], 'label': 1},
  {'question': 'Fog is found in', 'choices': ['a marsh', 'a box'], 'label': 0},
  {'question': 'Seeds', 'choices': ['grow', 'sleep', 'sing'], 'label': 0},
]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  (path / 'openbookqa.jsonl').write_text('\n'.join(map(json.dumps, QUESTIONS)))
  (path / 'words.txt').write_text('Words and more words.\n' * 60)
  return TrainConfig(
    init_from=small_lm.write(path / 'model'),
    data=DataConfig(
      source=str(path / 'words.txt'), seq_len=32, cache_dir=str(path / 'cache')
    ),
    batch_size=4,
    eval_batches=1,
    eval=TaskOptions(tasks='openbookqa', data=str(path), batch_size=2),
    # The weights are held in another form than those of a folder.
    adapter=AdapterOptions(kind='lora'),
    step=StepConfig(mode='layerwise', weight_bits=8),
  )


@pytest.fixture(scope='module')
def prepared(config):
  return recipe.prepare(config)


def test_evaluations_score_the_tasks_too(config, prepared):
  assert [task.name for task in prepared.tasks] == ['openbookqa']
  built = prepared.program
  held = built.parameters.start(jax.random.key(0))
  found = recipe.evaluation(prepared, config)(*held)

  # What the exported model would score.
  model, _ = small_lm.model()
  merged = built.parameters.merge(*held)
  merged = jax.tree.map(
    lambda x: (
      x
      if isinstance(x, jax.Array)
      else np.stack([*map(x.__getitem__, range(2))])
    ),
    merged,
    is_leaf=lambda x: not isinstance(x, dict),
  )
  expected = scores.evaluate_tasks(
    model, merged, small_lm.tokenizer(), prepared.tasks
  )['openbookqa']['metrics']
  assert found.keys() == {
    'loss',
    'perplexity',
    *('openbookqa/acc', 'openbookqa/acc_stderr'),
    *('openbookqa/acc_norm', 'openbookqa/acc_norm_stderr'),
  }
  for name in ('acc', 'acc_norm'):
    assert found[f'openbookqa/{name}'] == expected[name]['value']
    assert found[f'openbookqa/{name}_stderr'] == expected[name]['stderr']


@pytest.mark.parametrize('add_bos', [False, True])
def test_contexts_begin_as_the_documents_of_the_run(
  add_bos, config, prepared, monkeypatch
):
  # Whatever the tokenizer itself would do: the exported one does the same.
  tokenizer = small_lm.tokenizer()
  tokenizer = tokenizer.beginning(not add_bos)
  text = prepared.text._replace(tokenizer=tokenizer)
  data = dataclasses.replace(config.data, add_bos=add_bos)
  contexts = []

  def score(model, params, requests, **options):
    contexts.extend(context for context, _ in requests)
    return [scoring.Score(-1.0, True)] * len(requests)

  monkeypatch.setattr(scoring, 'log_likelihoods', score)
  evaluate = recipe.evaluation(
    prepared._replace(text=text), dataclasses.replace(config, data=data)
  )
  evaluate(*prepared.program.parameters.start(jax.random.key(0)))
  begins = {int(context[0]) == tokenizer.bos_id for context in contexts}
  assert begins == {add_bos}


def test_absent_files_of_a_task_are_told_before_anything_is_read(
  config, tmp_path
):
  asked = TaskOptions(tasks='piqa', data=str(tmp_path))
  with pytest.raises(ValueError, match='piqa'):
    recipe.prepare(dataclasses.replace(config, eval=asked))
