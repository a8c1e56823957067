"""What the configurations of all models have in common: checks, presets."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar('Config')


def find_preset(name: str, presets: Mapping[str, Config]) -> Config:
  """The configuration of that name.

  Args:
    name: Key of `presets`.
    presets: A model's configurations by name.

  Returns:
    The configuration.

  Raises:
    ValueError: If there is no such name.
  """
  if name not in presets:
    near = difflib.get_close_matches(name.lower(), presets, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
      f'Unknown model {name!r}; expected one of {tuple(presets)}.{hint}'
    )
  return presets[name]


def check_positive(config: Any, *names: str) -> None:
  """Raises ValueError if one of these fields is not positive."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not value > 0:
      raise ValueError(f'{name}={value} must be positive.')


def check_heads(config: Any) -> None:
  """Raises ValueError unless `num_heads` divides `hidden_size`."""
  if config.hidden_size % config.num_heads:
    raise ValueError(
      f'hidden_size={config.hidden_size} must be a multiple of '
      f'num_heads={config.num_heads}.'
    )


def check_dtypes(config: Any) -> None:
  """Raises ValueError unless both dtypes are float32 or bfloat16."""
  for name in ('param_dtype', 'compute_dtype'):
    value = getattr(config, name)
    if value not in ('float32', 'bfloat16'):
      raise ValueError(
        f"Unknown {name} {value!r}; expected one of ('bfloat16', 'float32')."
      )
