"""What is asked of the planner: a run of some recipe, and GPUs to plan it for.

Each recipe has a class here, with the options of its program and those of
`Target`. It knows how the recipe builds its program without data.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from gnlorp_jax.compose import parameters
from gnlorp_jax.compose.settings import free, result
from gnlorp_jax.data import glue as glue_data
from gnlorp_jax.plan.accelerators import check_name
from gnlorp_jax.recipes.glue import protocol, tasks
from gnlorp_jax.recipes.glue import recipe as glue
from gnlorp_jax.recipes.glue import settings as glue_settings
from gnlorp_jax.recipes.pretrain import recipe as pretrain
from gnlorp_jax.recipes.pretrain import settings as pretrain_settings
from gnlorp_jax.recipes.sft import recipe as sft
from gnlorp_jax.recipes.sft import settings as sft_settings

Devices = Sequence[jax.Device] | int

_UNITS = {
  **{f'{letter}B': 1000**n for n, letter in enumerate('KMGT', 1)},
  **{f'{letter}iB': 1024**n for n, letter in enumerate('KMGT', 1)},
}


def size_of(text: str) -> int:
  """Bytes of a size such as ``16GiB``, ``12GB`` or ``800MiB``.

  Raises:
    ValueError: If it is no number with a unit, or not positive.
  """
  match = re.fullmatch(r'(\d+(?:\.\d+)?) ?([KMGT]i?B)', text.strip())
  size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
  if size < 1:
    raise ValueError(
      f'{text!r} is no size: give a positive number and a unit '
      f'({", ".join(_UNITS)}), such as 16GiB, 12GB or 800MiB.'
    )
  return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """The GPUs to plan for; goes before a recipe's configuration."""

  device: str = free('h100')
  """The GPU: rtx4090, rtx4060ti (16 GB), rtx3060 (12 GB), a100 (80 GB), h100 or
  h200."""
  devices: int = free(1)
  """Number of these GPUs, in one machine."""
  json: str | None = free(None)
  """File to write the plan to as JSON; '-' prints it instead of the tables."""

  def __post_init__(self):
    super().__post_init__()  # type: ignore[misc]
    check_name(self.device)
    if self.devices < 1:
      raise ValueError(
        f'{type(self).__name__}.devices must be at least 1, got {self.devices}.'
      )

  @property
  def title(self) -> str | None:
    """What is planned, where the options alone do not say it."""
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Target, pretrain_settings.TrainConfig):
  """A pre-training run, and the GPUs to plan it for."""

  budget: str | None = free(None)
  """What a run may take on one device, such as 16GiB, 12GB or 800MiB: asks for
  the optimizers that fit, by the losses that were measured with them."""

  def __post_init__(self):
    super().__post_init__()
    if self.budget is None:
      return
    try:
      size_of(self.budget)
    except ValueError as error:
      raise ValueError(f'budget={error}') from None
    if self.adapter.kind is not None or self.sampling.is_on:
      raise ValueError(
        f'budget={self.budget!r} ranks optimizers that train all weights in '
        'every step: leave out adapter.kind and the options of sampling, or '
        'budget.'
      )

  @classmethod
  def parse(cls, args: list[str], description: str) -> 'PlanConfig':
    """Makes the settings from the options of a command line."""
    return pretrain.with_rank(pretrain_settings.parse(args, description, cls))

  def build(self, devices: Devices) -> pretrain.Planned:
    """What the run computes on these devices, described or just a number."""
    return pretrain.plan(self, devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GluePlanConfig(Target, glue_settings.GlueConfig):
  """Fine-tuning with one method on one task, and the GPUs to plan it for."""

  needs_examples: ClassVar[bool] = False

  task: str = free('mrpc')
  """The task, whose number of classes, batch size and length are planned: cola,
  sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli. With `data.train` it names
  your own."""
  method: str = free('gradnormlorp')
  """The method: full, lora, dora, galore, gradnormlorp, gradnormlorp_adapter;
  or another optimizer that trains all weights. optim.name and adapter.kind
  replace what it stands for."""
  init_from: str | None = result('base')
  """Hugging Face folder of a RoBERTa, or a preset: tiny, mini, small, base,
  large. Of a preset the vocabulary is planned as it was published, unless a
  tokenizer is named."""

  def __post_init__(self):
    super().__post_init__()
    for name in ('task', 'method'):
      value = getattr(self, name)
      if value == 'all' or ',' in value:
        raise ValueError(
          f'{name}={value!r} names several, and a plan is for one. Name one.'
        )

  @classmethod
  def parse(cls, args: list[str], description: str) -> 'GluePlanConfig':
    """Makes the settings, with the protocol's numbers for what is not given."""
    config = glue_settings.parse(args, description, cls)
    return protocol.resolve(config, config.task, config.method)

  @property
  def title(self) -> str:
    """The task, the method and the largest batch."""
    return (
      f'{self.task} with {self.method}: {self.batch_size} sequences of '
      f'{self.max_length} tokens'
    )

  def build(self, devices: Devices) -> glue.Planned:
    """What the run computes on these devices, described or just a number."""
    return glue.plan(
      self,
      devices,
      task=self._task(),
      architecture=tasks.architecture(self, self._tokenizer()),
    )

  def _task(self) -> Any:
    if self.is_custom or self.task == glue_settings.DEMO:
      return tasks.find_tasks(self)[0]
    return glue_data.get_task(self.task)

  def _tokenizer(self) -> Any:
    """The tokenizer; None for a preset, whose own is then assumed."""
    is_preset = self.init_from is not None and not parameters.is_folder(
      self.init_from
    )
    if is_preset and self.tokenizer is None:
      return None
    return tasks.load_tokenizer(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftPlanConfig(Target, sft_settings.SftConfig):
  """Fine-tuning on conversations, and the GPUs to plan it for."""

  init_from: str | None = result('llama-3.1-8b')
  """Hugging Face folder of the model to fine-tune (also --model), 'hf:OWNER/
  NAME', or a preset: 7b, llama-3.1-8b, qwen2.5-7b, ..."""

  @classmethod
  def parse(cls, args: list[str], description: str) -> 'SftPlanConfig':
    """Makes the settings, with the recipe's numbers for what is not given."""
    return sft.resolve(sft_settings.parse(args, description, cls))

  @property
  def title(self) -> str:
    """The model, the method and the batch."""
    return (
      f'{self.init_from or "the demo"} with {self.method}: {self.batch_size} '
      f'rows of {self.data.max_length} tokens'
    )

  def build(self, devices: Devices) -> sft.Planned:
    """What the run computes on these devices, described or just a number."""
    return sft.plan(self, devices)


RECIPES = {
  'pretrain': PlanConfig,
  'glue': GluePlanConfig,
  'sft': SftPlanConfig,
}
"""What can be planned, by the first word of the command line."""

Settings = PlanConfig | GluePlanConfig | SftPlanConfig
