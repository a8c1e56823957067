"""Every optimizer, adapter and kind of step can be asked of GLUE.

A model of two layers of width 16 takes three steps of each combination. Layer
by layer it must take those of whole steps; what is kept in 8 bits must be.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gnlorp_jax.compose import folders, program
from gnlorp_jax.optim.inspect import tree_bytes
from gnlorp_jax.recipes.glue import recipe, tasks
from gnlorp_jax.recipes.glue.settings import parse
from gnlorp_jax.training import sharding

COMMON = """
  --batch-size 8 --eval-batch-size 8 --epochs 2 --mesh.data 1
  --data.max-train-examples 24 --data.max-dev-examples 8
  --model.hidden-size 16 --model.intermediate-size 32 --model.num-heads 2
  --optim.rank 2 --adapter.rank 2 --optim.update-proj-gap 2
  --optim.learning-rate 0.003
"""
STEPS = 3


@pytest.fixture(scope='module', autouse=True)
def steps_are_forgotten():
  yield
  taken.cache_clear()


class Taken(NamedTuple):
  """Three steps: the state and weights on the host, the losses."""

  program: program.Program
  start: Any
  params: Any
  frozen: Any
  opt_state: Any
  losses: tuple[float, ...]
  evaluation: dict[str, float]

  @property
  def state_bytes(self):
    return tree_bytes(self.program.abstract_state.opt_state)


def prepare(words):
  config = parse([*COMMON.split(), *words.split()], '')
  (task,) = tasks.find_tasks(config)
  data = tasks.load_task(config, task)
  return recipe.prepare(config, data, config.method_names[0])


@functools.cache
def taken(words):
  prepared = prepare(words)
  run = recipe.make_run(prepared, None, 0).run
  state, frozen = run.start()
  start = jax.device_get((state.params, frozen))
  losses = []
  for _ in range(STEPS):
    batch = sharding.put_batch(next(run.batches), run.mesh)
    state, values = run.train_step(state, batch, frozen)
    losses.append(float(values['loss']))
    assert values['skipped_steps'] == 0
  found = run.evaluate(state.params, frozen)
  assert np.isfinite(found['loss'])
  # No step touches what is frozen.
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), start[1])
  return Taken(
    prepared.program,
    start[0],
    jax.device_get(state.params),
    start[1],
    jax.device_get(state.opt_state),
    tuple(losses),
    found,
  )


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def report_of(found):
  return {row.name: row for row in program.report(found.program)}


def dtypes_of(tree):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def distance(a, b):
  squares = jax.tree.map(
    lambda x, y: np.sum((np.float64(x) - y) ** 2, dtype=float), a, b
  )
  return np.sqrt(sum(jax.tree.leaves(squares)))


def exact(found, tree):
  """Weights in 8 bits as numbers."""
  decode = found.program.parameters.decode_exact
  return jax.device_get(jax.jit(decode)(tree))


def assert_same_way(found, expected, *, rtol):
  """Both went the same way, up to a share of its length."""
  np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4)
  start = exact(expected, expected.start)
  end, other = exact(expected, expected.params), exact(found, found.params)
  way = distance(end, start)
  assert way > 0
  assert distance(other, end) < rtol * way


# Options of the optimizer.


@pytest.mark.parametrize(
  ('option', 'model'),
  [
    # Moments of fewer than 4,096 elements stay as they are.
    (
      '--optim.moment-bits 8',
      '--optim.rank 16 --model.hidden-size 64 --model.intermediate-size 256',
    ),
    ('--optim.basis-bits 4', ''),
  ],
)
@pytest.mark.slow
def test_state_of_few_bits_is_smaller(option, model):
  words = f'--method gradnormlorp {model}'
  plain, found = taken(words), taken(f'{words} {option}')
  assert found.state_bytes < plain.state_bytes
  assert 'uint8' not in dtypes_of(plain.opt_state)
  assert 'uint8' in dtypes_of(found.opt_state)
  assert found.losses[0] == plain.losses[0]
  assert distance(found.params, plain.params) > 0


@pytest.mark.parametrize(
  'option',
  [
    '--optim.projection random',
    '--optim.b1 0.5',
    '--optim.side out',
    '--optim.solver eigh',
    '--optim.weight-decay 0.1',
    '--optim.clip-global-norm 0.01',
    '--optim.schedule cosine',
  ],
)
@pytest.mark.slow
def test_option_of_the_optimizer_counts(option):
  plain = taken('--method gradnormlorp')
  found = taken(f'--method gradnormlorp {option}')
  assert found.losses[0] == plain.losses[0]
  assert distance(found.params, plain.params) > 0


def test_optimizer_projects_the_factors_of_adapters_on_both_sides():
  rows = report_of(planned := taken('--method lora --optim.name galore'))
  row = rows['layers/attn/q_proj/lora_a']
  assert (row.label, row.rank, row.side) == ('low_rank', 2, 'in+out')
  assert rows['layers/attn/q_proj/kernel'].label == 'frozen'
  assert rows['classifier/out/kernel'].label == 'full'
  plain = taken('--method lora')
  assert planned.state_bytes < plain.state_bytes
  assert planned.losses[0] == plain.losses[0]
  assert distance(planned.params, plain.params) > 0


@pytest.mark.parametrize('name', ['fira', 'ldadam', 'apollo_mini'])
def test_optimizer_that_needs_a_whole_axis_has_one_on_adapters(name):
  prepared = prepare(f'--method lora --optim.name {name}')
  rows = {row.name: row for row in program.report(prepared.program)}
  row = rows['layers/attn/q_proj/lora_a']
  assert row.label == 'low_rank' and '+' not in row.side


def test_kind_of_adapter_replaces_the_methods():
  found = taken('--method full --adapter.kind dora')
  assert found.frozen
  names = {path.split('/')[-1] for path in flat(found.params)}
  assert {'lora_a', 'lora_b', 'magnitude'} <= names
  # The magnitudes start as the norms of the frozen kernels' columns.
  start, frozen = flat(found.start), flat(found.frozen)
  kernel = frozen['layers/mlp/up_proj/kernel']
  np.testing.assert_allclose(
    np.squeeze(start['layers/mlp/up_proj/magnitude']),
    np.linalg.norm(kernel, axis=-2),
    rtol=1e-5,
  )


# Layer by layer.


@pytest.mark.parametrize(
  'words',
  [
    pytest.param('--method full', marks=pytest.mark.slow),
    pytest.param('--method gradnormlorp', marks=pytest.mark.slow),
    '--method lora',
    pytest.param(
      '--method gradnormlorp --optim.clip-global-norm 0.01',
      marks=pytest.mark.slow,
    ),
    pytest.param('--method lora --micro-batches 2', marks=pytest.mark.slow),
    pytest.param('--method gradnormlorp_adapter', marks=pytest.mark.slow),
    pytest.param('--method lora --step.weight-bits 8', marks=pytest.mark.slow),
  ],
)
def test_layer_by_layer_is_the_way_of_whole_steps(words):
  whole, layerwise = taken(words), taken(f'{words} --step.mode layerwise')
  # Sums in another order: float32 rounding, which Adam makes larger.
  assert_same_way(layerwise, whole, rtol=2e-3)
  assert bool(layerwise.frozen) == ('lora' in words or 'adapter' in words)


# Weights in 8 bits.


def codes_of(tree):
  """Nodes that are kept in codes, by path."""
  nodes = traverse_util.flatten_dict(
    tree, is_leaf=lambda _, node: folders.is_quantized(node), sep='/'
  )
  return {path: n for path, n in nodes.items() if folders.is_quantized(n)}


@pytest.mark.parametrize(
  'mode', ['whole', pytest.param('layerwise', marks=pytest.mark.slow)]
)
def test_adapters_stand_beside_kernels_in_8_bits(mode):
  words = f'--method lora --step.mode {mode}'
  found = taken(f'{words} --step.weight-bits 8')
  codes = codes_of(found.frozen)
  assert set(codes) == {
    f'layers/{kernel}/kernel'
    for kernel in (
      *(f'attn/{name}_proj' for name in 'qkvo'),
      *('mlp/up_proj', 'mlp/down_proj'),
    )
  }
  assert not codes_of(found.params)
  plain = taken(words)
  assert tree_bytes(found.frozen) < tree_bytes(plain.frozen)
  assert found.state_bytes == plain.state_bytes
  # Random weights are drawn layer by layer, others than those of one draw.
  assert jax.tree.structure(found.params) == jax.tree.structure(plain.params)
  for path, leaf in flat(exact(found, found.frozen)).items():
    assert leaf.shape == flat(plain.frozen)[path].shape
  assert all(np.isfinite(found.losses))


def test_steps_beside_8_bits_are_those_beside_the_numbers_they_stand_for():
  found = taken('--method lora --step.weight-bits 8')
  plain = prepare('--method lora')
  run = recipe.make_run(plain, None, 0).run
  state, _ = run.start()
  frozen = jax.tree.map(jnp.asarray, exact(found, found.frozen))
  # The same start: of the adapters, and of the classifier beside them.
  state = state._replace(params=jax.tree.map(jnp.asarray, found.start))
  losses = []
  for _ in range(STEPS):
    batch = sharding.put_batch(next(run.batches), run.mesh)
    state, values = run.train_step(state, batch, frozen)
    losses.append(float(values['loss']))
  np.testing.assert_allclose(losses, found.losses, rtol=1e-5)
  way = distance(found.params, found.start)
  # Sums in another order, as of layers.
  assert distance(jax.device_get(state.params), found.params) < 2e-3 * way


@pytest.mark.slow
def test_kernels_that_train_in_8_bits_move_layer_by_layer():
  words = '--method gradnormlorp --step.mode layerwise --step.weight-bits 8'
  found = taken(words)
  codes = codes_of(found.params)
  assert len(codes) == 6 and not found.frozen
  before = codes_of(found.start)
  for path, node in codes.items():
    assert node.codes.dtype == np.uint8, path
    assert not np.array_equal(node.codes, before[path].codes), path
  assert all(np.isfinite(found.losses))
  # Rounded at random, and yet the same bits again.
  again = taken.__wrapped__(words)
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


@pytest.mark.parametrize('method', ['full', 'gradnormlorp'])
def test_kernels_in_8_bits_that_train_in_whole_steps_are_refused(method):
  with pytest.raises(
    ValueError,
    match=r"step.weight_bits=8 needs step.mode='layerwise', which rounds the "
    r".* or adapters \(adapter.kind='lora'\) beside kernels .* got "
    r"step.mode='whole' and adapter.kind=None.",
  ):
    prepare(f'--method {method} --step.weight-bits 8')


# Dropout.


@pytest.mark.slow
@pytest.mark.parametrize(
  'words',
  ['--method full --dropout 0.3', '--method lora --adapter.dropout 0.3'],
)
def test_layer_by_layer_drops_by_the_seeds_of_the_batch(words):
  without = words.split(' --')[0]
  plain = taken(f'--{without.removeprefix("--")} --step.mode layerwise')
  layerwise = f'{words} --step.mode layerwise'
  found = taken(layerwise)
  run = recipe.make_run(prepare(layerwise), None, 0).run

  def losses(change):
    state, frozen = run.start()
    batches = recipe.make_run(prepare(layerwise), None, 0).run.batches
    for _ in range(2):  # Adapters at their start change nothing.
      batch = next(batches)
      batch['seeds'] = batch['seeds'] + np.uint32(change)
      batch = sharding.put_batch(batch, run.mesh)
      state, values = run.train_step(state, batch, frozen)
      yield float(values['loss'])

  assert tuple(losses(0)) == found.losses[:2]
  assert tuple(losses(1))[1] != found.losses[1]
  assert found.losses[1] != plain.losses[1]
  # The loss itself is what it is in whole steps, but for what is dropped.
  whole = taken(words)
  np.testing.assert_allclose(found.losses, whole.losses, rtol=0.3)
