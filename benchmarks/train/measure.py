"""Whole training steps beside PyTorch's: speed, memory, compilation.

  python -m benchmarks.train --sizes 20m --minutes 15 --output runs/train.json
  python -m benchmarks.train --device gpu --dtype bfloat16 --sizes 60m 130m 350m

Each size of LLaMA is trained by this package and by transformers' PyTorch model
with the optimizers of other packages: same architecture, same batches, and up
to 100M parameters the same weights. All take turns of a few steps, until every
method has made as many counted steps as lie between two refreshes (--gap), or
the size's share of --minutes is used up.

  tokens/s    of the mean counted step, refreshes included
  / PEER      the same as a ratio to that peer's: above 1 ours is faster. In
              brackets the quartiles over the rounds of the ratio of medians
  interval    counted steps, in refresh intervals
  worst       the slowest step, in medians of its turn
  state       bytes of the optimizer's state
  peak        what the compiled step has at most, state included; for PyTorch
              what it had allocated in two steps, on a GPU
  compile     tracing and compiling, seconds
  MFU         model FLOPs over the dense bfloat16 peak of the GPU, where that is
              known and all weights are trained

What is not alike: ours computes the norms that it reports and leaves out steps
that are not finite; PyTorch runs eagerly, and has all logits at once where ours
has --loss-chunk tokens'. In bfloat16 our moments are float32 and PyTorch's
bfloat16. PEFT's LoRA and DoRA train their adapters alone, which is less work.
On a CPU the bare products of a float32 step are timed as well, see products.py.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import report
from benchmarks.common import harness, peers, record, turns
from benchmarks.common.plots import Bars, bars
from benchmarks.common.tables import MB, median_in_quartiles, number, of_columns
from benchmarks.common.turns import Row
from benchmarks.train import products
from benchmarks.train.train_sides import BATCHES, METHODS, RATE, Case
from gnlorp_jax.models import llama
from gnlorp_jax.training import hardware

RESULTS = pathlib.Path('benchmarks/results/train.json')
# What the page shows beside it.
SMALL, LARGE = (RESULTS.with_name(f'train_{x}.json') for x in ('small', '60m'))
PAGE = pathlib.Path('docs/results/train.md')
PLOT = pathlib.Path('docs/results/train.png')
PEERS = ('galore-torch', 'torch-adamw', 'torch-adamw-fused', 'adamw')
OURS = ('gradnormlorp', 'galore', 'adamw')  # What a regression check sees.


def _speed_per(racer: turns.Racer, other: turns.Racer) -> Row:
  """A method's speed in that of another one, in the rounds both have made."""
  common = min(len(racer.turns), len(other.turns))
  seconds, others = (
    np.concatenate([turn.seconds for turn in r.turns[:common]])
    for r in (racer, other)
  )
  return {
    'mean': float(others.mean() / seconds.mean()),
    'quartiles': turns.ratio_quartiles(other.turns, racer.turns),
  }


def row(racer: turns.Racer, racers: list[turns.Racer], case: Case) -> Row:
  """What is known of a method by now, with ratios to the peers."""
  known = turns.known(racer) | {'loss': racer.method.loss}
  if not racer.turns:
    return known
  seconds = np.concatenate([turn.seconds for turn in racer.turns])
  relative = [t.seconds / np.median(t.seconds) for t in racer.turns]
  mean = float(seconds.mean())
  peak = hardware.PEAK_FLOPS.get(jax.devices()[0].device_kind)
  flops = llama.flops_per_token(case.config, case.seq_len) * case.tokens
  partial = racer.name.startswith('peft')  # It trains adapters alone.
  timed = {other.name: other for other in racers if other.turns}
  return known | {
    'tokens_per_second': case.tokens / mean,
    **{'mean_s': mean, 'median_s': float(np.median(seconds))},
    'worst_per_median': float(np.concatenate(relative).max()),
    **{'steps': len(seconds), 'intervals': len(seconds) / case.setting.gap},
    'mfu': None if peak is None or partial else flops / mean / peak,
    'speed_per': {
      name: _speed_per(racer, timed[name]) for name in PEERS if name in timed
    },
  }


def _title(entry: Row) -> str:
  return f'{entry["size"]}, {entry["batch_size"]} x {entry["seq_len"]}'


def _ours(found: Row) -> dict[str, Row]:
  """Rows that a regression check compares; only the same with the same."""
  named = {}
  for case in found['cases']:
    title = (
      f'train {case["size"]} {case["dtype"]} {case["batch_size"]} x '
      f'{case["seq_len"]}, T={case["gap"]}, chunk {case["loss_chunk"]}'
    )
    rows = {row['method']: row for row in case['rows']}
    named |= {f'{title}: {name}': rows[name] for name in OURS if name in rows}
  return named


def ratios(found: Row) -> dict[str, tuple[float, float, float]]:
  """What a regression check compares: larger is better for this package.

  These are quartiles of the speed of each of `OURS` in that of each of `PEERS`,
  by a name. The medians of rounds leave out most refreshes.
  """
  return {
    f'{name} / {peer}': tuple(ratio['quartiles'])
    for name, known in _ours(found).items()
    for peer, ratio in known.get('speed_per', {}).items()
    if peer != known['method']
  }


def sizes(found: Row) -> dict[str, int]:
  """Bytes that a regression check compares: of state and compiled step."""
  return {
    f'{name}, {key}': known[key]
    for name, known in _ours(found).items()
    for key in ('state_bytes', 'peak_bytes')
    if known.get(key) is not None
  }


def _ratio(peer: str, known: Row) -> str:
  found = known['speed_per'].get(peer)
  if found is None or peer == known['method']:
    return number(None, '')
  low, _, high = found['quartiles']
  return median_in_quartiles((low, found['mean'], high))


COLUMNS: dict[str, Callable[[Row], str]] = {
  'method': lambda known: known['method'],
  'tokens/s': lambda known: f'{known["tokens_per_second"]:.0f}',
  **{f'/ {peer}': functools.partial(_ratio, peer) for peer in PEERS},
  'interval': lambda known: f'{known["intervals"]:.2f}',
  'worst': lambda known: f'{known["worst_per_median"]:.2f}',
  'state, MB': lambda known: number(known['state_bytes'], '.1f', MB),
  'peak, MB': lambda known: number(known['peak_bytes'], '.0f', MB),
  'compile, s': lambda known: number(known['compile_s'], '.1f'),
  'MFU': lambda known: number(known['mfu'], '.1%'),
}


def table(entry: Row) -> str:
  """The rows of a size as a Markdown table, and its products below."""
  timed = [known for known in entry['rows'] if 'mean_s' in known]
  text = of_columns(timed, COLUMNS) + turns.not_timed(entry['rows'])
  bare = [
    f'{name} {total["seconds"]:.3f} s per step ({total["gflops"]:.0f} GFLOP/s)'
    for key, name in (('xla', 'XLA'), ('torch', 'PyTorch'))
    if (total := entry.get('products', {}).get(key))
  ]
  return text + (f'\nBare products: {", ".join(bare)}.\n' if bare else '')


def tables() -> dict[str, str]:
  """The tables of `PAGE`, from the recorded files."""
  records = map(record.read, (RESULTS, SMALL, LARGE))
  entries = [entry for found in records for entry in found['cases']]
  return {_title(entry): table(entry) for entry in entries}


def plot(cases: list[Row], path: pathlib.Path) -> None:
  """Speed of each method in that of galore-torch, or of the first method."""
  panels = []
  for entry in cases:
    seconds = {r['method']: r['mean_s'] for r in entry['rows'] if 'mean_s' in r}
    base = next((name for name in (*PEERS, *seconds) if name in seconds), None)
    if base is None:
      continue
    is_theirs = {n: n in peers.TORCH or n.startswith('peft') for n in seconds}
    panels.append(
      Bars(
        f'LLaMA-{_title(entry)}',
        f'tokens/s, in those of {base} (blue: jax, grey: PyTorch)',
        {name: (seconds[base] / s,) * 3 for name, s in seconds.items()},
        {name: 'C7' if theirs else 'C0' for name, theirs in is_theirs.items()},
      )
    )
  bars(panels, path)


def plots() -> None:
  """Draws the picture of `PAGE` again."""
  plot(record.read(SMALL)['cases'], PAGE.with_name('train_small.png'))


def _case(size: str, args: argparse.Namespace) -> Case:
  config = llama.preset(size, param_dtype=args.dtype, compute_dtype=args.dtype)
  return Case(
    *(config, args.batch_size, args.seq_len),
    peers.Setting(RATE, config.hidden_size // 4, args.gap),
    *(args.loss_chunk, args.device),
  )


def parse() -> tuple[argparse.Namespace, dict[str, Case]]:
  """The command line, of which `methods` are names, and a case per size."""
  parser = harness.parser(__doc__)
  harness.add_arguments(parser, RESULTS, minutes=15, plot=PLOT)
  harness.add_methods(parser, METHODS, ['*'], turn=5)
  add, count = parser.add_argument, harness.positive
  presets = 'presets, of most worth first: ' + ', '.join(llama.PRESETS)
  add('--sizes', nargs='+', default=['20m'], metavar='SIZE', help=presets)
  add('--batch-size', type=count, default=8, help='sequences')
  add('--seq-len', type=count, default=256, help='their tokens')
  dtypes = 'float32', 'bfloat16'
  add('--dtype', choices=dtypes, default='float32', help='of weights, products')
  chunk = 'tokens whose logits ours has at once (default: %(default)s)'
  add('--loss-chunk', type=count, default=1024, help=chunk)
  args = parser.parse_args()
  try:
    args.methods = harness.select(args.methods, METHODS)
    return args, {size: _case(size, args) for size in args.sizes}
  except ValueError as error:
    parser.error(str(error))


def main() -> None:
  """Measures, and writes the JSON file, the plot and the tables."""
  args, cases = parse()
  if args.report:
    report.report('train.measure')
    return
  clock = harness.start(args)
  found: Row = {'environment': harness.environment(), 'cases': []}
  for index, (size, case) in enumerate(cases.items()):
    harness.progress(f'LLaMA-{size}')
    entry: Row = {
      **{'size': size, 'parameters': llama.num_params(case.config)},
      **{n: getattr(args, n) for n in ('batch_size', 'seq_len', 'dtype')},
      **{'remat': case.config.remat, 'rank': case.setting.rank},
      **{n: getattr(args, n) for n in ('loss_chunk', 'turn', 'gap')},
      'rows': [],
    }
    found['cases'].append(entry)

    def save(rows: list[Row], entry: Row = entry) -> None:
      entry['rows'] = rows
      record.write(args.output, found)

    if not clock.seconds_left:
      entry['left_out'] = 'no time was left'
      save([])
      continue
    if (args.device, args.dtype) == ('cpu', 'float32'):
      entry['products'] = products.measure(case.config, case.tokens)
    turns.race(
      args.methods,
      lambda name, case=case: METHODS[name](case),
      lambda *known, case=case: row(*known, case),
      *(save, clock.share(len(cases) - index)),
      **{'steps': args.gap, 'turn': args.turn, 'inputs': BATCHES},
    )
  for entry in found['cases']:
    text = f'{entry["left_out"]}\n' if 'left_out' in entry else table(entry)
    sys.stdout.write(f'LLaMA-{entry["size"]}:\n\n{text}\n')
  plot(found['cases'], args.plot)


if __name__ == '__main__':
  main()
