"""Counts the optimizer-state bytes of LLaMA-7B, from shapes alone.

Nothing is allocated: `jax.eval_shape` runs each optimizer's init on the shapes
of the weights (bfloat16), and every array of the state counts with its bytes.
The yardstick is Adam with both moments of all parameters in bfloat16: 4 bytes a
parameter, 26.95 GB (1 GB is 10^9 bytes).

  python -m benchmarks.state_bytes
  python -m benchmarks.state_bytes --methods gradnormlorp galore

takes some minutes. An option that a method lacks is left out of its rows, and
one that it refuses drops the row; the JSON file lists these with the reason.
In bold: 8-bit GradNormLoRP where it saves at least the 89.5 % that its paper
claims (the abstract names no baseline, so this is the same number, not a
repetition of the claim).
"""

import argparse
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import optax

from benchmarks.common import methods, record
from gnlorp_jax.models import llama
from gnlorp_jax.optim import inspect

RESULTS = pathlib.Path('benchmarks/results/state_bytes.json')
PAPER_SAVING = 0.895  # arXiv 2412.19616, abstract.
RANKS = (256, 512, 1024)
OPTIONS: dict[str, tuple[Any, ...]] = {
  'side': ('short', 'both'),
  'moment_bits': (32, 8, 4),
  'basis_bits': (32, 16, 8, 4),
}
# Embedding and head: as the aliases do by default, or projected as all else.
LABELS = {'full': None, 'projected': [('norm', 'full'), ('.*', 'low_rank')]}


def shapes_of(size: str) -> Any:
  """Shapes of a LLaMA's parameters, bfloat16."""
  model = llama.make(llama.preset(size, param_dtype='bfloat16'))
  return jax.eval_shape(model.init, jax.random.key(0))


def count(tx: optax.GradientTransformation, shapes: Any) -> dict[str, int]:
  """Bytes of a state by component, see `inspect.state_bytes`."""
  return inspect.state_bytes(jax.eval_shape(tx.init, shapes))


def settings(alias: str) -> Iterator[dict[str, Any]]:
  """All combinations of the options that `alias` has.

  Yields:
    Settings with the keys embeddings, rank, side, moment_bits and basis_bits;
    None where the alias has no such option.
  """
  known = methods.options_of(alias)
  projects = 'kernel_axes' in known
  choices = {
    'embeddings': tuple(LABELS) if projects else ('full',),
    **{k: v if k in known else (None,) for k, v in OPTIONS.items()},
    'rank': RANKS if 'rank' in known else (None,),
  }
  for values in itertools.product(*choices.values()):
    yield dict(zip(choices, values, strict=True))


def row(alias: str, setting: dict[str, Any], shapes: Any) -> dict[str, Any]:
  """One method in one setting, counted.

  Raises:
    AbsentError: If the method refuses the setting.
  """
  variant = {k: setting[k] for k in OPTIONS if setting[k] is not None}
  common = {} if setting['rank'] is None else {'rank': setting['rank']}
  tx = methods.build(
    alias,
    variant,
    learning_rate=1.0,
    param_labels=LABELS[setting['embeddings']],
    **common,
  )
  try:
    parts = count(tx, shapes)
  except ValueError as error:  # It does not fit these shapes.
    raise methods.AbsentError(f'{alias} refuses {variant}: {error}') from error
  total = sum(parts.values())
  saving = 1 - total / baseline(shapes)
  is_paper = alias == 'gradnormlorp' and setting['moment_bits'] == 8
  return {
    'method': alias,
    **setting,
    'bytes': total,
    **{f'{part}_bytes': size for part, size in parts.items()},
    'saving': saving,
    # Only where the paper speaks of it.
    'reaches_paper': saving >= PAPER_SAVING if is_paper else None,
  }


def baseline(shapes: Any) -> int:
  """Bytes of two bfloat16 moments of all parameters."""
  return 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))


def benchmark(
  aliases: list[str],
  shapes: Any,
  save: Callable[[list[dict[str, Any]], list[dict[str, Any]]], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Counts every setting of every method.

  Args:
    aliases: Keys of `methods.ALIASES`.
    shapes: Shapes of the parameters.
    save: Called with all rows and all absent settings after each one.

  Returns:
    The rows, and the settings that do not exist with the reasons.
  """
  rows: list[dict[str, Any]] = []
  absent: list[dict[str, Any]] = []
  for alias in aliases:
    try:
      found = list(settings(alias))
    except methods.AbsentError as error:
      absent.append({'method': alias, 'reason': str(error)})
      found = []
    for setting in found:
      try:
        rows.append(row(alias, setting, shapes))
      except methods.AbsentError as error:
        absent.append({'method': alias, **setting, 'reason': str(error)})
      save(rows, absent)
    sys.stderr.write(f'{alias}: {len(found)} settings\n')
    sys.stderr.flush()
  return rows, absent


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table, ranks side by side."""
  keys = ('method', 'embeddings', *OPTIONS)
  lines: dict[tuple[Any, ...], dict[Any, str]] = {}
  for known in rows:
    cell = f'{known["bytes"] / 1e9:.2f} GB, {known["saving"]:.1%}'
    bold = '**' if known['reaches_paper'] else ''
    line = lines.setdefault(tuple(known[key] for key in keys), {})
    line[known['rank']] = bold + cell + bold
  heads = [
    *('method', 'embedding, head', 'side', 'moment bits', 'basis bits'),
    *(f'rank {rank}' for rank in RANKS),
    'without rank',
  ]
  text = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
  for names, cells in lines.items():
    shown = ['-' if name is None else str(name) for name in names]
    shown += [cells.get(rank, '') for rank in (*RANKS, None)]
    text.append('| ' + ' | '.join(shown) + ' |')
  return '\n'.join(text) + '\n'


def main() -> None:
  """Counts, and writes the JSON file and the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    '--methods',
    nargs='+',
    choices=tuple(methods.ALIASES),
    default=list(methods.ALIASES),
    help='names of gnlorp_jax.optim (default: all)',
  )
  add(
    '--model',
    choices=tuple(llama.PRESETS),
    default='7b',
    help='size of the LLaMA (default: %(default)s)',
  )
  add(
    '--output',
    type=pathlib.Path,
    default=RESULTS,
    help='JSON file, written after every row (default: %(default)s)',
  )
  args = parser.parse_args()
  shapes = shapes_of(args.model)
  header = {
    'commit': record.commit(),
    'model': args.model,
    'baseline_bytes': baseline(shapes),
    'paper_saving': PAPER_SAVING,
  }

  def save(rows: list[dict[str, Any]], absent: list[dict[str, Any]]) -> None:
    found = {**header, 'rows': rows, 'absent': absent}
    record.write(args.output, found)

  rows, absent = benchmark(args.methods, shapes, save)
  save(rows, absent)
  sys.stdout.write(
    f'LLaMA-{args.model}; BF16 Adam: {baseline(shapes) / 1e9:.2f} GB. Each '
    'cell: bytes of the state and what they save of that.\n\n' + table(rows)
  )


if __name__ == '__main__':
  main()
