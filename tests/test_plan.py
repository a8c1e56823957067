"""What a run takes, counted by hand, and what plan says of it.

The tiny model has V = 64, D = 128, F = 256 and L = 2; its kernels are four
[L, D, D], two [L, D, F] and one [L, F, D].
"""

import dataclasses
import importlib.util
import json

import jax
import pytest

from gnlorp_jax import accelerators, build, plan
from gnlorp_jax.config import DataConfig, MeshConfig, OptimConfig, StepConfig
from gnlorp_jax.models import llama

MODEL = llama.LlamaConfig(
  vocab_size=64,
  hidden_size=128,
  intermediate_size=256,
  num_layers=2,
  num_heads=4,
  max_seq_len=16,
)
TABLE = 64 * 128  # Elements of the embedding, and of the head.
KERNELS = 2 * (4 * 128 * 128 + 3 * 128 * 256)
SCALES = 2 * 2 * 128 + 128
BATCH = 8 * 16 * 3 * 4  # Inputs, targets and weights.
INPUTS = 2 * 8 * 16 * 128 * 4  # Of both blocks.
COUNTED = ('weights', 'moments', 'bases', 'errors', 'other')


def settings(**changes):
  """The tiny run: GaLore of rank 64, 8 sequences of 16 tokens, float32."""
  fields = {
    'batch_size': 8,
    'model': MODEL,
    'data': DataConfig(seq_len=16),
    'optim': OptimConfig(name='galore', rank=64),
  }
  return plan.PlanConfig(**{**fields, **changes})


def bound_of(**changes):
  return plan.lower_bound(settings(**changes)).components


@pytest.fixture
def no_wheels(monkeypatch):
  monkeypatch.setattr(plan, 'compiler_is_installed', lambda: False)


@pytest.fixture
def small_gpu(monkeypatch):
  """Makes an h100 a card of so many bytes, all of them usable."""

  def shrink(size):
    small = plan.ACCELERATORS['h100']._replace(memory=size)
    monkeypatch.setattr(accelerators, 'RESERVED', 0)
    monkeypatch.setitem(plan.ACCELERATORS, 'h100', small)

  return shrink


# Counting.


def test_every_component_of_galore_by_hand():
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


def test_adamw_in_bfloat16_by_hand():
  model = dataclasses.replace(
    MODEL, param_dtype='bfloat16', compute_dtype='bfloat16'
  )
  found = bound_of(model=model, optim=OptimConfig(name='adamw'))
  size = 2 * TABLE + KERNELS + SCALES
  assert found['weights'] == 2 * size
  assert found['moments'] == 2 * 4 * size
  assert found['bases'] == found['errors'] == 0
  assert found['saved_activations'] == INPUTS // 2
  assert found['gradients'] == 2 * (size - TABLE)


def test_8_bit_moments_and_bases_by_hand():
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


def test_error_buffers_by_hand():
  optim = OptimConfig(name='ldadam', rank=64, error_bits=32)
  assert bound_of(optim=optim)['errors'] == 4 * KERNELS


@pytest.mark.parametrize(('data', 'fsdp'), [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_what_a_device_really_holds(data, fsdp):
  """The oracle are arrays on four devices of the CPU, moments in 8 bits."""
  run = settings(
    devices=data * fsdp,
    mesh=MeshConfig(data=data, fsdp=fsdp),
    optim=OptimConfig(name='galore', rank=64, moment_bits=8),
  )
  parts = build.program(run, jax.devices()[: run.devices])
  held = sum(
    leaf.addressable_shards[0].data.nbytes
    for leaf in jax.tree.leaves(build.new_state(parts))
  )
  found = plan.lower_bound(run)
  assert sum(found.components[name] for name in COUNTED) == held
  assert found.components['batch'] == BATCH // run.devices
  assert found.components['saved_activations'] == INPUTS // run.devices
  assert found.mesh == {'data': data, 'fsdp': fsdp}


def test_arrays_split_over_four_devices_by_hand():
  found = bound_of(devices=4, mesh=MeshConfig(fsdp=4))
  # The tables have fewer than 2^14 elements: every device has them whole.
  whole = 2 * TABLE + SCALES
  assert found['weights'] == 4 * (whole + KERNELS // 4)
  low = 2 * (4 * 128 + 3 * 256) * 64
  assert found['moments'] == 2 * 4 * (whole + low // 4)
  assert found['bases'] == 4 * 2 * 7 * 128 * 64 // 4
  assert found['gradients'] == 4 * (whole - TABLE + KERNELS // 4)


def test_micro_batches_save_inputs_and_add_sums():
  found = bound_of(micro_batches=4)
  assert found['saved_activations'] == INPUTS // 4
  everything = 2 * TABLE + KERNELS + SCALES
  assert found['gradients'] == 4 * (everything + everything - TABLE)


def test_layer_by_layer_has_one_gradient():
  found = bound_of(step=StepConfig(mode='layerwise'), micro_batches=4)
  assert found['gradients'] == 4 * 128 * 256
  assert found['saved_activations'] == INPUTS
  projected = StepConfig(mode='layerwise', accumulate='projected')
  found = bound_of(step=projected, micro_batches=4)
  assert found['saved_activations'] == INPUTS // 4


def test_weights_in_8_bits_by_hand():
  found = bound_of(step=StepConfig(mode='layerwise', weight_bits=8))
  rest = 4 * (2 * TABLE + SCALES)
  # A byte per element of a kernel; blocks of 256 with a scale, perhaps a zero.
  assert rest + KERNELS < found['weights'] <= rest + KERNELS * (1 + 8 / 256)


# The verdict.


def test_verdict_at_the_border():
  exact = plan.Plan({'weights': 100}, {'peak': 100}, [], {})
  assert exact.fits(100) is True
  assert exact.fits(99) is False
  bound = plan.Plan({'weights': 100}, None, None, {})
  assert bound.fits(100) is None
  assert bound.fits(99) is False


def test_usable_memory_is_the_share_that_jax_is_given():
  for gpu in plan.ACCELERATORS.values():
    assert gpu.usable == int(gpu.fraction * gpu.memory)
    left = gpu.memory - gpu.usable
    # All but the reserve, to a percent.
    assert 0 <= left - plan.RESERVED <= 0.01 * gpu.memory


def printed(capsys, *words):
  """What the tiny run prints, on one line."""
  options = (
    '--batch-size 8 --data.seq-len 16 --optim.name galore --optim.rank 64 '
    '--model.vocab-size 64 --model.hidden-size 128 '
    '--model.intermediate-size 256 --model.num-layers 2 --model.num-heads 4 '
    '--model.max-seq-len 16'
  )
  plan.main([*options.split(), *words])
  return ' '.join(capsys.readouterr().out.split())


def test_lower_bound_says_so_and_how_to_know(no_wheels, capsys):
  text = printed(capsys)
  assert 'peak, at least' in text
  assert 'It may fit: the lower bound does.' in text
  assert "no GPU is needed: pip install 'gnlorp_jax[cuda]'" in text
  assert 'What one change saves' not in text


def test_suggestions_are_computed(no_wheels, small_gpu):
  run = settings(batch_size=12, micro_batches=1)
  bound = plan.lower_bound(run)
  basis = bound.components['bases']
  small_gpu(bound.peak - basis // 4)
  found = {s.options: s for s in plan.suggestions(run, bound, bound)}
  # 32 bits to 8, and 8 bytes for each 256 elements.
  bits = found['--optim.basis-bits 8']
  assert bits.saves == basis - basis // 4 - basis // 4 // 256 * 8
  assert bits.peak == bound.peak - bits.saves
  assert (bits.compiled, bits.fits) == (False, 'perhaps')
  half = found['--optim.rank 32']
  low = 2 * (4 * 128 + 3 * 256) * 64
  assert half.saves == basis // 2 + 2 * 4 * low // 2
  assert '--optim.basis-bits 16' in found
  assert '--step.mode layerwise' in found
  assert '--step.mode layerwise --step.weight-bits 8' in found
  # 12 sequences split over 2 and 4 devices, not over 8.
  devices = {s for s in found if 'devices' in s}
  assert devices == {
    '--devices 2 --mesh.fsdp 2',
    '--devices 4 --mesh.fsdp 4',
  }
  # GaLore feeds no errors back.
  assert not any('error' in s for s in found)
  # Sums in float32 are more than the inputs of half a batch.
  assert all(s.saves is None or s.saves > 0 for s in found.values())


def test_nothing_suffices(no_wheels, small_gpu, capsys):
  small_gpu(1000)
  text = printed(capsys)
  assert 'It does not fit:' in text
  assert '--optim.moment-bits 8' in text
  assert 'None of them suffices alone: combine some.' in text


def test_suggestions_leave_out_what_is_so_already():
  run = settings(
    model=dataclasses.replace(MODEL, remat=True),
    optim=OptimConfig(name='galore', rank=1, moment_bits=8),
    step=StepConfig(mode='layerwise'),
  )
  families = list(plan.changes(run))
  flat = [change for family in families for change in family]
  assert {'step.mode': 'layerwise'} not in flat
  assert {'step.weight_bits': 8} in flat
  assert {'model.remat': True} not in flat
  assert {'optim.moment_bits': 8} not in flat
  assert {'optim.moment_bits': 4} in flat
  for change in flat:
    if change != {'optim.rank': 1}:
      assert plan.replace(run, change) != run


# JSON, help and errors.


def test_json_has_everything(no_wheels, tmp_path, capsys):
  path = tmp_path / 'plan.json'
  printed(capsys, '--device', 'a100', '--devices', '4', '--json', str(path))
  found = json.loads(path.read_text())
  run = settings(devices=4)
  assert found['components'] == plan.lower_bound(run).components
  assert found['peak'] == sum(found['components'].values())
  assert found['peak_is_lower_bound'] is True
  assert found['compiled'] is False
  assert found['fits'] is None
  assert found['device']['name'] == 'a100'
  assert found['device']['memory'] == plan.ACCELERATORS['a100'].memory
  assert found['mesh'] == {'data': 4, 'fsdp': 1}
  assert found['arguments'][-2:] == ['--json', str(path)]
  assert found['config']['optim']['rank'] == 64
  assert found['versions']['jax'] == jax.__version__
  assert found['suggestions'] == []


def test_json_on_standard_output_is_alone_there(no_wheels, capsys):
  assert json.loads(printed(capsys, '--json', '-'))['device']['name'] == 'h100'


def test_help_explains_the_program_and_its_options(capsys):
  with pytest.raises(SystemExit) as stop:
    plan.main(['--help'])
  assert stop.value.code == 0
  text = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
  assert 'Tells whether a run fits a GPU' in text
  assert 'rtx4090, rtx4060ti (16 GB), a100 (80 GB), h100 or h200' in text
  for option in ('--device STR', '--devices INT', '--json', '--optim.rank'):
    assert option in text


@pytest.mark.parametrize(
  ('words', 'text'),
  [
    (
      ['--device', 'rtx4080'],
      "Unknown device 'rtx4080'; expected one of ('rtx4090', 'rtx4060ti', "
      "'a100', 'h100', 'h200'). Did you mean 'rtx4090'?",
    ),
    (['--devices', '0'], 'PlanConfig.devices must be at least 1, got 0.'),
    (
      ['--devices', '6', '--mesh.fsdp', '4'],
      'data=-1, fsdp=4 does not fit 6 devices: the product of the sizes must '
      'divide 6.',
    ),
    (
      ['--devices', '3'],
      'batch_size=8 cannot be split over data=3, fsdp=1 and micro_batches=1: '
      'it must be a multiple of data*fsdp*micro_batches=3. Use 6 or 9.',
    ),
    (
      ['--optim.rnak', '3'],
      "OptimConfig has no field 'rnak' (from --optim.rnak). Did you mean",
    ),
  ],
)
def test_mistakes_get_the_value_the_rule_and_the_fix(words, text, capsys):
  with pytest.raises(SystemExit) as stop:
    printed(capsys, *words)
  assert stop.value.code == 2
  assert text in ' '.join(capsys.readouterr().err.replace('│', ' ').split())


# The compiler for GPUs, which needs none.

needs_wheels = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda12_plugin') is None,
  reason='the CUDA wheels (the extra cuda) are not installed',
)
# Compiles faster than a method that refreshes subspaces.
ADAMW = OptimConfig(name='adamw')
HALF = dataclasses.replace(
  MODEL, param_dtype='bfloat16', compute_dtype='bfloat16', remat=True
)


@needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize('device', plan.ACCELERATORS)
def test_compiled_plan_adds_up(device):
  run = settings(device=device, model=HALF, optim=ADAMW)
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


@needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'optim': ADAMW, 'micro_batches': 4},
    {'optim': ADAMW, 'model': MODEL},
    {'optim': ADAMW, 'step': StepConfig(mode='layerwise')},
    {'optim': ADAMW, 'devices': 4, 'mesh': MeshConfig(fsdp=4)},
  ],
  ids=['galore', 'micro-batches', 'float32', 'layerwise', 'fsdp'],
)
def test_lower_bound_is_one(changes):
  run = settings(**{'model': HALF, **changes})
  assert plan.lower_bound(run).peak < plan.compiled(run).peak


@needs_wheels
@pytest.mark.slow
def test_copies_exchange_every_gradient_once():
  found = plan.compiled(settings(devices=4, model=HALF, optim=ADAMW))
  sums = [row for row in found.collectives if row.kind == 'all-reduce']
  inside = sum(row.bytes_per_step for row in sums if row.loops == (2,))
  outside = sum(
    row.bytes_per_step for row in sums if not (row.loops or row.conditionals)
  )
  # Kernels as the loop over the blocks reaches them, in bfloat16. After it the
  # tables, the norms' scales in float32, and the sums of losses and weights.
  assert inside == 2 * KERNELS
  assert outside == 2 * 2 * TABLE + 4 * SCALES + 2 * 4


@needs_wheels
@pytest.mark.slow
def test_compiled_suggestion_is_exact(small_gpu, monkeypatch):
  run = settings(model=HALF, optim=ADAMW)
  whole = plan.compiled(run)
  small_gpu(whole.peak - 1)
  change = {'optim.moment_bits': 8}
  monkeypatch.setattr(plan, 'changes', lambda _: [[change]])
  (found,) = plan.suggestions(run, whole, plan.lower_bound(run))
  changed = plan.compiled(plan.replace(run, change))
  assert found == plan.Suggestion(
    options='--optim.moment-bits 8',
    saves=whole.peak - changed.peak,
    peak=changed.peak,
    compiled=True,
    fits='yes',
  )
