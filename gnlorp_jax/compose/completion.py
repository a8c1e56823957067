"""Scripts with which a shell completes the options of a command.

tyro writes them. It would be asked by options of its own, which know neither
the names that a program understands beside its fields, nor the recipes of the
planner, and whose scripts come to grief at help of several lines.
"""

import contextlib
import dataclasses
import functools
import io
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from gnlorp_jax.compose import command_help, command_name

OPTION = '--print-completion'
SHELLS = ('bash', 'zsh')
HINT = (
  f'{OPTION} {"|".join(SHELLS)} prints a script with which the shell completes '
  'options.'
)

# tyro's script alone would answer with nothing where a file may stand, such as
# the folder that is the first word of a command.
_WITH_FILES = r"""_files_or\1() {
  \1 "$@"
  [[ ${COMPREPLY[*]} ]] || COMPREPLY=()
}
complete -o default -o filenames -F _files_or\1 \2"""


class Options(NamedTuple):
  """What a command line may say."""

  default: Any
  """A dataclass, whose fields may be dataclasses."""
  short_names: Mapping[str, tuple[str, ...]] = {}
  """Further names of options, and the dotted fields of each."""
  takes_file: bool = False
  """Whether ``--config`` names a file, which is no field."""


def shell_of(args: list[str]) -> str | None:
  """The shell for which a command line asks for a script; None if it does not.

  Args:
    args: Words of a command line.

  Raises:
    ValueError: If it is none of `SHELLS`.
  """
  for number, word in enumerate(args):
    option, equals, shell = word.partition('=')
    if option.replace('_', '-') != OPTION:
      continue
    if not equals:
      shell = ''.join(args[number + 1 : number + 2])
    if shell not in SHELLS:
      raise ValueError(f'{OPTION} {shell!r}: expected one of {SHELLS}.')
    return shell
  return None


def script(
  shell: str, options: Options, recipes: Mapping[str, Options] | None = None
) -> str:
  """A script that completes this command, by its installed name.

  Args:
    shell: One of `SHELLS`.
    options: What the command understands.
    recipes: What it understands behind a first word.
  """
  # Who runs no command line need not have it.
  import tyro

  name = command_name.installed()
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    try:
      tyro.cli(
        _described(options, recipes or {}),
        args=['--tyro-write-completion', shell, '-'],
        prog=name,
        config=(tyro.conf.AvoidSubcommands,),
      )
    except SystemExit as end:
      if end.code:
        raise
  return re.sub(
    rf'^complete -F (\w+) ({re.escape(name)})$',
    _WITH_FILES,
    printed.getvalue(),
    flags=re.MULTILINE,
  )


def _described(options: Options, recipes: Mapping[str, Options]) -> type:
  """A dataclass whose fields are all that can be said."""
  import tyro

  default = options.default
  names = [field.name for field in dataclasses.fields(default)]
  fields: list[Any] = []
  for short, meant in options.short_names.items():
    kind, value = _field(default, meant[0])
    # Some are called as a group of fields is.
    kind = Annotated[kind, tyro.conf.arg(name=short)]
    help_text = f'Short for {", ".join(map(command_help.option, meant))}.'
    fields.append((f'short_{short}', kind, _with_help(value, help_text)))
  if options.takes_file:
    text = 'The configuration that other options override.'
    fields.append(('config', str | None, _with_help(None, text)))
  if recipes:
    kinds = tuple(
      Annotated[
        _described(inner, {}), tyro.conf.subcommand(name, prefix_name=False)
      ]
      for name, inner in recipes.items()
    )
    # Without a name, those of its fields are as they would be alone.
    kind = Annotated[typing.Union[kinds], tyro.conf.arg(name='')]  # noqa: UP007
    fields.append(('recipe', kind))
  return dataclasses.make_dataclass(
    type(default).__name__,
    fields,
    bases=(type(command_help.only(default, names)),),
    frozen=True,
    kw_only=True,
  )


def _field(default: Any, dotted: str) -> tuple[Any, Any]:
  """Type and value of a field."""
  *groups, name = dotted.split('.')
  node = functools.reduce(getattr, groups, default)
  return typing.get_type_hints(type(node))[name], getattr(node, name)


def _with_help(value: Any, text: str) -> Any:
  return dataclasses.field(default=value, metadata={'help': text})
