"""Alice-0: Alice without memory of earlier gradients."""

from typing import Unpack

import optax

from gnlorp_jax.optim.methods.alice import AliceOptions, alice
from gnlorp_jax.optim.methods.options import OneSide, with_options
from gnlorp_jax.optim.projections.svd import Solver


@with_options(alice, b2=0.9)
def alice0(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.3,
  *,
  leading: int | None = None,
  solver: Solver = 'power',
  compensation_scale: float = 0.4,
  norm_growth_limit: float | None = 1.01,
  side: OneSide = 'short',
  spread_refreshes: bool = True,
  **options: Unpack[AliceOptions],
) -> optax.GradientTransformationExtraArgs:
  """Alice-0: full-rank updates, and bases of which a part is always new.

  It is `alice` without tracking: bases are fitted to the gradient at hand
  alone, which needs r x r numbers less for a kernel.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `alice`.

  Examples:
    >>> tx = alice0(2e-2, rank=4, leading=2)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Gong et al., `Structured Fisher Approximation`, 2025, arXiv:2502.07752,
    section 5.4.

  Note:
    See `alice`.
  """
  return alice(
    learning_rate,
    rank,
    update_proj_gap,
    scale,
    b3=0.0,
    leading=leading,
    solver=solver,
    compensation_scale=compensation_scale,
    norm_growth_limit=norm_growth_limit,
    side=side,
    spread_refreshes=spread_refreshes,
    **options,
  )
