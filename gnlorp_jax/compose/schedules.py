"""Learning rates over a run, as functions of the steps taken before.

What differs between runs of one program is an argument, and a number in the
optimizer's state; what is a constant of the compiled program stands behind it.
"""

import functools

import jax
import jax.numpy as jnp
import optax


def cosine_rate(
  count: jax.Array | int,
  peak: jax.Array | float,
  climb: jax.Array | float,
  *,
  warmup: int,
  steps: int,
  final: float,
) -> jax.Array:
  """Linear warm-up, then a cosine down to a share of the peak.

  The first update already has ``peak / warmup`` (a schedule that starts at 0
  would waste a step); the last one has ``final * peak``.

  Args:
    count: Steps taken before this one.
    peak: The highest learning rate.
    climb: The first learning rate minus the peak, at most 0.
    warmup: Steps of the rise, at least 1.
    steps: Steps of the whole run.
    final: Where the cosine ends, as a share of the peak.

  Returns:
    The learning rate, a float32 scalar.
  """
  fall = optax.cosine_decay_schedule(1.0, max(steps - warmup - 1, 1), final)
  rise_steps = max(warmup - 1, 1)
  progress = jnp.clip(count, 0, rise_steps) / rise_steps
  rise = climb * (1 - progress) + peak
  return jnp.where(count < warmup, rise, peak * fall(count - warmup))


def jagged_rate(
  count: jax.Array | int,
  peak: jax.Array | float,
  climb: jax.Array | float,
  *,
  warmup: int,
  steps: int,
  final: float,
  cycle: int,
  rewarm: int,
) -> jax.Array:
  """`cosine_rate` that rises again from near 0 at the start of every cycle.

  With b the cosine, C the cycle and w the steps of the rise, update ``k C + j``
  has ``(j + 1) / w * b(k C + w)`` where ``j < w`` and ``k > 0``, and b
  otherwise.

  Args:
    count: Steps taken before this one.
    peak: As of `cosine_rate`, as are climb, warmup, steps and final.
    climb: See there.
    warmup: See there; at most a cycle.
    steps: See there.
    final: See there.
    cycle: Steps of a cycle.
    rewarm: Steps of the rise in all cycles but the first, at least 1.

  Returns:
    The learning rate, a float32 scalar.

  References:
    Lialin et al., `ReLoRA`, 2023, arXiv:2307.05695, section 3.

  Note:
    The public code has ``j / w`` there: its first update of a cycle, like that
    of the run, has a learning rate of 0 and changes nothing. Here rises are one
    step ahead, and the cosine ends at the last update, not behind it, as in
    `cosine_rate`. An offset of the cycles (its ``adjust_step``), for runs that
    go on from a full-rank one with its count of steps, is left out: such a run
    counts from 0 here.
  """
  base = functools.partial(
    cosine_rate,
    peak=peak,
    climb=climb,
    warmup=warmup,
    steps=steps,
    final=final,
  )
  place = count % cycle
  rise = (place + 1) / rewarm * base(count - place + rewarm)
  rises = (count >= cycle) & (place < rewarm)
  return jnp.where(rises, rise, base(count))


def linear_rate(
  count: jax.Array | int,
  peak: jax.Array | float,
  warmup: jax.Array | float,
  steps: jax.Array | float,
  *,
  final: float = 0.0,
) -> jax.Array:
  """Up to the peak if asked for, then linearly down.

  Args:
    count: Steps taken before this one.
    peak: The highest learning rate, which the last step of the rise has, and
      the first one after it.
    warmup: Steps of the rise.
    steps: Steps of the whole run.
    final: What is reached after the last step, as a share of the peak.

  Returns:
    The learning rate, a float32 scalar.

  Note:
    The linear schedule of transformers rises from 0, so that with a warm-up its
    first step changes nothing. Without one the two are the same.
  """
  rise = (count + 1) / jnp.maximum(warmup, 1)
  fall = (steps - count) / jnp.maximum(steps - warmup, 1)
  if final:
    fall = final + (1 - final) * fall
  return peak * jnp.clip(jnp.minimum(rise, fall), 0, 1)
