"""Alice: GaLore whose bases explore, and the rest of the gradient, scaled.

Shape suffixes in this file:
  MN    a gradient's last two axes, turned so that the basis lives on N
  R     rank of the subspace
Leading axes `[*]` stack matrices; each is treated by itself.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  OneSide,
  OneSideOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.methods.recovered_adam import RecoverySubspace
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.parts.checks import check_interval
from gnlorp_jax.optim.parts.norm_growth import limiter
from gnlorp_jax.optim.projections.svd import Solver
from gnlorp_jax.optim.subspace.low_rank import (
  Recovery,
  rest,
  with_low_rank_projection,
)


class CompensationState(NamedTuple):
  """State of `compensation`."""

  energy: jax.Array  # float32 [*, m], the paper's p
  norm: Any  # float32 [*], last norm; () without a limit


def compensation(
  scale: float = 0.4,
  b1: float = 0.9,
  norm_growth_limit: float | None = 1.01,
) -> Recovery:
  r"""The direction in the subspace, and the rest with rows of one energy.

  With coordinates ``R = G Q``, the direction N of them, and for the rows i
  of the axis M that is not compressed, of the n - r directions left out,

  .. math::
    p_i &\leftarrow \beta_1 p_i + (1 - \beta_1) |(G - R Q^T)_i|^2 \\
    C_i &= \sqrt{n - r} \, (G - R Q^T)_i / \sqrt{p_i} \\
    U &= N Q^T + \alpha_c C

  where C goes through `limit_norm_growth` before it is added.

  Args:
    scale: ``alpha_c``, at least 0.
    b1: Decay of the energies, in [0, 1).
    norm_growth_limit: Most that the norm of C may grow by in a step, at least
      1; None lets it grow.

  Returns:
    The recovery; its state is a `CompensationState`.

  Raises:
    ValueError: If a number is out of its interval.

  References:
    Gong et al., `Alice`, 2025, arXiv:2502.07752, algorithm 3.

  Note:
    The paper computes a row's energy outside as the difference of those of the
    gradient and of its coordinates, which is the same and may come out below
    zero. A rest of less than 1e-4 of the gradient's energy counts as zero here
    (`rest`): divided by its own energy, roundings would become an update. The
    energies begin at zero and are not corrected, as in the paper, so that a
    first C is longer by up to ``(1 - b1) ** -0.5``. A norm of zero is not
    recorded, see `norm_growth.limiter`.
  """
  check_interval('compensation_scale', scale, '[0, inf)')
  check_interval('b1', b1, '[0, 1)')
  limit = limiter(norm_growth_limit)

  def init(shape: tuple[int, ...]) -> CompensationState:
    return CompensationState(
      energy=jnp.zeros(shape[:-1], jnp.float32), norm=limit.init(shape)
    )

  def apply(
    grad_MN: jax.Array,
    low_MR: jax.Array,
    direction_MR: jax.Array,
    back: Callable[[jax.Array], jax.Array],
    state: CompensationState,
  ) -> tuple[jax.Array, CompensationState]:
    left_out = grad_MN.shape[-1] - low_MR.shape[-1]
    if left_out == 0:
      return back(direction_MR), jax.tree.map(jnp.zeros_like, state)
    rest_MN = rest(grad_MN, low_MR, back)
    energy = jnp.sum(jnp.square(rest_MN), axis=-1)
    energy = b1 * state.energy + (1 - b1) * energy
    has_rest = (energy > 0)[..., None]
    root = jax.lax.rsqrt(jnp.where(has_rest, energy[..., None], 1))
    scaled_MN = math.sqrt(left_out) * rest_MN * jnp.where(has_rest, root, 0)
    scaled_MN, norm = limit.apply(scaled_MN, state.norm)
    update_MN = back(direction_MR) + scale * scaled_MN
    return update_MN, CompensationState(energy, norm)

  return Recovery(init, apply)


@with_options(b2=0.9)
def scale_by_alice(
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.3,
  *,
  compensation_scale: float = 0.4,
  norm_growth_limit: float | None = 1.01,
  **options: Unpack[RecoverySubspace],
) -> optax.GradientTransformationExtraArgs:
  """Alice's direction for kernels, of full rank with moments of low rank.

  Learning rate and decay follow in `descend`.

  Args:
    compensation_scale: Multiplies the rest of the gradient, beside `scale`; at
      least 0.
    norm_growth_limit: Factor by which the norm of that rest may grow in a step,
      at least 1; None lets it grow.

  Returns:
    A transformation of kernels ``[*, in, out]`` alone; its updates are float32.

  Raises:
    ValueError: As `with_low_rank_projection`, `scale_by_adam` and
      `compensation`.
  """
  adam = pick(options, AdamOptions)
  return with_low_rank_projection(
    scale_by_adam(**adam, bias_correction=False),
    rank,
    update_proj_gap,
    scale,
    recovery=compensation(compensation_scale, adam['b1'], norm_growth_limit),
    **pick(options, OneSideOptions),
  )


class AliceOptions(AdamOptions, WeightNormOptions, total=False):
  """The shared keywords of `alice`."""


@with_options(scale_by_alice, b2=0.9)
def alice(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.3,
  *,
  b3: float = 0.999,
  leading: int | None = None,
  solver: Solver = 'power',
  compensation_scale: float = 0.4,
  norm_growth_limit: float | None = 1.01,
  side: OneSide = 'short',
  spread_refreshes: bool = True,
  **options: Unpack[AliceOptions],
) -> optax.GradientTransformationExtraArgs:
  """Alice: full-rank updates, and bases of which a part is always new.

  Bases are fitted to the gradient at hand and to an average of the coordinates
  so far, r x r numbers for a kernel. Only some columns are leading singular
  vectors of both; the others are drawn at every refresh. What a basis leaves
  out of a gradient is scaled to rows of one energy and added.

  Args:
    b3: Decay of what bases remember, in [0, 1); 0 remembers nothing, which is
      `alice0`.
    leading: Columns of a basis that are leading singular vectors, at least 1;
      the others are drawn, none of them if it is at least `rank`. None takes
      5/16 of `rank`.
    solver: How these are found: ``power``, ``eigh`` or ``exact``, see
      `projections.svd`.
    b2: Decay of the second moments of kernels, in [0, 1); that of Adam for all
      else is 0.999.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp` and `scale_by_alice`; also if `b3` is out of
      its interval, `leading` below 1, `solver` unknown or one that draws or
      follows, or `side` ``both``.

  Examples:
    >>> tx = alice(2e-2, rank=4, leading=2)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Gong et al., `Structured Fisher Approximation`, 2025, arXiv:2502.07752,
    algorithm 4.

  Note:
    Of the paper's ranks and leading columns, 40 of 128 and 160 of 512 are 5 of
    16. A refresh comes at steps 1, T + 1, ..., there at 1, T, 2T, ... The
    moments of kernels have no bias correction, as in the paper; eps is added to
    their root, where that has none. See `switch` and `track` in
    `projections.svd` for how columns are drawn and what is remembered.
  """
  check_interval('b3', b3, '[0, 1)')
  if solver in ('sampled', 'grassmann'):
    raise ValueError(
      f'solver={solver!r} finds no leading vectors beside which alice could '
      "draw others. Use 'power', 'eigh' or 'exact'."
    )
  if leading is None:
    leading = max(1, rank * 5 // 16)
  adam = pick(options, AdamOptions)
  svd = projections.get('svd', solver=solver, leading=leading, tracking=b3)
  return assemble(
    scale_by_alice(
      rank,
      update_proj_gap,
      scale,
      compensation_scale=compensation_scale,
      norm_growth_limit=norm_growth_limit,
      projection=svd,
      side=side,
      spread_refreshes=spread_refreshes,
      **adam,
    ),
    scale_by_adam(b1=adam['b1'], eps=adam['eps']),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
