"""Memory-lean language-model training in JAX: GradNormLoRP and its family."""

__version__ = '0.1.0'

from gnlorp_jax.optim import adamw as adamw
from gnlorp_jax.optim import format_report as format_report
from gnlorp_jax.optim import galore as galore
from gnlorp_jax.optim import gradnormlorp as gradnormlorp
from gnlorp_jax.optim import projections as projections
from gnlorp_jax.optim import report as report
from gnlorp_jax.optim import (
  with_low_rank_projection as with_low_rank_projection,
)
from gnlorp_jax.optim import with_weight_norm as with_weight_norm
