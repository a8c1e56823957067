"""From a group of settings to an optimizer and its learning rates.

What decides the learning rate of every step are numbers in the optimizer's
state, so that programs are shared by all learning rates.
"""

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax import optim
from gnlorp_jax.compose import schedules
from gnlorp_jax.compose.settings import AdapterOptions, OptimConfig
from gnlorp_jax.optim import methods
from gnlorp_jax.optim.parts.hyperparams import inject_hyperparams

_logger = logging.getLogger(__name__)

LabelRules = tuple[tuple[str, str], ...]

# The factors of adapters, where an optimizer treats kernels in its own way.
_FACTORS_LOW_RANK: LabelRules = ((r'/lora_[ab]$', 'low_rank'),)
_ALL_FULL: LabelRules = (('.*', 'full'),)
# All matrices of all models, but for tables of a few rows.
_ALL_MATRICES: LabelRules = (
  (
    r'layers/(attn|mlp)/.*/kernel|^(lm_head|classifier)/(.*/)?kernel$'
    r'|^embed/((tokens|positions)/)?embedding$',
    'low_rank',
  ),
  ('.*', 'full'),
)

# Fields of OptimConfig that are no arguments of an optimizer.
_NOT_ARGUMENTS = {
  'name',
  'learning_rate',
  'schedule',
  'warmup_fraction',
  'final_fraction',
  'cycle',
  'restart_warmup_fraction',
  'solver',
  'leading',
  'stochastic_rounding',
  'decay_norms_and_biases',
  'clip_global_norm',
  'param_labels',
}


def _parameters(config: OptimConfig) -> Mapping[str, inspect.Parameter]:
  """The arguments of the optimizer."""
  return inspect.signature(methods.get(config.name)).parameters


def accepts(config: OptimConfig, argument: str) -> bool:
  """Whether the optimizer has an argument of that name, such as ``rank``."""
  return argument in _parameters(config)


def has_subspaces(config: OptimConfig) -> bool:
  """Whether the optimizer projects matrices; `apollo_mini` has no ``rank``."""
  return accepts(config, 'side')


def label_rules(
  config: OptimConfig,
  model_rules: LabelRules,
  *,
  adapted: bool,
  only_factors: bool = False,
  restarts: bool = False,
) -> LabelRules:
  """Which parameters are trained how: the configuration's rules, or defaults.

  Args:
    config: The optimizer.
    model_rules: The rules of the model's family, for its own weights.
    adapted: Whether adapters train in place of the model's kernels.
    only_factors: Whether nothing but their factors trains: no magnitude, and
      no head beside them.
    restarts: Whether adapters restart.

  Returns:
    Pairs (regex, label), each of which some parameter needs. The factors of
    adapters are kernels to an optimizer that treats these in its own way, but
    not those of adapters that restart: a subspace is one of the factors before.
    `adamw` treats all that trains alike.

  Raises:
    ValueError: If all matrices of a model shall be projected that are frozen.
  """
  labels = config.param_labels
  if labels == 'all' and adapted:
    raise ValueError(
      "optim.param_labels='all' projects the matrices of a model, in whose "
      'place adapters train here. Leave it out, or adapter.kind.'
    )
  if labels == 'all':
    return _ALL_MATRICES
  if labels is not None and labels != 'blocks':
    return labels
  if not adapted:
    return model_rules
  if restarts or not accepts(config, 'kernel_axes'):
    return _ALL_FULL
  return _FACTORS_LOW_RANK + (() if only_factors else _ALL_FULL)


def for_adapters(config: OptimConfig) -> OptimConfig:
  """The optimizer as it projects the factors of adapters: on both sides.

  Those whose ``side`` cannot be ``both``, by its annotation, keep their default
  side.

  References:
    Huang et al., `GradNormLoRP`, 2024, arXiv:2412.19616: the fine-tuning form.
  """
  if config.side is not None or not has_subspaces(config):
    return config
  sides = get_args(_parameters(config)['side'].annotation)
  return dataclasses.replace(config, side='both' if 'both' in sides else None)


def rank_or(config: OptimConfig, default: int) -> int | None:
  """The rank that is given, or a default where it is one of whole matrices.

  That of `vlorp` and `projfactor` counts the directions of pieces of rows,
  another number: None stands for the optimizer's own default there.
  """
  if config.rank is not None or config.name in ('vlorp', 'projfactor'):
    return config.rank
  return default


def in_cycles(config: OptimConfig, adapter: AdapterOptions) -> OptimConfig:
  """The optimizer with the cycle of its jagged schedule: that of the restarts.

  Raises:
    ValueError: If there is no cycle, or another one.
  """
  every = adapter.restart_every
  if config.schedule != 'jagged':
    if config.cycle is not None:
      raise ValueError(
        f"optim.cycle={config.cycle} is of optim.schedule='jagged', got "
        f'{config.schedule!r}. Leave it out.'
      )
    return config
  if config.cycle is None and every is None:
    raise ValueError(
      "optim.schedule='jagged' rises again in every cycle, and there is none. "
      'Give adapter.restart_every, or optim.cycle.'
    )
  if None not in (config.cycle, every) and config.cycle != every:
    raise ValueError(
      f'optim.cycle={config.cycle} is not adapter.restart_every={every}: the '
      'learning rate must rise again when adapters restart. Leave out '
      'optim.cycle.'
    )
  return dataclasses.replace(config, cycle=config.cycle or every)


def make(
  config: OptimConfig, steps: int, rules: LabelRules
) -> optax.GradientTransformationExtraArgs:
  """The optimizer by its name, its learning rates numbers in its state.

  Gradients are clipped by the training step, which also leaves out those that
  are not finite. `start` puts the learning rates of a run into a state.

  Args:
    config: The optimizer; its name is not None.
    steps: Number of steps of a run; it counts where `depends_on_steps`.
    rules: Pairs (regex, label) over the paths of what trains.

  Returns:
    The transformation.

  Raises:
    ValueError: If an option is not allowed.
  """
  _check_cycle(config, steps)
  build = _builder(config, rules)

  def make_one(**numbers: Any) -> optax.GradientTransformation:
    return build(functools.partial(_rate(config, steps), **numbers))

  return inject_hyperparams(make_one, **_numbers(config, steps, peak=1.0))


def make_at_rate(
  config: OptimConfig, rules: LabelRules, outer_bits: int | None = None
) -> optax.GradientTransformationExtraArgs:
  """The optimizer with a learning rate that is a number in its state.

  It does not depend on how many steps that state has seen, as layers need that
  come and go.

  Args:
    config: The optimizer; its name is not None.
    rules: Pairs (regex, label) over the paths of what trains.
    outer_bits: Bits of the moments outside of the layers; None: those of all.

  Returns:
    The transformation, whose state has ``hyperparams['learning_rate']``.

  Raises:
    ValueError: If an option is not allowed.
  """
  build = _builder(config, rules, outer_bits)
  return inject_hyperparams(
    lambda learning_rate: build(learning_rate), learning_rate=0.0
  )


def start(opt_state: Any, numbers: dict[str, jax.Array]) -> Any:
  """A fresh state of `make`'s optimizer with the learning rates of a run."""
  return opt_state._replace(hyperparams=numbers)


def numbers(config: OptimConfig, steps: int) -> dict[str, jax.Array]:
  """The numbers that decide every learning rate of a run, float32 scalars."""
  found = _numbers(config, steps, config.learning_rate)
  return {name: jnp.float32(value) for name, value in found.items()}


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
  """The learning rate after a number of steps taken."""
  return functools.partial(
    _rate(config, steps), **_numbers(config, steps, config.learning_rate)
  )


def rate(config: OptimConfig, steps: int) -> Callable[..., jax.Array]:
  """``rate(count, numbers)``: the learning rate of a run with these numbers.

  Raises:
    ValueError: If the cycle of a schedule does not fit its warm-up.
  """
  _check_cycle(config, steps)
  found = _rate(config, steps)
  return lambda count, numbers: found(count, **numbers)


def depends_on_steps(config: OptimConfig) -> bool:
  """Whether the number of steps is a constant of the compiled program."""
  return config.schedule != 'linear'


def without_rates(config: OptimConfig) -> OptimConfig:
  """The settings without what is a number in the state: equal for a program.

  Args:
    config: The optimizer.

  Returns:
    The same with a learning rate of None; of a linear schedule, whose warm-up
    is such a number too, without warm-up.
  """
  config = dataclasses.replace(config, learning_rate=None)
  if config.schedule == 'linear':
    config = dataclasses.replace(config, warmup_fraction=0.0)
  return config


def transformation(
  config: OptimConfig, learning_rate: optax.ScalarOrSchedule, rules: LabelRules
) -> optax.GradientTransformation:
  """The optimizer with a learning rate that is a constant of the program."""
  return _builder(config, rules)(learning_rate)


def _builder(
  config: OptimConfig, rules: LabelRules, outer_bits: int | None = None
) -> Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]:
  """Makes the optimizer from a learning rate; says once what has no effect."""
  method = methods.get(config.name)
  options = _arguments(config)
  if outer_bits is not None:
    bits = options['moment_bits'][-1][1]
    options['moment_bits'] = (('^layers/', bits), ('.*', outer_bits))

  def build(learning_rate: optax.ScalarOrSchedule) -> Any:
    # The training step leaves out bad steps itself, and rounds the sum of
    # parameter and update once.
    tx = method(
      learning_rate,
      param_labels=rules,
      skip_nonfinite=False,
      update_dtype=jnp.float32,
      **options,
    )
    if config.stochastic_rounding:
      tx = optim.split.chain(tx, optim.stochastic_rounding())
    return tx

  return build


def _arguments(config: OptimConfig) -> dict[str, Any]:
  """The arguments of an optimizer that a configuration names."""
  accepted = _parameters(config)
  options = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in _NOT_ARGUMENTS
    and getattr(config, field.name) is not None
  }
  if config.lazy_refresh is not None:
    options['lazy_refresh'] = None
    if config.lazy_refresh != 'never':
      options['lazy_refresh'] = optim.LazyRefresh(
        similarity=config.lazy_refresh
      )
  # The bits of a method are those of embeddings too.
  bits = config.moment_bits or accepted['moment_bits'].default
  options['moment_bits'] = (('.*', bits),)
  if not config.decay_norms_and_biases:
    options['weight_decay_mask'] = optim.spare_norms_and_biases
  if config.error_bits == 0:
    options['error_bits'] = None
  options |= _of_svd(config, accepted)
  for name in sorted(set(options) - set(accepted)):
    value = options.pop(name)
    if value != getattr(OptimConfig(), name):
      _logger.warning(
        'optim.%s=%r has no effect with optim.name=%r.',
        name,
        getattr(config, name),
        config.name,
      )
  return options


def _of_svd(
  config: OptimConfig, accepted: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
  """The arguments that say how singular vectors are found and chosen."""
  given = {'solver': config.solver, 'leading': config.leading}
  given = {name: value for name, value in given.items() if value is not None}
  # Those that an optimizer lacks are options of its projection, or, if that is
  # another one, without effect.
  own = {name: value for name, value in given.items() if name in accepted}
  others = {name: value for name, value in given.items() if name not in own}
  default = None
  if 'projection' in accepted:
    default = accepted['projection'].default
  if others and (config.projection or default) == 'svd':
    return {**own, 'projection': optim.projections.get('svd', **others)}
  return given


# Learning rates.


def _rate(config: OptimConfig, steps: int) -> Callable[..., jax.Array]:
  """A function of a count and the numbers of `_numbers`."""
  if config.schedule == 'linear':
    return functools.partial(schedules.linear_rate, final=config.final_fraction)
  shape = {
    'warmup': _warmup_steps(config, steps),
    'steps': steps,
    'final': config.final_fraction,
  }
  if config.schedule == 'cosine':
    return functools.partial(schedules.cosine_rate, **shape)
  rewarm = max(round(config.restart_warmup_fraction * config.cycle), 1)
  return functools.partial(
    schedules.jagged_rate, **shape, cycle=config.cycle, rewarm=rewarm
  )


def _check_cycle(config: OptimConfig, steps: int) -> None:
  """Raises ValueError if the first warm-up is longer than a cycle."""
  warmup = _warmup_steps(config, steps)
  if config.schedule == 'jagged' and warmup > config.cycle:
    raise ValueError(
      f'optim.warmup_fraction={config.warmup_fraction:g} of {steps} steps are '
      f'{warmup}, more than a cycle (adapter.restart_every or optim.cycle) of '
      f'{config.cycle}: the learning rate would restart before it reached its '
      'peak. Lower the former or raise the latter.'
    )


def _numbers(config: OptimConfig, steps: int, peak: float) -> dict[str, float]:
  if config.schedule == 'linear':
    warmup = float(round(config.warmup_fraction * steps))
    return {'peak': peak, 'warmup': warmup, 'steps': float(steps)}
  # Rounded once: the difference of two rounded numbers is another one.
  return {'peak': peak, 'climb': peak / _warmup_steps(config, steps) - peak}


def _warmup_steps(config: OptimConfig, steps: int) -> int:
  return max(round(config.warmup_fraction * steps), 1)
