r"""What refreshing a subspace costs, captures, and does to a loss.

Every few hundred steps a projected kernel gets a new basis of rank r, fitted to
the gradient at hand. The ways to fit one are compared, each by the library's
own function, jitted, one matrix at a time:

  exact    a full SVD
  eigh     eigenvectors of the smaller Gram matrix
  power    one block power iteration: `first` from the random start, `warm` from
           the basis of the gradient one gap before, as refreshes are in a run
  dct      columns of the cosine transform with the largest norms
  random   random directions; only a new seed is drawn
  stale    no refresh: the exact basis of the gradient one gap before

There are four parts; each replaces its own rows in the JSON file.

  save     trains a small LLaMA with `galore` and keeps the gradients that its
           refreshes would see, of the first, a middle and the last layer, at
           the first step and three times a gap later, for the next part
  energy   for each saved gradient, and synthetic ones of large models: how much
           of it a basis captures, relative to the best that the rank allows
           (median, [the lowest]), and its overlap with the exact subspace (mean
           squared canonical correlation)
  time     seconds of one refresh, after compilation, in turns: the median, and
           the median ratio to `exact` in the same round [its quartiles]: below
           1 is faster. `dct` and `random` store no basis: what they leave
           undone here, every step does. Wants a quiet machine
  loss     the first size with `gradnormlorp` and each way of refreshing, all
           else equal: the evaluation loss at the end

  python -m benchmarks.refresh save energy loss --size 9m 60m --gap 50 10 \
    --data.source 'wikipedia_en/*train.00000*'
  python -m benchmarks.refresh time --minutes 4
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
GRADIENTS = pathlib.Path('runs/refresh')

NUMBERS: dict[str, tuple[int, str]] = {
  'steps': (150, 'of a run of `loss`'),
  'seeds': (2, 'of `loss`'),
  'eval-batches': (40, 'of `loss`'),
  'batch-size': (8, 'sequences of 128 tokens'),
  'rounds': (9, 'turns of `time`'),
}
"""Options that are a number: their default, and what they are."""


def save_cases(args: argparse.Namespace) -> Iterator[Case]:
  """A run of each size."""
  for size, gap in zip(args.size, args.gap, strict=True):
    take = functools.partial(runs.save_row, args, size, gap)
    yield Case({'size': size, 'gap': gap}, take, clock='share')


def loss_cases(args: argparse.Namespace) -> Iterator[Case]:
  """Every way of refreshing, seed after seed."""
  ways = runs.variants(llama.preset(args.size[0]).hidden_size)
  for seed, way in itertools.product(range(args.seeds), ways):
    take = functools.partial(runs.loss_row, args, seed, ways[way])
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
  add = parser.add_argument
  cases.add_parts(parser, PARTS)
  add('--gradients', type=pathlib.Path, default=GRADIENTS, help='their folder')
  add('--data.source', dest='source', default='stdlib', help='a text')
  tokenizer = 'of `save`: as of train_lm.py, or bpe with a vocabulary of 4096'
  add('--data.tokenizer', dest='tokenizer', default='bpe', help=tokenizer)
  sizes = 'presets to save gradients of; `loss` trains the first (9m)'
  add('--size', nargs='+', choices=llama.PRESETS, default=['9m'], help=sizes)
  gaps = 'steps between saved gradients, for all sizes or for each (50)'
  add('--gap', nargs='+', type=int, default=[50], help=gaps)
  for name, (default, what) in NUMBERS.items():
    add(f'--{name}', type=int, default=default, help=f'{what} (%(default)s)')
  add('--learning-rate', type=float, default=5e-3, help='peak (%(default)s)')
  args = parser.parse_args(arguments)
  if len(args.gap) == 1:
    args.gap *= len(args.size)
  if len(args.gap) != len(args.size):
    parser.error(
      f'--gap has {len(args.gap)} values for {len(args.size)} sizes: give one '
      'for all, or one for each.'
    )
  counts = {name: getattr(args, name.replace('-', '_')) for name in NUMBERS}
  for name, value in {**counts, 'gap': min(args.gap)}.items():
    if value < 1:
      parser.error(f'--{name} {value} must be at least 1.')
  return args


def options(args: argparse.Namespace) -> cases.Row:
  """What of the command line decides the figures; of paths their last part."""
  names = ('size', 'gap', 'steps', 'seeds', 'learning_rate', 'batch_size')
  return {
    'source': ','.join(pathlib.Path(s).name for s in args.source.split(',')),
    'tokenizer': pathlib.Path(args.tokenizer).name,
    **{name: getattr(args, name) for name in names},
    **{'eval_batches': args.eval_batches, 'rounds': args.rounds},
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
  for part, table in refresh_tables.tables(found).items():
    sys.stdout.write(f'{table}\n{refresh_tables.absent(part, found)}')
  save(picture.draw(found), args.plot)


if __name__ == '__main__':
  main()
