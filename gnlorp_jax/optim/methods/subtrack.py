"""SubTrack++: Fira in a subspace that turns along geodesics."""

from typing import Unpack

import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.fira import fira_recovery
from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  OneSide,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.methods.recovered_adam import scale_by_recovered_adam
from gnlorp_jax.optim.parts.adam import scale_by_adam


class SubtrackOptions(AdamOptions, WeightNormOptions, total=False):
  """The shared keywords of `subtrack`."""


@with_options(eps=1e-6, decay_order='after')
def subtrack(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  step_size: float = 1.0,
  norm_growth_limit: float | None = 1.01,
  side: OneSide = 'short',
  spread_refreshes: bool = True,
  **options: Unpack[SubtrackOptions],
) -> optax.GradientTransformationExtraArgs:
  """SubTrack++: full-rank updates, in a subspace that is followed, not found.

  A first basis is that of the leading singular vectors; a refresh turns it by
  an angle toward the gradient's, and the moments of Adam move along. What the
  subspace leaves out is scaled and added, as by `fira`.

  Args:
    step_size: Largest angle by which a refresh turns a basis, in radians,
      positive.
    norm_growth_limit: Factor by which the norm of what is left out may grow in
      a step, at least 1; None lets it grow.
    eps: Added to the root of the second moments, at least 0; the bias
      corrections do not touch it (``hf``).

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp`; also if `step_size` is not positive,
      `norm_growth_limit` below 1, or `side` ``both``.

  Examples:
    >>> tx = subtrack(1e-2, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Rajabi et al., `SubTrack++`, 2025, arXiv:2502.01586, algorithm 1.

  Note:
    The paper's angle grows with the square of a gradient's size; here it is
    relative to it, see `follow_geodesic` in `projections.svd`. Moments move as
    LDAdam's do, with bias corrections inside. As in `fira`, Adam's corrections
    multiply the whole update, which has none in the paper's equation 10.
  """
  adam = pick(options, AdamOptions)
  return assemble(
    scale_by_recovered_adam(
      rank,
      update_proj_gap,
      fira_recovery(scale, 'scaled', norm_growth_limit),
      rotates=True,
      projection=projections.get(
        'svd', solver='grassmann', step_size=step_size
      ),
      side=side,
      spread_refreshes=spread_refreshes,
      **adam,
    ),
    scale_by_adam(**adam, eps_mode='hf'),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
