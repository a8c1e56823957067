"""What can be asked of a run whose steps choose their batch from a pool."""

import dataclasses
from typing import Literal

from gnlorp_jax.compose.fields import check_at_least_one, check_within


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoresetOptions:
  """Training on a choice of a larger pool of rows, drawn anew in every step."""

  pool: int | None = None
  """Rows that `batch_size` are chosen from; None chooses nothing."""
  selector: Literal['herding', 'facility', 'random'] = 'herding'
  """How rows are picked within the quotas of their sources: so that the pool's
  mean feature is matched, by facility location as in CoLM, or at random, which
  needs no pass of the pool through the model."""
  keep_small: bool = True
  """Whether rows of sources below the mean size are all kept; the rest of the
  batch is shared out in proportion."""
  features: Literal['exact', 'spsa'] | None = None
  """What rows are compared by: gradients of the last value projection (or the
  second factor of its adapter), or derivatives along random directions, as in
  CoLM. None is exact."""
  directions: int | None = None
  """Directions of spsa; None is CoLM's 1, which tells next to nothing."""
  normalise: Literal['adam', 'none'] | None = None
  """Whether facility location compares steps of Adam; None: it does."""
  sketch: int | None = None
  """Most numbers of a random sketch of an exact gradient; 0 keeps all. None is
  4096, and all where Adam normalises them."""
  top: int | None = None
  """Entries that facility location compares, the largest of the mean of each
  source; 0 compares all. None is CoLM's 2560 where Adam normalises, else all.
  """
  ties: Literal['lowest', 'released'] = 'lowest'
  """Which of equally good rows facility location takes: the first, or the last,
  as the library that CoLM calls."""

  @property
  def is_on(self) -> bool:
    """Whether batches are chosen."""
    return self.pool is not None

  def rows_per_step(self, batch_size: int) -> int:
    """Rows that a step is offered: those of a batch, or of a pool."""
    return self.pool or batch_size

  @property
  def needs_model(self) -> bool:
    """Whether the pool goes through the model."""
    return self.is_on and self.selector != 'random'

  @property
  def adam(self) -> bool:
    """Whether features are normalised."""
    return self.selector == 'facility' and self.normalise != 'none'

  def __post_init__(self):
    check_at_least_one(self, 'pool', 'directions')
    check_within(self, '[0, inf)', 'sketch', 'top')
    if not self.is_on:
      for field in dataclasses.fields(self):
        if (value := getattr(self, field.name)) != field.default:
          raise ValueError(
            f'coreset.{field.name}={value!r} has no effect where nothing is '
            'chosen: give coreset.pool, rows to choose from.'
          )
    comparing = ('features', 'directions', 'normalise', 'sketch', 'top', 'ties')
    ruled_out = {
      'random': ('picks without looking', comparing),
      'herding': (
        'matches gradients as they are',
        ('normalise', 'top', 'ties'),
      ),
      'facility': ('', ()),
    }
    why, names = ruled_out[self.selector]
    for name in names:
      value = getattr(self, name)
      if value not in (None, 'none', 'lowest'):
        raise ValueError(
          f'coreset.{name}={value!r} has no effect: coreset.selector='
          f"{self.selector!r} {why}. Use selector='facility', or leave it out."
        )
    if self.features != 'spsa' and self.directions is not None:
      raise ValueError(
        f'coreset.directions={self.directions} is of coreset.features='
        f"'spsa', got {self.features!r}. Leave it out."
      )
    if self.sketch and (self.features == 'spsa' or self.adam):
      what = (
        'of exact gradients, and spsa has few numbers already'
        if self.features == 'spsa'
        else "of gradients that Adam does not normalise: use normalise='none'"
      )
      raise ValueError(
        f'coreset.sketch={self.sketch} is {what}. Or leave it out.'
      )
