"""The command `python -m gnlorp_jax.plan`; the package says what it does."""

from gnlorp_jax.compose import interruption

with interruption.starting():
  import difflib
  import logging
  import os
  import sys

  import jax

  from gnlorp_jax import plan
  from gnlorp_jax.compose import command_line, completion
  from gnlorp_jax.plan import budget
  from gnlorp_jax.plan.report import report
  from gnlorp_jax.plan.settings import (
    RECIPES,
    GluePlanConfig,
    PlanConfig,
    Settings,
    SftPlanConfig,
  )
  from gnlorp_jax.recipes.sft.settings import SHORT_NAMES


def main(args: list[str] | None = None) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  words = sys.argv[1:] if args is None else args
  logging.basicConfig(format='%(message)s', stream=sys.stderr, force=True)
  # XLA warns of programs larger than it likes; the table says so too. JAX has
  # set '1' already, and what a user sets stays.
  if os.environ.get('TF_CPP_MIN_LOG_LEVEL') == '1':
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
  # Nothing runs here: a GPU of this machine stays free for others.
  jax.config.update('jax_platforms', 'cpu')
  command_line.run(
    lambda: answer(parse(words), words), traceback_variable='PLAN_TRACEBACK'
  )


def answer(settings: Settings, args: list[str]) -> None:
  """Plans the run as it is asked for, or what fits a budget in its place."""
  if isinstance(settings, PlanConfig) and settings.budget is not None:
    budget.report(settings, args)
  else:
    report(settings, args)


def parse(args: list[str]) -> Settings:
  """The settings of a command line, whose first word may name a recipe.

  Raises:
    SystemExit: After `--help`, or a script for a shell.
    ValueError: If there is no such recipe or field, or a value is not allowed.
  """
  pretrain = completion.Options(PlanConfig(), takes_file=True)
  offered = {
    'pretrain': pretrain,
    'glue': completion.Options(GluePlanConfig()),
    'sft': completion.Options(SftPlanConfig(), SHORT_NAMES, takes_file=True),
  }
  command_line.print_completion(args, pretrain, offered)
  recipe, options = 'pretrain', args
  if args and not args[0].startswith('-'):
    recipe, *options = args
  if recipe not in RECIPES:
    near = difflib.get_close_matches(recipe, RECIPES, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
      f'Unknown recipe {recipe!r}; expected one of {tuple(RECIPES)}.{hint}'
    )
  settings = RECIPES[recipe].parse(options, plan.__doc__ or '')
  if settings.json != '-':
    command_line.check_place('json', settings.json)
  return settings


if __name__ == '__main__':
  main()
