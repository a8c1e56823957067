"""The programs of the manual run as they stand, one after the other."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import inspect
from tests.compose import small_lm

ROOT = pathlib.Path(__file__).parents[2]


def blocks(path):
  text = (ROOT / path).read_text()
  return re.findall('```python\n(.*?)```', text, re.DOTALL)


def updates_of(tx):
  """What moves of a kernel whose last eight columns have the gradient."""
  params = {'kernel': jnp.ones((32, 16))}
  grads = {'kernel': jnp.zeros((32, 16)).at[:, 8:].set(1.0)}
  with jax.numpy_rank_promotion('allow'):
    updates, _ = tx.update(grads, tx.init(params), params)
  return np.asarray(updates['kernel'])


def test_programs_of_the_guide_to_optimizers():
  pytest.importorskip('equinox')
  names = {}
  found = blocks('docs/optimizers.md')
  assert len(found) == 11
  for number, block in enumerate(found):
    exec(compile(block, f'optimizers.md, program {number}', 'exec'), names)
    if 'largest_columns' in block:
      moved = updates_of(names['tx'])
      assert (np.abs(moved).sum(axis=0) > 0).tolist() == [False] * 8 + [
        True
      ] * 8
    if 'weight_dimension_numbers' in block:
      params = {
        'query': {'kernel': jnp.ones((16, 2, 4, 4))},
        'out': {'kernel': jnp.ones((4, 2, 4, 16))},
        'table': jnp.ones((8, 8)),
      }
      state = jax.eval_shape(names['tx'].init, params)
      stacks = {
        name: subspace.overlap.shape
        for name, subspace in inspect.subspaces(state).items()
      }
  assert stacks == {'query/kernel': (2,), 'out/kernel': (2,)}
  # The last one puts parts together.
  params = {'up': {'kernel': jnp.ones((128, 96)), 'bias': jnp.ones(96)}}
  tx = names['tx']
  jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with what the programs of the manual read."""
  folder = tmp_path_factory.mktemp('place')
  small_lm.write(folder / 'runs/mine/hf')
  (folder / 'questions').mkdir()
  question = {'goal': 'To eat', 'sol1': 'sit', 'sol2': 'fly', 'label': 0}
  (folder / 'questions/piqa.jsonl').write_text(json.dumps(question))
  scores = json.dumps({'scores': list(range(1, 31))})
  (folder / 'layer_scores.json').write_text(scores)
  return folder


@pytest.mark.parametrize(
  ('page', 'name', 'expected'),
  [
    ('evaluation', 'found', lambda found: found['piqa']['questions'] == 1),
    ('training', 'new', lambda new: 0 < len(new) <= 32),
    ('layer-sampling', 'scores', lambda scores: scores[29] == 30.0),
    ('plan', 'advice', lambda advice: advice.need <= 5 * 2**30),
  ],
)
def test_program_of_a_page(place, monkeypatch, page, name, expected):
  monkeypatch.chdir(place)
  names = {'params': {'up': {'kernel': jnp.ones((256, 256))}}}
  (block,) = blocks(f'docs/{page}.md')
  exec(compile(block, f'{page}.md', 'exec'), names)
  assert expected(names[name])


def test_every_page_with_a_program_is_run():
  pages = {
    path.stem
    for path in (ROOT / 'docs').rglob('*.md')
    if blocks(path.relative_to(ROOT))
  }
  here = {'optimizers', 'evaluation', 'training', 'layer-sampling', 'plan'}
  # In tests/models/test_adapters.py and tests/recipes/sft/test_recipe.py.
  assert pages == here | {'finetuning', 'instruction-tuning'}


def test_lines_of_the_readme():
  params = {'up': {'kernel': jnp.ones((8, 4)), 'bias': jnp.ones(4)}}
  names = {'params': params, 'grads': params, 'optax': optax}
  for number, block in enumerate(blocks('README.md')):
    exec(compile(block, f'README.md, program {number}', 'exec'), names)
  assert float(names['params']['up']['bias'][0]) < 1
