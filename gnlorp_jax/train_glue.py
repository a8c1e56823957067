"""Fine-tunes a RoBERTa on GLUE with GradNormLoRP and what it is compared with.

Without options, and without network, it trains a small model on a generated
task with three methods, and ends with their table. The same command in the same
run directory goes on where it stopped: finished runs are not repeated, and the
unfinished one continues at its batch. With TRAIN_GLUE_TRACEBACK set in the
environment, an error shows where it arose.

  python train_glue.py
  python train_glue.py --method gradnormlorp --optim.moment-bits 8
    --step.mode layerwise
  python train_glue.py --task mrpc,rte --method all --init-from roberta-base/
    --data.source glue/ --seeds 0,1,2 --learning-rates 1e-5,3e-5,1e-4
  python train_glue.py --task mine --data.train train.tsv --data.dev dev.tsv
    --data.text-columns question,answer --data.label-column y --init-from base/
"""

from gnlorp_jax.compose import interruption

with interruption.starting():
  import logging
  import sys

  import sklearn  # noqa: F401  # Missed here, not at the first evaluation.

  from gnlorp_jax.compose import command_line, device_settings, run_directory
  from gnlorp_jax.recipes import grid
  from gnlorp_jax.recipes.glue import recipe, report, table, tasks
  from gnlorp_jax.recipes.glue.settings import GlueConfig, parse
  from gnlorp_jax.training import distributed, metrics
  from gnlorp_jax.training.interrupt import StopRequest

_logger = logging.getLogger('train_glue')


def main(args: list[str] | None = None) -> None:
  """Runs the command line `args`; a user's mistake ends with one message."""
  words = sys.argv[1:] if args is None else args
  metrics.log_to_terminal()
  command_line.run(
    lambda: finetune(parse(words, __doc__)),
    traceback_variable='TRAIN_GLUE_TRACEBACK',
  )


def finetune(config: GlueConfig) -> None:
  """Every task with every method, learning rate and seed, one by one."""
  if config.dry_run:
    sys.stdout.write(report.dry_run(config))
    return
  device_settings.join(config)
  found = tasks.find_tasks(config)
  recipe.check(config, found)
  _logger.info(
    'Tasks: %s. Methods: %s. Learning rates: %s. Seeds: %s.',
    ', '.join(task.name for task in found),
    ', '.join(config.method_names),
    config.learning_rates or 'given, or those of the method and the task',
    ', '.join(map(str, config.seed_numbers)),
  )
  with run_directory.opened(config.run_dir), StopRequest() as stop:
    # All of them: a malformed row of the last one must not be found after days.
    read = distributed.in_turn(
      lambda: [tasks.load_task(config, task) for task in found]
    )
    for data in read:
      for method in config.method_names:
        prepared = recipe.prepare(config, data, method)

        def run(rate, seed, prepared=prepared):
          member = recipe.make_run(prepared, rate, seed)
          result = grid.run_once(
            member, stop, keep=config.keep, is_single=config.is_single
          )
          distributed.from_first(
            lambda: table.write(config.run_dir, picture=False)
          )
          return result

        grid.search(config.searched_rates, config.seed_numbers, run)
    results = distributed.from_first(lambda: table.write(config.run_dir))
  if not distributed.is_first():
    return
  table.show(results)
  _logger.info(
    'Results of all runs are in %s: results.json, results.md, results.png.',
    config.run_dir,
  )


if __name__ == '__main__':
  main()
