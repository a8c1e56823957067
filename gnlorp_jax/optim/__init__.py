"""The optimizer library: jax and optax only, for any model.

The complete optimizers stand first; what follows are the parts that they are
made of, for chains of one's own.
"""

from gnlorp_jax.optim import inspect, labels, projections
from gnlorp_jax.optim.advice import Advice, recommend
from gnlorp_jax.optim.inspect import format_report, report
from gnlorp_jax.optim.methods.adamw import adamw
from gnlorp_jax.optim.methods.alice import alice, scale_by_alice
from gnlorp_jax.optim.methods.alice0 import alice0
from gnlorp_jax.optim.methods.apollo import apollo, scale_by_apollo
from gnlorp_jax.optim.methods.apollo_mini import apollo_mini
from gnlorp_jax.optim.methods.dct_adamw import dct_adamw
from gnlorp_jax.optim.methods.fira import fira, scale_by_fira
from gnlorp_jax.optim.methods.frugal import frugal
from gnlorp_jax.optim.methods.galore import galore
from gnlorp_jax.optim.methods.galore_adafactor import galore_adafactor
from gnlorp_jax.optim.methods.gradnormlorp import gradnormlorp
from gnlorp_jax.optim.methods.ldadam import ldadam, scale_by_ldadam
from gnlorp_jax.optim.methods.muon import muon, scale_by_muon
from gnlorp_jax.optim.methods.projfactor import projfactor
from gnlorp_jax.optim.methods.q_galore import q_galore
from gnlorp_jax.optim.methods.racs import racs, scale_by_racs
from gnlorp_jax.optim.methods.released import released_gradnormlorp
from gnlorp_jax.optim.methods.scale import scale
from gnlorp_jax.optim.methods.sinkgd import sinkgd
from gnlorp_jax.optim.methods.subtrack import subtrack
from gnlorp_jax.optim.methods.vlorp import vlorp
from gnlorp_jax.optim.parts import split
from gnlorp_jax.optim.parts.adafactor import scale_by_adafactor
from gnlorp_jax.optim.parts.adam import descend, scale_by_adam
from gnlorp_jax.optim.parts.boundary import for_any_tree
from gnlorp_jax.optim.parts.decay_mask import spare_norms_and_biases
from gnlorp_jax.optim.parts.kernel_axes import (
  WeightDimensionNumbers,
  with_kernel_axes,
)
from gnlorp_jax.optim.parts.nonfinite import skip_nonfinite
from gnlorp_jax.optim.parts.norm_growth import initial_norm, limit_norm_growth
from gnlorp_jax.optim.parts.weight_norm import with_weight_norm
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.optim.quantized import pruning
from gnlorp_jax.optim.quantized import weights as quantized_weights
from gnlorp_jax.optim.quantized.moments import quantize_moments
from gnlorp_jax.optim.quantized.stochastic_rounding import stochastic_rounding
from gnlorp_jax.optim.subspace.lazy import LazyRefresh
from gnlorp_jax.optim.subspace.low_rank import (
  LowRankState,
  Recovery,
  with_low_rank_projection,
)

__all__ = [
  'Advice',
  'LazyRefresh',
  'LowRankState',
  'Projection',
  'Recovery',
  'WeightDimensionNumbers',
  'adamw',
  'alice',
  'alice0',
  'apollo',
  'apollo_mini',
  'dct_adamw',
  'descend',
  'fira',
  'for_any_tree',
  'format_report',
  'frugal',
  'galore',
  'galore_adafactor',
  'gradnormlorp',
  'initial_norm',
  'inspect',
  'labels',
  'ldadam',
  'limit_norm_growth',
  'muon',
  'projections',
  'projfactor',
  'pruning',
  'q_galore',
  'quantize_moments',
  'quantized_weights',
  'racs',
  'recommend',
  'released_gradnormlorp',
  'report',
  'scale',
  'scale_by_adafactor',
  'scale_by_adam',
  'scale_by_alice',
  'scale_by_apollo',
  'scale_by_fira',
  'scale_by_ldadam',
  'scale_by_muon',
  'scale_by_racs',
  'sinkgd',
  'skip_nonfinite',
  'spare_norms_and_biases',
  'split',
  'stochastic_rounding',
  'subtrack',
  'vlorp',
  'with_kernel_axes',
  'with_low_rank_projection',
  'with_weight_norm',
]
