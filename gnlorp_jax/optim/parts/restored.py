"""Whether a state is one of the optimizer that is asked to go on from it.

Most libraries restore whatever was saved, of another rank or in other bits too.
Shapes are known before anything is computed: in a compiled step these checks
cost nothing but tracing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.plain import path_name

_FIX = (
  'Give the optimizer the options that the state was made with, or begin with '
  'init(params).'
)


def check_state(
  state: optax.OptState, expected: optax.OptState, options: str
) -> None:
  """Raises a `ValueError` if an array of a state is of another shape.

  Args:
    state: What an optimizer is to go on from.
    expected: The shapes of a state that its `init` makes.
    options: The options that decide about them, such as ``rank=8``.
  """
  have, want = _shapes(state), _shapes(expected)
  if have == want:
    return
  name = next(n for n in (*want, *have) if have.get(n) != want.get(n))
  raise ValueError(
    f'The state is not one of this optimizer: its {name!r} has '
    f'{_as_text(have.get(name))}, and that of this one ({options}) has '
    f'{_as_text(want.get(name))}. {_FIX}'
  )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {
    path_name(path): jnp.shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _as_text(shape: tuple[int, ...] | None) -> str:
  return 'no array' if shape is None else f'the shape {list(shape)}'


def check_no_codes(state: optax.OptState) -> None:
  """Raises a `ValueError` if codes were restored in the place of an array.

  `flax.serialization` leaves a dictionary where a `QuantizedArray` was saved
  and an array is wanted.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    # The field of a `QuantizedArray` is an attribute; parameters are no bytes.
    if (
      path
      and path[-1] == jax.tree_util.DictKey('codes')
      and getattr(leaf, 'dtype', None) == jnp.uint8
    ):
      raise ValueError(
        f'The state is not one of this optimizer: its {path_name(path[:-1])!r} '
        'was saved in few bits, where this one keeps 32 (see moment_bits, '
        f'basis_bits and error_bits). {_FIX}'
      )
