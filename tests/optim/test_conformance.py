"""Every optimizer name through the same demands.

`VARIANTS` is the one table of names and of forms worth testing apart; a new
name is one line in it. Each variant's step is compiled once, for one tree that
holds every kind of parameter, and serves all demands that need no other one.
"""

import functools
import inspect as python_inspect
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnlorp_jax import optim
from gnlorp_jax.optim import (
  LazyRefresh,
  inspect,
  projections,
  stochastic_rounding,
)
from gnlorp_jax.optim.parts.norm_growth import NO_NORM
from gnlorp_jax.optim.quantized.arrays import QuantizedArray, dequantize
from gnlorp_jax.training import sharding
from gnlorp_jax.training.checkpoint import Checkpointer

variant = functools.partial
LOW_RANK = {'rank': 8, 'update_proj_gap': 3}
EXACT = {
  'projection': projections.get('svd', solver='exact'),
  'spread_refreshes': False,
}
FINE = {'rank': 3, 'update_proj_gap': 3, 'granularity': 2}
# Every subspace counts as at rest, from the first comparison on.
RESTING = {'lazy_refresh': LazyRefresh(threshold=-1.0, queue=1)}
VARIANTS = {
  'adamw': variant(optim.adamw),
  'adamw, 8 bits': variant(optim.adamw, moment_bits=8),
  'alice': variant(optim.alice, b3=0.9, leading=4, scale=1.0, **LOW_RANK),
  'alice0': variant(optim.alice0, leading=4, scale=1.0, **LOW_RANK),
  'apollo': variant(optim.apollo, **LOW_RANK),
  'apollo_mini': variant(optim.apollo_mini, update_proj_gap=3),
  'dct_adamw': variant(optim.dct_adamw, error_bits=8, **LOW_RANK),
  'fira': variant(optim.fira, **LOW_RANK),
  'frugal': variant(
    optim.frugal,
    projection=projections.get('svd', solver='sampled'),
    **LOW_RANK,
  ),
  'galore': variant(optim.galore, **LOW_RANK),
  'galore, long': variant(optim.galore, side='long', **LOW_RANK),
  'galore_adafactor': variant(optim.galore_adafactor, b1=0.9, **LOW_RANK),
  'gradnormlorp': variant(optim.gradnormlorp, **LOW_RANK),
  'gradnormlorp, tracked': variant(
    optim.gradnormlorp, norm_state='tracked', **LOW_RANK
  ),
  'gradnormlorp, both': variant(
    optim.gradnormlorp, side='both', **LOW_RANK, **EXACT
  ),
  'gradnormlorp, 4 bits': variant(
    optim.gradnormlorp, moment_bits=4, **LOW_RANK
  ),
  'ldadam': variant(optim.ldadam, rank=8),
  'projfactor': variant(optim.projfactor, **FINE),
  'muon': variant(optim.muon, moment_bits=8, consistent_rms=1.0),
  'racs': variant(optim.racs, scale=1.0),
  'scale': variant(optim.scale),
  'sinkgd': variant(optim.sinkgd, scale=1.0),
  'subtrack': variant(optim.subtrack, **LOW_RANK),
  'vlorp': variant(optim.vlorp, **FINE),
  'q_galore': variant(optim.q_galore, **LOW_RANK, **RESTING),
}
# The variant that bears an alias' own name.
ALIASES = [name for name, tx in VARIANTS.items() if tx.func.__name__ == name]
# Of each mechanism one, for a quick look.
QUICK = ('adamw, 8 bits', 'apollo', 'galore', 'gradnormlorp', 'ldadam')
every_variant = pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in VARIANTS
  ],
)
every_alias = pytest.mark.parametrize('name', ALIASES)


def variants_but(*names):
  assert set(names) <= set(VARIANTS)
  found = [name for name in VARIANTS if name not in names]
  return pytest.mark.parametrize('name', found)


# Some variants are left out here: stacks and meshes of apollo, fira, ldadam and
# of few bits are tested in files of their own, and what alice0, galore,
# gradnormlorp, scale and vlorp do is part of what a variant with more options
# does, or sinkgd.
variant_of_slices = variants_but(
  'adamw',
  'adamw, 8 bits',
  'alice0',
  'apollo',
  'fira',
  'galore',
  'galore, long',
  'gradnormlorp',
  'gradnormlorp, 4 bits',
  'ldadam',
  'scale',
  'vlorp',
)
variant_on_mesh = variants_but(
  'adamw',
  'adamw, 8 bits',
  'alice0',
  'apollo',
  'fira',
  'frugal',
  'gradnormlorp',
  'gradnormlorp, 4 bits',
  'ldadam',
  'scale',
  'subtrack',
  'vlorp',
)
# What they compute is part of what a variant with more options does: adamw is
# in all, galore in gradnormlorp, gradnormlorp in that of 4 bits, vlorp in
# projfactor, scale in sinkgd, alice0 in alice, and apollo_mini is apollo with
# one factor for a matrix.
PARTS_OF_OTHERS = (
  'adamw',
  'alice0',
  'apollo_mini',
  'galore',
  'galore, long',
  'gradnormlorp',
  'scale',
  'vlorp',
)
# Aliases with a link of their own that takes the numbers; in the others the
# links of these take them, so that it is enough to trace them.
INJECTED = (
  'apollo',
  'dct_adamw',
  'fira',
  'galore_adafactor',
  'gradnormlorp',
  'ldadam',
  'projfactor',
)

RATE, DECAY, STEPS, FIT_STEPS = 1e-2, 0.1, 7, 40
LABELS = [('frozen', 'frozen'), ('kernel', 'low_rank'), ('.*', 'full')]
# Moments [512, 8] of a projected kernel and [64, 80] of another parameter are
# large enough to be quantised. The rank exceeds the shorter axis of `down`.
SHAPES = {
  'embed': {'embedding': (64, 80)},
  'frozen': {'kernel': (4, 4)},
  'layers': {
    'down': {'kernel': (40, 6)},
    'up': {'kernel': (2, 16, 512), 'bias': (2, 512)},
  },
}
MESH_RULES = (('.*', sharding.shard_largest_axis('fsdp', min_size=1024)),)


def random_tree(seed):
  """Standard normal numbers of the shapes above, on the host."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def random_grads(seed):
  """Gradients of which no two singular values are nearly equal."""
  grads = random_tree(seed)
  grads['layers']['up']['kernel'] *= np.float32(0.8) ** np.arange(16)[:, None]
  return grads


PARAMS = random_tree(0)
GRADS = [random_grads(1 + step) for step in range(STEPS)]
# Out of reach within `FIT_STEPS`, near which a constant rate would overshoot.
TARGET = jax.tree.map(lambda p, d: p + 0.2 * d, PARAMS, random_tree(99))


def up_of(tree):
  """Of each label one parameter, which is enough for a program by itself."""
  return {'frozen': tree['frozen'], 'layers': {'up': tree['layers']['up']}}


UP = up_of(PARAMS)


def build(name, learning_rate=RATE, **options):
  """A variant that decays weights and freezes a parameter."""
  return VARIANTS[name](
    learning_rate, weight_decay=DECAY, param_labels=LABELS, **options
  )


def step_of(tx):
  """The training step of an optimizer."""

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


class Compiled(NamedTuple):
  """A variant, ready for many runs."""

  tx: optax.GradientTransformation
  state: Any  # at the start
  step: Any  # it overwrites parameters and state


@functools.cache
def compiled(name):
  tx = build(name)
  step = jax.jit(step_of(tx), donate_argnums=(0, 1))
  return Compiled(tx, tx.init(PARAMS), step)


def on_device(tree):
  """A copy that a step may overwrite."""
  return jax.tree.map(jnp.array, tree)


def on_host(tree):
  """A copy that no step overwrites."""
  return jax.tree.map(np.array, tree)


def run(step, params, state, grads):
  """Parameters and state after a step for each tree of gradients."""
  params, state = on_device((params, state))
  for grad in grads:
    params, state = step(params, state, grad)
  return on_host((params, state))


def fit(step, params, state, num_steps=FIT_STEPS, target=TARGET):
  """Parameters after steps along the gradient of half |params - target|^2."""
  params, state = on_device((params, state))
  for _ in range(num_steps):
    grads = jax.tree.map(lambda p, t: p - t.astype(p.dtype), params, target)
    params, state = step(params, state, grads)
  return on_host(params)


@functools.cache
def trained(name, num_steps=STEPS):
  """Parameters and state of a variant after its first steps."""
  _, state, step = compiled(name)
  return run(step, PARAMS, state, GRADS[:num_steps])


class MeshRun(NamedTuple):
  """What `trained` returns, and how arrays lay on four devices."""

  result: Any
  shardings: Any
  rules: Any  # the shardings that were asked for
  num_programs: int


@functools.cache
def trained_on_mesh(name):
  tx, state, _ = compiled(name)
  rules = sharding.infer_shardings(
    (PARAMS, state), sharding.make_mesh(1, 4), MESH_RULES
  )
  step = jax.jit(step_of(tx), donate_argnums=(0, 1), out_shardings=rules)
  params, state = jax.device_put(on_host((PARAMS, state)), rules)
  for grads in GRADS:
    params, state = step(params, state, jax.device_put(grads, rules[0]))
  shardings = jax.tree.map(lambda x: x.sharding, (params, state))
  return MeshRun(on_host((params, state)), shardings, rules, step._cache_size())


def is_quantized(x):
  return isinstance(x, QuantizedArray)


def named_leaves(tree, is_leaf=None):
  return [
    (jax.tree_util.keystr(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf)
  ]


def quantized(state):
  """Names of what a state keeps in few bits."""
  leaves = named_leaves(state, is_quantized)
  return [name for name, leaf in leaves if is_quantized(leaf)]


def decoded(state):
  """A state with numbers for codes."""
  return jax.tree.map(
    lambda x: dequantize(x) if is_quantized(x) else x,
    state,
    is_leaf=is_quantized,
  )


def types(tree):
  return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, tolerance):
  """Integers are equal, arrays up to that share of their length."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (name, a), b in zip(
    named_leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    if jnp.issubdtype(b.dtype, jnp.integer):
      np.testing.assert_array_equal(a, b, name)
    else:
      difference = np.linalg.norm(np.float64(a) - np.float64(b))
      length = np.linalg.norm(np.float64(b))
      # Parameters (the first tree) of length 160 are rounded at each of 7
      # steps: 2**-24 * 160 * sqrt(7). And what a projection of full rank loses
      # of a gradient is rounding alone.
      floor = 3e-5 if name.startswith('[0]') or 'error' in name else 0
      assert difference <= max(tolerance * length, floor), name


def assert_same_training(actual, expected, name, start=PARAMS):
  """Parameters have moved alike, and states are, up to roundings.

  Sums in another order differ by some 1e-7, which bases and Adam's division by
  small second moments make about ten times larger. More in two cases. A number
  between two codes may get the other one: that is a hundredth of it or, of 4
  bits, a tenth, but few of thousands do. And between the singular vectors of
  both sides a gradient is diagonal: Adam divides what roundings put beside the
  diagonal by its own size.
  """
  (params, state), (expected_params, expected_state) = actual, expected
  rough = quantized(state) or VARIANTS[name].keywords.get('side') == 'both'
  assert_close(
    (jax.tree.map(np.subtract, params, start), decoded(state)),
    (
      jax.tree.map(np.subtract, expected_params, start),
      decoded(expected_state),
    ),
    1e-3 if rough else 1e-5,
  )


def assert_nearer(params, share, start=PARAMS, target=TARGET):
  """Each parameter has come nearer to the target, but for the frozen one."""
  for (name, p), begin, end in zip(
    named_leaves(params),
    jax.tree.leaves(start),
    jax.tree.leaves(target),
    strict=True,
  ):
    before = np.linalg.norm(begin - end)
    after = np.linalg.norm(np.float32(p) - end)
    assert 'frozen' in name or after < share * before, (name, after / before)


def assert_finite(tree):
  assert all(np.isfinite(np.float32(x)).all() for x in jax.tree.leaves(tree))


def test_every_public_alias_is_in_the_table():
  def is_alias(member):
    if not python_inspect.isfunction(member):
      return False
    parameters = python_inspect.signature(member).parameters
    return next(iter(parameters), None) == 'learning_rate'

  public = {name for name, member in vars(optim).items() if is_alias(member)}
  # A link of a chain, and the copy of a PyTorch optimizer with its errors.
  assert public - {'descend', 'released_gradnormlorp'} == set(ALIASES)


@every_variant
def test_what_a_variant_is_named_for_takes_place(name):
  _, state = trained(name)
  options = python_inspect.signature(VARIANTS[name]).parameters
  for option, part in (
    ('moment_bits', '.mu'),
    ('basis_bits', '.basis'),
    ('error_bits', '.error'),
  ):
    few = option in options and options[option].default not in (None, 32)
    found = [path for path in quantized(state) if part in path]
    assert any("['up']" in path for path in found) == few, option
  gaps = [leaf for path, leaf in named_leaves(state) if path.endswith('.gap')]
  assert bool(gaps) == ('lazy_refresh' in VARIANTS[name].keywords)
  assert all((gap > LOW_RANK['update_proj_gap']).any() for gap in gaps)


@pytest.mark.slow
@variant_of_slices
def test_stack_equals_its_slices(name):
  tx, state, _ = compiled(name)

  def sliced(tree):
    layers = dict(tree['layers'])
    up = layers.pop('up')
    for i in range(2):
      layers[f'up{i}'] = jax.tree.map(lambda x, i=i: x[i], up)
    return {**tree, 'layers': layers}

  params = sliced(PARAMS)
  structure = jax.eval_shape(tx.init, params)

  def sliced_state(state):
    # Also where matrices start from random numbers of their own.
    leaves = dict(named_leaves(state))

    def leaf(path, _):
      name = jax.tree_util.keystr(path)
      found = re.search(r'up(\d)', name)
      if found is None:
        return leaves[name]
      return leaves[name.replace(found[0], 'up')][int(found[1])]

    return jax.tree_util.tree_map_with_path(leaf, structure)

  stacked_params, stacked_state = trained(name)
  step = jax.jit(step_of(tx))
  assert_same_training(
    run(step, params, sliced_state(state), map(sliced, GRADS)),
    (sliced(stacked_params), sliced_state(stacked_state)),
    name,
    params,
  )


@pytest.mark.slow
@variant_on_mesh
def test_mesh_equals_one_device(name):
  run = trained_on_mesh(name)
  assert_same_training(run.result, trained(name), name)
  assert run.num_programs == 1
  assert run.shardings == run.rules
  assert not all(s.is_fully_replicated for s in jax.tree.leaves(run.rules[1]))


@every_variant
def test_types_and_shapes_stay(name):
  tx, state, _ = compiled(name)
  assert types(jax.eval_shape(tx.init, PARAMS)) == types(state)
  assert types(trained(name)) == types((PARAMS, state))


@every_variant
def test_one_program_serves_all_steps(name):
  trained(name)
  assert compiled(name).step._cache_size() == 1


@every_variant
def test_buffers_are_distinct_and_overwritten(name):
  _, state, step = compiled(name)
  buffers = jax.tree.leaves(state)
  pointers = {buffer.unsafe_buffer_pointer() for buffer in buffers}
  assert len(pointers) == len(buffers)
  given = on_device((PARAMS, state))
  step(*given, GRADS[0])
  assert all(buffer.is_deleted() for buffer in jax.tree.leaves(given))


@every_variant
def test_bfloat16_parameters_have_float32_states_and_updates_of_choice(name):
  tx, state, _ = compiled(name)
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
  # The arguments are for other links of a user's chain.
  update = functools.partial(tx.update, value=1.0, nobody_knows=2)
  updates, after = jax.eval_shape(update, params, state, params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype('bfloat16')}
  unrounded = build(name, update_dtype=jnp.float32).update
  updates, _ = jax.eval_shape(unrounded, params, state, params)
  assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype('float32')}
  assert types(jax.eval_shape(tx.init, params)) == types(state)
  assert types(after) == types(state)


@every_variant
def test_x64_changes_neither_types_nor_numbers(name):
  tx, state, _ = compiled(name)
  with jax.enable_x64(True):
    for dtype in (jnp.float64, jnp.bfloat16):
      params = jax.tree.map(lambda p, d=dtype: p.astype(d), PARAMS)
      start = jax.eval_shape(tx.init, params)
      updates, after = jax.eval_shape(tx.update, params, start, params)
      assert types(updates) == types(params)
      assert types(start) == types(after) == types(state)
    first_step = jax.jit(lambda p, g: step_of(tx)(p, tx.init(p), g))
    lowered = first_step.lower(PARAMS, GRADS[0])
    # No array on the way either; numbers of Python pass for float64.
    assert 'xf64>' not in lowered.as_text()
    if name in PARTS_OF_OTHERS:
      return
    result = on_host(lowered.compile()(PARAMS, GRADS[0]))
  assert types(result) == types((PARAMS, state))
  assert_same_training(result, trained(name, 1), name)


@every_variant
def test_map_params_is_the_identity(name):
  tx, state, _ = compiled(name)
  again = optax.tree.map_params(tx, lambda x: x, state)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  assert_same(again, state)


@pytest.fixture(scope='module')
def restored(tmp_path_factory):
  """States of all variants half-way, out of one checkpoint.

  Among them are records of every kind: codes, seeds, and columns of the DCT.
  """
  # Put where they will be restored to: one program sums them up both times.
  saved = jax.device_put(
    {name: trained(name, STEPS // 2)[1] for name in VARIANTS}, jax.devices()[0]
  )
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved
  )
  with Checkpointer(tmp_path_factory.mktemp('saved')) as checkpointer:
    checkpointer.save(STEPS // 2, saved, {}, {})
    found, _, _ = checkpointer.restore_latest(abstract)
  return on_host(found)


@pytest.mark.slow
@every_variant
def test_checkpoint_continues_bit_for_bit(name, restored):
  params, _ = trained(name, STEPS // 2)
  resumed = run(
    compiled(name).step, params, restored[name], GRADS[STEPS // 2 :]
  )
  assert_same(resumed, trained(name))


@every_variant
def test_nonfinite_gradients_leave_no_trace_but_a_count(name):
  _, state, step = compiled(name)
  poisoned = []
  for index, value in enumerate((np.nan, np.inf)):
    grads = on_host(GRADS[index])
    grads['layers']['up']['bias' if index else 'kernel'][0, 0] = value
    poisoned.append(grads)
  # At the first step, and where all subspaces may be due.
  grads = [poisoned[0], *GRADS[:3], poisoned[1], *GRADS[3:]]
  params, state = run(step, PARAMS, state, grads)
  assert int(inspect.skipped_steps(state)) == 2
  expected_params, expected_state = trained(name)
  assert_same(params, expected_params)
  assert_same(state.inner_state, expected_state.inner_state)


@every_variant
def test_zero_and_rank_deficient_gradients_stay_finite(name):
  _, state, step = compiled(name)
  grads = [
    jax.tree.map(lambda p, size=size: np.full_like(p, size), PARAMS)
    for size in (0.0, 1e-3, 0.0, 1e-3, 0.0, 1e3)
  ]
  params, state = run(step, PARAMS, state, grads)
  assert_finite(params)
  for path, x in named_leaves(state):
    # Nothing was outside of the subspaces of alice: no norm is on record yet.
    is_unset = 'norm' in path and np.all(x == NO_NORM)
    assert is_unset or np.isfinite(np.float32(x)).all(), path
  for (path, p), start in zip(
    named_leaves(params), jax.tree.leaves(PARAMS), strict=True
  ):
    assert 'frozen' in path or np.abs(p - start).max() > 1e-3, path


@every_variant
def test_parameters_without_elements_rest(name):
  tx = build(name)
  empty = {
    f'layer_{i}': {'kernel': np.zeros(shape, np.float32)}
    for i, shape in enumerate(
      [(0, 8), (8, 0), (0, 0), (0, 4, 8), (2, 0, 8), (2, 8, 0)]
    )
  }
  empty['embed'] = {'embedding': np.zeros((0, 80), np.float32)}
  empty['frozen'] = {'kernel': np.zeros((0, 4), np.float32)}
  updates, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(empty)
  assert types(updates) == types(empty)
  assert_finite(state)
  both = {'empty': empty, 'other': UP}
  state = jax.eval_shape(tx.init, both)
  updates, after = jax.eval_shape(tx.update, both, state, both)
  assert types(updates) == types(both)
  assert types(after) == types(state)


@every_variant
def test_weight_decay_shrinks_and_frozen_parameters_rest(name):
  _, state, step = compiled(name)
  params, state = run(
    step, PARAMS, state, [jax.tree.map(np.zeros_like, PARAMS)]
  )
  expected = jax.tree.map(lambda p: p * (1 - RATE * DECAY), PARAMS)
  expected['frozen'] = PARAMS['frozen']
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), params, expected
  )
  assert_same(trained(name)[0]['frozen'], PARAMS['frozen'])
  assert not any('frozen' in path for path, _ in named_leaves(state))


@every_variant
def test_regression_on_matrices_descends(name):
  _, state, step = compiled(name)
  assert_nearer(fit(step, PARAMS, state), 0.99)


@every_variant
def test_zero_initialised_kernel_learns(name):
  _, state, step = compiled(name)
  params = on_host(PARAMS)
  params['layers']['up']['kernel'][:] = 0
  new = fit(step, params, state, num_steps=5)
  assert_finite(new)
  lengths = np.linalg.norm(new['layers']['up']['kernel'], axis=-2)
  assert (lengths > 1e-3).all()


@every_variant
def test_report_adds_up(name):
  tx, state, _ = compiled(name)
  rows = inspect.report(PARAMS, tx, LABELS)
  names = ['embedding', *(f"['{key}']" for key in ('down', 'up'))]
  unowned = sum(  # Step counts belong to no parameter.
    leaf.nbytes
    for path, leaf in named_leaves(state)
    if not any(name in path for name in names)
  )
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  assert sum(row.state_bytes for row in rows) + unowned == total
  assert unowned <= 64
  assert sum(inspect.state_bytes(state).values()) == total
  assert inspect.state_bytes(state)['moments'] > 0


@every_variant
def test_report_tells_rank_and_sides(name):
  rows = {row.name: row for row in inspect.report(PARAMS, build(name), LABELS)}
  options = python_inspect.signature(VARIANTS[name]).parameters
  up, down = rows['layers/up/kernel'], rows['layers/down/kernel']
  if 'side' not in options:
    assert (up.rank, up.side) == (None, '')
    return
  rank = options['rank'].default if 'rank' in options else 1
  sides = {
    'short': ('in', 'out'),
    'long': ('out', 'in'),
    'both': ('in+out',) * 2,
    'in': ('in', 'in'),
    'out': ('out', 'out'),
  }
  assert (up.rank, down.rank) == (rank, min(rank, 6))
  assert (up.side, down.side) == sides[options['side'].default]
  assert ('nothing is compressed' in down.reason) == (rank >= 6)


@pytest.mark.slow
@every_alias
def test_injected_hyperparameters_equal_fixed_ones(name):
  # Integers fix shapes or the program; the other numbers may change.
  options = python_inspect.signature(VARIANTS[name]).parameters
  static = [key for key, p in options.items() if isinstance(p.default, int)]
  tx = optax.inject_hyperparams(VARIANTS[name], static_args=static)(
    RATE, weight_decay=DECAY, param_labels=LABELS
  )
  if name not in INJECTED:
    state = jax.eval_shape(tx.init, PARAMS)
    _, after = jax.eval_shape(step_of(tx), PARAMS, state, GRADS[0])
    assert types(after) == types(state)
    return
  step = jax.jit(step_of(tx))
  params, state = run(step, PARAMS, jax.jit(tx.init)(PARAMS), GRADS)
  # In float32, 1 - b2 is off by 5e-5.
  assert_close(
    jax.tree.map(np.subtract, params, PARAMS),
    jax.tree.map(np.subtract, trained(name)[0], PARAMS),
    1e-4,
  )
  state.hyperparams['learning_rate'] = np.zeros_like(
    state.hyperparams['learning_rate']
  )
  resting, _ = run(step, params, state, GRADS[:1])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), resting, params
  )


@pytest.mark.slow
@every_alias
def test_bfloat16_parameters_train_in_a_users_chain(name):
  # Normalised weights, a schedule, and links before and behind, all at once.
  options = python_inspect.signature(VARIANTS[name]).parameters
  normalised = {'weight_norm': True} if 'weight_norm' in options else {}
  schedule = optax.linear_schedule(RATE, RATE / 2, FIT_STEPS)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    build(name, schedule, **normalised),
    stochastic_rounding(),
  )
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), UP)
  new = fit(
    jax.jit(step_of(tx)), params, jax.jit(tx.init)(params), target=up_of(TARGET)
  )
  assert {p.dtype for p in jax.tree.leaves(new)} == {jnp.dtype('bfloat16')}
  assert_nearer(new, 0.99, UP, up_of(TARGET))
