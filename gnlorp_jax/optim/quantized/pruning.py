"""Sets moments of chosen parameters to zero, in whatever bits they are kept.

Codes are decoded first: the code 0 of a number is not the number 0.

Shape suffixes in this file:
  S     entries of a matrix, flattened
"""

import fractions
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.checks import check_choice
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.optim.parts.state_axes import owned
from gnlorp_jax.optim.quantized.arrays import (
  QuantizedArray,
  dequantize,
  requantize,
)
from gnlorp_jax.optim.quantized.moments import MOMENT_FIELDS

Prune = Literal['magnitude', 'random', 'reset']


def num_kept(size: int, share: float) -> int:
  """How many of `size` entries are left when a share of them is pruned.

  Examples:
    >>> num_kept(10, 0.7), num_kept(11, 0.7), num_kept(10, 1.0)
    (3, 4, 0)
  """
  # As a decimal: 1 - 0.7 is more than 0.3 in binary.
  return math.ceil(size * (1 - fractions.Fraction(repr(float(share)))))


def prune(
  x: jax.Array, how: Prune, share: float, key: jax.Array | None = None
) -> jax.Array:
  """Sets a share of the entries of each matrix of a stack to zero.

  Args:
    x: ``[*, m, n]``, any floating dtype.
    how: ``magnitude`` keeps the largest absolute values, of equal ones those
      that come first; ``random`` keeps any; ``reset`` keeps none.
    share: Of the entries of a matrix, in [0, 1]; ``ceil((1 - share) m n)`` are
      kept, however many are equal. Of no effect with ``reset``.
    key: A random key, for ``random``.

  Returns:
    The stack; what is kept is unchanged.

  Raises:
    ValueError: If `how` is unknown, or ``random`` without a key.

  References:
    Lialin et al., `ReLoRA`, 2023, arXiv:2307.05695, section 3.

  Note:
    The public code zeroes what is not above a quantile: all of a matrix whose
    entries are equal.
  """
  check_choice('prune', how, get_args(Prune))
  if how == 'random' and key is None:
    raise ValueError("prune='random' draws what is kept: give a key.")
  x_S = x.reshape(*x.shape[:-2], -1)
  size = x_S.shape[-1]
  count = num_kept(size, share)
  if how == 'reset' or count == 0:
    return jnp.zeros_like(x)
  worth_S = jnp.abs(x_S)
  if key is not None and how == 'random':
    worth_S = jax.random.uniform(key, x_S.shape)
  least = jnp.sort(worth_S, axis=-1)[..., size - count, None]
  above_S, equal_S = worth_S > least, worth_S == least
  room = count - jnp.sum(above_S, axis=-1, keepdims=True)
  kept_S = above_S | (equal_S & (jnp.cumsum(equal_S, axis=-1) <= room))
  return jnp.where(kept_S, x_S, 0).reshape(x.shape)


def _nodes_of(
  state: optax.OptState, params: optax.Params, is_chosen: Callable[[str], bool]
) -> tuple[list[Any], Any, list[tuple[int, tuple[str, ...], str]]]:
  """A state's arrays, its structure, and which arrays are of chosen parameters.

  Returns:
    The arrays, quantised ones in one piece; their structure; and of those that
    belong to chosen parameters the number, the fields on the way to it and the
    path of the parameter.
  """
  names = [
    path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  nodes, structure = jax.tree.flatten(
    state, is_leaf=lambda node: isinstance(node, QuantizedArray)
  )
  numbered = jax.tree.unflatten(structure, range(len(nodes)))
  found = owned(numbered, params)
  return (
    nodes,
    structure,
    [
      (array.leaf, array.outer, names[array.owner])
      for array in found
      if array.owner is not None and is_chosen(names[array.owner])
    ],
  )


def fields_beside_moments(
  state: optax.OptState, params: optax.Params, is_chosen: Callable[[str], bool]
) -> list[str]:
  """What a state keeps of chosen parameters, other than moments and counts.

  Args:
    state: A state, or its shapes.
    params: The plain tree of parameters that it was made for, or its shapes.
    is_chosen: Tells by its ``/``-joined path whether a parameter counts.

  Returns:
    Names of fields, such as ``subspace``, each once.
  """
  known = {*MOMENT_FIELDS, 'count'}
  _, _, found = _nodes_of(state, params, is_chosen)
  return sorted(
    {outer[-1] for _, outer, _ in found if not known & {*outer[-1:]}}
  )


def prune_moments(
  state: optax.OptState,
  params: optax.Params,
  is_chosen: Callable[[str], bool],
  how: Prune,
  share: float,
  key: jax.Array,
) -> optax.OptState:
  """Prunes the moments of chosen parameters; all else stays as it is.

  First and second moments are pruned each by itself, and so is each matrix of a
  stack. Counts of steps go on: bias corrections stay those of a late step.

  Args:
    state: A state of any optimizer, in which moments are the fields ``mu``,
      ``nu`` and ``trace``.
    params: The plain tree of parameters that it was made for, or its shapes.
    is_chosen: Tells by its ``/``-joined path whether a parameter's moments are
      pruned; of such parameters all must be matrices ``[*, m, n]``.
    how: As of `prune`.
    share: As of `prune`.
    key: A random key, for ``random``.

  Returns:
    The state. Quantised moments are decoded, pruned and encoded anew. Zero is
    exact in 8 bits; in 4 bits a second moment of 0 becomes the least value of
    its block, as the code for it has no zero.

  References:
    Lialin et al., `ReLoRA`, 2023, arXiv:2307.05695, section 3 and algorithm 1.
  """
  nodes, structure, found = _nodes_of(state, params, is_chosen)
  for number, outer, name in found:
    if outer[-1] not in MOMENT_FIELDS:
      continue
    node = nodes[number]
    is_coded = isinstance(node, QuantizedArray)
    own = jax.random.fold_in(key, zlib.crc32(f'{outer[-1]}/{name}'.encode()))
    pruned = prune(dequantize(node) if is_coded else node, how, share, own)
    nodes[number] = requantize(pruned, node) if is_coded else pruned
  return jax.tree.unflatten(structure, nodes)
