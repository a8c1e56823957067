"""FRUGAL: Adam in a subspace, and the sign of the rest.

Shape suffixes in this file:
  MN    a gradient's last two axes, turned so that the basis lives on N
  R     rank of the subspace
Leading axes `[*]` stack matrices; each is treated by itself.
"""

from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim import projections
from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamOptions,
  OneSideOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.parts.checks import check_interval
from gnlorp_jax.optim.subspace.low_rank import (
  Recovery,
  rest,
  with_low_rank_projection,
)
from gnlorp_jax.optim.subspace.moments import MomentsOnRefresh, moment_rule


def sign_recovery(scale: float = 1.0) -> Recovery:
  r"""The direction in the subspace, and the sign of the rest.

  With coordinates ``R = G Q`` and the direction N of them,

  .. math:: U = N Q^T + \gamma \, \mathrm{sign}(G - R Q^T).

  Args:
    scale: ``gamma``, at least 0.

  Returns:
    The recovery; it has no state.

  Raises:
    ValueError: If `scale` is out of its interval.

  Note:
    Two things have no sign here that have one in the paper's formula: a rest
    with less than 1e-4 of the gradient's energy, which is what roundings leave
    of a gradient inside the subspace, and entries without a gradient.
  """
  check_interval('sign_scale', scale, '[0, inf)')

  def apply(
    grad_MN: jax.Array,
    low_MR: jax.Array,
    direction_MR: jax.Array,
    back: Callable[[jax.Array], jax.Array],
    state: tuple[()],
  ) -> tuple[jax.Array, tuple[()]]:
    rest_MN = rest(grad_MN, low_MR, back)
    sign_MN = jnp.where(grad_MN != 0, jnp.sign(rest_MN), 0)
    return back(direction_MR) + scale * sign_MN, state

  return Recovery(lambda shape: (), apply)


class FrugalOptions(
  AdamOptions, OneSideOptions, WeightNormOptions, total=False
):
  """The shared keywords of `frugal`."""


@with_options()
def frugal(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  *,
  sign_scale: float = 1.0,
  moments_on_refresh: MomentsOnRefresh = 'reset',
  **options: Unpack[FrugalOptions],
) -> optax.GradientTransformationExtraArgs:
  """FRUGAL: Adam in a subspace, and signed descent outside of it.

  Updates are of full rank, and nothing outside of the subspace is remembered.

  Args:
    scale: Multiplies the whole update of projected kernels.
    sign_scale: Multiplies the sign of what the subspace leaves out, at least 0.
    projection: Name of a module of `projections` (``svd``, ``dct``), or a
      `Projection` with orthonormal bases, such as
      ``projections.get('svd', solver='sampled')``.
    moments_on_refresh: ``reset``, ``keep`` or ``rotate`` the moments when their
      basis changes, see `moment_rule`.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp`; also if `sign_scale` is below 0, `projection`
      has bases that are not orthonormal (``random``), or `side` is ``both``.

  Examples:
    >>> tx = frugal(1e-3, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Zmushko et al., `FRUGAL`, 2024, arXiv:2411.07837, with Adam and signSGD.

  Note:
    The paper prefers whole blocks, columns or random orthonormal directions as
    subspaces; the default here are those of GaLore. See `sign_recovery` for
    what counts as zero.
  """
  if not projections.as_projection(options['projection']).is_orthonormal:
    raise ValueError(
      'What a projection whose bases are not orthonormal, such as random ones, '
      'leaves of a gradient is mostly noise, whose sign frugal would follow. '
      "Use 'svd' or 'dct'."
    )
  adam = pick(options, AdamOptions)
  rule = moment_rule(moments_on_refresh, adam['b1'], adam['b2'])
  return assemble(
    with_low_rank_projection(
      scale_by_adam(**adam, count_per_matrix=rule is not None),
      rank,
      update_proj_gap,
      scale,
      on_refresh=rule,
      recovery=sign_recovery(sign_scale),
      **pick(options, OneSideOptions),
    ),
    scale_by_adam(**adam),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
