"""The configuration that a user's file holds, and its groups.

A face: configuration files import from here, wherever the groups are at home.
"""

from gnlorp_jax.compose.coreset_settings import (
  CoresetOptions as CoresetOptions,
)
from gnlorp_jax.compose.settings import AdapterOptions as AdapterOptions
from gnlorp_jax.compose.settings import (
  LayerSamplingOptions as LayerSamplingOptions,
)
from gnlorp_jax.compose.settings import MeshConfig as MeshConfig
from gnlorp_jax.compose.settings import OptimConfig as OptimConfig
from gnlorp_jax.compose.settings import ProcessOptions as ProcessOptions
from gnlorp_jax.compose.settings import StepConfig as StepConfig
from gnlorp_jax.compose.settings import TaskOptions as TaskOptions
from gnlorp_jax.recipes.pretrain.settings import DataConfig as DataConfig
from gnlorp_jax.recipes.pretrain.settings import SampleConfig as SampleConfig
from gnlorp_jax.recipes.pretrain.settings import TrainConfig as TrainConfig
from gnlorp_jax.recipes.pretrain.settings import load as load
from gnlorp_jax.recipes.pretrain.settings import parse as parse
from gnlorp_jax.recipes.sft.settings import ChatDataConfig as ChatDataConfig
from gnlorp_jax.recipes.sft.settings import SftConfig as SftConfig
from gnlorp_jax.recipes.sft.settings import SftEvalOptions as SftEvalOptions
