"""What makes records of this package serializable by Flax, if it is there."""

import functools
import sys
from types import ModuleType
from typing import Any

import jax

from gnlorp_jax.optim.parts.plain import keys_and_children


class FlaxSerializable:
  """A dataclass, registered with JAX, that `flax.serialization` takes too.

  Flax has to be told of every type, and this package does not import it: the
  first record that is made once the program has imported Flax tells it.
  """

  def __post_init__(self) -> None:
    flax, kind = sys.modules.get('flax.serialization'), type(self)
    if flax is not None and not flax.is_serializable(kind):
      flax.register_serialization_state(
        kind,
        functools.partial(_to_state_dict, flax),
        functools.partial(_from_state_dict, flax),
      )


def _to_state_dict(flax: ModuleType, record: Any) -> dict[str, Any]:
  """The arrays of a record by their names; what is static stays in the type."""
  children = keys_and_children(record) or []
  return {key.name: flax.to_state_dict(child) for key, child in children}


def _from_state_dict(flax: ModuleType, target: Any, state: Any) -> Any:
  """A record like `target` of the arrays in a state dictionary."""
  children = keys_and_children(target) or []
  names = [key.name for key, _ in children]
  if not isinstance(state, dict) or state.keys() != set(names):
    raise ValueError(
      f'{flax.current_path()} is a {type(target).__name__} of {names}, but '
      'something else was saved. Restore into a state of the same optimizer, '
      'with the same options.'
    )
  structure: Any = jax.tree.structure(target, is_leaf=lambda x: x is not target)
  return structure.unflatten(
    flax.from_state_dict(child, state[key.name], key.name)
    for key, child in children
  )
