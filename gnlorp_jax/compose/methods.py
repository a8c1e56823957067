"""How a model is fine-tuned: what each method trains, with which optimizer."""

import dataclasses
import difflib
from typing import Literal, NamedTuple, get_args

from gnlorp_jax.compose.settings import LayerSamplingOptions, OptimizerName
from gnlorp_jax.models import adapters


class Method(NamedTuple):
  """What a method trains, and how.

  Attributes:
    optimizer: Name of an optimizer of `gnlorp_jax.optim`.
    adapter: Kind of the adapters. With them, they and the classifier train, and
      all other weights are frozen; None trains every weight.
    rates: Which published learning rates suit it: those of ``galore`` (all
      weights train), ``lora`` or ``gradnormlorp``.
    sampling: How layers are drawn that train at a time, a method of
      `LayerSamplingOptions`; None trains all.
  """

  optimizer: str
  adapter: adapters.Kind | None = None
  rates: str = 'galore'
  sampling: Literal['owlore', 'ows', 'lisa', 'badam'] | None = None


METHODS: dict[str, Method] = {
  'full': Method('adamw'),
  'lora': Method('adamw', 'lora', rates='lora'),
  'dora': Method('adamw', 'dora', rates='lora'),
  'galore': Method('galore'),
  'gradnormlorp': Method('gradnormlorp', rates='gradnormlorp'),
  # The factors of the adapters are projected on both sides, as in the paper.
  'gradnormlorp_adapter': Method('galore', 'gradnormlorp', 'gradnormlorp'),
  # Some layers at a time.
  'owlore': Method('galore', sampling='owlore'),
  'ows': Method('adamw', sampling='ows'),
  'lisa': Method('adamw', sampling='lisa'),
  'badam': Method('adamw', sampling='badam'),
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


def get_method(name: str, *, or_all: bool = False) -> Method:
  """A method by its name.

  Args:
    name: Key of `METHODS`.
    or_all: Whether the error says that 'all' stands for several, where a
      command runs more than one.

  Returns:
    The method.

  Raises:
    ValueError: If there is none of that name.
  """
  if name not in METHODS:
    near = difflib.get_close_matches(name.lower(), METHODS, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    hint = _OTHER_NAMES.get(name.lower(), hint)
    several = f', or all for {", ".join(COMPARED)}' if or_all else ''
    raise ValueError(
      f'Unknown method {name!r}.{hint} Methods: {", ".join(METHODS)}{several}.'
    )
  return METHODS[name]


def sampling_of(
  method: Method, given: LayerSamplingOptions
) -> LayerSamplingOptions:
  """How layers are drawn: as is asked for, or else as the method does.

  Args:
    method: The method.
    given: What is asked for, whose other options replace the method's own.
  """
  if method.sampling is None or given.method is not None:
    return given
  return dataclasses.replace(given, method=method.sampling)
