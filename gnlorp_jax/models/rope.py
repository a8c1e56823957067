"""Rotary positions: frequencies, their scaling for long contexts, the rotation.

A `Rope` says how fast each pair of features turns with the position. The
classes of scaling carry Hugging Face's names of their numbers.

Shape suffixes in this file:
  B, T  batch, position in the sequence
  N     heads
  H     width of one head
  F     pairs of features that turn, at most H / 2
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
  """All frequencies divided by one factor."""

  rope_type: ClassVar[str] = 'linear'

  factor: float
  """Longest context divided by the original one, at least 1."""

  def scale(
    self, frequency_F: np.ndarray, theta: float, length: int
  ) -> tuple[np.ndarray, float]:
    """The scaled frequencies, and what cosines and sines are multiplied by."""
    del theta, length
    return frequency_F / self.factor, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
  """Low frequencies divided by a factor, high ones kept, of Llama 3.1."""

  rope_type: ClassVar[str] = 'llama3'

  factor: float
  """What low frequencies are divided by, at least 1."""
  low_freq_factor: float
  """Turns in the original context below which a frequency is low."""
  high_freq_factor: float
  """Turns in the original context above which a frequency is high."""
  original_max_position_embeddings: int
  """The original context, in tokens."""

  def scale(
    self, frequency_F: np.ndarray, theta: float, length: int
  ) -> tuple[np.ndarray, float]:
    """The scaled frequencies, and what cosines and sines are multiplied by."""
    del theta, length
    turns_F = self.original_max_position_embeddings * frequency_F / (2 * np.pi)
    kept_F = (turns_F - self.low_freq_factor) / (
      self.high_freq_factor - self.low_freq_factor
    )
    return _between(frequency_F, np.clip(kept_F, 0, 1), self.factor), 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
  """Low frequencies divided by a factor, high ones kept, all scores sharper.

  References:
    Peng et al., `YaRN`, 2023, arXiv:2309.00071.
  """

  rope_type: ClassVar[str] = 'yarn'

  factor: float
  """What low frequencies are divided by, at least 1."""
  original_max_position_embeddings: int
  """The original context, in tokens."""
  attention_factor: float | None = None
  """What cosines and sines are multiplied by; None follows from the others."""
  beta_fast: float = 32.0
  """Turns in the original context above which a frequency is kept."""
  beta_slow: float = 1.0
  """Turns in the original context below which a frequency is divided."""
  mscale: float | None = None
  """With `mscale_all_dim`, part of the rule for `attention_factor`."""
  mscale_all_dim: float | None = None
  """With `mscale`, part of the rule for `attention_factor`."""
  truncate: bool = True
  """Whether the ends of the ramp are rounded to whole pairs of features."""

  def scale(
    self, frequency_F: np.ndarray, theta: float, length: int
  ) -> tuple[np.ndarray, float]:
    """The scaled frequencies, and what cosines and sines are multiplied by."""
    del length
    pairs = len(frequency_F)

    def pair_of(turns: float) -> float:
      period = self.original_max_position_embeddings / (2 * math.pi * turns)
      return pairs * math.log(period) / math.log(theta)

    low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    # As in transformers, where the ramp has no length.
    ramp_F = (np.arange(pairs) - low) / (high - low if high != low else 1e-3)
    scaled_F = _between(frequency_F, 1 - np.clip(ramp_F, 0, 1), self.factor)
    return scaled_F, self._attention_factor()

  def _attention_factor(self) -> float:
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      whole, part = (
        self._sharper(self.mscale),
        self._sharper(self.mscale_all_dim),
      )
      return whole / part
    return self._sharper(1.0)

  def _sharper(self, mscale: float) -> float:
    if self.factor <= 1:
      return 1.0
    return 0.1 * mscale * math.log(self.factor) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
  """Each frequency divided by its own factor, in long sequences by another.

  References:
    Ding et al., `LongRoPE`, 2024, arXiv:2402.13753.

  Note:
    A sequence is as long as the row it stands in, and with a cache as the row
    may get (`Cache.longest_B`); transformers takes the largest position of a
    batch so far. So a short document in a long row is turned by the long
    factors here, and a text that may outgrow the original context by the long
    ones from its first token, where transformers goes over to them in the
    middle of it, beside keys that were turned by the short ones.
  """

  rope_type: ClassVar[str] = 'longrope'

  short_factor: tuple[float, ...]
  """What frequencies are divided by up to the original context."""
  long_factor: tuple[float, ...]
  """What frequencies are divided by beyond it."""
  factor: float
  """Longest context divided by the original one."""
  original_max_position_embeddings: int
  """The original context, in tokens."""
  attention_factor: float | None = None
  """What cosines and sines are multiplied by; None follows from the others."""

  def scale(
    self, frequency_F: np.ndarray, theta: float, length: int
  ) -> tuple[np.ndarray, float]:
    """The scaled frequencies, and what cosines and sines are multiplied by."""
    del theta
    is_long = length > self.original_max_position_embeddings
    scaled_F = frequency_F / (
      self.long_factor if is_long else self.short_factor
    )
    if self.attention_factor is not None:
      return scaled_F, self.attention_factor
    if self.factor <= 1:
      return scaled_F, 1.0
    original = math.log(self.original_max_position_embeddings)
    return scaled_F, math.sqrt(1 + math.log(self.factor) / original)

  def check(self, pairs: int) -> None:
    """Raises ValueError unless there is a factor for each pair of features."""
    for name in 'short_factor', 'long_factor':
      if len(getattr(self, name)) != pairs:
        raise ValueError(
          f'{name} of rope_scaling has {len(getattr(self, name))} factors, and '
          f'{pairs} pairs of features turn: give one for each pair.'
        )


def _between(
  frequency_F: np.ndarray, kept_F: np.ndarray, factor: float
) -> np.ndarray:
  """Each frequency between itself, where 1 is kept, and itself by a factor."""
  return kept_F * frequency_F + (1 - kept_F) * frequency_F / factor


Scaling = Linear | Llama3 | Yarn | LongRope
SCALINGS: tuple[type[Scaling], ...] = (Linear, Llama3, Yarn, LongRope)


class Rope(NamedTuple):
  """How fast pairs of features turn.

  Attributes:
    theta: Base of the frequencies, > 1.
    scaling: How they are scaled for a context longer than the original; None:
      not at all.
  """

  theta: float
  scaling: Scaling | None = None

  def frequencies(self, width: int, length: int) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, and a factor of cosines and sines.

    Args:
      width: Features of a head that turn, even.
      length: Tokens of the sequence.

    Returns:
      float64 ``[F]`` and a number.
    """
    frequency_F = self.theta ** (-np.arange(0, width, 2) / width)
    if self.scaling is None:
      return frequency_F, 1.0
    return self.scaling.scale(frequency_F, self.theta, length)


def change_at(ropes: Sequence[Rope | None]) -> int | None:
  """The length beyond which frequencies are others; None where there is none.

  Args:
    ropes: Those of a model's layers.
  """
  scalings = (rope.scaling for rope in ropes if rope is not None)
  return next(
    (
      scaling.original_max_position_embeddings
      for scaling in scalings
      if isinstance(scaling, LongRope)
    ),
    None,
  )


def rotate(
  x_BTNH: jax.Array,
  positions_BT: jax.Array,
  frequency_F: jax.Array | np.ndarray,
  factor: jax.Array | float = 1.0,
) -> jax.Array:
  """Rotates pairs of features by an angle that grows with the position.

  Feature i and feature i + F form a pair (the half-split convention of Hugging
  Face checkpoints). Features from 2 F on stay as they are.

  Args:
    x_BTNH: Queries or keys, any floating dtype.
    positions_BT: Their positions; its first axis may be 1.
    frequency_F: Radians per position, ``[F]`` or ``[B, F]``; 0 leaves a pair as
      it is.
    factor: What cosines and sines are multiplied by.

  Returns:
    Array of the shape and dtype of `x_BTNH`; computed in float32.

  References:
    Su et al., `RoFormer: Enhanced Transformer with Rotary Position Embedding`,
    2021, arXiv:2104.09864, equation 34.
  """
  frequency_F = jnp.asarray(frequency_F, jnp.float32)
  frequency_B11F = jnp.atleast_2d(frequency_F)[:, None, None]
  positions_BT11 = positions_BT.astype(jnp.float32)[..., None, None]
  angle_BT1F = positions_BT11 * frequency_B11F
  cos, sin = jnp.cos(angle_BT1F) * factor, jnp.sin(angle_BT1F) * factor
  pairs = frequency_B11F.shape[-1]
  first, second, rest = jnp.split(
    x_BTNH.astype(jnp.float32), (pairs, 2 * pairs), axis=-1
  )
  rotated = (first * cos - second * sin, second * cos + first * sin, rest)
  return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


def from_hf(
  fields: dict[str, Any], max_seq_len: Any
) -> tuple[Scaling | None, list[str]]:
  """Scaling from Hugging Face's ``rope_parameters`` or ``rope_scaling``.

  Args:
    fields: The JSON object; empty where a checkpoint has none. The type is
      named ``rope_type`` or, in old files, ``type``.
    max_seq_len: What an absent original context means.

  Returns:
    The scaling, None without, and the reasons why it is not supported.
  """
  kind = fields.get('rope_type') or fields.get('type') or 'default'
  if kind == 'default':
    return None, []
  found = next((c for c in SCALINGS if c.rope_type == kind), None)
  if found is None:
    why = (
      'its frequencies change with the length of a sequence'
      if kind == 'dynamic'
      else 'it is not known'
    )
    known = ['default', *(c.rope_type for c in SCALINGS)]
    return None, [f'rope_type={kind!r} (supported: {known}; {why})']
  fields = {'original_max_position_embeddings': max_seq_len, **fields}
  names = [f.name for f in dataclasses.fields(found)]
  given = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in fields.items()
    if name in names and value is not None
  }
  missing = [
    f.name
    for f in dataclasses.fields(found)
    if f.default is dataclasses.MISSING and f.name not in given
  ]
  if missing:
    return None, [f'rope_type={kind!r} lacks {missing}']
  known = {*names, 'original_max_position_embeddings'}
  known |= {'rope_type', 'type', 'rope_theta', 'finetuned'}
  unknown = {k: v for k, v in fields.items() if k not in known}
  if unknown:
    return None, [f'rope_type={kind!r} with unknown {unknown}']
  wrong = [
    f'rope_type={kind!r} with {f.name}={given[f.name]!r} (it must be '
    f'{_EACH if f.type == _MANY else "a number"} > 0)'
    for f in dataclasses.fields(found)
    if f.name in given and not _fits(f.type, given[f.name])
  ]
  return (None, wrong) if wrong else (found(**given), [])


_MANY, _EACH = tuple[float, ...], 'several numbers, each'


def _fits(kind: Any, value: Any) -> bool:
  """Whether a value is of that type and, if it is a number, above 0."""
  if kind != _MANY:
    is_number = isinstance(value, int | float)
    return isinstance(value, bool) or (is_number and 0 < value < math.inf)
  return isinstance(value, tuple) and all(_fits(float, v) for v in value)


def to_hf(theta: float, scaling: Scaling | None) -> dict[str, Any]:
  """Hugging Face's ``rope_parameters``, the inverse of `from_hf`."""
  fields = {} if scaling is None else dataclasses.asdict(scaling)
  kind = 'default' if scaling is None else scaling.rope_type
  given = {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in fields.items()
    if value is not None
  }
  return {'rope_type': kind, 'rope_theta': theta, **given}
