"""AdamW, the full-rank baseline."""

import optax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.parts.adam import DecayOrder, EpsMode, scale_by_adam
from gnlorp_jax.optim.parts.labels import ParamLabels


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  eps_mode: EpsMode = 'standard',
  weight_decay: float = 0.0,
  decay_order: DecayOrder = 'before',
  moment_bits: int = 32,
  param_labels: ParamLabels | None = None,
  skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """AdamW on every parameter, the full-rank baseline.

  Args:
    learning_rate: A number or an Optax schedule.
    b1: Decay of the first moments, in [0, 1).
    b2: Decay of the second moments, in [0, 1).
    eps: Added to the root of the second moments.
    eps_mode: ``standard`` or ``hf``, see `scale_by_adam`.
    weight_decay: Decoupled decay of all weights, at least 0.
    decay_order: ``before`` or ``after``, see `descend`.
    moment_bits: As in `gradnormlorp`.
    param_labels: As in `gradnormlorp`; ``low_rank`` is treated as ``full``.
    skip_nonfinite: As in `gradnormlorp`.

  Returns:
    A complete optimizer; its updates are float32.

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
    scale_by_adam(b1, b2, eps, eps_mode=eps_mode),
    learning_rate,
    weight_decay=weight_decay,
    decay_order=decay_order,
    moment_bits=moment_bits,
    param_labels=param_labels,
    skip_nonfinite=skip_nonfinite,
  )
