"""What would make a run fit, computed by hand and by compiling it."""

import dataclasses

import pytest

from gnlorp_jax import plan
from gnlorp_jax.config import OptimConfig, StepConfig
from gnlorp_jax.plan import suggest


def test_suggestions_are_computed(settings, no_wheels, limited_gpu):
  run = settings(batch_size=12, micro_batches=1)
  bound = plan.lower_bound(run)
  basis = bound.components['bases']
  limited_gpu(bound.peak - basis // 4)
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


def test_suggestions_leave_out_what_is_so_already(settings):
  run = settings(
    model=dataclasses.replace(settings().model, remat=True),
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


def offered(run):
  return [change for family in plan.changes(run) for change in family]


def test_adapters_are_suggested_where_there_are_weights_to_start_from(settings):
  lora = {'adapter.kind': 'lora'}
  assert lora not in offered(settings())
  fine_tuning = plan.GluePlanConfig.parse(['--method', 'full'], '')
  assert lora in offered(fine_tuning)
  assert {**lora, 'step.weight_bits': 8} in offered(fine_tuning)
  adapted = plan.replace(fine_tuning, lora)
  assert not any('adapter.kind' in change for change in offered(adapted))
  assert {'step.weight_bits': 8} in offered(adapted)
  assert {'step.weight_bits': 4} in offered(adapted)
  assert {**lora, 'step.weight_bits': 4} in offered(fine_tuning)
  few = plan.replace(adapted, {'step.weight_bits': 4})
  assert not any('step.weight_bits' in change for change in offered(few))
  assert {'step.weight_bits': 8} not in offered(fine_tuning)


def test_fine_tuning_that_does_not_fit_may_with_adapters(limited_gpu):
  run = plan.GluePlanConfig.parse(['--method', 'full', '--init-from=tiny'], '')
  bound = plan.lower_bound(run)
  limited_gpu(bound.peak - 1)
  found = {s.options: s for s in plan.suggestions(run, bound, bound)}
  saves = found['--adapter.kind lora'].saves
  assert saves > found['--optim.moment-bits 8'].saves > 0
  assert found['--adapter.kind lora --step.weight-bits 8'].saves > saves


@pytest.mark.slow
def test_compiled_suggestion_is_exact(
  settings, wheels, limited_gpu, monkeypatch
):
  model = dataclasses.replace(
    settings().model,
    param_dtype='bfloat16',
    compute_dtype='bfloat16',
    remat=True,
  )
  run = settings(model=model, optim=OptimConfig(name='adamw'))
  whole = plan.compiled(run)
  limited_gpu(whole.peak - 1)
  change = {'optim.moment_bits': 8}
  monkeypatch.setattr(suggest, 'changes', lambda _: [[change]])
  (found,) = plan.suggestions(run, whole, plan.lower_bound(run))
  changed = plan.compiled(plan.replace(run, change))
  assert found == plan.Suggestion(
    options='--optim.moment-bits 8',
    saves=whole.peak - changed.peak,
    peak=changed.peak,
    compiled=True,
    fits='yes',
  )
