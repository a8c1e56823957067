"""AdamW, the full-rank baseline."""

from typing import Unpack

import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.options import (
  AdamModeOptions,
  CommonOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam


class AdamWOptions(AdamModeOptions, CommonOptions, total=False):
  """The shared keywords of `adamw`."""


@with_options()
def adamw(
  learning_rate: optax.ScalarOrSchedule,
  **options: Unpack[AdamWOptions],
) -> optax.GradientTransformationExtraArgs:
  """AdamW on every parameter, the full-rank baseline.

  Returns:
    A complete optimizer.

  Raises:
    ValueError: As `gradnormlorp`.

  Examples:
    >>> tx = adamw(1e-3)
    >>> state = tx.init({'dense': {'kernel': jnp.ones((16, 8))}})

  References:
    Loshchilov & Hutter, `Decoupled Weight Decay`, 2017, arXiv:1711.05101.
  """
  return assemble(
    None,
    scale_by_adam(**pick(options, AdamModeOptions)),
    learning_rate,
    **pick(options, CommonOptions),
  )
