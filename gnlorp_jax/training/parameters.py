"""A model's weights as a run holds them: what trains, what is frozen, codes.

A step moves the *trained* tree and reads the *frozen* one. Both are *stored*:
some of their nodes may be codes of fewer bits, opaque pytrees here. Joined and
decoded they are the parameters that a model computes with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# The top-level key of the parameters that are stacked [L, ...].
LAYERS = 'layers'

Tree = dict[str, Any]


def outer(tree: Tree) -> Tree:
  """A dict of parameters without the stacked layers."""
  return {key: node for key, node in tree.items() if key != LAYERS}


class Parameters(NamedTuple):
  """How a run holds the weights of a model.

  Attributes:
    trained: Nested dict of `jax.ShapeDtypeStruct` with shardings, as stored:
      what the optimizer moves. Nodes may be other pytrees, such as codes.
    frozen: The same of what no step changes; ``{}`` where everything trains.
    join: ``join(trained, frozen)``: one nested dict of both, which have no path
      in common. Computes nothing, and takes slices of one layer, too.
    decode: Maps a stored tree, of one layer or outside of the layers, to the
      arrays that a model computes with, whole on every device. What is decoded
      keeps its values when it is decoded again, but is sent again.
    decode_exact: Maps a stored tree to arrays with every digit, to add updates
      to.
    split: Lays gradients of what `decode` returned out over the devices as the
      weights are.
    store: ``store(new, old, step, first)``: stores new values as `old` is, both
      trees of one parameter, or of a part that starts at `first` on the first
      axis; `step` and `first` are for random numbers.
    start: Maps a random key to (trained, frozen), real arrays in their
      shardings.
    start_frozen: Maps the same key to the frozen tree alone, for a run that
      resumes.
    merge: ``merge(trained, frozen)``: the model's plain parameters, adapters
      folded and codes decoded, for an export.
  """

  trained: Any
  frozen: Any
  join: Callable[[Any, Any], Any]
  decode: Callable[[Any], Any]
  decode_exact: Callable[[Any], Any]
  split: Callable[[Any], Any]
  store: Callable[[Any, Any, jax.Array, jax.Array | int], Any]
  start: Callable[[jax.Array], tuple[Any, Any]]
  start_frozen: Callable[[jax.Array], Any]
  merge: Callable[[Any, Any], Any]

  @property
  def is_plain(self) -> bool:
    """Whether `decode` has nothing to do: no codes, and nothing to gather."""
    return self.decode is unchanged


def join(trained: Tree, frozen: Tree) -> Tree:
  """One nested dict of two that have no path in common.

  Args:
    trained: Nested dict; what is not a dict counts as an array.
    frozen: Nested dict.

  Returns:
    The arrays of both; `trained` itself where `frozen` is empty.

  Raises:
    ValueError: If both hold something at a path.

  Examples:
    >>> join({'dense': {'lora_a': 2}}, {'dense': {'kernel': 1}})
    {'dense': {'kernel': 1, 'lora_a': 2}}
  """
  return _join(trained, frozen, ())


def _join(trained: Any, frozen: Any, path: tuple[str, ...]) -> Any:
  if not (isinstance(trained, dict) and isinstance(frozen, dict)):
    raise ValueError(
      f'Both trees of parameters hold {"/".join(path)!r}. Take it out of one.'
    )
  if not frozen:
    return trained
  joined = dict(frozen)
  for key, node in trained.items():
    if key in frozen:
      node = _join(node, frozen[key], (*path, key))
    joined[key] = node
  return joined


def unchanged(tree: Any) -> Any:
  """The tree itself: `Parameters.decode` of plain arrays."""
  return tree


def cast_like(
  new: Any, old: Any, step: jax.Array, first: jax.Array | int
) -> Any:
  """New values in the dtypes of the old: `Parameters.store` of plain arrays.

  Args:
    new: Pytree of arrays.
    old: A tree like it.
    step: Unused.
    first: Unused.

  Returns:
    A tree like `old`.
  """
  del step, first
  return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


def plain(trained: Tree, frozen: Tree | None = None) -> Parameters:
  """Parameters that are stored as plain arrays.

  Args:
    trained: Nested dict of arrays or of `jax.ShapeDtypeStruct`.
    frozen: The same of what does not train; None: everything trains.

  Returns:
    The parameters. `start` returns the trees that are given here, whatever the
    key.

  Examples:
    >>> parameters = plain({'w': jnp.ones(2)}, {'b': jnp.zeros(2)})
    >>> sorted(parameters.join(parameters.trained, parameters.frozen))
    ['b', 'w']
  """
  frozen = {} if frozen is None else frozen
  return Parameters(
    trained=trained,
    frozen=frozen,
    join=join,
    decode=unchanged,
    decode_exact=unchanged,
    split=unchanged,
    store=cast_like,
    start=lambda key: (trained, frozen),
    start_frozen=lambda key: frozen,
    merge=join,
  )
