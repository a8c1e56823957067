"""DCT-AdamW: Adam on dynamically chosen columns of a cosine transform."""

from typing import Unpack

import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamModeOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.projections.dct import Transform
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection
from gnlorp_jax.optim.subspace.moments import MomentsOnRefresh, moment_rule
from gnlorp_jax.optim.subspace.sides import Side


class DctOptions(AdamModeOptions, WeightNormOptions, total=False):
  """The shared keywords of `dct_adamw`."""


@with_options()
def dct_adamw(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 1,
  scale: float = 1.0,
  *,
  transform: Transform = 'dct2',
  norm: int = 1,
  side: Side = 'short',
  error_bits: int | None = None,
  moments_on_refresh: MomentsOnRefresh = 'rotate',
  **options: Unpack[DctOptions],
) -> optax.GradientTransformationExtraArgs:
  """DCT-AdamW: Adam on dynamically chosen columns of a cosine transform.

  Each matrix stores only the numbers of its columns; they are chosen again at
  every step, and the moments of the columns that stay move along.

  Args:
    update_proj_gap: Steps between two choices of columns, at least 1.
    transform: ``dct2`` or ``dct3``, see `projections.dct`.
    norm: 1 or 2, the norm that scores a column.
    error_bits: 32, 8 or 4 bits for every element of a buffer that feeds back
      what projecting lost; None forgets it.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp`.

  Examples:
    >>> tx = dct_adamw(1e-3, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Modoranu et al., `FFT-based Dynamic Subspace Selection`, 2025,
    arXiv:2505.17967, algorithm 2.

  Note:
    The public class rotates moments and feeds errors back only on request; the
    published method rotates, and so does this by default. With an interval T
    above 1 it chooses at steps 1, T, 2T, ...; here at 1, T + 1, 2T + 1, ... of
    each matrix, spread over the interval.
  """
  adam = pick(options, AdamModeOptions)
  rule = moment_rule(moments_on_refresh, adam['b1'], adam['b2'])
  return assemble(
    with_low_rank_projection(
      scale_by_adam(**adam, count_per_matrix=rule is not None),
      rank,
      update_proj_gap,
      scale,
      projection=projections.get('dct', transform=transform, norm=norm),
      side=side,
      on_refresh=rule,
      error_bits=error_bits,
    ),
    scale_by_adam(**adam),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
