"""What a merge shows, and leaves behind."""

import json
import pathlib
import re
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.measure
import rich.table
import rich.text

NAME = 'merge.json'
HEADS = (
  *('tensors', 'count', 'shape', 'from', 'why'),
  *('change / base', 'merged / base'),
)


def write(folder: pathlib.Path, found: dict[str, Any]) -> None:
  """Writes what was done as JSON, and a model card.

  Args:
    folder: The merged folder.
    found: What `recipe.merge` returns.
  """
  text = json.dumps(found, indent=1, allow_nan=False) + '\n'
  (folder / NAME).write_text(text, encoding='utf-8')
  (folder / 'README.md').write_text(card(found), encoding='utf-8')


def show(
  found: dict[str, Any], console: rich.console.Console | None = None
) -> None:
  """Prints what was, or would be, done: tensors of all layers in one row.

  Args:
    found: What `recipe.merge` returned.
    console: Where to; None is the terminal.
  """
  console = console or rich.console.Console()
  for line in _lines(found):
    console.print(line, markup=False, highlight=False, soft_wrap=True)
  table = rich.table.Table(
    box=rich.box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    collapse_padding=True,
  )
  for number, name in enumerate(HEADS):
    table.add_column(
      name, no_wrap=True, justify='right' if number in (1, 5, 6) else 'left'
    )
  for row in rows(found):
    table.add_row(*map(rich.text.Text, row))
  # On a terminal that is too narrow its lines run on: nothing is cut.
  endless = console.options.update(max_width=10_000)
  table.width = rich.measure.Measurement.get(console, endless, table).maximum
  console.print()
  console.print(table, crop=False)
  if 'seconds' not in found:
    size = found['peak_bytes'] / 2**20
    console.print(
      f'\nNothing was written. Merging holds about {size:.0f} MiB of one '
      'tensor at a time, beside Python and jax.',
      highlight=False,
    )
    return
  console.print(
    f'\nWritten to {found["out"]} in {found["seconds"]:.0f} s. '
    f'{NAME} there tells of every tensor.',
    highlight=False,
    soft_wrap=True,
  )


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
  """The table: a row for the tensors of all layers that fared alike."""
  groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
  for row in found['tensors']:
    why = row['why']
    if row.get('result', 'merged') not in ('merged', 'averaged'):
      why = row['result']
    shape = ' x '.join(map(str, row['shape'])) or 'scalar'
    name = re.sub(r'\.\d+\.', '.*.', row['name'])
    groups.setdefault((name, shape, row['action'], why), []).append(row)
  return [
    (name, str(len(group)), shape, action, why, *_lengths(group))
    for (name, shape, action, why), group in groups.items()
  ]


def card(found: dict[str, Any]) -> str:
  """The README.md of a merged folder."""
  names = [expert['folder'] for expert in found['experts']]
  table = '\n'.join(
    '| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |'
    for row in rows(found)
  )
  lines = '\n'.join(f'* {line}' for line in _lines(found))
  return f"""---
base_model: {json.dumps([found['base'], *names])}
tags: [merge]
---

# A merge of {len(names)} models

Made by `python -m gnlorp_jax.merge`, tensor by tensor, in float32.

{lines}

| {' | '.join(HEADS)} |
|{'---|' * len(HEADS)}
{table}

change / base: the mean length of what the experts changed in a tensor, over
that of the base's tensor. merged / base: that of what was added to it. Means
over the tensors of a row. `{NAME}` has each tensor and all settings.

Nobody has evaluated this model unless it says so here.
"""


def _lines(found: dict[str, Any]) -> list[str]:
  """The base, the experts, and how they were merged."""
  experts = [
    f'Expert {e["label"]}: {e["folder"]} ({e["kind"]}), weight {e["weight"]:g}'
    for e in found['experts']
  ]
  return [
    f'Base: {found["base"]}',
    *experts,
    _method(found),
    *_undropped(found),
  ]


def _undropped(found: dict[str, Any]) -> list[str]:
  """The experts of whom all that changed is more than what is to be kept."""
  thresholds = found.get('thresholds')
  if thresholds is None:
    return []
  return [
    f'keep {keep:g} drops nothing of {expert["label"]}: fewer of its entries '
    'changed at all'
    for expert, keep, threshold in zip(
      found['experts'], found['options']['keep'], thresholds, strict=True
    )
    if threshold == 0 and keep < 100
  ]


def _method(found: dict[str, Any]) -> str:
  """The method with the options that it read."""
  method, options = found['method'], found['options']
  read = {
    'average': ('weights divided by their sum',),
    'ties': ('scale', 'keep'),
    'dare': ('scale', 'keep', 'seed'),
    'doge': (
      *('keep', 'subspace', 'steps', 'rate', 'solver', 'inner', 'project'),
    ),
  }.get(method, ('scale',))
  parts = [
    f'{name} {_text(options[name])}' if name in options else name
    for name in read
  ]
  if method == 'doge':
    eta = f'eta {_text(options["eta"])}'
    if options['eta'] == 'auto':
      eta += f' (scale {options["scale"]:g})'
    if 'eta' in found:
      eta += f' = {found["eta"]:.4g}'
    parts.insert(0, eta)
  return f'Method {method}: {", ".join(parts)}'


def _text(value: Any) -> str:
  if isinstance(value, tuple | list):
    return ' '.join(f'{number:g}' for number in value)
  return str(value)


def _lengths(group: list[dict[str, Any]]) -> tuple[str, str]:
  """Mean lengths of the changes and of the update, over the base's."""
  measured = [row for row in group if row.get('base_norm')]
  if not measured:
    return '', ''
  update = [row['update_norm'] / row['base_norm'] for row in measured]
  change = [
    np.mean(row['tau_norms']) / row['base_norm']
    for row in measured
    if 'tau_norms' in row
  ]
  return f'{np.mean(change):.2g}' if change else '', f'{np.mean(update):.2g}'
