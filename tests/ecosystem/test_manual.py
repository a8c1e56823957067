"""The programs of the manual run as they stand, one after the other."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from gnlorp_jax import inspect

ROOT = pathlib.Path(__file__).parents[2]


def blocks(path):
  text = (ROOT / path).read_text()
  return re.findall('```python\n(.*?)```', text, re.DOTALL)


def test_programs_of_the_guide_to_optimizers():
  pytest.importorskip('equinox')
  names = {}
  found = blocks('docs/optimizers.md')
  assert len(found) == 8
  for number, block in enumerate(found):
    exec(compile(block, f'optimizers.md, program {number}', 'exec'), names)
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


def test_lines_of_the_readme():
  params = {'up': {'kernel': jnp.ones((8, 4)), 'bias': jnp.ones(4)}}
  names = {'params': params, 'grads': params, 'optax': optax}
  for number, block in enumerate(blocks('README.md')):
    exec(compile(block, f'README.md, program {number}', 'exec'), names)
  assert float(names['params']['up']['bias'][0]) < 1
