"""What a running command is called, for its help and for shells."""

import pathlib
import sys

_PACKAGE = pathlib.Path(__file__).parents[1]


def called() -> str:
  """How the command was called.

  Returns:
    The installed command (``gnlorp-train-sft``), a module (``python -m
    gnlorp_jax.train_sft``) or a script (``train_sft.py``).
  """
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  if spec is None:
    return pathlib.Path(sys.argv[0]).name
  return f'python -m {spec.name.removesuffix(".__main__")}'


def installed() -> str:
  """The installed command that does the same, such as ``gnlorp-train-sft``.

  Of a program that is not of this package it is the script or the module.
  """
  word = called().rpartition(' ')[2]
  name = word.removeprefix('gnlorp_jax.').removesuffix('.py')
  places = (_PACKAGE / f'{name}.py', _PACKAGE / name / '__main__.py')
  if any(place.is_file() for place in places):
    return f'gnlorp-{name.replace("_", "-")}'
  return word
