"""Arrays on the host, wherever their pieces are, and who writes them."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
  """The whole of an array, in every process that has a part of it.

  Args:
    x: The array. If other processes hold parts of it, all of them must ask.

  Returns:
    Its values.
  """
  if not isinstance(x, jax.Array) or (
    x.is_fully_addressable or x.is_fully_replicated
  ):
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def is_writer() -> bool:
  """Whether this process writes what all of them have."""
  return jax.process_index() == 0
