"""How a model is fine-tuned: what each method trains, with which optimizer."""

import difflib
from typing import NamedTuple, get_args

from gnlorp_jax.compose.settings import OptimizerName
from gnlorp_jax.models import adapters


class Method(NamedTuple):
  """What a method trains, and how.

  Attributes:
    optimizer: Name of an optimizer of `gnlorp_jax.optim`.
    adapter: Kind of the adapters. With them, they and the classifier train, and
      all other weights are frozen; None trains every weight.
    rates: Which published learning rates suit it: those of ``galore`` (all
      weights train), ``lora`` or ``gradnormlorp``.
  """

  optimizer: str
  adapter: adapters.Kind | None = None
  rates: str = 'galore'


METHODS: dict[str, Method] = {
  'full': Method('adamw'),
  'lora': Method('adamw', 'lora', rates='lora'),
  'dora': Method('adamw', 'dora', rates='lora'),
  'galore': Method('galore'),
  'gradnormlorp': Method('gradnormlorp', rates='gradnormlorp'),
  # The factors of the adapters are projected on both sides, as in the paper.
  'gradnormlorp_adapter': Method('galore', 'gradnormlorp', 'gradnormlorp'),
}
# Every other optimizer trains all weights in place of GaLore.
METHODS |= {
  name: Method(name)
  for name in get_args(OptimizerName)
  if name not in METHODS and name != 'adamw'  # That is `full`.
}

# What '--method all' stands for: those that the papers put side by side.
COMPARED = (
  'full',
  'lora',
  'dora',
  'galore',
  'gradnormlorp',
  'gradnormlorp_adapter',
)


_OTHER_NAMES = {
  'adam': " Did you mean 'full', which is AdamW?",
  'adamw': " Did you mean 'full', which is AdamW?",
  'qlora': " Did you mean 'lora', with step.weight_bits=4?",
}


def get_method(name: str) -> Method:
  """A method by its name.

  Args:
    name: Key of `METHODS`.

  Returns:
    The method.

  Raises:
    ValueError: If there is none of that name.
  """
  if name not in METHODS:
    near = difflib.get_close_matches(name.lower(), METHODS, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    hint = _OTHER_NAMES.get(name.lower(), hint)
    raise ValueError(
      f'Unknown method {name!r}.{hint} Methods: {list(METHODS)}, or all for '
      f'{list(COMPARED)}.'
    )
  return METHODS[name]
