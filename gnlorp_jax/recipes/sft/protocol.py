"""What an instruction-tuning run takes where the user gives nothing."""

import dataclasses
import math

from gnlorp_jax.compose import optimizer
from gnlorp_jax.compose.methods import Method, get_method, sampling_of
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  LayerSamplingOptions,
  OptimConfig,
)
from gnlorp_jax.recipes.sft.settings import SftConfig

# Learning rates by kind of method, of a trained model of a hundred million
# parameters and more. `full` and `lora` are what users of other programs start
# from; larger models want lower ones. A drawn layer trains in a part of the
# steps: AdamW's best rate was nine times that of `full` (docs/results/sft.md).
_RATES = {
  'full': 1e-5,
  'lora': 2e-4,
  'projected': 2e-4,
  'drawn': 1e-4,
  'other': 2e-5,
}
# The generated set trains a small random model: chosen by trial.
_DEMO_RATES = {
  'full': 2e-3,
  'lora': 5e-3,
  'projected': 1e-2,
  'drawn': 2e-3,
  'other': 2e-3,
}
_RANK, _ADAPTER_RANK = 32, 8


def resolve(config: SftConfig) -> SftConfig:
  """The settings of a run: what is given, or else what suits the method.

  Args:
    config: What the user asks for; None stands for what this decides.

  Returns:
    Settings without None where the optimizer, the adapters or the length of the
    run need a number; without a learning rate where rates are searched.

  Raises:
    ValueError: If there is no such method.
  """
  method, is_demo = get_method(config.method), config.is_demo
  adapter = _adapter(config.adapter, method)
  sampling = sampling_of(method, config.sampling)
  optim = _optimizer(config, method, adapter, sampling)
  return dataclasses.replace(
    config,
    batch_size=_or(config.batch_size, 16 if is_demo else 8),
    epochs=_or(config.epochs, 4 if is_demo else 1),
    optim=optimizer.in_cycles(optim, adapter),
    adapter=adapter,
    sampling=sampling,
    run_dir=config.run_dir or ('runs/sft_demo' if is_demo else 'runs/sft'),
    data=dataclasses.replace(
      config.data, max_length=_or(config.data.max_length, _length(config))
    ),
    eval=dataclasses.replace(
      config.eval, generate=_or(config.eval.generate, 64 if is_demo else 8)
    ),
  )


def _or(given, default):
  return default if given is None else given


def _length(config: SftConfig) -> int:
  return min(1024, config.model.max_seq_len)


def _adapter(given: AdapterOptions, method: Method) -> AdapterOptions:
  kind = given.kind or method.adapter
  if kind is None:
    return given
  found = dataclasses.replace(given, kind=kind, dropout=_or(given.dropout, 0.0))
  if given.init_from is not None:  # What is there has a rank of its own.
    return found
  rank = _or(given.rank, _ADAPTER_RANK)
  # Twice the product of the factors, whatever it is divided by.
  alpha = 2.0 * (math.sqrt(rank) if given.rank_stabilized else rank)
  return dataclasses.replace(found, rank=rank, alpha=_or(given.alpha, alpha))


def _optimizer(
  given: SftConfig,
  method: Method,
  adapter: AdapterOptions,
  sampling: LayerSamplingOptions,
) -> OptimConfig:
  config = dataclasses.replace(
    given.optim, name=given.optim.name or method.optimizer
  )
  if config.learning_rate is None and given.learning_rates is None:
    rates = _DEMO_RATES if given.is_demo else _RATES
    rate = rates[_rates_of(config, adapter, sampling)]
    config = dataclasses.replace(config, learning_rate=rate)
  _check_used(given, config, adapter)
  rank = _RANK if adapter.kind is None else _or(adapter.rank, _ADAPTER_RANK)
  numbers = {
    'rank': optimizer.rank_or(config, rank),
    'update_proj_gap': _or(config.update_proj_gap, 100),
  }
  return dataclasses.replace(
    config,
    **{
      name: value if optimizer.accepts(config, name) else None
      for name, value in numbers.items()
    },
  )


def _check_used(
  given: SftConfig, config: OptimConfig, adapter: AdapterOptions
) -> None:
  """Raises ValueError for an option of subspaces where there are none."""
  # --rank sets that of subspaces and that of adapters.
  is_of_adapters = adapter.kind and given.optim.rank == given.adapter.rank
  for name in ('rank', 'update_proj_gap'):
    value = getattr(given.optim, name)
    if value is None or optimizer.accepts(config, name):
      continue
    if name == 'rank' and is_of_adapters:
      continue
    fix = (
      'The rank of its adapters is adapter.rank.'
      if adapter.kind and name == 'rank'
      else 'Leave it out, or use a method that has some, such as galore.'
    )
    raise ValueError(
      f'optim.{name}={value} is about subspaces, and {config.name}, the '
      f'optimizer of method={given.method!r}, has none. {fix}'
    )


def _rates_of(
  config: OptimConfig, adapter: AdapterOptions, sampling: LayerSamplingOptions
) -> str:
  if adapter.kind is not None:
    return 'lora'
  if optimizer.has_subspaces(config):
    return 'projected'
  if sampling.is_on:
    return 'drawn'
  return 'full' if config.name == 'adamw' else 'other'
