"""What is asked of the planner: a training run, and GPUs to plan it for."""

import dataclasses

from gnlorp_jax import config
from gnlorp_jax.plan.accelerators import check_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(config.TrainConfig):
  """A training run, and the GPUs to plan it for."""

  device: str = 'h100'
  """The GPU: rtx4090, rtx4060ti (16 GB), a100 (80 GB), h100 or h200."""
  devices: int = 1
  """Number of these GPUs, in one machine."""
  json: str | None = None
  """File to write the plan to as JSON; '-' prints it instead of the tables."""

  def __post_init__(self):
    super().__post_init__()
    check_name(self.device)
    if self.devices < 1:
      raise ValueError(
        f'PlanConfig.devices must be at least 1, got {self.devices}.'
      )
