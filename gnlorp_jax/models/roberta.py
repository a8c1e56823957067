"""RoBERTa in one place: its configuration, and the functions of its models."""

from gnlorp_jax.models.families.roberta import (
  HF_CLASSIFIER_TENSORS as HF_CLASSIFIER_TENSORS,
)
from gnlorp_jax.models.families.roberta import (
  HF_ENCODER_TENSORS as HF_ENCODER_TENSORS,
)
from gnlorp_jax.models.families.roberta import HF_TENSORS as HF_TENSORS
from gnlorp_jax.models.families.roberta import HF_UNREAD as HF_UNREAD
from gnlorp_jax.models.families.roberta import LABEL_RULES as LABEL_RULES
from gnlorp_jax.models.families.roberta import PRESETS as PRESETS
from gnlorp_jax.models.families.roberta import RobertaConfig as RobertaConfig
from gnlorp_jax.models.families.roberta import config_from_hf as config_from_hf
from gnlorp_jax.models.families.roberta import config_to_hf as config_to_hf
from gnlorp_jax.models.families.roberta import (
  export_classifier as export_classifier,
)
from gnlorp_jax.models.families.roberta import (
  flops_per_token as flops_per_token,
)
from gnlorp_jax.models.families.roberta import (
  load_classifier as load_classifier,
)
from gnlorp_jax.models.families.roberta import make as make
from gnlorp_jax.models.families.roberta import (
  make_classifier as make_classifier,
)
from gnlorp_jax.models.families.roberta import num_params as num_params
from gnlorp_jax.models.families.roberta import preset as preset
from gnlorp_jax.models.interface import Dtype as Dtype
from gnlorp_jax.models.interface import LayerFns as LayerFns
from gnlorp_jax.models.interface import Model as Model
from gnlorp_jax.models.interface import Params as Params
