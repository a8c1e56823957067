"""From the words of a command line, or a file, to the settings of a merge."""

import dataclasses
import pathlib

from gnlorp_jax.compose import command_line, config_file
from gnlorp_jax.recipes.merge import mergekit
from gnlorp_jax.recipes.merge.settings import MergeConfig


def parse(args: list[str], description: str) -> MergeConfig:
  """The settings of a command line.

  Args:
    args: Words of the command line, without the program's name.
    description: What `--help` says before the options.

  Raises:
    SystemExit: After `--help`.
    ValueError: If an option does not exist or a value is not allowed, or no
      base, no expert or no place to write is named.
  """
  file, args = config_file.take(args)
  if file is not None and not pathlib.Path(file).is_file():
    raise ValueError(f'--config {file}: there is no such file.')
  default = MergeConfig() if file is None else mergekit.read(file)
  config = command_line.override(default, args, description)
  config = dataclasses.replace(config, config=file)
  for name in ('base', 'experts'):
    if not getattr(config, name):
      raise ValueError(
        f'No --{name} named: python -m gnlorp_jax.merge --base FOLDER '
        '--experts FOLDER FOLDER --method NAME --out FOLDER'
      )
  if not config.out and not config.dry_run:
    raise ValueError('Name a folder to write by --out, or add --dry-run.')
  return config
