"""GaLore: Adam on projected gradients."""

from typing import Unpack

import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamModeOptions,
  GaloreSubspace,
  RefreshOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection
from gnlorp_jax.optim.subspace.moments import moment_rule


class GaloreOptions(GaloreSubspace, WeightNormOptions, total=False):
  """The shared keywords of `galore`."""


@with_options(eps=1e-6, eps_mode='hf')
def scale_by_galore(
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  **options: Unpack[GaloreSubspace],
) -> optax.GradientTransformationExtraArgs:
  """GaLore's direction for kernels: Adam in the subspace of their gradients.

  Learning rate and decay follow in `descend`, or all around it weight
  normalisation, as in `gradnormlorp`.

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: As `with_low_rank_projection` and `scale_by_adam`.
  """
  adam = pick(options, AdamModeOptions)
  rule = moment_rule(options['moments_on_refresh'], adam['b1'], adam['b2'])
  return with_low_rank_projection(
    scale_by_adam(**adam, count_per_matrix=rule is not None),
    rank,
    update_proj_gap,
    scale,
    on_refresh=rule,
    **pick(options, RefreshOptions),
  )


@with_options(eps=1e-6, eps_mode='hf', decay_order='after')
def galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
  """GaLore: Adam on projected gradients.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp`.

  Examples:
    >>> tx = galore(1e-2, rank=4, projection='svd')
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Zhao et al., `GaLore`, 2024, arXiv:2403.03507, algorithm 2.

  Note:
    With ``projection=projections.get('svd', solver='exact')`` and
    ``spread_refreshes=False`` it follows the public PyTorch code; the defaults
    find the subspace by power iteration and spread the refreshes.
  """
  return assemble(
    scale_by_galore(
      rank, update_proj_gap, scale, **pick(options, GaloreSubspace)
    ),
    scale_by_adam(**pick(options, AdamModeOptions)),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
