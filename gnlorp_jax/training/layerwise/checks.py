"""Finds what cannot be trained layer by layer, when a step is built."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gnlorp_jax.training.layerwise.engine import Engine
from gnlorp_jax.training.layerwise.slices import (
  WHOLE,
  Cut,
  Path,
  leaf_at,
  replace_leaf,
)
from gnlorp_jax.training.parameters import LAYERS, Parameters

# Elements of a large matrix that are updated at once; a few arrays of this size
# exist then, in float32.
ROW_BLOCK = 2**22
# The parts hold a multiple of as many, the largest block of quantised moments.
ROW_ALIGN = 256
# Whose `init` warns, of ranks for example.
OPTIMIZERS = logging.getLogger('gnlorp_jax.optim')


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises a ValueError unless a value is one of those there are."""
  if value not in choices:
    raise ValueError(f'{name}={value!r} must be one of {choices}.')


def count_layers(parameters: Parameters) -> int:
  """L, the common first axis of all parameters of the layers.

  Raises:
    ValueError: If there are no layers, nothing else, or stacks of different
      lengths.
  """
  params = parameters.join(parameters.trained, parameters.frozen)
  if not isinstance(params, dict) or LAYERS not in params or len(params) < 2:
    raise ValueError(
      f'Parameters must be a dict with the key {LAYERS!r}, stacked [L, ...], '
      f'and others, to be trained layer by layer; got {sorted(params)}.'
    )
  lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(params[LAYERS])}
  if len(lengths) != 1 or lengths == {()}:
    raise ValueError(
      f'All arrays of params[{LAYERS!r}] must be stacked along one first axis, '
      f'[L, ...]; the first axes are {sorted(lengths)}.'
    )
  ((length,),) = lengths
  return length


def check_layers(engine: Engine) -> None:
  """Raises a ValueError unless the state of all stacks is cut into layers."""
  stuck = [
    '/'.join(path)
    for path in _that_cannot_be_cut(
      engine, engine.layer_paths, engine.passes.num_layers
    )
  ]
  if stuck:
    raise ValueError(
      f'The optimizer keeps something of {stuck} that cannot be cut into '
      'layers, such as the moments of stacked vectors quantised in one piece. '
      "Name vectors 'scale' or 'bias', or train in whole steps."
    )


def count_row_blocks(engine: Engine) -> dict[Path, int]:
  """Large outer matrices, and into how many parts to cut them."""
  counts = {}
  for path in engine.outer_paths:
    leaf = leaf_at(_exact(engine), path)
    fewest = -(-leaf.size // ROW_BLOCK)
    if leaf.ndim != 2 or fewest == 1:
      continue
    for count in range(fewest, 4 * fewest):
      # No block of a quantised array may be cut.
      fits = leaf.shape[0] % count == 0 and leaf.size // count % ROW_ALIGN == 0
      if fits and _can_be_cut(engine, path, count):
        counts[path] = count
        break
  return counts


def _can_be_cut(engine: Engine, path: Path, count: int) -> bool:
  """Whether a part of a parameter's state is the state of a part."""
  return not _that_cannot_be_cut(engine, [path], count)


def _that_cannot_be_cut(
  engine: Engine, paths: Sequence[Path], count: int
) -> list[Path]:
  """The parameters of whose state a part is not the state of a part.

  All are cut at once: to trace an optimizer's `init` takes time.
  """
  cut = Cut(0, count)
  whole = _states(engine, paths, WHOLE)
  part = _states(engine, paths, cut)

  def is_stuck(path: Path) -> bool:
    shapes = _shapes(whole[path])
    if any(not shape or shape[0] % count for shape in shapes):
      return True
    return _shapes(jax.eval_shape(cut.at, whole[path])) != _shapes(part[path])

  return [path for path in paths if is_stuck(path)]


def _shapes(tree: Any) -> list[tuple[int, ...]]:
  return [x.shape for x in jax.tree.leaves(tree)]


def _states(
  engine: Engine, paths: Sequence[Path], part: Cut
) -> dict[Path, list[Any]]:
  """What an optimizer keeps of parameters, of each of which it sees a part."""
  slices = engine.slices

  def param_states(params: Any) -> dict[Path, list[Any]]:
    for path in paths:
      params = replace_leaf(params, path, part.at(leaf_at(params, path)))
    nodes = jax.tree.leaves(engine.tx.init(params), is_leaf=slices.is_params)
    nodes = [node for node in nodes if slices.is_params(node)]
    return {path: [leaf_at(node, path) for node in nodes] for path in paths}

  with _without_warnings():
    return jax.eval_shape(param_states, _exact(engine))


def _exact(engine: Engine) -> Any:
  """Shapes of what the optimizer is shown."""
  parameters = engine.passes.parameters
  return jax.eval_shape(parameters.decode_exact, parameters.trained)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
  """The optimizer has warned of what there is to warn of, at its own start."""
  level = OPTIMIZERS.level
  OPTIMIZERS.setLevel(logging.ERROR)
  try:
    yield
  finally:
    OPTIMIZERS.setLevel(level)
