"""Training steps of the library without their training loop.

For benchmarks that compile steps to weigh them, or that time single steps.
"""

from typing import Any

import jax

from gnlorp_jax.compose import optimizer
from gnlorp_jax.recipes.pretrain.recipe import Planned
from gnlorp_jax.training.state import TrainState


def lower(planned: Planned) -> jax.stages.Lowered:
  """The training step on the shapes of its arguments."""
  program = planned.program
  return program.train_step.lower(
    program.abstract_state, planned.abstract_batch, program.parameters.frozen
  )


def start(planned: Planned) -> tuple[TrainState, Any]:
  """The state at step 0 and the frozen weights."""
  config = planned.config
  return planned.program.start(
    jax.random.key(config.seed), optimizer.numbers(config.optim, config.steps)
  )
