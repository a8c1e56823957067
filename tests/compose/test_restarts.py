"""Adapters that restart in a program: what is checked, trained and kept."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from gnlorp_jax import optim
from gnlorp_jax.compose import optimizer, program
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  MeshConfig,
  OptimConfig,
  StepConfig,
)
from gnlorp_jax.models import hf, llama
from gnlorp_jax.recipes.glue import recipe as glue_recipe
from gnlorp_jax.recipes.glue.settings import GlueConfig
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig
from gnlorp_jax.recipes.sft import recipe as sft_recipe
from gnlorp_jax.recipes.sft.settings import SftConfig
from gnlorp_jax.training import state as state_lib
from gnlorp_jax.training.checkpoint import Checkpointer
from gnlorp_jax.training.restarts import with_restarts

pytestmark = pytest.mark.usefixtures('compiled_once')

# Two of the seven kernels: compiling takes the time.
RULES = ('(q|down)_proj/kernel',)
ADAPTER = AdapterOptions(
  kind='lora', rank=2, rules=RULES, restart_every=2, restart_prune_share=0.75
)
JAGGED = OptimConfig(
  name='adamw',
  schedule='jagged',
  learning_rate=0.02,
  eps=1e-3,  # Roundings of a gradient near zero are no steps.
)
TINY = TrainConfig(
  batch_size=2,
  steps=6,
  model=llama.LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    max_seq_len=8,
  ),
  data=DataConfig(seq_len=8),
  optim=JAGGED,
  adapter=ADAPTER,
)


def planned(**changes):
  return recipe.plan(dataclasses.replace(TINY, **changes), jax.devices()[:1])


def batch(found, number):
  rng = np.random.default_rng(number)
  return {
    name: (
      rng.integers(0, 40, leaf.shape)
      if leaf.dtype == np.int32
      else np.ones(leaf.shape)
    ).astype(leaf.dtype)
    for name, leaf in found.abstract_batch.items()
  }


def start(found):
  numbers = optimizer.numbers(found.config.optim, found.config.steps)
  return found.program.start(jax.random.key(0), numbers)


@functools.cache
def trajectory(mode='whole', bits=None, kind='lora'):
  """Six steps with restarts after the second and fourth, on the host."""
  found = planned(
    step=StepConfig(mode=mode, weight_bits=bits),
    # Kernels that are not adapted would train, in 8 bits.
    adapter=dataclasses.replace(ADAPTER, kind=kind, train_others=bits is None),
  )
  state, frozen = start(found)
  assert frozen == {} == found.program.parameters.frozen
  states, rows = [jax.tree.map(np.array, state)], []
  for number in range(1, 7):
    state, metrics = found.program.train_step(
      state, batch(found, number), frozen
    )
    states.append(jax.tree.map(np.array, state))
    rows.append({name: float(x) for name, x in metrics.items()})
  assert found.program.train_step._cache_size() == 1
  return found, states, rows


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def test_state_holds_the_whole_model_and_the_optimizer_what_trains():
  found, states, rows = trajectory()
  built = found.program
  params = flat(states[0].params)
  assert params.keys() == flat(built.abstract_state.params).keys()
  base = set(
    flat(jax.eval_shape(llama.make(TINY.model).init, jax.random.key(0)))
  )
  assert base < set(params)
  trained = set(flat(built.parameters.trained))
  adapted = {
    f'layers/{name}/kernel' for name in ('attn/q_proj', 'mlp/down_proj')
  }
  assert set(params) - trained == adapted
  size = sum(2 * params[name].size for name in trained)
  assert optim.inspect.state_bytes(states[0].opt_state)['moments'] == 4 * size
  assert [row['restarts'] for row in rows] == [0, 1, 1, 2, 2, 2]
  report = {row.name: row for row in program.report(built)}
  assert {n for n, row in report.items() if row.label == 'frozen'} == adapted
  assert set(report) == set(params)


def test_all_that_trains_moves_and_kernels_move_at_restarts():
  found, states, _ = trajectory()
  params = [flat(state.params) for state in states]
  for name in params[0]:
    moved = [
      np.any(a[name] != b[name])
      for a, b in zip(params, params[1:], strict=False)
    ]
    if name.endswith('_proj/kernel') and name not in flat(
      found.program.parameters.trained
    ):
      assert moved == [False, True, False, True, False, False], name
    elif not name.endswith('lora_a'):  # Its gradient is zero while B is.
      assert all(moved), name
  b = 'layers/attn/q_proj/lora_b'
  assert not np.any(params[0][b]) and np.any(params[1][b])
  assert not np.any(params[2][b]) and np.any(params[3][b])


def restarted(found, state, shardings=None):
  """A state after an update that changes nothing, and the restart due then."""

  def nothing(state, batch, frozen):
    return state._replace(step=state.step + 1), {}

  take = jax.jit(
    lambda state: with_restarts(nothing, found.program.restarts)(state, {})[0],
    out_shardings=shardings,
  )
  return take(state._replace(step=jnp.ones_like(state.step)))


@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_model_computes_the_same_after_a_restart(kind):
  found = planned(adapter=dataclasses.replace(ADAPTER, kind=kind))
  state, _ = start(found)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), state.params
  )
  after = restarted(found, state._replace(params=params)).params
  tokens = batch(found, 9)['inputs']
  apply = jax.jit(found.program.apply)
  expected = apply(params, {}, tokens)
  np.testing.assert_allclose(apply(after, {}, tokens), expected, atol=1e-5)
  before, new = flat(params), flat(after)
  changed = {n for n in before if np.any(before[n] != new[n])}
  names = {n.split('/')[-1] for n in changed}
  magnitude = {'magnitude'} if kind == 'dora' else set()
  assert names == {'kernel', 'lora_a', 'lora_b'} | magnitude
  # An export has the same kernels, whether they are folded now or then.
  kernels = (
    np.asarray(
      found.program.parameters.merge(tree, {})['layers']['attn']['q_proj'][
        'kernel'
      ][1]
    )
    for tree in (params, after)
  )
  np.testing.assert_allclose(*kernels, atol=1e-6)


@pytest.mark.parametrize(
  'bits', [None, pytest.param(8, marks=pytest.mark.slow)]
)
def test_layerwise_steps_are_whole_steps(bits):
  _, states, rows = trajectory('layerwise', bits)
  _, expected, expected_rows = trajectory('whole', bits)
  for row, other in zip(rows, expected_rows, strict=True):
    np.testing.assert_allclose(row['loss'], other['loss'], rtol=1e-4)
    assert row['restarts'] == other['restarts']
  if bits is None:  # A rounding of a gradient may be one of a code.
    for name, x in flat(states[-1].params).items():
      y = flat(expected[-1].params)[name]
      np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
  else:
    codes = [
      s.params['layers']['attn']['q_proj']['kernel'].codes for s in states
    ]
    moved = [np.any(a != b) for a, b in zip(codes, codes[1:], strict=False)]
    assert moved == [False, True, False, True, False, False]


@pytest.mark.parametrize('number', [2, 3])
def test_resumed_run_is_the_same_to_the_last_bit(number, tmp_path):
  """Right at a restart, and in the middle of a cycle."""
  found, states, _ = trajectory()
  abstract = found.program.abstract_state
  with Checkpointer(tmp_path) as saved:
    saved.save(number, states[number], {}, {}, wait=True)
    state, _, _ = saved.restore_latest(abstract)
  for later in range(number + 1, 7):
    state, _ = found.program.train_step(state, batch(found, later), {})
  jax.tree.map(np.testing.assert_array_equal, state, states[6])


def test_run_may_start_from_a_trained_model(tmp_path):
  weights = jax.jit(llama.make(TINY.model).init)(jax.random.key(7))
  hf.export(tmp_path, weights, llama.HF_TENSORS, llama.config_to_hf(TINY.model))
  state, _ = start(planned(init_from=str(tmp_path)))
  params = flat(state.params)
  for name, x in flat(weights).items():
    np.testing.assert_array_equal(params[name], x)


def test_others_stay_where_asked_to():
  adapter = dataclasses.replace(ADAPTER, train_others=False)
  built = planned(adapter=adapter).program
  trained = flat(built.parameters.trained)
  assert {name.split('/')[-1] for name in trained} == {'lora_a', 'lora_b'}
  assert set(trained) < set(flat(built.abstract_state.params))
  lora = AdapterOptions(kind='lora', rules=RULES, train_others=True)
  built = planned(adapter=lora, optim=OptimConfig(name='adamw')).program
  assert 'embed/embedding' in flat(built.parameters.trained)
  assert built.restarts is None
  assert set(flat(built.parameters.frozen)) == {
    'layers/attn/q_proj/kernel',
    'layers/mlp/down_proj/kernel',
  }


def test_devices_that_share_the_weights_restart_them_alike():
  model = dataclasses.replace(TINY.model, hidden_size=96)
  found = []
  for count in (1, 2):
    mesh = MeshConfig(data=1, fsdp=count)
    config = dataclasses.replace(TINY, model=model, mesh=mesh)
    built = recipe.plan(config, jax.devices()[:count])
    state, _ = start(built)
    shardings = state_lib.shardings(state)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda x, s, rng=rng: jax.device_put(
        np.asarray(x) + rng.normal(size=x.shape).astype(np.float32), s
      ),
      state.params,
      shardings.params,
    )
    found.append(restarted(built, state._replace(params=params), shardings))
  name = 'layers/attn/q_proj/kernel'
  kernel = flat(found[1].params)[name]
  assert not kernel.sharding.is_fully_replicated
  assert np.any(np.asarray(kernel) != np.asarray(flat(params)[name]))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *found
  )


def sft_plan(**options):
  config = SftConfig(
    method='lora',
    steps=9,
    optim=dataclasses.replace(SftConfig().optim, schedule='jagged'),
    adapter=AdapterOptions(restart_every=4),
    **options,
  )
  return sft_recipe.plan(config, 1)


def glue_plan():
  config = GlueConfig(
    method='lora',
    optim=dataclasses.replace(GlueConfig().optim, schedule='jagged'),
    adapter=AdapterOptions(restart_every=4),
  )
  return glue_recipe.plan(config, 1)


@pytest.mark.parametrize('plan', [sft_plan, glue_plan])
def test_every_recipe_restarts(plan):
  found = plan()
  built = found.program
  assert found.config.optim.cycle == built.restarts.every == 4
  assert built.parameters.frozen == {}
  base = flat(built.restarts.parameters.frozen)
  assert base and all(name.endswith('/kernel') for name in base)
  state, metrics = jax.eval_shape(
    built.train_step, built.abstract_state, found.abstract_batch, {}
  )
  assert jax.tree.structure(state) == jax.tree.structure(built.abstract_state)
  assert metrics['restarts'].dtype == np.int32


# What is refused, and what is warned of.


def message(**changes):
  with pytest.raises(ValueError) as error:
    planned(**changes)
  return str(error.value)


def test_what_cannot_restart_is_told():
  assert message(step=StepConfig(weight_bits=4)) == (
    'adapter.restart_every=2 folds adapters into their kernels, and '
    'step.weight_bits=4 rounds these to 16 values, to nearest: most of what '
    'was learned would be lost. Use step.weight_bits=8, which rounds at '
    'random, or None.'
  )
  assert message(steps=2) == (
    'adapter.restart_every=2 must be less than the steps of the run, 2: there '
    'is no restart after the last. Lower it, or leave it out.'
  )
  assert message(optim=dataclasses.replace(JAGGED, warmup_fraction=0.5)) == (
    'optim.warmup_fraction=0.5 of 6 steps are 3, more than a cycle '
    '(adapter.restart_every or optim.cycle) of 2: the learning rate would '
    'restart before it reached its peak. Lower the former or raise the latter.'
  )
  rules = (('lora_', 'low_rank'), ('.*', 'full'))
  low_rank = OptimConfig(
    name='galore', schedule='jagged', rank=1, param_labels=rules
  )
  assert message(optim=low_rank) == (
    "adapter.restart_every=2 draws new factors, and optim.name='galore' keeps "
    "['subspace'] of the old ones. Label the factors 'full' (which they are "
    "without optim.param_labels), or use optim.name='adamw'."
  )
  for name, value in (('restart_every', 2), ('train_others', True)):
    assert message(
      adapter=AdapterOptions(**{name: value}), optim=OptimConfig(name='adamw')
    ) == (
      f'adapter.{name}={value} needs adapters: give adapter.kind, such as '
      "'lora'."
    )


@pytest.mark.parametrize(
  ('adapter', 'optim_config', 'text'),
  [
    (
      ADAPTER,
      OptimConfig(name='adamw'),
      'adapter.restart_every=2 prunes moments at every restart, and '
      "optim.schedule='cosine' does not lower the learning rate for it: runs "
      "may diverge. Use optim.schedule='jagged'.",
    ),
    (
      dataclasses.replace(ADAPTER, restart_every=None, restart_prune_share=0.9),
      dataclasses.replace(JAGGED, cycle=3),
      "optim.schedule='jagged' lets the learning rate rise again in cycles "
      'without restarts, for which it is meant: give adapter.restart_every, or '
      "use optim.schedule='cosine'.",
    ),
    (
      dataclasses.replace(ADAPTER, restart_every=None),
      OptimConfig(name='adamw'),
      'adapter.restart_prune_share=0.75 has no effect without '
      'adapter.restart_every.',
    ),
    (ADAPTER, JAGGED, None),
    (AdapterOptions(), OptimConfig(name='adamw'), None),
  ],
)
def test_half_of_relora_is_warned_of(adapter, optim_config, text, caplog):
  with caplog.at_level(logging.WARNING, logger='gnlorp_jax.compose.restarts'):
    planned(adapter=adapter, optim=optim_config)
  assert caplog.messages == ([] if text is None else [text])


def test_optimizer_with_subspaces_projects_no_factors_that_restart():
  found = planned(optim=OptimConfig(schedule='jagged', rank=1))
  labels = {row.name: row.label for row in program.report(found.program)}
  assert set(labels.values()) == {'full', 'frozen'}
