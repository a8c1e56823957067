"""What a run takes, counted by hand, and what XLA's compiler says of it.

The tiny model has V = 64, D = 128, F = 256 and L = 2; its kernels are four
[L, D, D], two [L, D, F] and one [L, F, D].
"""

import dataclasses

import jax
import pytest

from gnlorp_jax import plan
from gnlorp_jax.compose import optimizer
from gnlorp_jax.compose.settings import AdapterOptions
from gnlorp_jax.config import (
  CoresetOptions,
  LayerSamplingOptions,
  MeshConfig,
  OptimConfig,
  StepConfig,
)
from gnlorp_jax.plan.accelerators import ACCELERATORS
from gnlorp_jax.recipes.pretrain import recipe

TABLE = 64 * 128  # Elements of the embedding, and of the head.
KERNELS = 2 * (4 * 128 * 128 + 3 * 128 * 256)
# Of a LoRA of rank 4 beside every kernel: each has in + out rows.
FACTORS = 2 * 4 * (4 * (128 + 128) + 3 * (128 + 256))
SCALES = 2 * 2 * 128 + 128
BATCH = 8 * 16 * 3 * 4  # Inputs, targets and weights.
INPUTS = 2 * 8 * 16 * 128 * 4  # Of both blocks.
COUNTED = ('weights', 'moments', 'bases', 'errors', 'other')
ADAMW = OptimConfig(name='adamw')  # Compiles faster than what has subspaces.
LORA = AdapterOptions(kind='lora', rank=4)


@pytest.fixture
def bound_of(settings):
  """Makes the components of the tiny run's lower bound."""
  return lambda **changes: plan.lower_bound(settings(**changes)).components


# Counting.


def test_every_component_of_galore_by_hand(bound_of):
  found = bound_of()
  low = 2 * (4 * 128 + 3 * 256) * 64  # Moments lie along the longer axis.
  full = 2 * TABLE + SCALES
  assert found.pop('other') > 0
  assert found == {
    'weights': 4 * (2 * TABLE + KERNELS + SCALES),
    'moments': 2 * 4 * (low + full),
    'bases': 4 * 2 * 7 * 128 * 64,
    'errors': 0,
    'batch': BATCH,
    'saved_activations': INPUTS,
    'gradients': 4 * (TABLE + KERNELS + SCALES),
  }


def test_adamw_in_bfloat16_by_hand(settings, bound_of):
  model = dataclasses.replace(
    settings().model, param_dtype='bfloat16', compute_dtype='bfloat16'
  )
  found = bound_of(model=model, optim=OptimConfig(name='adamw'))
  size = 2 * TABLE + KERNELS + SCALES
  assert found['weights'] == 2 * size
  assert found['moments'] == 2 * 4 * size
  assert found['bases'] == found['errors'] == 0
  assert found['saved_activations'] == INPUTS // 2
  assert found['gradients'] == 2 * (size - TABLE)


def test_drawn_layers_by_hand(bound_of):
  options = {'draw': 'uniform', 'layers': 1}
  dropped, offloaded, kept = (
    bound_of(
      optim=ADAMW, sampling=LayerSamplingOptions(**options, on_leave=on_leave)
    )
    for on_leave in ('drop', 'offload', 'keep')
  )
  outer = 2 * TABLE + 128
  assert dropped['moments'] == 8 * (outer + (KERNELS + SCALES - 128) // 2)
  assert kept['moments'] == 8 * (outer + KERNELS + SCALES - 128)
  # What rests on the host takes nothing of the device.
  assert offloaded == dropped


def test_8_bit_moments_and_bases_by_hand(bound_of):
  optim = OptimConfig(name='galore', rank=64, moment_bits=8, basis_bits=8)
  found = bound_of(optim=optim)
  # A byte per element and a float32 per 256 of them; scales of norms, [L, D] of
  # 256 elements and [D], are too small to be quantised.
  low = 2 * (4 * 128 + 3 * 256) * 64
  quantised = low + 2 * TABLE
  assert found['moments'] == 2 * (quantised + quantised // 256 * 4 + 4 * SCALES)
  # Bases have a zero beside the scale.
  basis = 2 * 7 * 128 * 64
  assert found['bases'] == basis + basis // 256 * 8


def test_error_buffers_by_hand(bound_of):
  optim = OptimConfig(name='ldadam', rank=64, error_bits=32)
  assert bound_of(optim=optim)['errors'] == 4 * KERNELS


@pytest.mark.slow
@pytest.mark.parametrize(
  ('data', 'fsdp', 'changes'),
  [
    # One device, and arrays split over four, are counted by hand.
    (4, 1, {}),
    (2, 2, {}),
    (2, 2, {'adapter': LORA, 'step': StepConfig(weight_bits=8)}),
  ],
)
def test_what_a_device_really_holds(data, fsdp, changes, settings):
  """The oracle are arrays on four devices of the CPU, moments in 8 bits."""
  run = settings(
    devices=data * fsdp,
    mesh=MeshConfig(data=data, fsdp=fsdp),
    optim=OptimConfig(name='galore', rank=64, moment_bits=8),
    **changes,
  )
  program = recipe.plan(run, jax.devices()[: run.devices]).program
  state, frozen = program.start(
    jax.random.key(0), optimizer.numbers(run.optim, run.steps)
  )
  found = plan.lower_bound(run)
  assert sum(found.components[name] for name in COUNTED) == held(state)
  assert found.components.get('frozen_weights', 0) == held(frozen)
  assert found.components['batch'] == BATCH // run.devices
  assert found.components['saved_activations'] == INPUTS // run.devices
  assert found.mesh == {'data': data, 'fsdp': fsdp}


def held(tree):
  """Bytes of arrays on the first device."""
  leaves = jax.tree.leaves(tree)
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)


def test_arrays_split_over_four_devices_by_hand(bound_of):
  found = bound_of(devices=4, mesh=MeshConfig(fsdp=4))
  # The tables have fewer than 2^14 elements: every device has them whole.
  whole = 2 * TABLE + SCALES
  assert found['weights'] == 4 * (whole + KERNELS // 4)
  low = 2 * (4 * 128 + 3 * 256) * 64
  assert found['moments'] == 2 * 4 * (whole + low // 4)
  assert found['bases'] == 4 * 2 * 7 * 128 * 64 // 4
  assert found['gradients'] == 4 * (whole - TABLE + KERNELS // 4)


def test_micro_batches_save_inputs_and_add_sums(bound_of):
  found = bound_of(micro_batches=4)
  assert found['saved_activations'] == INPUTS // 4
  everything = 2 * TABLE + KERNELS + SCALES
  assert found['gradients'] == 4 * (everything + everything - TABLE)


def test_choosing_from_a_pool_by_hand(bound_of):
  whole, found = (
    bound_of(optim=ADAMW, coreset=options)
    for options in (
      CoresetOptions(),
      CoresetOptions(pool=16, selector='facility'),
    )
  )
  matrix, row = 128 * 128, 16 * 128 * 4
  features, moments = 3 * 4 * 16 * matrix, 2 * 4 * matrix
  pool = 2 * BATCH + features + moments
  at_once = 3 * 8 * 4 * matrix + 2 * 8 * row
  assert found.pop('coreset') == pool + at_once
  assert found == whole


def test_layer_by_layer_has_one_gradient(bound_of):
  found = bound_of(step=StepConfig(mode='layerwise'), micro_batches=4)
  assert found['gradients'] == 4 * 128 * 256
  assert found['saved_activations'] == INPUTS
  projected = StepConfig(mode='layerwise', accumulate='projected')
  found = bound_of(step=projected, micro_batches=4)
  assert found['saved_activations'] == INPUTS // 4


def test_weights_in_8_bits_by_hand(bound_of):
  found = bound_of(step=StepConfig(mode='layerwise', weight_bits=8))
  rest = 4 * (2 * TABLE + SCALES)
  # A byte per element of a kernel; blocks of 256 with a scale, perhaps a zero.
  assert rest + KERNELS < found['weights'] <= rest + KERNELS * (1 + 8 / 256)


def test_adapters_beside_frozen_weights_by_hand(bound_of):
  found = bound_of(adapter=LORA, optim=ADAMW)
  assert found['weights'] == 4 * FACTORS
  assert found['frozen_weights'] == 4 * (2 * TABLE + KERNELS + SCALES)
  assert found['moments'] == 2 * 4 * FACTORS
  # The embedding has no gradient, whose place the others could take.
  assert found['gradients'] == 4 * FACTORS
  assert found['saved_activations'] == INPUTS


@pytest.mark.parametrize(
  ('mode', 'bits'), [('whole', 8), ('layerwise', 8), ('whole', 4)]
)
def test_adapters_beside_few_bits_by_hand(mode, bits, bound_of):
  step = StepConfig(mode=mode, weight_bits=bits)
  found = bound_of(adapter=LORA, optim=ADAMW, step=step, micro_batches=2)
  assert found['weights'] == 4 * FACTORS
  rest = 4 * (2 * TABLE + SCALES)
  # Codes, and of 256 of them a scale and a zero, or of 64 a scale.
  each = bits / 8 + (8 / 256 if bits == 8 else 4 / 64)
  assert rest + KERNELS * bits // 8 < found['frozen_weights']
  assert found['frozen_weights'] <= rest + KERNELS * each
  # Layer by layer that of one factor; else also sums over micro-batches.
  gradients = {'whole': 2 * 4 * FACTORS, 'layerwise': 4 * 4 * 256}
  assert found['gradients'] == gradients[mode]


def test_projected_adapters_of_a_model_without_a_new_head(bound_of):
  """Nothing but factors trains: there is no rule for anything else."""
  found = bound_of(adapter=LORA)
  assert found['weights'] == 4 * FACTORS
  assert 0 < found['moments'] < 2 * 4 * FACTORS


# The verdict.


def test_verdict_at_the_border():
  exact = plan.Plan({'weights': 100}, {'peak': 100}, [], {})
  assert exact.fits(100) is True
  assert exact.fits(99) is False
  bound = plan.Plan({'weights': 100}, None, None, {})
  assert bound.fits(100) is None
  assert bound.fits(99) is False


# The compiler for GPUs, which needs none.

HALF = {'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16', 'remat': True}


@pytest.fixture
def compact(settings, wheels):
  """Makes the tiny run in bfloat16 with remat, or with `model` changed so."""

  def make(model=HALF, **changes):
    model = dataclasses.replace(settings().model, **model)
    return settings(model=model, **changes)

  return make


@pytest.mark.slow
@pytest.mark.parametrize('device', ACCELERATORS)
def test_compiled_plan_adds_up(device, compact):
  run = compact(device=device, optim=ADAMW)
  found = plan.compiled(run)
  xla, parts = found.xla, found.components
  assert xla['peak'] == (
    xla['argument'] + xla['output'] + xla['temp'] - xla['alias']
  )
  given = sum(parts[name] for name in (*COUNTED, 'batch'))
  assert xla['argument'] == given
  # The gradient of [B, T, N, H] queries in float32, for cuDNN's attention.
  assert parts['attention_workspace'] == 8 * 16 * 128 * 4
  assert parts['saved_activations'] == INPUTS // 2
  assert parts['temporaries'] > 0
  assert found.peak == xla['peak'] + parts['attention_workspace']
  assert plan.lower_bound(run).peak < found.peak
  assert found.collectives == []


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'optim': ADAMW, 'micro_batches': 4},
    {'optim': ADAMW, 'model': {}},
    {'optim': ADAMW, 'step': StepConfig(mode='layerwise')},
    {'optim': ADAMW, 'devices': 4, 'mesh': MeshConfig(fsdp=4)},
    {
      'optim': ADAMW,
      'adapter': LORA,
      'step': StepConfig(mode='layerwise', weight_bits=8),
    },
  ],
  ids=['galore', 'micro-batches', 'float32', 'layerwise', 'fsdp', 'lora'],
)
def test_lower_bound_is_one(changes, compact):
  run = compact(**changes)
  assert plan.lower_bound(run).peak < plan.compiled(run).peak


@pytest.mark.slow
def test_frozen_weights_are_arguments(compact):
  found = plan.compiled(compact(optim=ADAMW, adapter=LORA))
  parts = found.components
  given = sum(parts[x] for x in (*COUNTED, 'frozen_weights', 'batch'))
  assert found.xla['argument'] == given
  # Nothing of them is written.
  assert found.xla['output'] < given - parts['frozen_weights'] + 100
  assert found.peak < given + found.xla['temp'] + parts['frozen_weights']


@pytest.mark.slow
def test_copies_exchange_every_gradient_once(compact):
  found = plan.compiled(compact(devices=4, optim=ADAMW))
  sums = [row for row in found.collectives if row.kind == 'all-reduce']
  inside = sum(row.bytes_per_step for row in sums if row.loops == (2,))
  outside = sum(
    row.bytes_per_step for row in sums if not (row.loops or row.conditionals)
  )
  # Kernels as the loop over the blocks reaches them, in bfloat16. After it the
  # tables, the norms' scales in float32, and the sums of losses and weights.
  assert inside == 2 * KERNELS
  assert outside == 2 * 2 * TABLE + 4 * SCALES + 2 * 4
