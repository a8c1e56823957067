"""What `--help` prints: the options of a program, or of one group of them.

A configuration of a run has more than a hundred options. `--help` shows
those that stand in no group, and what the groups are; `--help GROUP` shows one,
`--help all` everything.
"""

import dataclasses
import difflib
import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.table

from gnlorp_jax.compose import command_name

_ALL = 'all'


def topic(args: list[str]) -> str | None:
  """What help is asked for: a group, or '' for what comes first.

  Args:
    args: Words of a command line.

  Returns:
    The word behind ``--help``, or None where nobody asks for help.
  """
  for number, word in enumerate(args):
    if word in ('--help', '-h'):
      following = args[number + 1 : number + 2]
      return ''.join(w for w in following if not w.startswith('-'))
  return None


def show(
  default: Any,
  asked: str,
  description: str,
  short_names: Mapping[str, tuple[str, ...]],
  foot: str,
) -> None:
  """Prints what there is to set, and its defaults.

  Args:
    default: A dataclass, whose fields may be dataclasses.
    asked: What `topic` found.
    description: What stands before the options.
    short_names: Further names of options, and the dotted fields of each.
    foot: What stands below the options, unless those of a group are asked for.

  Raises:
    ValueError: If there is no such group.
  """
  groups = {
    field.name: doc(type(default), field.name)
    for field in dataclasses.fields(default)
    if dataclasses.is_dataclass(getattr(default, field.name))
  }
  if asked not in ('', _ALL, *groups):
    near = difflib.get_close_matches(asked, groups, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
      f'--help {asked}: there is no such group of options.{hint} Groups: '
      f'{", ".join((*groups, _ALL))}.'
    )
  names = [field.name for field in dataclasses.fields(default)]
  if asked in groups:
    names, description = [asked], ''
  elif not asked:
    # What a program adds comes before what all of them have.
    added = inspect.get_annotations(type(default))
    names = [name for name in names if name not in groups]
    names.sort(key=lambda name: name not in added)
  _print_options(only(default, names), description)
  if not asked:
    _print_groups(groups, short_names)
  if asked not in groups:
    _console().print(foot, soft_wrap=True)


def _print_options(shown: Any, description: str) -> None:
  import tyro

  try:
    tyro.cli(
      type(shown),
      default=shown,
      args=['--help'],
      description=description,
      prog=command_name.called(),
      config=(tyro.conf.AvoidSubcommands,),  # As they are parsed.
    )
  except SystemExit as end:
    if end.code:
      raise


def _print_groups(
  groups: Mapping[str, str], short_names: Mapping[str, tuple[str, ...]]
) -> None:
  console = _console()
  if short_names:
    table = rich.table.Table('Short name', 'of', box=None, padding=(0, 2, 0, 0))
    for name, fields in short_names.items():
      table.add_row(option(name), ', '.join(map(option, fields)))
    console.print(table)
    console.print()
  if groups:
    table = rich.table.Table('Group', 'sets', box=None, padding=(0, 2, 0, 0))
    for name, text in groups.items():
      table.add_row(f'--{name}.*', text.partition('. ')[0].rstrip('.') + '.')
    console.print(table)
    console.print(
      f'\n--help GROUP, such as --help {next(iter(groups))}, shows its '
      f'options; --help {_ALL} shows everything.',
      soft_wrap=True,
    )


def _console() -> rich.console.Console:
  return rich.console.Console(highlight=False, markup=False)


def option(field: str, *, negated: bool = False) -> str:
  """A dotted field as an option, such as ``--model.no-remat``."""
  *groups, name = field.replace('_', '-').split('.')
  return '--' + '.'.join([*groups, f'no-{name}' if negated else name])


def only(node: Any, names: list[str]) -> Any:
  """A dataclass with some of the fields, each with its help on one line.

  tyro keeps the line breaks of a docstring and breaks lines once more; help
  that stands in the metadata of a field it wraps as a whole.

  Args:
    node: A dataclass, whose fields may be dataclasses.
    names: Those of its fields that are wanted.
  """
  hints = typing.get_type_hints(type(node), include_extras=True)
  fields: list[Any] = []
  for name in names:
    value = getattr(node, name)
    kind = hints[name]
    if dataclasses.is_dataclass(value):
      inner = [field.name for field in dataclasses.fields(value)]
      value = only(value, inner)
      kind = type(value)
    metadata = {'help': doc(type(node), name)}
    default = dataclasses.field(default=value, metadata=metadata)
    fields.append((name, kind, default))
  shown = dataclasses.make_dataclass(
    type(node).__name__, fields, frozen=True, kw_only=True
  )
  return shown()


def doc(kind: type, name: str) -> str:
  """The docstring under a field, of the nearest class that has one."""
  for one in kind.__mro__:
    text = _docs(one).get(name)
    if text:
      return ' '.join(text.split())
  return ''


@functools.cache
def _docs(kind: type) -> dict[str, str]:
  import docstring_parser

  if kind is object or not inspect.getmodule(kind):
    return {}
  parsed = docstring_parser.parse_from_object(kind).params
  return {one.arg_name: one.description or '' for one in parsed}
