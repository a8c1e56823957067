"""The optimizer library: jax and optax only, for any model."""

from gnlorp_jax.optim import inspect as inspect
from gnlorp_jax.optim import projections as projections
from gnlorp_jax.optim import quantized_weights as quantized_weights
from gnlorp_jax.optim import split as split
from gnlorp_jax.optim.adafactor import (
  scale_by_adafactor as scale_by_adafactor,
)
from gnlorp_jax.optim.adam import descend as descend
from gnlorp_jax.optim.adam import scale_by_adam as scale_by_adam
from gnlorp_jax.optim.adamw import adamw as adamw
from gnlorp_jax.optim.apollo import apollo as apollo
from gnlorp_jax.optim.apollo import apollo_mini as apollo_mini
from gnlorp_jax.optim.apollo import scale_by_apollo as scale_by_apollo
from gnlorp_jax.optim.dct_adamw import dct_adamw as dct_adamw
from gnlorp_jax.optim.fira import fira as fira
from gnlorp_jax.optim.fira import scale_by_fira as scale_by_fira
from gnlorp_jax.optim.galore import galore as galore
from gnlorp_jax.optim.galore_adafactor import (
  galore_adafactor as galore_adafactor,
)
from gnlorp_jax.optim.gradnormlorp import gradnormlorp as gradnormlorp
from gnlorp_jax.optim.inspect import format_report as format_report
from gnlorp_jax.optim.inspect import report as report
from gnlorp_jax.optim.kernel_axes import with_kernel_axes as with_kernel_axes
from gnlorp_jax.optim.ldadam import ldadam as ldadam
from gnlorp_jax.optim.ldadam import scale_by_ldadam as scale_by_ldadam
from gnlorp_jax.optim.low_rank import LowRankState as LowRankState
from gnlorp_jax.optim.low_rank import Recovery as Recovery
from gnlorp_jax.optim.low_rank import (
  with_low_rank_projection as with_low_rank_projection,
)
from gnlorp_jax.optim.nonfinite import skip_nonfinite as skip_nonfinite
from gnlorp_jax.optim.norm_growth import initial_norm as initial_norm
from gnlorp_jax.optim.norm_growth import limit_norm_growth as limit_norm_growth
from gnlorp_jax.optim.projections import Projection as Projection
from gnlorp_jax.optim.q_galore import q_galore as q_galore
from gnlorp_jax.optim.quantized_state import (
  quantize_moments as quantize_moments,
)
from gnlorp_jax.optim.refresh import LazyRefresh as LazyRefresh
from gnlorp_jax.optim.released import (
  released_gradnormlorp as released_gradnormlorp,
)
from gnlorp_jax.optim.stochastic_rounding import (
  stochastic_rounding as stochastic_rounding,
)
from gnlorp_jax.optim.vlorp import projfactor as projfactor
from gnlorp_jax.optim.vlorp import vlorp as vlorp
from gnlorp_jax.optim.weight_norm import with_weight_norm as with_weight_norm
