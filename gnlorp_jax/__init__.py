"""Memory-lean language-model training in JAX: GradNormLoRP and its family."""

__version__ = '0.1.0'

from gnlorp_jax.optim import LazyRefresh as LazyRefresh
from gnlorp_jax.optim import adamw as adamw
from gnlorp_jax.optim import apollo as apollo
from gnlorp_jax.optim import apollo_mini as apollo_mini
from gnlorp_jax.optim import dct_adamw as dct_adamw
from gnlorp_jax.optim import fira as fira
from gnlorp_jax.optim import format_report as format_report
from gnlorp_jax.optim import galore as galore
from gnlorp_jax.optim import galore_adafactor as galore_adafactor
from gnlorp_jax.optim import gradnormlorp as gradnormlorp
from gnlorp_jax.optim import inspect as inspect
from gnlorp_jax.optim import ldadam as ldadam
from gnlorp_jax.optim import projections as projections
from gnlorp_jax.optim import projfactor as projfactor
from gnlorp_jax.optim import q_galore as q_galore
from gnlorp_jax.optim import quantize_moments as quantize_moments
from gnlorp_jax.optim import report as report
from gnlorp_jax.optim import stochastic_rounding as stochastic_rounding
from gnlorp_jax.optim import vlorp as vlorp
from gnlorp_jax.optim import (
  with_low_rank_projection as with_low_rank_projection,
)
from gnlorp_jax.optim import with_weight_norm as with_weight_norm
