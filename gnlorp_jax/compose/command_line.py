"""A command line to settings, and a user's mistake to one clear message."""

import dataclasses
import difflib
import errno
import itertools
import logging
import os
import pathlib
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from gnlorp_jax.compose import (
  command_help,
  command_name,
  completion,
  foreign_names,
  interruption,
)
from gnlorp_jax.disk import extras, writing
from gnlorp_jax.training import distributed

_logger = logging.getLogger(__name__)

Settings = TypeVar('Settings')
Aliases = Mapping[str, tuple[str, ...]]


def override(
  default: Settings,
  args: list[str],
  description: str,
  aliases: Aliases | None = None,
  short_names: Aliases | None = None,
  *,
  takes_file: bool = False,
) -> Settings:
  """Replaces fields of a configuration by those of the command line.

  Args:
    default: A dataclass, whose fields may be dataclasses.
    args: Words of the command line, without the program's name.
    description: What `--help` says before the options.
    aliases: Earlier names of fields, and the dotted fields that each sets now,
      which is told where one is used.
    short_names: Further names of fields, likewise, which `--help` lists.
    takes_file: Whether the program takes ``--config`` off its command line,
      which shells are then told of.

  Returns:
    The configuration.

  Raises:
    SystemExit: After `--help`, or a script for a shell.
    ValueError: If a field does not exist or a value is not allowed.
  """
  # Who runs no command line, such as a benchmark, need not have it.
  import tyro

  asked = command_help.topic(args)
  if asked is not None:
    command_help.show(
      default, asked, description, short_names or {}, completion.HINT
    )
    raise SystemExit(0)
  offered = completion.Options(default, short_names or {}, takes_file)
  print_completion(args, offered)
  args = _replace_aliases(args, default, short_names or {}, told=False)
  args = _replace_aliases(args, default, aliases or {}, told=True)
  _check_fields(args, default)
  return tyro.cli(
    type(default),
    default=default,
    args=args,
    description=description,
    prog=command_name.called(),
    # The model is of the kind that is there: its fields are options as others.
    config=(tyro.conf.AvoidSubcommands,),
  )


def print_completion(
  args: list[str],
  options: completion.Options,
  recipes: Mapping[str, completion.Options] | None = None,
) -> None:
  """Prints a script for a shell, and ends the program, if that is asked for.

  Args:
    args: Words of the command line.
    options: What the command understands.
    recipes: What it understands behind a first word.

  Raises:
    SystemExit: Once it is printed.
    ValueError: If there is none for the shell that is named.
  """
  shell = completion.shell_of(args)
  if shell is not None:
    sys.stdout.write(completion.script(shell, options, recipes))
    raise SystemExit(0)


def run(main: Callable[[], None], traceback_variable: str) -> None:
  """Runs a program; a user's mistake, or Ctrl-C, ends it with one message.

  Args:
    main: The program.
    traceback_variable: Name of the environment variable with which an error
      shows where it arose.

  Raises:
    SystemExit: With status 2, after a ValueError or an OSError, or where
      memory does not suffice; with several processes also where another one is
      lost. What others do not share ends the process at once. As of
      `interruption.running`.
  """
  with interruption.running():
    try:
      with distributed.shared_errors():
        main()
    except BaseException as caught:
      error = distributed.explained(caught)
      message = None if traceback_variable in os.environ else _message(error)
      if distributed.is_alone(error):
        _leave(error, message)
      if message is None:
        raise
      if not distributed.is_first():
        raise SystemExit(2) from None
      exit_with_message(message)


def _message(error: BaseException) -> str | None:
  """What to tell of an error; None of one that is the program's fault."""
  text = str(error)
  # JAX has one class for whatever XLA complains of.
  is_memory = isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in text
  if is_memory:
    reason = text.partition('\n')[0] or 'no more is to be had'
    return (
      f'Out of memory: {reason} Lower batch_size or the length of sequences, '
      'raise micro_batches, or choose a smaller model; python -m '
      'gnlorp_jax.plan says what a run takes.'
    )
  if isinstance(error, OSError) and error.errno == errno.EROFS:
    return (
      f'{error.filename or text} cannot be written: its file system is '
      'read-only. What was complete is as it was. Make it writable, or name '
      'another place.'
    )
  if isinstance(error, ImportError):
    return extras.missing(error)
  is_told = ValueError | OSError | distributed.LostProcessError
  return text if isinstance(error, is_told) else None


def _leave(error: BaseException, message: str | None) -> None:
  """Ends one of several processes, whose error the others do not have."""
  mark = f'[process {jax.process_index()}]'
  if message is not None:
    sys.stderr.write(f'{mark} error: {message}\n')
    distributed.leave(2)
  if isinstance(error, KeyboardInterrupt):
    sys.stderr.write(f'{mark} Interrupted.\n')
    distributed.leave(128 + signal.SIGINT)
  traceback.print_exception(error)
  distributed.leave(1)


def exit_with_message(message: str) -> None:
  """Ends the program with the message of a user's mistake, no traceback."""
  sys.stderr.write(f'error: {message}\n')
  raise SystemExit(2)


def check_place(option: str, file: str | None) -> None:
  """Checks that there is a place for a file that is to be written.

  Args:
    option: Which option names it.
    file: The file, or None for none.

  Raises:
    ValueError: If it is a folder, or that it should lie in does not exist or
      cannot be written.
  """
  if file is None:
    return
  path = pathlib.Path(file).expanduser()
  if path.is_dir():
    raise ValueError(f'--{option} {file}: that is a folder. Name a file in it.')
  if not path.parent.is_dir():
    raise ValueError(
      f'--{option} {file}: the folder {path.parent} does not exist. Create it, '
      'or name another file.'
    )
  places = [path] if path.exists() else []
  if not _is_written_into(path):
    places.append(path.parent)
  for place in places:
    if not os.access(place, os.W_OK):
      raise ValueError(
        f'--{option} {file}: {place} cannot be written. Correct its '
        'permissions, or name another file.'
      )


def write_at_place(file: str, text: str) -> None:
  """Writes a file that `check_place` was asked about, UTF-8.

  It is there whole or not at all. A pipe, a device or a link is written into as
  it is.

  Args:
    file: The file.
    text: What it is to hold.

  Raises:
    OSError: If that fails.
  """
  path = pathlib.Path(file).expanduser()
  if _is_written_into(path):
    path.write_text(text, encoding='utf-8')
  else:
    writing.write_text(path, text)


def _is_written_into(path: pathlib.Path) -> bool:
  """Whether something is there that no new file may take the place of."""
  return path.is_symlink() or (path.exists() and not path.is_file())


def override_with_folder(
  default: Settings, args: list[str], description: str
) -> Settings:
  """`override` of a command line whose first word may be a model's folder.

  Args:
    default: The settings to override, with a field ``folder``.
    args: Words of the command line, without the program's name.
    description: What `--help` says before the options.
  """
  if args and not args[0].startswith('-'):
    default = dataclasses.replace(default, folder=args[0])
    args = args[1:]
  return override(default, args, description)


def _replace_aliases(
  args: list[str], default: Any, aliases: Aliases, *, told: bool
) -> list[str]:
  """Puts the names of fields in the place of others, and may say so."""
  replaced: list[str] = []
  words = iter(args)
  for word in words:
    option, equals, value = word.partition('=')
    name = option.removeprefix('--').replace('-', '_')
    is_negated = name.startswith('no_') and name.removeprefix('no_') in aliases
    fields = aliases.get(name.removeprefix('no_') if is_negated else name)
    if not option.startswith('--') or fields is None:
      replaced.append(word)
      continue
    values = [value] if equals else []
    if not equals and not isinstance(_value(default, fields[0]), bool):
      values = list(itertools.islice(words, 1))  # Without one, tyro complains.
    options = [
      command_help.option(field, negated=is_negated) for field in fields
    ]
    for new in options:
      replaced += [new, *values]
    if told:
      _logger.info('%s means %s.', option, ' and '.join(options))
  return replaced


def _value(node: Any, field: str) -> Any:
  for name in field.split('.'):
    node = getattr(node, name)
  return node


def _check_fields(args: list[str], default: Any) -> None:
  """Names the nearest option, or choice, for one that does not exist."""
  for word, following in itertools.pairwise([*args, '']):
    if word.startswith('--') and word != '--':
      option, equals, value = word.partition('=')
      _check_option(option, value if equals else following, default)


def _check_option(option: str, value: str, default: Any) -> None:
  """Follows an option such as ``--optim.rank`` through the fields."""
  node: Any = default
  groups: list[str] = []
  for field in option[2:].replace('-', '_').split('.'):
    names = [f.name for f in dataclasses.fields(node)]
    known = field if field in names else field.removeprefix('no_')  # A flag.
    if known not in names:
      near = _nearest(field, node)
      near = [command_help.option('.'.join([*groups, n])) for n in near]
      hint = f' Did you mean {near[0]}?' if near else ''
      near_by = near[0][2:].split('.')[:-1] if near else groups
      topic = ' '.join(['--help', *near_by[:1]])
      raise ValueError(f'There is no option {option}.{hint} {topic} lists all.')
    groups.append(known)
    group, node = node, getattr(node, known)
    if not dataclasses.is_dataclass(node):
      _check_choice(option, value, group, field)
      return  # tyro judges the rest.
  fields = [
    name for name in names if not dataclasses.is_dataclass(getattr(group, name))
  ]
  near = difflib.get_close_matches(groups[-1], fields, n=1)
  hint = f' Did you mean {command_help.option(near[0])}?' if near else ''
  raise ValueError(
    f'{option} is a group of options.{hint} --help {groups[0]} lists those in '
    'it.'
  )


def _check_choice(option: str, value: str, group: Any, field: str) -> None:
  """Checks the value of a field that has a few, where one is given."""
  kind = typing.get_type_hints(type(group)).get(field)
  is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
  kinds = typing.get_args(kind) if is_union else (kind,)
  literals = [k for k in kinds if typing.get_origin(k) is typing.Literal]
  choices = [str(choice) for k in literals for choice in typing.get_args(k)]
  if not literals or {*kinds} - {*literals, type(None)}:
    return  # Any other value may be allowed as well.
  if type(None) in kinds:
    choices.append('None')
  if value and not value.startswith('--') and value not in choices:
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
      f'{option} {value!r}: expected one of {sorted(choices)}.{hint}'
    )


def _nearest(field: str, node: Any) -> list[str]:
  """Dotted fields that may have been meant, the likeliest first."""
  nested = _nested(node)
  names = [f.name for f in dataclasses.fields(node)]
  meant = foreign_names.MEANING.get(field)
  return (
    [name for name in (*names, *nested) if name == meant]
    or [name for name in nested if name.endswith(f'.{field}')]
    or difflib.get_close_matches(field, names, n=1)
    or _close_in_groups(field, node)
  )


def _close_in_groups(field: str, node: Any) -> list[str]:
  """Dotted names whose last part is close to a mistyped field."""
  by_name = {name.split('.')[-1]: name for name in _nested(node)}
  return [by_name[n] for n in difflib.get_close_matches(field, by_name, n=1)]


def _nested(node: Any) -> list[str]:
  """Dotted names of the fields of a configuration's groups."""
  return [
    f'{group.name}.{field.name}'
    for group in dataclasses.fields(node)
    if dataclasses.is_dataclass(getattr(node, group.name))
    for field in dataclasses.fields(getattr(node, group.name))
  ]
