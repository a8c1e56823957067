"""Groups of settings: their rules, and what a resumed run must share."""

import dataclasses

import pytest

from gnlorp_jax.compose import settings
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  MeshConfig,
  OptimConfig,
  RunConfig,
  StepConfig,
)

# What becomes of a run that is resumed with another value of a field. A new
# field must be judged here.
KINDS = {
  RunConfig: {
    'fixed': 'seed',
    'result': 'batch_size steps micro_batches init_from eval_every patience',
    'free': 'run_dir seeds learning_rates checkpoint_every checkpoint_keep '
    'log_every log dry_run accept',
  },
  # Fixed is what decides what the optimizer's state holds.
  OptimConfig: {
    'fixed': 'name schedule rank update_proj_gap spread_refreshes projection '
    'granularity side basis_bits lazy_refresh moments_on_refresh error_bits '
    'weight_norm norm_state moment_bits stochastic_rounding',
    'result': 'learning_rate warmup_fraction final_fraction cycle '
    'restart_warmup_fraction scale solver leading b1 b2 eps eps_mode '
    'weight_decay decay_norms_and_biases clip_global_norm param_labels',
  },
  # Fixed is what decides the arrays, and what they stand for.
  AdapterOptions: {
    'fixed': 'kind rank alpha rank_stabilized rules init_from train_others '
    'restart_every',
    'result': 'dropout restart_prune restart_prune_share',
  },
  # A state of either mode is one of the other.
  StepConfig: {
    'fixed': 'weight_bits',
    'result': 'mode accumulate clipping',
    'free': 'offload',
  },
  MeshConfig: {'free': 'data fsdp'},
}


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_every_field_says_what_becomes_of_a_resumed_run(kind):
  found = {}
  for field in dataclasses.fields(kind):
    if not dataclasses.is_dataclass(field.default):
      on_resume = field.metadata.get(settings.ON_RESUME, 'fixed')
      found.setdefault(on_resume, set()).add(field.name)
  assert found == {k: set(names.split()) for k, names in KINDS[kind].items()}


@dataclasses.dataclass(frozen=True)
class Inner:
  width: int = 3
  rate: float = settings.result(0.5)
  shown: bool = settings.free(True)


@dataclasses.dataclass(frozen=True)
class Outer:
  name: str = 'a'
  inner: Inner = Inner()
  other: Inner = Inner(width=4)
  folder: str = settings.free('x')
  steps: int = settings.result(7)


def test_fixed_settings_are_named_by_group_and_field():
  fixed = {'name': 'a', 'inner.width': 3, 'other.width': 4}
  assert settings.fixed_settings(Outer()) == fixed
  result = {'inner.rate': 0.5, 'other.rate': 0.5, 'steps': 7}
  assert settings.fixed_settings(Outer(), compared=True) == fixed | result


def test_helpers_keep_the_default():
  assert Outer() == Outer(folder='x', steps=7)
  assert Inner().rate == 0.5 and Inner().shown is True


@pytest.mark.parametrize(
  ('build', 'text'),
  [
    (
      lambda: RunConfig(batch_size=0),
      'RunConfig.batch_size must be at least 1, got 0.',
    ),
    (
      lambda: RunConfig(steps=0),
      'RunConfig.steps must be at least 1, got 0.',
    ),
    (
      lambda: RunConfig(micro_batches=-1),
      'RunConfig.micro_batches must be at least 1, got -1.',
    ),
    (
      lambda: RunConfig(checkpoint_keep=0),
      'RunConfig.checkpoint_keep must be at least 1, got 0.',
    ),
    (
      lambda: OptimConfig(update_proj_gap=0),
      'OptimConfig.update_proj_gap must be at least 1, got 0.',
    ),
    (
      lambda: OptimConfig(final_fraction=2),
      'OptimConfig.final_fraction must be in [0, 1], got 2.',
    ),
    (
      lambda: OptimConfig(learning_rate=float('nan')),
      'OptimConfig.learning_rate must be a finite number in (0, inf), got nan.',
    ),
    (
      lambda: OptimConfig(clip_global_norm=0.0),
      'OptimConfig.clip_global_norm must be in (0, inf), got 0.0. Use None '
      'not to clip.',
    ),
    (
      lambda: AdapterOptions(rank=0),
      'AdapterOptions.rank must be at least 1, got 0.',
    ),
    (
      lambda: AdapterOptions(restart_every=0),
      'AdapterOptions.restart_every must be at least 1, got 0.',
    ),
    (
      lambda: AdapterOptions(restart_prune_share=1.5),
      'AdapterOptions.restart_prune_share must be in [0, 1], got 1.5.',
    ),
    (
      lambda: OptimConfig(cycle=0),
      'OptimConfig.cycle must be at least 1, got 0.',
    ),
    (
      lambda: AdapterOptions(alpha=0.0),
      'AdapterOptions.alpha must be in (0, inf), got 0.0.',
    ),
    (
      lambda: AdapterOptions(dropout=-0.1),
      'AdapterOptions.dropout must be in [0, 1), got -0.1.',
    ),
    (
      lambda: StepConfig(accumulate='projected'),
      "StepConfig.accumulate='projected' needs mode='layerwise', got mode="
      "'whole'.",
    ),
    (
      lambda: StepConfig(offload=True),
      "StepConfig.offload=True needs mode='layerwise', got mode='whole'.",
    ),
    (
      lambda: StepConfig(
        mode='layerwise', accumulate='projected', clipping='recompute'
      ),
      "StepConfig.clipping='recompute' measures gradients that "
      "accumulate='projected' does not sum. Use one or the other.",
    ),
    (
      lambda: RunConfig(seeds=','),
      "seeds=',' names nothing. Give one or more, joined by commas.",
    ),
    (
      lambda: RunConfig(seeds='0,x'),
      "seeds='0,x' must be numbers joined by commas: invalid literal for int() "
      "with base 10: 'x'.",
    ),
    (
      lambda: RunConfig(seeds='0,-1'),
      'seed=-1 must be a whole number from 0 to 4294967295.',
    ),
    (
      lambda: RunConfig(seed=-1),
      'seed=-1 must be a whole number from 0 to 4294967295.',
    ),
    # Which JAX would take for 0.
    (
      lambda: RunConfig(seed=2**32),
      'seed=4294967296 must be a whole number from 0 to 4294967295.',
    ),
    (
      lambda: RunConfig(learning_rates=''),
      "learning_rates='' names nothing. Give one or more, joined by commas.",
    ),
    (
      lambda: RunConfig(learning_rates='1e-3,-1'),
      'A learning rate must be in (0, inf), got -1.0.',
    ),
  ],
)
def test_bad_value_gets_the_value_and_the_rule(build, text):
  with pytest.raises(ValueError) as error:
    build()
  assert str(error.value) == text


def test_kernels_in_8_bits_are_no_matter_of_the_mode_alone():
  # Beside adapters they may be so in whole steps: the recipe judges.
  assert StepConfig(weight_bits=8).weight_bits == 8


def test_a_run_on_one_device_differs_in_its_devices_alone():
  run = RunConfig(steps=3, mesh=MeshConfig(data=64, fsdp=8))
  assert run.on_one_device() == RunConfig(
    steps=3, mesh=MeshConfig(data=1, fsdp=1)
  )


def test_seeds_and_rates_are_numbers_each_once():
  config = RunConfig(seeds='2, 0,2', learning_rates='1e-4,3e-4,0.0001')
  assert config.seed_numbers == (2, 0)
  assert config.searched_rates == (1e-4, 3e-4)
  assert not config.is_single


@pytest.mark.parametrize(
  ('changes', 'single', 'seeds'),
  [
    ({}, True, (0,)),
    ({'seed': 3}, True, (3,)),
    ({'seeds': '4'}, True, (4,)),
    ({'seeds': '4,5'}, False, (4, 5)),
    ({'learning_rates': '1'}, False, (0,)),
  ],
)
def test_one_rate_and_one_seed_are_a_single_run(changes, single, seeds):
  config = RunConfig(**changes)
  assert config.is_single == single
  assert config.seed_numbers == seeds
