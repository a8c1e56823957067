"""Q-GaLore: GaLore with few bits and with refreshes only where needed."""

from typing import Unpack

import optax

from gnlorp_jax.optim.methods.galore import GaloreOptions, galore
from gnlorp_jax.optim.methods.options import with_options
from gnlorp_jax.optim.subspace.lazy import LazyRefresh


@with_options(
  basis_bits=4,
  lazy_refresh=LazyRefresh(),
  moment_bits=8,
  decay_order='after',
)
def q_galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
  """Q-GaLore's optimizer: 8-bit moments, 4-bit bases, lazy refreshes.

  It is `galore` with other defaults. `inspect.saved_refreshes` tells how many
  refreshes each layer was spared.

  Args:
    update_proj_gap: Steps between two refreshes of a basis at first, >= 1.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp`.

  Examples:
    >>> tx = q_galore(1e-2, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Zhang et al., `Q-GaLore`, 2024, arXiv:2407.08296.

  Note:
    Its 8-bit weights are no part of an optimizer. The similarity that lets an
    interval grow is the overlap of the two subspaces; the public code compares
    the first singular vectors with their signs:
    ``LazyRefresh(similarity='cosine')``.
  """
  return galore(learning_rate, rank, update_proj_gap, scale, **options)
