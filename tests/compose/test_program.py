"""What a run computes: its steps, its start, its report."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax import optim
from gnlorp_jax.compose import optimizer, program
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  MeshConfig,
  OptimConfig,
  StepConfig,
)
from gnlorp_jax.models import llama
from gnlorp_jax.plan import collectives
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.recipes.pretrain.settings import DataConfig, TrainConfig
from gnlorp_jax.training import sharding

pytestmark = pytest.mark.usefixtures('compiled_once')

D, F, V, L, R = 16, 24, 300, 2, 4  # Width, feed-forward, vocabulary, ...
TINY = TrainConfig(
  batch_size=2,
  model=llama.LlamaConfig(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_layers=L,
    num_heads=2,
    max_seq_len=8,
  ),
  data=DataConfig(seq_len=8),
  optim=OptimConfig(name='adamw', clip_global_norm=None),
)


def planned(**changes):
  return recipe.plan(dataclasses.replace(TINY, **changes), jax.devices()[:1])


def ones(found):
  return jax.tree.map(
    lambda x: jnp.ones(x.shape, x.dtype), found.abstract_batch
  )


def start(found, seed=0):
  numbers = optimizer.numbers(found.config.optim, found.config.steps)
  return found.program.start(jax.random.key(seed), numbers)


@pytest.mark.parametrize(
  'mode', ['whole', pytest.param('layerwise', marks=pytest.mark.slow)]
)
def test_gradients_are_clipped_before_the_optimizer_sees_them(mode):
  # With so large an eps Adam's step is the gradient divided by it.
  adam = OptimConfig(
    name='adamw',
    eps=1e6,
    eps_mode='standard',
    clip_global_norm=0.01,
    learning_rate=1e3,
    weight_decay=0.0,
  )
  found = planned(optim=adam, step=StepConfig(mode=mode))
  state, frozen = start(found)
  _, metrics = found.program.train_step(state, ones(found), frozen)
  assert metrics['grad_norm'] > 0.1
  rate = optimizer.schedule(adam, found.config.steps)(0)
  np.testing.assert_allclose(
    metrics['update_norm'], rate * 0.01 / 1e6, rtol=1e-4
  )


def test_adapters_train_beside_4_bits_in_whole_and_layerwise_steps():
  """As beside the values that the codes stand for, which stay as they are."""
  # Two kernels have adapters, as compiling takes the time; all are in 4 bits.
  rules = ('(q|down)_proj/kernel',)
  losses = {}
  fields = {'adapter': AdapterOptions(kind='lora', rank=2, rules=rules)}
  adam = OptimConfig(name='adamw', learning_rate=0.02, warmup_fraction=0)
  for mode in ('whole', 'layerwise', 'decoded'):
    step = StepConfig(
      mode='layerwise' if mode == 'layerwise' else 'whole',
      weight_bits=None if mode == 'decoded' else 4,
    )
    found = planned(optim=adam, step=step, steps=20, **fields)
    state, frozen = start(found)
    if mode == 'whole':
      decode, kept = found.program.parameters.decode_exact, frozen
      codes = [np.asarray(x) for x in jax.tree.leaves(frozen)]
    if mode == 'decoded':
      frozen = jax.jit(decode)(kept)
    losses[mode] = []
    for _ in range(6):
      state, metrics = found.program.train_step(state, ones(found), frozen)
      losses[mode].append(float(metrics['loss']))
  assert losses['whole'][-1] < losses['whole'][0] - 0.01
  for mode in ('layerwise', 'decoded'):
    np.testing.assert_allclose(losses[mode], losses['whole'], rtol=1e-5)
  for leaf, before in zip(jax.tree.leaves(kept), codes, strict=True):
    np.testing.assert_array_equal(leaf, before)


def test_nothing_is_frozen_without_a_reason():
  found = planned().program
  assert found.parameters.frozen == {}
  assert jax.tree.structure(found.parameters.trained) == jax.tree.structure(
    jax.eval_shape(found.model.init, jax.random.key(0))
  )


@pytest.mark.parametrize(
  'changes', [{}, {'adapter': AdapterOptions(kind='lora', rank=2)}],
  ids=['whole', 'lora'],
)  # fmt: skip
def test_start_is_what_the_abstract_state_says(changes):
  found = planned(**changes)
  state, frozen = start(found)
  for tree, like in (
    (state, found.program.abstract_state),
    (frozen, found.program.parameters.frozen),
  ):
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    for leaf, expected in zip(
      jax.tree.leaves(tree), jax.tree.leaves(like), strict=True
    ):
      assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
      assert leaf.sharding == expected.sharding
  assert int(state.step) == int(state.skipped) == 0
  numbers = optimizer.numbers(found.config.optim, found.config.steps)
  assert state.opt_state.hyperparams == numbers


def test_start_draws_the_models_own_weights():
  found = planned()
  state, _ = start(found, seed=5)
  expected = jax.jit(found.program.model.init)(jax.random.key(5))
  jax.tree.map(np.testing.assert_array_equal, state.params, expected)


def test_start_with_adapters_is_the_model_itself():
  found = planned(adapter=AdapterOptions(kind='dora', rank=2))
  state, frozen = start(found, seed=5)
  built = found.program
  base = jax.jit(llama.make(TINY.model).init)(jax.random.key(5))
  jax.tree.map(np.testing.assert_array_equal, frozen, base)
  tokens_BT = np.arange(16, dtype=np.int32).reshape(2, 8)
  np.testing.assert_allclose(
    jax.jit(built.apply)(state.params, frozen, tokens_BT),
    jax.jit(llama.make(TINY.model).apply)(base, tokens_BT),
    rtol=1e-5,
    atol=1e-6,
  )
  # A run that resumes makes the same base once more.
  again = built.parameters.start_frozen(jax.random.key(5))
  jax.tree.map(np.testing.assert_array_equal, again, frozen)


def test_state_that_was_read_gets_the_learning_rates_of_now():
  found = planned()
  state, _ = start(found)
  other = dataclasses.replace(found.config.optim, learning_rate=0.25)
  numbers = optimizer.numbers(other, 40)
  renewed = found.program.renew(state, numbers)
  assert renewed.opt_state.hyperparams == numbers
  assert renewed.opt_state.inner_state is state.opt_state.inner_state
  for name, number in renewed.opt_state.hyperparams.items():
    like = found.program.abstract_state.opt_state.hyperparams[name]
    assert number.sharding == like.sharding


def test_numbers_tell_what_an_instrument_shows():
  found = planned()
  instruments = found.program.instruments(
    found.config.optim, 20, tokens_per_step=16, flops_per_token=3.0
  )
  schedule = optimizer.schedule(found.config.optim, 20)
  assert [instruments.schedule(n) for n in range(20)] == [
    schedule(n) for n in range(20)
  ]
  held = optim.inspect.tree_bytes(found.program.abstract_state.opt_state)
  assert instruments.state_bytes == held
  assert instruments.tokens_per_step == 16
  assert instruments.flops_per_token == 3.0
  assert instruments.peak_flops is None  # That of a CPU is not known.


@pytest.mark.parametrize(('data', 'fsdp', 'size'), [(2, 1, 2), (2, 2, 4)])
def test_peak_is_that_of_all_devices(monkeypatch, data, fsdp, size):
  found = planned(mesh=MeshConfig(data=1)).program
  mesh = program.make_mesh(
    MeshConfig(data=data, fsdp=fsdp), 4, 1, jax.devices()[: data * fsdp]
  )
  kind = jax.devices()[0].device_kind
  monkeypatch.setitem(program.PEAK_FLOPS, kind, 7e12)
  instruments = found._replace(mesh=mesh).instruments(OptimConfig(), 10)
  assert instruments.peak_flops == size * 7e12


@pytest.mark.parametrize(
  ('config', 'batch_size', 'micro_batches', 'text'),
  [
    (
      MeshConfig(data=3),
      6,
      1,
      'data=3, fsdp=1 does not fit 4 devices: the product of the sizes must '
      'divide 4.',
    ),
    (
      MeshConfig(data=4),
      6,
      1,
      'batch_size=6 cannot be split over data=4, fsdp=1 and micro_batches=1: '
      'it must be a multiple of data*fsdp*micro_batches=4. Use 4 or 8.',
    ),
  ],
)
def test_devices_that_do_not_fit_are_told(
  config, batch_size, micro_batches, text
):
  with pytest.raises(ValueError) as error:
    program.make_mesh(config, batch_size, micro_batches)
  assert str(error.value) == text


# Weights that are split over devices.

WIDE = dataclasses.replace(
  TINY,
  batch_size=64,
  loss_chunk_tokens=2048,  # One chunk: each sums a gradient of the head.
  model=dataclasses.replace(
    TINY.model, hidden_size=128, intermediate_size=128, max_seq_len=32
  ),
  data=DataConfig(seq_len=32),
)


def on_one_and_on(mesh, **changes):
  """Bytes by kind that a step sends on a mesh, where it does as on a device."""
  outcomes, text = [], ''
  for sizes in ((1, 1), mesh):
    data, fsdp = sizes
    config = dataclasses.replace(
      WIDE, mesh=MeshConfig(data=data, fsdp=fsdp), **changes
    )
    found = recipe.plan(config, jax.devices()[: data * fsdp])
    state, frozen = start(found)
    batch = jax.device_put(
      ones(found), sharding.batch_sharding(found.program.mesh)
    )
    step = found.program.train_step.lower(state, batch, frozen).compile()
    text = step.as_text()
    outcomes.append(step(state, batch, frozen)[1])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    *outcomes,
  )
  by_kind = dict.fromkeys(collectives.KINDS, 0)
  for row in collectives.collectives(text):
    by_kind[row.kind] += row.bytes_per_step
  return by_kind


@pytest.mark.parametrize('mode', ['whole', 'layerwise'])
def test_split_weights_are_gathered_and_nothing_else(mode):
  """A step sends weights and gradients, however many tokens there are."""
  by_kind = on_one_and_on((1, 4), step=StepConfig(mode=mode))
  of_layer = 7 * 128 * 128 * 4
  outside = 2 * V * 128 * 4
  # Twice, as the backward pass computes a layer again.
  gathered = 2 * (L * of_layer + outside)
  assert L * of_layer < by_kind['all-gather'] <= gathered
  # XLA on CPUs sums whole gradients where a GPU's sums and splits them.
  summed = by_kind['all-reduce'] + by_kind['reduce-scatter']
  assert summed <= 1.01 * (L * of_layer + outside)
  assert not by_kind['all-to-all'] and not by_kind['collective-permute']


def test_split_weights_are_gathered_under_shard_map():
  """Where projected gradients alone cross the copies of split weights."""
  by_kind = on_one_and_on(
    (2, 2),
    step=StepConfig(mode='layerwise', accumulate='projected'),
    optim=OptimConfig(
      rank=R,
      clip_global_norm=None,
      param_labels=(('down_proj/kernel', 'low_rank'), ('.*', 'full')),
    ),
  )
  of_layer = 7 * 128 * 128 * 4
  outside = 2 * V * 128 * 4
  # XLA sums the embedding's gradient where its rows lie, for which it gathers
  # that of what was read of it, on half of the devices.
  read = 64 // 2 * 32 * 128 * 4
  bases = 2**14
  assert L * of_layer < by_kind['all-gather']
  assert by_kind['all-gather'] <= 2 * (L * of_layer + outside) + read + bases
  assert not by_kind['all-to-all'] and not by_kind['collective-permute']


# The report.


def rows_of(**changes):
  config = dataclasses.replace(TINY, **changes)
  return program.report(recipe.plan(config.on_one_device(), 1).program)


def test_report_totals_are_those_of_the_state():
  rows = rows_of(optim=OptimConfig(name='galore', rank=R))
  lines = optim.format_report(rows).splitlines()
  down = next(line for line in lines if line.startswith('layers/mlp/down_proj'))
  assert down.split()[1:5] == [f'{L}x{F}x{D}', 'low_rank', str(R), 'out']
  projected = L * (4 * D * D + 3 * D * F)
  full = 2 * V * D + 2 * L * D + D
  # All compress the axis of length D: the other one has D or F entries.
  low_rank = L * (4 * D * R + 3 * F * R)
  bases = L * 7 * D * R
  shown = 4 * (2 * (full + low_rank) + bases) / 1024
  total = lines[-1].split()
  # Beside moments and bases some statistics: less than a KiB.
  assert shown < float(total[1]) < shown + 1
  assert total[3] == f'{8 * (full + projected) / 1024:.1f}'


def test_report_needs_neither_the_devices_nor_data(monkeypatch):
  rows = rows_of(
    mesh=MeshConfig(data=512, fsdp=8),
    data=DataConfig(seq_len=8, source='nowhere'),
    batch_size=4096,
  )
  assert len(rows) == 12


def test_report_tells_what_does_not_train():
  rows = {
    row.name: row
    for row in rows_of(adapter=AdapterOptions(kind='lora', rank=R))
  }
  kernel = rows['layers/attn/q_proj/kernel']
  assert kernel.label == 'frozen' and kernel.state_bytes == 0
  assert kernel.reason == 'not trained: it has no gradient and no state'
  factor = rows['layers/attn/q_proj/lora_a']
  assert factor.label == 'full' and factor.shape == (L, D, R)
  assert factor.state_bytes == 8 * L * D * R
  trained = sum(r.state_bytes for r in rows.values())
  assert trained == 8 * L * R * (4 * 2 * D + 3 * (D + F))


def test_statistics_are_per_kernel_and_their_mean():
  found = planned(optim=OptimConfig(rank=R)).program
  state, _ = found.start(
    jax.random.key(0), optimizer.numbers(OptimConfig(), 300)
  )
  stats = found.stats(state.opt_state)
  kernels = [n for n in stats if n.startswith('energy/layers/')]
  assert len(kernels) == 7
  for field in optim.inspect.SubspaceStats._fields:
    values = [stats[n] for n in stats if n.startswith(f'{field}/layers/')]
    np.testing.assert_allclose(stats[f'{field}/low_rank'], np.mean(values))
  plain = planned().program
  state, _ = start(planned())
  assert plain.stats(state.opt_state) == {}
