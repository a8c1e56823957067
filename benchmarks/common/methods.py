"""The optimizers that the benchmarks compare, in one table."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from gnlorp_jax import optim

# Alias of gnlorp_jax.optim: options of the benchmark that are not its to take.
ALIASES: dict[str, tuple[str, ...]] = {
  'gradnormlorp': (),
  'galore': (),
  'q_galore': (),
  'dct_adamw': ('update_proj_gap',),  # It chooses at every step.
  # Their rank is that of a piece of a row, not of a matrix.
  'vlorp': ('rank', 'update_proj_gap'),
  'projfactor': ('rank', 'update_proj_gap'),
  'apollo': (),
  'apollo_mini': (),
  'fira': (),
  'alice': (),
  'alice0': (),
  'frugal': (),
  'subtrack': (),
  'ldadam': (),
  'galore_adafactor': (),
  # Without a rank.
  'muon': (),
  'racs': (),
  'scale': (),
  'sinkgd': (),
  'adamw': (),
}

OURS: dict[str, tuple[str, dict[str, int]]] = {
  f'{alias}{suffix}': (alias, {'moment_bits': bits})
  for alias in ALIASES
  for suffix, bits in (('', 32), ('-8bit', 8), ('-4bit', 4))
}
"""Name of a row: alias of gnlorp_jax.optim, and the bits of its moments."""

# What an optimizer without the option does anyway.
NEUTRAL = {'side': 'short', 'moment_bits': 32, 'basis_bits': 32}


class AbsentError(Exception):
  """A method cannot be built here; the text says why."""


def options_of(alias: str) -> set[str]:
  """Names of the options that a benchmark may give to `alias`, if it exists."""
  function = getattr(optim, alias, None)
  if function is None:
    raise AbsentError(f'gnlorp_jax.optim has no {alias!r}')
  return set(inspect.signature(function).parameters) - set(ALIASES[alias])


def bits_of_all_moments(
  alias: Callable[..., Any], options: dict[str, Any]
) -> dict[str, Any]:
  """The options with bits of all moments, as the trainers have them.

  The optimizers' own option leaves the moments of embeddings in float32.
  """
  default = inspect.signature(alias).parameters['moment_bits'].default
  bits = options.get('moment_bits', default)
  return {**options, 'moment_bits': (('.*', bits),)}


def build(
  alias: str, variant: dict[str, Any], **common: Any
) -> optax.GradientTransformation:
  """An optimizer of this package, with the options it has.

  Args:
    alias: Key of `ALIASES`.
    variant: Options that make the row what it is.
    **common: Options for all methods; those that the alias lacks are left out.

  Raises:
    AbsentError: If the alias does not exist, refuses a value, or lacks an
      option of `variant` that asks for more than happens anyway (`NEUTRAL`).
  """
  known = options_of(alias)
  for key, value in variant.items():
    if key not in known and NEUTRAL.get(key) != value:
      raise AbsentError(f'{alias} has no option {key}')
  chosen = {k: v for k, v in {**common, **variant}.items() if k in known}
  try:
    function = getattr(optim, alias)
    return function(**bits_of_all_moments(function, chosen))
  except ValueError as error:
    raise AbsentError(f'{alias} refuses {variant}: {error}') from error


def ours(
  name: str, setting: tuple[float, int, int], **options: Any
) -> optax.GradientTransformation:
  """A row of `OURS` with a learning rate, a rank and a refresh interval.

  Raises:
    AbsentError: As `build`.
  """
  rate, rank, gap = setting
  options |= {'learning_rate': rate, 'rank': rank, 'update_proj_gap': gap}
  return build(*OURS[name], **options)
