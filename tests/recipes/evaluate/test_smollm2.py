"""A real model against a plain loop in PyTorch, question by question.

Runs by hand, where GNLORP_SMOLLM2 names a Hugging Face folder of a LLaMA, such
as SmolLM2-135M in float32, and transformers and PyTorch are installed.
GNLORP_SMOLLM2_LIMIT is the number of questions per task, and of pages of 4000
characters whose perplexity is compared; by default 10.
"""

import os

import pytest

from gnlorp_jax.compose import scores
from gnlorp_jax.data import tasks
from gnlorp_jax.recipes.evaluate import recipe, settings

FOLDER = os.environ.get('GNLORP_SMOLLM2')
LIMIT = int(os.environ.get('GNLORP_SMOLLM2_LIMIT', '10'))
pytestmark = [
  pytest.mark.slow,
  pytest.mark.fast_code,
  pytest.mark.skipif(not FOLDER, reason='GNLORP_SMOLLM2 names no model'),
]


@pytest.fixture(scope='module')
def ours():
  return recipe.load(settings.EvaluateConfig(folder=FOLDER))


@pytest.fixture(scope='module')
def plain_torch():
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  from tests.recipes.evaluate import plain_torch

  return plain_torch


@pytest.fixture(scope='module')
def theirs(plain_torch):
  return plain_torch.load(FOLDER)


@pytest.mark.parametrize('name', ['arc_easy', 'openbookqa', 'piqa'])
def test_questions_are_answered_as_in_pytorch(
  ours, theirs, plain_torch, shared, name
):
  data = shared / 'data/sft/commonsense_llm_adapters'
  records = []
  task = tasks.get(name, data, limit=LIMIT)
  scores.evaluate_tasks(*ours, [task], keep=records.append)
  wanted = plain_torch.choices(*theirs, name, data, LIMIT)
  for found, row in zip(records, wanted, strict=True):
    assert found['context'] == row['context']
    assert list(found['options']) == row['options']
    # Float32 sums of a few dozen logarithms, in another order.
    assert found['log_likelihoods'] == pytest.approx(
      row['log_likelihoods'], abs=1e-3
    )
    assert found['right'] == {k: row[k] for k in ('acc', 'acc_norm')}


def test_perplexity_is_that_of_pytorch(
  ours, theirs, plain_torch, shared, tmp_path
):
  model, tokenizer = theirs
  whole = shared / 'data/text/wikitext-2/wiki.test.tokens'
  text = whole.read_text(encoding='utf-8')[: 4000 * LIMIT]
  path = tmp_path / 'text'
  path.write_text(text, encoding='utf-8')
  start = tokenizer.bos_token_id
  wanted = plain_torch.text(model, tokenizer, path, 1024, start)
  found = scores.text_perplexity(*ours, text, max_length=1024)
  assert found['tokens'] == wanted['tokens']
  assert found['log_likelihood'] == pytest.approx(
    wanted['log_likelihood'], rel=1e-5
  )
