"""What fits a budget: the measured optimizers, each with a step that fits.

The optimizers, their options and the order are those of the record that the
package ships (`gnlorp_jax.optim.advice`). All else is the run's: its model, its
batch, its schedule. A run goes in whole steps where these fit, else layer by
layer, then with a backward pass more to clip, and last with the blocks' kernels
in 8 bits.
"""

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table

from gnlorp_jax.compose import optimizer
from gnlorp_jax.compose.settings import OptimConfig, StepConfig
from gnlorp_jax.optim import advice, methods
from gnlorp_jax.plan.accelerators import ACCELERATORS, compiler_is_installed
from gnlorp_jax.plan.count import lower_bound, step_of
from gnlorp_jax.plan.report import (
  HOW_TO_KNOW,
  ON_TOP,
  gib,
  open_console,
  quiet,
  versions,
  write,
)
from gnlorp_jax.plan.settings import PlanConfig, size_of
from gnlorp_jax.plan.suggest import (
  MOST_COMPILED,
  Change,
  option_text,
  replace,
  try_compiled,
)

# What a run keeps of its optimizer's settings; the rest is the record's.
_OF_THE_RUN = (
  *('schedule', 'warmup_fraction', 'final_fraction', 'cycle'),
  *('restart_warmup_fraction', 'update_proj_gap', 'clip_global_norm'),
  *('weight_decay', 'decay_norms_and_biases', 'stochastic_rounding'),
)
_STATE = ('moments', 'bases', 'errors', 'other')  # Of a plan's components.
_SIGNS = {'compiled': '', 'estimated': '~ ', 'bound': '>= '}
_SAID = {'compiled': '', 'estimated': 'about ', 'bound': 'at least '}


class Choice(NamedTuple):
  """An optimizer of the record, and a step with which a run takes it.

  Attributes:
    row: The optimizer, and what was measured of it.
    place: Its place in the record.
    run: The run with both.
    state: Bytes of the optimizer's state on one device.
    peak: Bytes of the step at its largest.
    known: Where that is from: ``compiled``; ``estimated``, the lower bound and
      what compiling the same step found on top with another optimizer; or a
      lower ``bound``.
  """

  row: advice.Row
  place: int
  run: PlanConfig
  state: int
  peak: int
  known: Literal['compiled', 'estimated', 'bound'] = 'bound'

  def change(self, settings: PlanConfig) -> Change:
    """New values of dotted fields that make this run of `settings`."""
    return {
      f'{group}.{name}': value
      for group in ('optim', 'step')
      for name, value in vars(getattr(self.run, group)).items()
      if value != getattr(getattr(settings, group), name)
    }


def report(settings: PlanConfig, args: list[str]) -> None:
  """Finds what fits the budget, and prints or writes it.

  Args:
    settings: The run, with a budget.
    args: The command line it came from, for the record.

  Raises:
    ValueError: If nothing fits.
  """
  console = open_console(settings)
  step = step_of(settings, settings.devices)
  leaves = jax.tree.leaves(step.gradients)
  grounds = advice.record().grounds(
    sum(math.prod(leaf.shape) for leaf in leaves)
  )
  with quiet():
    found = choices(settings, step.model.hidden_size)
  print_choices(console, settings, found, grounds)
  write(settings, as_json(settings, args, found, grounds))


def choices(settings: PlanConfig, width: int) -> list[Choice]:
  """The optimizers that fit the budget, each with the mildest step that does.

  Where XLA's compiler is there, the first are compiled until one fits for
  certain; what turns out not to fit is left out.

  Args:
    settings: The run, with a budget.
    width: Of the model.

  Returns:
    The best measured first; of those that the record does not tell apart, the
    one of the smallest state.

  Raises:
    ValueError: If nothing fits; the text has the smallest need.
  """
  record, budget = advice.record(), size_of(settings.budget)
  left = MOST_COMPILED if compiler_is_installed() else 0
  tried: list[Choice] = []
  waiting: list[list[Choice]] = []  # What may fit, of each optimizer.
  for row, place in zip(record.rows, record.places, strict=True):
    fitting = []
    for choice in _steps(settings, row, place, width):
      if choice.peak > budget:
        tried.append(choice)
        continue
      fitting.append(choice)
      if not left:
        break  # A harsher step is for what turns out not to fit.
    if fitting:
      waiting.append(fitting)
  waiting.sort(key=lambda steps: (steps[0].place, steps[0].state))
  on_top: dict[StepConfig, int] = {}  # What compiling a step found.
  found = []
  for steps in waiting:
    for bound in steps:
      choice = _estimated(bound, on_top)
      if left and choice.peak <= budget:
        left -= 1
        plan = try_compiled(choice.run, choice.row.name)
        if plan is None:
          continue
        on_top[choice.run.step] = plan.peak - bound.peak
        choice = choice._replace(peak=plan.peak, known='compiled')
        if choice.peak <= budget:
          left = 0
      tried.append(choice)
      if choice.peak <= budget:
        found.append(choice)
        break
  if not found:
    tried = [_estimated(choice, on_top) for choice in tried]
    raise ValueError(_nothing_fits(settings, tried))
  return found


def _estimated(choice: Choice, on_top: Mapping[StepConfig, int]) -> Choice:
  """A choice with what its step took on top with another optimizer."""
  more = on_top.get(choice.run.step)
  if more is None or choice.known != 'bound':
    return choice
  return choice._replace(peak=choice.peak + more, known='estimated')


def _steps(
  settings: PlanConfig, row: advice.Row, place: int, width: int
) -> Iterator[Choice]:
  """A run with an optimizer of the record, its steps from mild to harsh."""
  optim = optim_of(settings.optim, row, width)
  runs = []
  for step in _changes(settings):
    try:
      run = dataclasses.replace(replace(settings, step), optim=optim)
      if run in runs:
        continue
      runs.append(run)
      plan = lower_bound(run)
    except ValueError:
      continue  # The parts of the run rule it out.
    state = sum(plan.components[name] for name in _STATE)
    yield Choice(row, place, run, state, plan.peak)


def _changes(settings: PlanConfig) -> tuple[Change, ...]:
  """Changes of the steps to try, from mild to harsh."""
  layerwise = spare = {'step.mode': 'layerwise'}
  is_clipped = settings.optim.clip_global_norm is not None
  if is_clipped and settings.step.accumulate == 'gradient':
    # Then no gradients wait for the norm.
    spare = {**layerwise, 'step.clipping': 'recompute'}
  return {}, layerwise, spare, {**spare, 'step.weight_bits': 8}


def optim_of(asked: OptimConfig, row: advice.Row, width: int) -> OptimConfig:
  """The optimizer's settings: the record's, and what is the run's to say."""
  wanted = OptimConfig(
    name=row.optimizer,
    learning_rate=row.learning_rate,
    **row.at_width(width),
    **{name: getattr(asked, name) for name in _OF_THE_RUN},
  )
  if optimizer.accepts(wanted, 'update_proj_gap'):
    return wanted
  return dataclasses.replace(wanted, update_proj_gap=None)


def _nothing_fits(settings: PlanConfig, tried: list[Choice]) -> str:
  least = min(tried, key=lambda choice: choice.peak)
  return (
    f'Nothing fits --budget {settings.budget}: {_SAID[least.known]}'
    f'{gib(least.peak)} GiB are needed, by {least.row.name!r} '
    f'({_step(least.run)}). Raise the budget, lower --batch-size or '
    '--data.seq-len, raise --micro-batches, or choose a smaller model. Adapters'
    ' (--adapter.kind lora) are planned without a budget.'
  )


def _step(run: PlanConfig) -> str:
  """The step of a run in words."""
  words = 'layer by layer' if run.step.mode == 'layerwise' else 'whole steps'
  bits = run.step.weight_bits
  return f'{words}, kernels in {bits} bits' if bits else words


def print_choices(
  console: rich.console.Console,
  settings: PlanConfig,
  found: list[Choice],
  grounds: str,
) -> None:
  """Prints what fits, the options of the best, and what that rests on."""
  verb = 'fits' if found[0].known == 'compiled' else 'may fit'
  console.print(
    f'What {verb} {gib(size_of(settings.budget))} GiB on one device, best first'
  )
  table = rich.table.Table(box=rich.box.SIMPLE, pad_edge=False)
  table.add_column('#', justify='right')
  for head in ('optimizer', 'rank', 'bits', 'step'):
    table.add_column(head)
  table.add_column('GiB', justify='right')
  table.add_column('loss there')
  for choice in found:
    row = choice.row
    table.add_row(
      str(choice.place),
      row.name,
      str(choice.run.optim.rank or '-'),
      '/'.join(map(str, _bits(choice.run))),
      choice.run.step.mode,
      f'{_SIGNS[choice.known]}{gib(choice.peak)}',
      f'{row.loss:.3f} ± {row.deviation:.3f}',
    )
  console.print(table)
  options = option_text(found[0].change(settings))
  console.print('Options of the first for train_lm.py, after your own:')
  # In one piece, to be copied.
  console.print(options or '(those you have)', soft_wrap=True)
  for sentence in _meaning(settings, found, grounds):
    console.print(sentence)


def _bits(run: PlanConfig) -> list[Any]:
  """Bits of moments, of bases and of the blocks' kernels."""
  defaults = inspect.signature(methods.get(run.optim.name)).parameters
  found: list[Any] = [
    (getattr(run.optim, name) or defaults[name].default)
    if name in defaults
    else '-'
    for name in ('moment_bits', 'basis_bits')
  ]
  kept = 8 * jnp.dtype(run.model.param_dtype).itemsize
  return [*found, run.step.weight_bits or kept]


def _meaning(
  settings: PlanConfig, found: list[Choice], grounds: str
) -> Iterator[str]:
  """What the table means, in sentences."""
  yield (
    '\n#: place by loss; optimizers of one place are tied, within two standard '
    'errors, and the smaller state is first. bits: of moments, bases (- if not '
    'to be chosen), kernels. The learning rate is the best of those '
    'tried there; a larger model may want a lower one.'
  )
  yield grounds
  if any(c.run.step.weight_bits != settings.step.weight_bits for c in found):
    yield 'No run of the record had its kernels in 8 bits.'
  device = ACCELERATORS[settings.device].description
  kinds = {choice.known for choice in found}
  if 'compiled' in kinds:
    yield f'Without a sign: compiled for {device}.'
  if 'estimated' in kinds:
    yield '~: the lower bound, and what compiling such a step found on top.'
  if 'bound' in kinds:
    yield f'>=: a lower bound; {ON_TOP}'
  if not compiler_is_installed():
    yield HOW_TO_KNOW


def as_json(
  settings: PlanConfig, args: list[str], found: list[Choice], grounds: str
) -> dict[str, Any]:
  """The same in a form `json` writes; sizes in bytes."""
  return {
    'arguments': args,
    'budget': size_of(settings.budget),
    'grounds': grounds,
    'choices': [
      {
        'place': choice.place,
        **dataclasses.asdict(choice.row),
        'change': choice.change(settings),
        'state': choice.state,
        'peak': choice.peak,
        'known': choice.known,
      }
      for choice in found
    ],
    'config': dataclasses.asdict(settings),
    'versions': versions(),
  }
