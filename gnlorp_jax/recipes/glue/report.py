"""What every method would do with every parameter."""

from gnlorp_jax.compose import program
from gnlorp_jax.compose.program import Program
from gnlorp_jax.optim import format_report
from gnlorp_jax.recipes.glue import recipe, tasks
from gnlorp_jax.recipes.glue.settings import GlueConfig


def dry_run(config: GlueConfig) -> str:
  """What every method would do with every parameter; trains nothing.

  Args:
    config: The settings.

  Returns:
    A table per task and method.

  Raises:
    ValueError: As `tasks.find_tasks` and `recipe.plan`.
  """
  parts = []
  config = config.on_one_device()
  architecture = tasks.architecture(config, tasks.load_tokenizer(config))
  for task in tasks.find_tasks(config):
    for method in config.method_names:
      planned = recipe.plan(
        config, 1, task=task, method=method, architecture=architecture
      )
      parts.append(
        f'{task.name}, {method}: {_sizes(planned.program)}\n'
        f'{_numbers(planned.config)}\n'
        f'{format_report(program.report(planned.program))}\n'
      )
  return '\n'.join(parts)


def _sizes(built: Program) -> str:
  sizes = recipe.describe_sizes(built)
  return (
    f'trains {sizes["trainable_parameters"]:,} of {sizes["parameters"]:,} '
    'parameters'
  )


def _numbers(config: GlueConfig) -> str:
  """What `protocol.resolve` filled in."""
  names = (
    *('optim.name', 'optim.learning_rate', 'optim.rank', 'optim.scale'),
    *('optim.update_proj_gap', 'optim.weight_decay', 'optim.warmup_fraction'),
    *('adapter.kind', 'adapter.rank', 'adapter.alpha', 'adapter.dropout'),
    *('batch_size', 'epochs', 'max_length'),
  )
  values = []
  for name in names:
    value = config
    for field in name.split('.'):
      value = getattr(value, field)
    if value is not None:
      values.append(f'{name} {value}')
  return ', '.join(values)
