"""Memory-lean language-model training in JAX: GradNormLoRP and its family."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from gnlorp_jax.optim import (
    Advice,
    LazyRefresh,
    WeightDimensionNumbers,
    adamw,
    alice,
    alice0,
    apollo,
    apollo_mini,
    dct_adamw,
    fira,
    for_any_tree,
    format_report,
    frugal,
    galore,
    galore_adafactor,
    gradnormlorp,
    inspect,
    ldadam,
    muon,
    projections,
    projfactor,
    q_galore,
    quantize_moments,
    racs,
    recommend,
    report,
    scale,
    sinkgd,
    spare_norms_and_biases,
    stochastic_rounding,
    subtrack,
    vlorp,
    with_low_rank_projection,
    with_weight_norm,
  )
else:

  def __getattr__(name: str) -> Any:
    # Names are looked up when they are asked for: commands lie in this package
    # too, and must hear of Ctrl-C before JAX is imported.
    if name not in __all__:
      raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module('gnlorp_jax.optim'), name)


__version__ = '0.2.0'

__all__ = [
  'Advice',
  'LazyRefresh',
  'WeightDimensionNumbers',
  'adamw',
  'alice',
  'alice0',
  'apollo',
  'apollo_mini',
  'dct_adamw',
  'fira',
  'for_any_tree',
  'format_report',
  'frugal',
  'galore',
  'galore_adafactor',
  'gradnormlorp',
  'inspect',
  'ldadam',
  'muon',
  'projections',
  'projfactor',
  'q_galore',
  'quantize_moments',
  'racs',
  'recommend',
  'report',
  'scale',
  'sinkgd',
  'spare_norms_and_biases',
  'stochastic_rounding',
  'subtrack',
  'vlorp',
  'with_low_rank_projection',
  'with_weight_norm',
]


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
