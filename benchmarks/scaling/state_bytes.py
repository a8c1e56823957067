"""Counts the optimizer-state bytes of LLaMA-7B, from shapes alone.

  python -m benchmarks.state_bytes

takes some minutes and allocates nothing. A cell of the table has the bytes
(1 GB is 10^9) and what they save of Adam's with both moments of all parameters
in bfloat16: 4 bytes a parameter, 26.95 GB. Settings that a method refuses are
listed with the reason. In bold: 8-bit GradNormLoRP where it saves at least the
89.5 % that its paper claims (the abstract names no baseline, so this is the
same number, not a repetition of the claim).
"""

import functools
import itertools
import math
import pathlib
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import optax

from benchmarks import report
from benchmarks.common import cases, harness, methods
from benchmarks.common.tables import markdown
from gnlorp_jax.models import llama
from gnlorp_jax.optim import inspect

RESULTS = pathlib.Path('benchmarks/results/state_bytes.json')
PAGE = pathlib.Path('docs/results/scaling.md')
PART, MODEL = 'settings', '7b'
PAPER_SAVING = 0.895  # arXiv 2412.19616, abstract.
RANKS = (256, 512, 1024)
REASON = 60  # Letters of why a setting is refused.
OWN = 'of its own'  # The rank of a method without the option.
OPTIONS: dict[str, tuple[Any, ...]] = {
  'side': ('short', 'both'),
  'moment_bits': (32, 8, 4),
  'basis_bits': (32, 16, 8, 4),
}
# Embedding and head: as the aliases do by default, or projected as all else.
LABELS = {'full': None, 'projected': [('norm', 'full'), ('.*', 'low_rank')]}
# The settings of other methods on the page: 8-bit moments beside bases of 32
# bits, and what is not so by default.
DEFAULTS = {'q_galore': (8, 4), 'galore_adafactor': (32, 32)}


@functools.cache
def shapes_of(size: str) -> Any:
  """Shapes of a LLaMA's parameters, bfloat16."""
  model = llama.make(llama.preset(size, param_dtype='bfloat16'))
  return jax.eval_shape(model.init, jax.random.key(0))


def count_parameters(shapes: Any) -> int:
  """Elements of all arrays."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def count(tx: optax.GradientTransformation, shapes: Any) -> int:
  """Bytes of an optimizer's state; nothing is allocated."""
  return inspect.tree_bytes(jax.eval_shape(tx.init, shapes))


def baseline(shapes: Any) -> int:
  """Bytes of two bfloat16 moments of all parameters."""
  return 4 * count_parameters(shapes)


def row(alias: str, setting: cases.Row, shapes: Any) -> cases.Row:
  """The bytes of one method in one setting, by rank; raises AbsentError."""
  variant = {k: setting[k] for k in OPTIONS if setting[k] is not None}
  labels = LABELS[setting['embeddings']]
  common = {'learning_rate': 1.0, 'param_labels': labels}
  found = {}
  for rank in RANKS if 'rank' in methods.options_of(alias) else (None,):
    try:
      tx = methods.build(alias, variant, rank=rank, **common)
      found[str(rank or OWN)] = count(tx, shapes)
    except (methods.AbsentError, ValueError) as error:
      reason = str(error.__cause__ or error)
      short = textwrap.shorten(reason, REASON, placeholder=' ...')
      raise methods.AbsentError(short) from error
  return {'bytes': found}


def all_cases(aliases: Iterable[str], shapes: Any) -> Iterator[cases.Case]:
  """Every setting of every method; None where it has no such option."""
  for alias in aliases:
    known = methods.options_of(alias)
    choices = {k: v if k in known else (None,) for k, v in OPTIONS.items()}
    embeddings = tuple(LABELS) if 'kernel_axes' in known else ('full',)
    choices = {'embeddings': embeddings, **choices}
    for values in itertools.product(*choices.values()):
      setting = dict(zip(choices, values, strict=True))
      take = functools.partial(row, alias, setting, shapes)
      yield cases.Case({'method': alias, **setting}, take)


def table(rows: list[cases.Row], baseline_bytes: int) -> str:
  """The rows as a Markdown table, ranks side by side."""

  def size(known: cases.Row, rank: str) -> str:
    if rank not in known['bytes']:
      return ''
    saving = 1 - known['bytes'][rank] / baseline_bytes
    kind = known['method'], known['moment_bits']
    reaches_paper = kind == ('gradnormlorp', 8) and saving >= PAPER_SAVING
    bold = '**' * reaches_paper
    return f'{bold}{known["bytes"][rank] / 1e9:.2f} GB, {saving:.1%}{bold}'

  ranks = (*map(str, RANKS), OWN)
  heads = ['method', 'embedding, head', 'side', 'moment bits', 'basis bits']
  lines = []
  for known in rows:
    if 'absent' not in known:
      values = [known[key] for key in ('method', 'embeddings', *OPTIONS)]
      names = ['-' if value is None else str(value) for value in values]
      lines.append([*names, *(size(known, rank) for rank in ranks)])
  return markdown([*heads, *(f'rank {rank}' for rank in ranks)], lines)


def _is_default(known: cases.Row) -> bool:
  """Whether a row of another method is on the page."""
  bits = known['moment_bits'], known['basis_bits'] or 32
  wanted = DEFAULTS.get(known['method'], (8, 32))
  return known['side'] != 'both' and bits == wanted


def tables() -> dict[str, str]:
  """The tables of the page: embedding and head full-rank."""
  part = cases.load(RESULTS)[PART]
  full = [known for known in part['rows'] if known['embeddings'] == 'full']
  ours = [known for known in full if known['method'] == 'gradnormlorp']
  others = [k for k in full if k not in ours and _is_default(k)]
  return {
    'state of 7b, settings': table(ours, part['baseline_bytes']),
    'state of 7b, methods': table(others, part['baseline_bytes']),
  }


def main() -> None:
  """Counts, and writes the JSON file and the table."""
  parser = harness.parser(__doc__)
  harness.add_arguments(parser, RESULTS, has_device=False)
  args = parser.parse_args()
  if args.report:
    report.report('scaling.state_bytes')
    return
  jax.config.update('jax_platforms', 'cpu')
  shapes = shapes_of(MODEL)
  found = cases.measure(
    *(PART, all_cases(methods.ALIASES, shapes), args.output),
    harness.Clock(math.inf),
    **{'model': MODEL, 'baseline_bytes': baseline(shapes)},
  )
  rows = found[PART]['rows']
  sys.stdout.write(table(rows, baseline(shapes)) + '\n' + cases.absent(rows))


if __name__ == '__main__':
  main()
