"""Every optimizer, adapter and kind of step can be asked of GLUE.

A model of two layers of width 16 takes three steps. Layer by layer it must take
those of whole steps; what is kept in 8 bits must be. What the options do is
tested where they are made use of; here, that GLUE passes them on.
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
# Of all kernels, or of what adapts them, two are projected: more of them take
# longer to compile.
FEW_PROJECTED = (
  '--optim.param-labels layers/.*(q|down)_proj/(kernel|lora_) low_rank .* full'
)
# Nor has any other kernel an adapter: it is frozen as it is.
FEW_ADAPTED = '--adapter.rules (q|down)_proj/kernel'


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


def test_state_of_few_bits_is_smaller():
  # Moments of fewer than 4,096 elements stay as they are.
  wide = '--optim.rank 16 --model.hidden-size 64 --model.intermediate-size 256'
  states = []
  for bits in ('', '--optim.moment-bits 8', '--optim.basis-bits 4'):
    planned = prepare(f'--method gradnormlorp {wide} {bits}').program
    states.append(planned.abstract_state.opt_state)
    assert ('uint8' in dtypes_of(states[-1])) == bool(bits)
    assert not bits or tree_bytes(states[-1]) < tree_bytes(states[0])


def test_options_of_the_optimizer_reach_the_place_that_makes_it(monkeypatch):
  words = """
    --method gradnormlorp --optim.basis-bits 4 --optim.b1 0.5
    --optim.side out --optim.solver eigh --optim.weight-decay 0.1
    --optim.clip-global-norm 0.01 --optim.schedule cosine
    --optim.moment-bits 8
  """
  found = []
  build = program.build

  def remember(*args, **options):
    found.append(options)
    return build(*args, **options)

  monkeypatch.setattr(program, 'build', remember)
  prepared = prepare(words)
  (options,) = found
  config = options['optim_config']
  assert (config.name, config.basis_bits, config.b1) == (
    *('gradnormlorp', 4, 0.5),
  )
  assert (config.side, config.solver, config.weight_decay) == (
    *('out', 'eigh', 0.1),
  )
  assert not config.decay_norms_and_biases
  assert (config.clip_global_norm, config.moment_bits) == (0.01, 8)
  # A rate is an argument of the program, its schedule is of a run.
  run = recipe.make_run(prepared, None, 0).run
  # One step of warm-up, then five from the peak to zero.
  rates = [float(run.instruments.schedule(count)) for count in range(1, 6)]
  cosine = [0.003 * (1 + np.cos(np.pi * count / 4)) / 2 for count in range(5)]
  np.testing.assert_allclose(rates, cosine, rtol=1e-5, atol=1e-9)


def test_optimizer_projects_the_factors_of_adapters_on_both_sides():
  planned = prepare('--method lora --optim.name galore').program
  rows = {row.name: row for row in program.report(planned)}
  row = rows['layers/attn/q_proj/lora_a']
  assert (row.label, row.rank, row.side) == ('low_rank', 2, 'in+out')
  assert rows['layers/attn/q_proj/kernel'].label == 'frozen'
  assert rows['classifier/out/kernel'].label == 'full'
  plain = prepare('--method lora').program
  sizes = [tree_bytes(p.abstract_state.opt_state) for p in (planned, plain)]
  assert sizes[0] < sizes[1]


@pytest.mark.parametrize('name', ['fira', 'ldadam', 'apollo_mini'])
def test_optimizer_that_needs_a_whole_axis_has_one_on_adapters(name):
  prepared = prepare(f'--method lora --optim.name {name}')
  rows = {row.name: row for row in program.report(prepared.program)}
  row = rows['layers/attn/q_proj/lora_a']
  assert row.label == 'low_rank' and '+' not in row.side


def test_kind_of_adapter_replaces_the_methods():
  run = recipe.make_run(prepare('--method full --adapter.kind dora'), None, 0)
  state, frozen = run.run.start()
  params, frozen = flat(state.params), flat(frozen)
  assert {'lora_a', 'lora_b', 'magnitude'} <= {p.split('/')[-1] for p in params}
  # The magnitudes start as the norms of the frozen kernels' columns.
  kernel = frozen['layers/mlp/up_proj/kernel']
  np.testing.assert_allclose(
    np.squeeze(params['layers/mlp/up_proj/magnitude']),
    np.linalg.norm(kernel, axis=-2),
    rtol=1e-5,
  )


# Layer by layer.


@pytest.mark.parametrize(
  'words',
  [
    # Everything trains.
    pytest.param(
      f'--method gradnormlorp --optim.clip-global-norm 0.01 {FEW_PROJECTED}',
      id='--method gradnormlorp --optim.clip-global-norm 0.01',
    ),
    # Of what is frozen, in full precision and in 8 bits.
    pytest.param(
      f'--method gradnormlorp_adapter --micro-batches 2 {FEW_ADAPTED}',
      id='--method gradnormlorp_adapter --micro-batches 2',
    ),
    '--method lora --step.weight-bits 8',
  ],
)
@pytest.mark.slow
def test_layer_by_layer_is_the_way_of_whole_steps(words):
  whole, layerwise = taken(words), taken(f'{words} --step.mode layerwise')
  # Sums in another order: float32 rounding, which Adam makes larger.
  assert_same_way(layerwise, whole, rtol=2e-3)
  assert bool(layerwise.frozen) == ('--optim.clip-global-norm' not in words)


# Weights in 8 bits.


def codes_of(tree):
  """Nodes that are kept in codes, by path."""
  nodes = traverse_util.flatten_dict(
    tree, is_leaf=lambda _, node: folders.is_quantized(node), sep='/'
  )
  return {path: n for path, n in nodes.items() if folders.is_quantized(n)}


@pytest.mark.slow
def test_adapters_stand_beside_kernels_in_8_bits():
  words = '--method lora'
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


@pytest.mark.slow
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
  found = taken(f'{words} {FEW_PROJECTED}')
  codes = codes_of(found.params)
  assert len(codes) == 6 and not found.frozen
  before = codes_of(found.start)
  for path, node in codes.items():
    assert node.codes.dtype == np.uint8, path
    assert not np.array_equal(node.codes, before[path].codes), path
  assert all(np.isfinite(found.losses))
  # Rounded at random: test_resume.py has the same bits again.


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
def test_layer_by_layer_drops_by_the_seeds_of_the_batch():
  words = '--method lora --adapter.dropout 0.3 --step.mode layerwise'
  prepared = prepare(f'{words} {FEW_ADAPTED}')
  run = recipe.make_run(prepared, None, 0).run

  def losses(change):
    state, frozen = run.start()
    batches = recipe.make_run(prepared, None, 0).run.batches
    for _ in range(2):  # Adapters at their start change nothing.
      batch = next(batches)
      batch['seeds'] = batch['seeds'] + np.uint32(change)
      batch = sharding.put_batch(batch, run.mesh)
      state, values = run.train_step(state, batch, frozen)
      yield float(values['loss'])

  first, again, other = (tuple(losses(change)) for change in (0, 0, 1))
  assert first == again
  assert first[0] == other[0] and first[1] != other[1]
