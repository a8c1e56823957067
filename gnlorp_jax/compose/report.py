"""What a run takes, by component, beside AdamW."""

import jax
import rich.table

from gnlorp_jax.compose.program import Program
from gnlorp_jax.compose.settings import OptimConfig, StepConfig
from gnlorp_jax.optim.inspect import format_bytes, state_bytes, tree_bytes
from gnlorp_jax.training import layerwise
from gnlorp_jax.training.layer_sampling import on_devices

Memory = dict[str, dict[str, int]]


def num_params(program: Program) -> int:
  """Number of the model's own parameters, from shapes alone."""
  shapes = jax.eval_shape(program.model.init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def num_trained(program: Program) -> int:
  """Number of the weights that train, from shapes alone.

  In codes, of which one may be half a byte, there are as many as decoded.
  """
  held = program.parameters
  shapes = jax.eval_shape(held.decode_exact, held.trained)
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def memory(program: Program, step: StepConfig, optim: OptimConfig) -> Memory:
  """Bytes of a run by component, beside those of AdamW.

  AdamW is counted in whole steps, with parameters and gradients in the model's
  dtype and two float32 moments per parameter, which is what `optim.adamw`
  holds. Layer by layer a run's gradients are those of one block, those outside
  of the blocks, and where it waits before it updates, what the projection
  leaves of all blocks. Where layers are drawn, those of all that are drawn, or
  layer by layer of one.

  Args:
    program: What the run computes.
    step: How its steps go through the model.
    optim: Its optimizer.

  Returns:
    By component, bytes of ``this run`` and of ``adamw``.
  """
  exact = jax.eval_shape(program.model.init, jax.random.key(0))
  abstract = program.abstract_state
  ours = {
    'parameters': tree_bytes(abstract.params)
    + tree_bytes(program.parameters.frozen),
    'gradients': _gradients(program, step, optim),
    **state_bytes(on_devices(abstract.opt_state)),
  }
  adamw = {
    **dict.fromkeys(ours, 0),
    'parameters': tree_bytes(exact),
    'gradients': tree_bytes(exact),
    'moments': 8 * num_params(program),
  }
  return {
    name: {'this run': ours[name], 'adamw': adamw[name]}
    for name in ours
    if name != 'errors' or ours[name]  # Few optimizers have them.
  }


def _gradients(program: Program, step: StepConfig, optim: OptimConfig) -> int:
  """Bytes of the gradients that a step holds at once."""
  sampling, trained = program.sampling, program.parameters.trained
  opt_state = program.abstract_state.opt_state
  if step.mode == 'whole' and sampling is None:
    return tree_bytes(trained)
  params = jax.eval_shape(program.parameters.decode, trained)
  layers = tree_bytes(params['layers'])
  outside = tree_bytes(params) - layers
  one = layers // program.model.config.num_layers
  if sampling is not None:
    return outside + one * (sampling.layers if step.mode == 'whole' else 1)
  waits = layerwise.gradients_wait(
    program.tx, optim.clip_global_norm, step.clipping, step.accumulate
  )
  if not waits:
    return outside + one
  projected = jax.eval_shape(
    lambda params, opt: program.tx.project(params, opt, params)[0],
    *(params, opt_state),
  )
  if step.accumulate == 'projected':  # They are added up.
    return one + 4 * sum(leaf.size for leaf in jax.tree.leaves(projected))
  return one + tree_bytes(projected)


def memory_table(found: Memory, what: str) -> rich.table.Table:
  """A table for a terminal.

  Args:
    found: What a run takes.
    what: Its method, or its optimizer.
  """
  table = rich.table.Table(title='Memory', title_justify='left')
  table.add_column('component')
  table.add_column(f'this run ({what})', justify='right')
  table.add_column('all weights by AdamW', justify='right')
  totals = {'this run': 0, 'adamw': 0}
  for name, sizes in found.items():
    if any(sizes.values()):
      table.add_row(name, *(format_bytes(size) for size in sizes.values()))
    totals = {key: totals[key] + sizes[key] for key in totals}
  table.add_section()
  table.add_row('total', *(format_bytes(size) for size in totals.values()))
  return table
