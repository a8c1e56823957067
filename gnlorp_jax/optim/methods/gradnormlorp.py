"""GradNormLoRP: weight normalisation with projected directions."""

from typing import Unpack

import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.methods.galore import scale_by_galore
from gnlorp_jax.optim.methods.options import (
  AdamModeOptions,
  GaloreSubspace,
  KernelOptions,
  pick,
  with_options,
)
from gnlorp_jax.optim.parts.adam import scale_by_adam
from gnlorp_jax.optim.parts.weight_norm import NormState


class GradNormLoRPOptions(GaloreSubspace, KernelOptions, total=False):
  """The shared keywords of `gradnormlorp`."""


@with_options(eps=1e-6, eps_mode='hf')
def gradnormlorp(
  learning_rate: optax.ScalarOrSchedule,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 0.25,
  *,
  norm_state: NormState = 'synced',
  **options: Unpack[GradNormLoRPOptions],
) -> optax.GradientTransformationExtraArgs:
  """GradNormLoRP: weight normalisation with projected directions.

  A kernel is magnitude times direction, ``W = g v / |v|``. The gradient of
  v is projected to `rank` and Adam runs there; g, one scalar per output unit,
  has an Adam of its own. Embeddings, heads, norms and biases take plain Adam.

  Args:
    scale: Multiplies the expanded update of the directions; the magnitudes and
      the other parameters move with the plain learning rate.
    norm_state: ``synced`` or ``tracked``, see `with_weight_norm`.

  Returns:
    A complete optimizer; its `update` needs `params`.

  Raises:
    ValueError: If an argument is out of its interval or unknown; at `init`, if
      the labels do not fit the parameters.

  Examples:
    >>> tx = gradnormlorp(1e-2, rank=4)
    >>> params = {'dense': {'kernel': jnp.ones((16, 8)), 'bias': jnp.ones(8)}}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> updates['dense']['kernel'].shape
    (16, 8)

  References:
    Huang et al., `GradNormLoRP`, 2024, arXiv:2412.19616.

  Note:
    The paper projects both sides; its public code, one (``std``), which is the
    default here too. Weight decay shrinks the magnitude: W = g v / |v| does not
    depend on the length of v, so decaying v would do nothing. The public
    code decays after the step.
  """
  return assemble(
    scale_by_galore(
      rank, update_proj_gap, scale, **pick(options, GaloreSubspace)
    ),
    scale_by_adam(**pick(options, AdamModeOptions)),
    learning_rate,
    weight_norm=True,
    norm_state=norm_state,
    **pick(options, KernelOptions),
  )
