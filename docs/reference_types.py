"""Lets the reference show the types of arguments as the source has them.

The pages are made from the source, where a type has the name that a person
gave it: a module that was loaded has each of them unrolled, a learning rate in
some thirty lines. What loading adds is taken over from there: the options that
`with_options` puts into signatures, their defaults and explanations.
"""

import importlib
import inspect
from typing import Any

import griffe


class SharedOptions(griffe.Extension):
  """Completes the optimizers that take ``**options: Unpack[Group]``."""

  def on_package(self, *, pkg: griffe.Module, **others: Any) -> None:
    """Goes through all optimizers, once the source has been read."""
    del others
    if pkg.name != 'gnlorp_jax':
      return
    for module in pkg['optim.methods'].modules.values():
      for function in module.functions.values():
        if not function.is_alias and any(
          mark.callable_path.endswith('.with_options')
          for mark in function.decorators
        ):
          _complete(function)


def _complete(function: griffe.Function) -> None:
  """Replaces ``**options`` by all options, each with the type of its group."""
  loaded = getattr(importlib.import_module(function.module.path), function.name)
  group = function.modules_collection[
    function.parameters['options'].annotation.slice.canonical_path
  ]
  written = {
    name: attribute.annotation
    for name, attribute in group.all_members.items()
    if attribute.is_attribute
  } | {own.name: own.annotation for own in function.parameters}
  function.parameters = griffe.Parameters(
    *(
      griffe.Parameter(
        name,
        annotation=written[name],
        kind=griffe.ParameterKind[parameter.kind.name.lower()],
        default=(
          None
          if parameter.default is parameter.empty
          else repr(parameter.default)
        ),
      )
      for name, parameter in inspect.signature(loaded).parameters.items()
    )
  )
  function.docstring.value = inspect.getdoc(loaded)
