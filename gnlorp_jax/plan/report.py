"""What the planner says: tables, sentences and JSON."""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.table

from gnlorp_jax.compose import command_line
from gnlorp_jax.disk import extras
from gnlorp_jax.plan.accelerators import (
  ACCELERATORS,
  RESERVED,
  Accelerator,
  compiler_is_installed,
)
from gnlorp_jax.plan.collectives import Collective
from gnlorp_jax.plan.count import Plan, compiled, lower_bound
from gnlorp_jax.plan.settings import Settings
from gnlorp_jax.plan.suggest import MOST_COMPILED, Suggestion, suggestions

LABELS = {
  'weights': 'weights',
  'frozen_weights': 'frozen weights',
  'moments': 'moments',
  'bases': 'bases',
  'errors': 'errors',
  'other': 'other state',
  'batch': 'batch',
  'saved_activations': 'saved activations',
  'gradients': 'gradients',
  'coreset': 'choosing the batch',
  'temporaries': 'temporaries',
  'attention_workspace': 'attention workspace (estimated)',
}
"""Components of a plan and what the table calls them."""
ON_TOP = (
  'activations inside a block, logits and what the optimizer computes come on '
  'top.'
)
HOW_TO_KNOW = (
  'For the exact figure install the CUDA wheels, for which no GPU is needed: '
  f'{extras.install("cuda")}'
)


def report(settings: Settings, args: list[str]) -> None:
  """Plans a run and its alternatives, and prints or writes what it finds.

  Args:
    settings: The run.
    args: The command line it came from, for the record.
  """
  console = open_console(settings)
  bound = lower_bound(settings)
  with quiet():  # The same program again has nothing new to warn of.
    plan = compiled(settings) if compiler_is_installed() else bound
    print_plan(console, settings, plan)
    found = []
    if plan.fits(ACCELERATORS[settings.device].usable) is False:
      if plan.xla is not None:
        console.print(
          f'\nTrying changes: up to {MOST_COMPILED} are compiled, each of '
          'which takes about as long as this plan did.'
        )
      found = suggestions(settings, plan, bound)
      print_suggestions(console, found)
  write(settings, as_json(settings, args, plan, found))


def open_console(settings: Settings) -> rich.console.Console:
  """Where tables go; silent where the JSON goes there."""
  return rich.console.Console(
    quiet=settings.json == '-', highlight=False, markup=False
  )


def write(settings: Settings, found: dict[str, Any]) -> None:
  """Writes what was found as JSON, where the settings ask for it."""
  text = json.dumps(found, indent=2) + '\n'
  if settings.json == '-':
    sys.stdout.write(text)
  elif settings.json is not None:
    command_line.write_at_place(settings.json, text)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences what building a program warns of."""
  loggers = [logging.getLogger(f'gnlorp_jax.{x}') for x in ('compose', 'optim')]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


def print_plan(
  console: rich.console.Console, settings: Settings, plan: Plan
) -> None:
  """Prints the components of a plan, its verdict and its communication."""
  device = ACCELERATORS[settings.device]
  console.print(f'{device.description}: {_mesh_text(plan)}')
  if settings.title:
    console.print(settings.title)
  table = rich.table.Table(box=rich.box.SIMPLE)
  table.add_column('on one device')
  table.add_column('GiB', justify='right')
  for name, size in plan.components.items():
    table.add_row(LABELS[name], gib(size))
  table.add_section()
  table.add_row('peak' if plan.xla else 'peak, at least', gib(plan.peak))
  table.add_row('memory', gib(device.memory))
  table.add_row('  of it for XLA, assumed', gib(device.usable))
  console.print(table)
  for sentence in _verdict(plan, device):
    console.print(sentence)
  if plan.collectives:
    _print_collectives(console, plan.collectives)


def _mesh_text(plan: Plan) -> str:
  data, fsdp = plan.mesh['data'], plan.mesh['fsdp']
  return f'{data * fsdp} in use, mesh data={data}, fsdp={fsdp}'


def _verdict(plan: Plan, device: Accelerator) -> Iterator[str]:
  """What the numbers mean, in sentences."""
  difference = gib(abs(device.usable - plan.peak))
  fits = plan.fits(device.usable)
  if fits:
    yield f'It fits, with {difference} GiB to spare.'
  elif fits is None:
    yield 'It may fit: the lower bound does.'
  else:
    yield f'It does not fit: {difference} GiB are missing.'
  if fits is not False and plan.peak > 0.75 * device.memory:
    yield (
      'JAX takes only 75 % of the memory unless told otherwise: set '
      f'XLA_PYTHON_CLIENT_MEM_FRACTION={device.fraction} in the environment.'
    )
  if plan.xla is None:
    yield f'This is a lower bound: {ON_TOP} {HOW_TO_KNOW}'


def _print_collectives(
  console: rich.console.Console, rows: list[Collective]
) -> None:
  """Bytes of each kind of collective, those that may not happen apart."""
  console.print('\nCommunication of a step, on one device')
  table = rich.table.Table(box=rich.box.SIMPLE)
  table.add_column('collective')
  table.add_column('where')
  table.add_column('times', justify='right')
  table.add_column('GiB', justify='right')
  for row in summed(rows):
    table.add_row(
      row.kind,
      _place(row),
      '?' if row.times is None else str(row.times),
      '?' if row.bytes is None else gib(row.bytes),
    )
  console.print(table)


class Communication(NamedTuple):
  """All collectives of a kind at places alike."""

  kind: str
  loops: tuple[int | None, ...]
  conditionals: int
  times: int | None  # None in a loop whose trip count XLA does not know.
  bytes: int | None  # Per step, every branch taken; None likewise.


def summed(rows: list[Collective]) -> list[Communication]:
  """Adds up collectives of all sizes, those of every step first."""
  groups: dict[tuple, list[Collective]] = {}
  for row in rows:
    key = row.kind, row.loops, row.conditionals
    groups.setdefault(key, []).append(row)
  found = []
  for (kind, loops, conditionals), members in groups.items():
    times = size = None
    if None not in loops:
      times = math.prod(loops) * sum(row.instructions for row in members)
      size = sum(row.bytes_per_step for row in members)
    found.append(Communication(kind, loops, conditionals, times, size))
  return sorted(found, key=lambda c: (None in c.loops, c.conditionals, c.kind))


def _place(row: Communication) -> str:
  """Where in the program, in words."""
  places = []
  if row.conditionals:
    places.append(
      'conditional' + f' x{row.conditionals}' * (row.conditionals > 1)
    )
  for trips in row.loops:
    places.append('loop of ' + ('?' if trips is None else str(trips)))
  return ', '.join(places) or 'once'


def print_suggestions(
  console: rich.console.Console, found: list[Suggestion]
) -> None:
  """Prints changes, what each saves, and whether it suffices."""
  console.print('\nWhat one change saves')
  table = rich.table.Table(box=rich.box.SIMPLE)
  table.add_column('option', no_wrap=True)
  table.add_column('saves GiB', justify='right')
  table.add_column('peak GiB', justify='right')
  table.add_column('fits')
  for row in found:
    table.add_row(
      row.options,
      '?' if row.saves is None else gib(row.saves),
      gib(row.peak) if row.compiled else f'>= {gib(row.peak)}',
      row.fits,
    )
  console.print(table)
  if any(row.fits in ('perhaps', 'unlikely') for row in found):
    console.print(
      'Where only the lower bound fits it says perhaps, or unlikely if the '
      'saving seems too small: plan with that option to know.'
    )
  none_suffices = all(row.fits == 'no' for row in found)
  console.print(
    'None of them suffices alone: combine some.'
    if none_suffices
    else 'Changes may be combined.'
  )


def as_json(
  settings: Settings,
  args: list[str],
  plan: Plan,
  found: list[Suggestion],
) -> dict[str, Any]:
  """Everything that was found out, in a form `json` writes; sizes in bytes."""
  device = ACCELERATORS[settings.device]
  return {
    'arguments': args,
    'device': {
      'name': settings.device,
      **device._asdict(),
      'reserved': RESERVED,
      'usable': device.usable,
    },
    'mesh': plan.mesh,
    'compiled': plan.xla is not None,
    'components': plan.components,
    'peak': plan.peak,
    'peak_is_lower_bound': plan.xla is None,
    'fits': plan.fits(device.usable),
    'xla': plan.xla,
    'collectives': plan.collectives
    and [
      {**row._asdict(), 'bytes_per_step': row.bytes_per_step}
      for row in plan.collectives
    ],
    'suggestions': [row._asdict() for row in found],
    'config': dataclasses.asdict(settings),
    'versions': versions(),
  }


def versions() -> dict[str, str | None]:
  """Versions of the packages that decide the numbers; None if absent."""
  found: dict[str, str | None] = {}
  for name in ('gnlorp_jax', 'jax', 'jaxlib', 'jax-cuda12-plugin'):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def gib(size: int) -> str:
  """Bytes in GiB, to the MiB."""
  return f'{size / 2**30:.3f}'
