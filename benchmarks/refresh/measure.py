r"""What refreshing a subspace costs, captures, and does to a loss.

  python -m benchmarks.refresh save energy loss --size 9m 60m --gap 50 10 \
    --data.source 'wikipedia_en/*train.00000*'
  python -m benchmarks.refresh time --minutes 4

Each part replaces its own rows in the JSON file:

save    trains small LLaMAs with `galore` and keeps gradients for the next part
energy  of each of them, and of synthetic ones of large models: the share that a
        basis captures of what its rank can (median, [the lowest]), and its
        overlap with the exact subspace (mean squared canonical correlation)
time    seconds of one refresh, in turns: the median, and the median ratio to
        `exact` in the same round [quartiles]. Wants a quiet machine
loss    the evaluation loss of the first size with `gradnormlorp`

A basis is fitted by `exact`, a full SVD; `eigh`, of the Gram matrix; `power`,
one block power iteration, `first` from a random start, `warm` from the basis of
a gap before; `dct` or `random` directions. `stale` is the exact one of a gap
before, not refreshed.
"""

import argparse
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator

from benchmarks import report
from benchmarks.common import cases, harness
from benchmarks.common.cases import Case
from benchmarks.common.plots import save
from benchmarks.refresh import fits, picture, runs
from benchmarks.refresh import tables as refresh_tables
from gnlorp_jax.models import llama

RESULTS = pathlib.Path('benchmarks/results/refresh.json')
PAGE = pathlib.Path('docs/results/refresh.md')
PLOT = pathlib.Path('docs/results/refresh.png')
SEEDS = 2


def save_cases(args: argparse.Namespace) -> Iterator[Case]:
  """A run of each size."""
  for size, gap in zip(args.size, args.gap, strict=True):
    path = args.gradients / f'{size}.npz'
    take = functools.partial(runs.save_row, size, gap, args.source, path)
    yield Case({'size': size, 'gap': gap}, take, clock='share')


def loss_cases(args: argparse.Namespace) -> Iterator[Case]:
  """Every way of refreshing, seed after seed."""
  size, *_ = args.size
  ways = runs.variants(llama.preset(size).hidden_size)
  for seed, way in itertools.product(range(SEEDS), ways):
    take = functools.partial(runs.loss_row, size, args.source, seed, ways[way])
    yield Case({'way': way, 'seed': seed}, take)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {
  'save': save_cases,
  'energy': fits.energy_cases,
  'time': fits.time_cases,
  'loss': loss_cases,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = harness.parser(__doc__)
  harness.add_arguments(parser, RESULTS, minutes=40, plot=PLOT)
  cases.add_parts(parser, PARTS)
  add = parser.add_argument
  folder = pathlib.Path('runs/refresh')
  add('--gradients', type=pathlib.Path, default=folder, help='their folder')
  add('--data.source', dest='source', default='stdlib', help='a text')
  sizes = 'presets to save gradients of; `loss` trains the first (9m)'
  add('--size', nargs='+', choices=llama.PRESETS, default=['9m'], help=sizes)
  gaps = 'steps between saved gradients, for all sizes or for each (50)'
  add('--gap', nargs='+', type=int, default=[50], help=gaps)
  args = parser.parse_args(arguments)
  if len(args.gap) == 1:
    args.gap *= len(args.size)
  if len(args.gap) != len(args.size):
    parser.error(
      f'--gap has {len(args.gap)} values for {len(args.size)} sizes: give one '
      'for all, or one for each.'
    )
  if min(args.gap) < 1:
    parser.error(f'--gap {min(args.gap)} must be at least 1.')
  return args


def options(args: argparse.Namespace) -> cases.Row:
  """What decides the figures; of paths their last part."""
  return {
    'source': ','.join(pathlib.Path(s).name for s in args.source.split(',')),
    **{'tokenizer': 'bpe', 'size': args.size, 'gap': args.gap},
    **{'steps': runs.STEPS, 'seeds': SEEDS},
    **{'learning_rate': runs.RATE, 'batch_size': runs.BATCH_SIZE},
    **{'eval_batches': runs.EVAL_BATCHES, 'rounds': fits.MOST_ROUNDS},
    **{'loss_rank': runs.RANK, 'loss_gap': runs.GAP},
  }


def tables() -> dict[str, str]:
  """The tables of the page, from the recorded file."""
  return refresh_tables.tables(cases.load(RESULTS))


def plots() -> None:
  """Draws the picture of the recorded file."""
  save(picture.draw(cases.load(RESULTS)), PLOT)


def main(arguments: list[str] | None = None) -> None:
  """Measures the parts asked for, and writes JSON file, tables and plot."""
  args = parse(arguments)
  if args.report:
    report.report('refresh.measure')
    return
  clock = harness.start(args)
  found: cases.Record = {}
  asked = [part for part in PARTS if part in (args.names or PARTS)]
  for number, part in enumerate(asked):
    share = clock.share(len(asked) - number)
    found = cases.measure(
      *(part, PARTS[part](args), args.output, share), options=options(args)
    )
  tables = refresh_tables.tables(found)
  for part in found:
    sys.stdout.write(f'{tables[part]}\n' if part in tables else '')
    sys.stdout.write(refresh_tables.absent(found[part]['rows']))
  save(picture.draw(found), args.plot)


if __name__ == '__main__':
  main()
