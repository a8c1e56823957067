"""From settings to adapters that restart, as ReLoRA's do."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import optax

from gnlorp_jax import models, optim
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  OptimConfig,
  StepConfig,
)
from gnlorp_jax.models import adapters, kernels
from gnlorp_jax.models.interface import Model
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.training.parameters import Parameters
from gnlorp_jax.training.restarts import Restarts

_logger = logging.getLogger(__name__)


def check(
  options: AdapterOptions,
  step_config: StepConfig,
  steps: int,
  *,
  is_sampled: bool,
) -> None:
  """Finds what cannot restart, before anything is built.

  Args:
    options: What is asked for.
    step_config: How weights are stored.
    steps: Number of steps of a run; 0 if it is not known yet.
    is_sampled: Whether some layers train at a time.

  Raises:
    ValueError: If kernels cannot be folded into, or the run is too short.
  """
  every = options.restart_every
  if every is None:
    return
  if is_sampled:
    raise ValueError(
      f'adapter.restart_every={every} restarts the adapters of all layers, and '
      'sampling trains some. Use one or the other.'
    )
  if step_config.weight_bits == 4:
    raise ValueError(
      f'adapter.restart_every={every} folds adapters into their kernels, and '
      'step.weight_bits=4 rounds these to 16 values, to nearest: most of what '
      'was learned would be lost. Use step.weight_bits=8, which rounds at '
      'random, or None.'
    )
  if steps and every >= steps:
    raise ValueError(
      f'adapter.restart_every={every} must be less than the steps of the run, '
      f'{steps}: there is no restart after the last. Lower it, or leave it out.'
    )


def others(
  make: Callable[[Any], Model],
  architecture: models.Config,
  options: AdapterOptions,
  adapter: adapters.AdapterConfig | None,
) -> tuple[str, ...]:
  """Paths of what trains beside adapters by `AdapterOptions.train_others`.

  Args:
    make: Makes the model of an architecture.
    architecture: The architecture.
    options: What is asked for.
    adapter: The adapters; None if there are none.

  Returns:
    The paths of all parameters that are not adapted; none where they stay.
  """
  trains = options.train_others
  if trains is None:
    trains = options.restart_every is not None
  if adapter is None or not trains:
    return ()
  shapes = jax.eval_shape(make(architecture).init, jax.random.key(0))
  adapted = {'/'.join((*layer, 'kernel')) for layer in _layers(adapter, shapes)}
  paths = jax.tree_util.tree_leaves_with_path(shapes)
  return tuple(
    name for path, _ in paths if (name := path_name(path)) not in adapted
  )


def _layers(
  adapter: adapters.AdapterConfig, shapes: Any
) -> list[tuple[str, ...]]:
  """Paths of the layers that have an adapter."""
  drawn = jax.eval_shape(
    lambda shapes: adapters.init(adapter, shapes, jax.random.key(0)), shapes
  )
  return sorted(kernels.adapted_layers(drawn))


def plan(
  options: AdapterOptions,
  adapter: adapters.AdapterConfig | None,
  held: Parameters,
  tx: optax.GradientTransformation,
  optim_config: OptimConfig,
  steps: int,
  seed: int,
) -> Restarts | None:
  """Says when adapters restart, and what that does; warns of half of ReLoRA.

  Args:
    options: What is asked for.
    adapter: The adapters; None if there are none.
    held: The weights as an ordinary step holds them.
    tx: The optimizer of what trains.
    optim_config: Its settings.
    steps: Number of steps of a run; 0 if it is not known yet, for shapes alone.
    seed: Decides what is drawn.

  Returns:
    The restarts; None if there are none.

  Raises:
    ValueError: If the optimizer keeps more than moments of the factors.
  """
  every = options.restart_every
  is_jagged = optim_config.schedule == 'jagged'
  if every is None or adapter is None:
    if is_jagged:
      _logger.warning(
        "optim.schedule='jagged' lets the learning rate rise again in cycles "
        'without restarts, for which it is meant: give adapter.restart_every, '
        "or use optim.schedule='cosine'."
      )
    _warn_without_effect(options)
    return None
  if not is_jagged:
    _logger.warning(
      'adapter.restart_every=%d prunes moments at every restart, and '
      'optim.schedule=%r does not lower the learning rate for it: runs may '
      "diverge. Use optim.schedule='jagged'.",
      *(every, optim_config.schedule),
    )
  exact = jax.eval_shape(held.decode_exact, held.trained)
  fields = optim.pruning.fields_beside_moments(
    jax.eval_shape(tx.init, exact), exact, _is_factor
  )
  if fields:
    raise ValueError(
      f'adapter.restart_every={every} draws new factors, and optim.name='
      f'{optim_config.name!r} keeps {fields} of the old ones. Label the '
      "factors 'full' (which they are without optim.param_labels), or use "
      "optim.name='adamw'."
    )
  shapes = held.join(held.trained, held.frozen)
  return Restarts(
    every=every,
    steps=steps,
    parameters=held,
    layers=tuple(sorted(kernels.adapted_layers(shapes))),
    restart=lambda layer, key: adapters.restart(adapter, layer, key),
    prune=lambda opt_state, key: optim.pruning.prune_moments(
      opt_state,
      exact,
      _is_factor,
      options.restart_prune,
      options.restart_prune_share,
      key,
    ),
    seed=seed,
  )


def _is_factor(path: str) -> bool:
  """Whether a parameter is a factor of an adapter.

  Magnitudes keep their moments: a restart leaves them what they were.
  """
  return path.split('/')[-1] in ('lora_a', 'lora_b')


def _warn_without_effect(options: AdapterOptions) -> None:
  for field in dataclasses.fields(options):
    value = getattr(options, field.name)
    if field.name.startswith('restart_prune') and value != field.default:
      _logger.warning(
        'adapter.%s=%r has no effect without adapter.restart_every.',
        *(field.name, value),
      )
