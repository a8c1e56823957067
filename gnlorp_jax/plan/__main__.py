"""The command `python -m gnlorp_jax.plan`; the package says what it does."""

import logging
import os
import sys

import jax

from gnlorp_jax import config, plan
from gnlorp_jax.plan.report import report
from gnlorp_jax.plan.settings import PlanConfig


def main(args: list[str]) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  logging.basicConfig(format='%(message)s', stream=sys.stderr, force=True)
  # XLA warns of programs larger than it likes; the table says so too. JAX has
  # set '1' already, and what a user sets stays.
  if os.environ.get('TF_CPP_MIN_LOG_LEVEL') == '1':
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
  # Nothing runs here: a GPU of this machine stays free for others.
  jax.config.update('jax_platforms', 'cpu')
  try:
    report(config.parse(args, plan.__doc__ or '', PlanConfig), args)
  except (ValueError, OSError) as error:
    config.exit_with_message(error)


if __name__ == '__main__':
  main(sys.argv[1:])
