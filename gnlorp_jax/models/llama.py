"""LLaMA in one place: its configuration, and the functions of its models."""

from gnlorp_jax.models.families.llama import HF_TENSORS as HF_TENSORS
from gnlorp_jax.models.families.llama import HF_UNREAD as HF_UNREAD
from gnlorp_jax.models.families.llama import LABEL_RULES as LABEL_RULES
from gnlorp_jax.models.families.llama import PRESETS as PRESETS
from gnlorp_jax.models.families.llama import LlamaConfig as LlamaConfig
from gnlorp_jax.models.families.llama import config_from_hf as config_from_hf
from gnlorp_jax.models.families.llama import config_to_hf as config_to_hf
from gnlorp_jax.models.families.llama import flops_per_token as flops_per_token
from gnlorp_jax.models.families.llama import make as make
from gnlorp_jax.models.families.llama import num_params as num_params
from gnlorp_jax.models.families.llama import preset as preset
from gnlorp_jax.models.interface import Dtype as Dtype
from gnlorp_jax.models.interface import LayerFns as LayerFns
from gnlorp_jax.models.interface import Model as Model
from gnlorp_jax.models.interface import Params as Params
