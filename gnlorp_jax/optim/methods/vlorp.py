"""VLoRP: random projections of finer or coarser granularity."""

from typing import Unpack

import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamModeOptions,
  OneSide,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.projections.random import Distribution
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection


class VlorpOptions(AdamModeOptions, WeightNormOptions, total=False):
  """The shared keywords of `vlorp`."""


@with_options(eps=1e-6, eps_mode='hf', decay_order='after')
def vlorp(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 1,
  update_proj_gap: int = 30,
  scale: float = 0.25,
  *,
  granularity: float | None = None,
  distribution: Distribution = 'normal',
  side: OneSide = 'short',
  spread_refreshes: bool = True,
  **options: Unpack[VlorpOptions],
) -> optax.GradientTransformationExtraArgs:
  """VLoRP in its subspace scheme: Adam on randomly projected gradients.

  Each matrix stores a seed instead of a basis. `granularity` cuts the gradient
  finer or coarser before it is projected; the moments of a kernel whose other
  axis is m have ``m * granularity * rank`` elements each.

  Args:
    rank: Columns of the random matrix, at least 1.
    update_proj_gap: Steps between two random matrices, at least 1.
    granularity: Pieces of every row of a gradient, or one over the rows to
      join, see `projections.random`; it must divide the compressed axis. None
      takes 64 or, where that does not, the largest power of two that does.
    distribution: ``normal`` or ``rademacher``, see `projections.random`.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp` and `projections.random`.

  Examples:
    >>> tx = vlorp(1e-3, granularity=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Wang et al., `VLoRP`, 2025, arXiv:2505.01744.

  Note:
    As published, the moments stay as they are when the random matrix changes.
    The published run takes a granularity of 256, which does not divide the
    width of every model; 64 was nearly as good there. For its reshape and its
    seeds see `projections.random`. A granularity of 1 goes with both sides too:
    that is `galore` with ``projection='random'`` and ``side='both'``.
  """
  adam = pick(options, AdamModeOptions)
  return assemble(
    with_low_rank_projection(
      scale_by_adam(**adam),
      rank,
      update_proj_gap,
      scale,
      projection=projections.get(
        'random', granularity=granularity, distribution=distribution
      ),
      side=side,
      spread_refreshes=spread_refreshes,
    ),
    scale_by_adam(**adam),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
