"""Whole training steps beside PyTorch's: speed, memory, compilation.

  python -m benchmarks.train --sizes 20m --minutes 15 --output runs/train.json
  python -m benchmarks.train --device gpu --dtype bfloat16 --sizes 60m 130m 350m

Each size of LLaMA is trained by this package and by transformers' PyTorch model
with the optimizers of other packages: same architecture, same batches, forward,
backward and update. Up to 100M parameters both start from the same weights. All
take turns of a few steps in one process, in another order each round, so that a
machine that slows down slows them all. Low-rank methods have the rank --rank
and refresh their bases every --gap steps; a size is done when every method has
made that many counted steps, which is one whole interval, or when its share of
--minutes is used up (`interval` then is below 1, and what refreshes cost is
counted in part or not at all).

  tokens/s    of the mean counted step, refreshes included
  / PEER      the same as a ratio to that peer's: above 1 ours is faster. In
              brackets the quartiles over the rounds of the ratio of medians
  interval    counted steps, in refresh intervals
  worst       the slowest step, in medians of its turn
  state       bytes of the optimizer's state
  peak        this package: what the compiled step has at most, state included.
              PyTorch: what it had allocated at most in its second step, on a
              GPU; on a CPU it does not tell
  compile     tracing and compiling, seconds
  MFU         model FLOPs (6 per weight and token, and attention) over the dense
              bfloat16 peak of the GPU, where that is known and all weights are
              trained

`products` are the bare matrix products of a float32 step (forward, and both
gradients of every kernel and of the head, in the form that the step has),
timed by themselves in turns with XLA and with PyTorch on a CPU: what either's
step cannot go below with these products.

What is not alike: ours clips nothing but computes the global norms that it
reports and leaves out steps that are not finite; PyTorch runs eagerly, without
`torch.compile`, and has all logits at once where ours has --loss-chunk tokens'.
In bfloat16 our moments are float32 and PyTorch's bfloat16. On a GPU both
multiply float32 matrices in TF32. Nobody decays weights. PEFT's LoRA and DoRA
train their adapters alone, which is less work; the others train all weights.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import matplotlib.figure
import numpy as np

from benchmarks.common import harness, peers, record, turns
from benchmarks.common.tables import markdown
from benchmarks.train import products
from benchmarks.train.train_sides import BATCHES, METHODS, RATE, Case
from gnlorp_jax.models import llama
from gnlorp_jax.training import hardware

RESULTS = pathlib.Path('benchmarks/results/train.json')
PLOT = pathlib.Path('docs/results/train.png')
PEERS = ('galore-torch', 'torch-adamw', 'torch-adamw-fused', 'adamw')
OURS = ('gradnormlorp', 'galore', 'adamw')  # What a regression check sees.


def row(racer: turns.Racer, case: Case) -> dict[str, Any]:
  """What is known of a method by now."""
  side: Any = racer.method
  known = {
    'method': racer.name,
    'state_bytes': side.state_bytes,
    'peak_bytes': side.peak_bytes,
    'compile_s': side.compile_s,
    'first_step_s': racer.first_s,
    'loss': side.loss,
  }
  if not racer.turns:
    return known
  seconds = np.concatenate([turn.seconds for turn in racer.turns])
  relative = [t.seconds / np.median(t.seconds) for t in racer.turns]
  mean = float(seconds.mean())
  peak = hardware.PEAK_FLOPS.get(jax.devices()[0].device_kind)
  flops = llama.flops_per_token(case.config, case.seq_len) * case.tokens
  partial = racer.name.startswith('peft')  # It trains adapters alone.
  return known | {
    'tokens_per_second': case.tokens / mean,
    'mean_s': mean,
    'median_s': float(np.median(seconds)),
    'worst_per_median': float(np.concatenate(relative).max()),
    'steps': len(seconds),
    'intervals': len(seconds) / case.setting.gap,
    'mfu': None if peak is None or partial else flops / mean / peak,
  }


def with_ratios(racers: list[turns.Racer], case: Case) -> list[dict[str, Any]]:
  """The rows of all methods, with ratios to the peers for those with turns."""
  rows = [row(racer, case) for racer in racers]
  pairs = [x for x in zip(rows, racers, strict=True) if x[1].turns]
  by_name = {known['method']: (known, racer) for known, racer in pairs}
  for name in PEERS:
    if name not in by_name:
      continue
    other, other_racer = by_name[name]
    for known, racer in pairs:
      low, middle, high = turns.ratio_quartiles(other_racer.turns, racer.turns)
      # Of the rounds that both have made.
      common = min(len(racer.turns), len(other_racer.turns))
      means = [
        np.mean(np.concatenate([t.seconds for t in r.turns[:common]]))
        for r in (other_racer, racer)
      ]
      known.setdefault('speed_per', {})[name] = {
        'mean': float(means[0] / means[1]),
        'quartiles': [low, middle, high],
      }
  return rows


def _reason(error: Exception) -> str:
  return f'{error}'.strip().split('\n')[0] or type(error).__name__


def compare(
  names: list[str],
  case: Case,
  clock: harness.Clock,
  turn: int,
  save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
  """Builds the methods, then lets them train in turns.

  Args:
    names: Keys of `METHODS`.
    case: What they train.
    clock: When to stop, at the latest.
    turn: Steps in a row of one method.
    save: Called with all rows after each method built and each round.

  Returns:
    One row per name; a method that is absent or fails has one with the reason.
  """
  racers: list[turns.Racer] = []
  absent: dict[str, str] = {}

  def rows() -> list[dict[str, Any]]:
    found = {known['method']: known for known in with_ratios(racers, case)}
    missing = {n: {'method': n, 'absent': why} for n, why in absent.items()}
    return [(found | missing)[n] for n in names if n in found or n in missing]

  for name in names:
    if racers and not clock.seconds_left:
      absent[name] = 'no time was left to build it'
      continue
    try:
      racers.append(turns.Racer(name, METHODS[name](case), BATCHES))
      harness.progress(f'{name}: first step {racers[-1].first_s:.2f} s')
    except Exception as error:  # Out of memory, no kernel: the others go on.
      absent[name] = _reason(error)
      harness.progress(f'{name}: absent, {absent[name]}')
    save(rows())
  rounds = 0
  while racers and rounds * turn < case.setting.gap:
    if rounds and not clock.seconds_left:
      break
    for racer in turns.order(racers, rounds):
      # PyTorch's threads keep spinning for a while after their work.
      time.sleep(0.05)
      try:
        racer.turn(turn)
      except Exception as error:
        absent[racer.name] = _reason(error)
        racers.remove(racer)
        harness.progress(f'{racer.name}: failed, {absent[racer.name]}')
    rounds += 1
    save(rows())
    harness.progress(
      f'{rounds * turn} of {case.setting.gap} steps, '
      f'{clock.seconds_left / 60:.1f} min left'
    )
  return rows()


def _name(case: dict[str, Any]) -> str:
  """What a regression check may compare: only the same with the same."""
  return (
    f'train {case["size"]} {case["dtype"]} {case["batch_size"]} x '
    f'{case["seq_len"]}, T={case["gap"]}, chunk {case["loss_chunk"]}'
  )


def ratios(found: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
  """What a regression check compares: larger is better for this package.

  Args:
    found: A record as this script writes it.

  Returns:
    The speed of each of `OURS` in that of each of `PEERS`, from the medians of
    rounds (most refreshes are left out of them): quartiles, by a name.
  """
  named = {}
  for case in found['cases']:
    for known in case['rows']:
      if known['method'] not in OURS:
        continue
      for peer, ratio in known.get('speed_per', {}).items():
        if peer != known['method']:
          name = f'{_name(case)}: {known["method"]} / {peer}'
          named[name] = tuple(ratio['quartiles'])
  return named


def sizes(found: dict[str, Any]) -> dict[str, int]:
  """Bytes that a regression check compares: they do not depend on the day.

  Args:
    found: A record as this script writes it.

  Returns:
    Bytes of state and of the compiled step of this package's methods, by a
    name.
  """
  named = {}
  for case in found['cases']:
    for known in case['rows']:
      if known['method'] in OURS:
        for key in ('state_bytes', 'peak_bytes'):
          if known.get(key) is not None:
            name = f'{_name(case)}: {known["method"]}, {key}'
            named[name] = known[key]
  return named


def table(case: dict[str, Any]) -> str:
  """The rows of a size as a Markdown table, and its products below."""
  heads = ['method', 'tokens/s', *(f'/ {peer}' for peer in PEERS)]
  heads += ['interval', 'worst', 'state, MB', 'peak, MB', 'compile, s', 'MFU']

  def number(value: float | None, form: str) -> str:
    return '-' if value is None else format(value, form)

  def ratio(known: dict[str, Any], peer: str) -> str:
    found = known.get('speed_per', {}).get(peer)
    if found is None or peer == known['method']:
      return '-'
    low, _, high = found['quartiles']
    return f'{found["mean"]:.2f} [{low:.2f}, {high:.2f}]'

  lines = []
  for known in (r for r in case['rows'] if 'mean_s' in r):
    peak = known['peak_bytes']
    lines.append(
      [
        known['method'],
        f'{known["tokens_per_second"]:.0f}',
        *(ratio(known, peer) for peer in PEERS),
        f'{known["intervals"]:.2f}',
        f'{known["worst_per_median"]:.2f}',
        f'{known["state_bytes"] / 1e6:.1f}',
        number(None if peak is None else peak / 1e6, '.0f'),
        number(known['compile_s'], '.1f'),
        number(known['mfu'], '.1%'),
      ]
    )
  text = f'LLaMA-{case["size"]}:\n\n' + markdown(heads, lines)
  for known in (r for r in case['rows'] if 'absent' in r):
    text += f'\n* {known["method"]}: absent, {known["absent"]}'
  for known in case['rows']:
    if 'absent' not in known and 'mean_s' not in known:
      text += (
        f'\n* {known["method"]}: {known["first_step_s"]:.2f} s for its first '
        'step; no time was left for a turn'
      )
  for name, total in case.get('products', {}).items():
    if name != 'products':
      text += (
        f'\n* bare products by {name}: {total["seconds"]:.3f} s per step, '
        f'{total["gflops"]:.0f} GFLOP/s'
      )
  return text + '\n'


def plot(cases: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Speed of each method in that of galore-torch, or of the first method."""
  figure = matplotlib.figure.Figure(
    figsize=(8, 1 + 2.4 * len(cases)), layout='constrained'
  )
  for axes, case in zip(
    figure.subplots(len(cases), squeeze=False)[:, 0], cases, strict=True
  ):
    rows = [known for known in case['rows'] if 'mean_s' in known]
    if not rows:
      continue
    names = [known['method'] for known in rows]
    base = next((p for p in PEERS if p in names), names[0])
    unit = rows[names.index(base)]['tokens_per_second']
    speeds = [known['tokens_per_second'] / unit for known in rows]
    is_theirs = [n in peers.TORCH or n.startswith('peft') for n in names]
    colors = ['C7' if theirs else 'C0' for theirs in is_theirs]
    axes.barh(names, speeds, color=colors)
    axes.axvline(1, color='0.3', lw=0.8)
    axes.invert_yaxis()
    axes.set(
      title=f'LLaMA-{case["size"]}, batch {case["batch_size"]} x '
      f'{case["seq_len"]}: tokens/s, in those of {base}'
    )
  figure.supxlabel('blue: jax, grey: PyTorch', fontsize='small')
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


def make_case(size: str, args: argparse.Namespace) -> Case:
  """The case of a size; the rank defaults to a quarter of the width."""
  config = llama.preset(
    size,
    param_dtype=args.dtype,
    compute_dtype=args.dtype,
    remat=args.remat,
    **({} if args.vocab is None else {'vocab_size': args.vocab}),
  )
  rank = config.hidden_size // 4 if args.rank is None else args.rank
  if rank > config.hidden_size:
    raise ValueError(
      f'--rank {rank} must be at most the width of {size}, '
      f'{config.hidden_size}.'
    )
  return Case(
    *(config, args.batch_size, args.seq_len),
    peers.Setting(RATE, rank, args.gap),
    *(args.loss_chunk, args.device),
  )


def arguments() -> argparse.ArgumentParser:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  harness.add_arguments(parser, RESULTS, minutes=15)
  add = parser.add_argument
  add(
    '--sizes',
    nargs='+',
    default=['20m'],
    metavar='SIZE',
    help='presets, the most valuable first (default: 20m): '
    + ', '.join(llama.PRESETS),
  )
  add(
    '--methods',
    nargs='+',
    default=['*'],
    metavar='NAME',
    help='names or patterns as of a shell, quoted (default: all): '
    + ', '.join(METHODS),
  )
  add('--batch-size', type=int, default=8, help='sequences (default: 8)')
  add('--seq-len', type=int, default=256, help='their tokens (default: 256)')
  add(
    '--dtype',
    choices=('float32', 'bfloat16'),
    default='float32',
    help='of weights and products, on both sides (default: %(default)s)',
  )
  add('--rank', type=int, help='(default: a quarter of the width)')
  add(
    '--gap',
    type=int,
    default=200,
    help='steps between two refreshes of a basis (default: %(default)s)',
  )
  add('--vocab', type=int, help="vocabulary (default: the preset's)")
  add(
    '--remat',
    action='store_true',
    help='compute blocks again in the backward pass, on both sides',
  )
  add(
    '--loss-chunk',
    type=int,
    default=1024,
    help='tokens whose logits ours has at once; the default is that of '
    'train_lm.py, hundreds are faster on a CPU, thousands on a GPU (default: '
    '%(default)s)',
  )
  add(
    '--turn',
    type=int,
    default=5,
    help='steps in a row of one method (default: %(default)s)',
  )
  add(
    '--products',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='time the bare matrix products as well',
  )
  add('--plot', type=pathlib.Path, default=PLOT, help='picture')
  return parser


def main() -> None:
  """Measures, and writes the JSON file, the plot and the tables."""
  parser = arguments()
  args = parser.parse_args()
  try:
    for name in ('batch_size', 'seq_len', 'rank', 'gap', 'turn', 'loss_chunk'):
      value = getattr(args, name)
      if value is not None and value < 1:
        option = name.replace('_', '-')
        raise ValueError(f'--{option} {value} must be at least 1.')
    names = harness.select(args.methods, METHODS)
    cases = {size: make_case(size, args) for size in args.sizes}
  except ValueError as error:
    parser.error(str(error))
  clock = harness.start(args)
  found: dict[str, Any] = {'environment': harness.environment(), 'cases': []}
  for number, (size, case) in enumerate(cases.items()):
    harness.progress(f'LLaMA-{size}')
    entry: dict[str, Any] = {
      'size': size,
      'parameters': llama.num_params(case.config),
      **{n: getattr(args, n) for n in ('batch_size', 'seq_len', 'dtype')},
      **{n: getattr(args, n) for n in ('remat', 'loss_chunk', 'turn')},
      'rank': case.setting.rank,
      'gap': case.setting.gap,
      'rows': [],
    }
    found['cases'].append(entry)

    def save(rows: list[dict[str, Any]], entry: dict[str, Any] = entry) -> None:
      entry['rows'] = rows
      record.write(args.output, found)

    if clock.seconds_left == 0:
      entry['left_out'] = 'no time was left'
      save([])
      continue
    if (args.device, args.dtype) == ('cpu', 'float32') and args.products:
      entry['products'] = products.measure(case.config, case.tokens)
    share = clock.share(len(cases) - number)
    compare(names, case, share, args.turn, save)
  for entry in found['cases']:
    if entry['rows']:
      sys.stdout.write(table(entry) + '\n')
    else:
      sys.stdout.write(f'LLaMA-{entry["size"]}: {entry["left_out"]}\n\n')
  measured = [entry for entry in found['cases'] if entry['rows']]
  if measured:
    plot(measured, args.plot)


if __name__ == '__main__':
  main()
