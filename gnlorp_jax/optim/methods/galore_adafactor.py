"""GaLore with Adafactor in the subspace."""

import functools
from typing import Unpack

import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  RefreshOptions,
  WeightNormOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adafactor import scale_by_adafactor
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection


class GaloreAdafactorOptions(RefreshOptions, WeightNormOptions, total=False):
  """The shared keywords of `galore_adafactor`."""


@with_options()
def galore_adafactor(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  b1: float | None = None,
  decay_rate: float = 0.8,
  eps: float = 1e-30,
  clip_threshold: float = 1.0,
  **options: Unpack[GaloreAdafactorOptions],
) -> optax.GradientTransformationExtraArgs:
  """GaLore with Adafactor: second moments of one number per row and column.

  Args:
    b1: Decay of a first moment, in [0, 1); None keeps none.
    decay_rate: How fast the second moments forget, positive; at step t their
      new share is t to the minus that.
    eps: Added to the squared gradient, positive.
    clip_threshold: Largest root mean square of a matrix's direction, positive.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp` and `scale_by_adafactor`.

  Examples:
    >>> tx = galore_adafactor(1e-2, rank=4)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Zhao et al., `GaLore`, 2024, arXiv:2403.03507; Shazeer & Stern,
    `Adafactor`, 2018, arXiv:1804.04235.

  Note:
    As in published runs, the learning rate is the one given: neither relative
    to the step nor to the parameter. Unlike there, refreshes are spread over
    the interval and find the subspace by power iteration; see `galore`.
  """
  adafactor = functools.partial(
    scale_by_adafactor, decay_rate, b1, eps, clip_threshold
  )
  return assemble(
    with_low_rank_projection(
      adafactor(matrix_names=''),  # All that is projected is a matrix.
      rank,
      update_proj_gap,
      scale,
      **pick(options, RefreshOptions),
    ),
    adafactor(),
    learning_rate,
    **pick(options, WeightNormOptions),
  )
