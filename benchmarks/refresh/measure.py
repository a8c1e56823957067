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

There are four parts; without names all of them run, in this order:

  save     trains a small LLaMA with `galore` and keeps the gradients that its
           refreshes would see: all seven kernels of the first, a middle and the
           last layer, at the first step and three times a gap later, as one
           .npz file per size for the next part
  energy   for each saved gradient, and for synthetic ones of large models: how
           much of it a basis captures, |G Q|^2 / |G|^2, relative to the best
           that rank r allows, and how much of the exact subspace it contains,
           |Q^T V|^2 / r (its mean squared canonical correlation). The best and
           V come from NumPy's SVD in float64; Q is orthonormalised first. A
           cell of the table has the median over matrices of the energy, [the
           lowest], and the median overlap; gradients of the first step, before
           which there is none, are in the JSON file alone.
  time     seconds of one refresh, after compilation, in turns whose order
           alternates. Wants a quiet machine.
  loss     the first size with `gradnormlorp` and each way of refreshing,
           on equal data, with equal learning rate and rank: the evaluation loss
           at the end

Models have a vocabulary of 4096, of a tokenizer that is trained on the text:
the head for a larger one would take most of the time. With --data.tokenizer
`save` takes another one, and the preset's vocabulary.

  python -m benchmarks.refresh save energy loss --size 9m 60m --gap 50 10 \
    --data.source 'wikipedia_en/*train.00000*'
  python -m benchmarks.refresh time --minutes 4

Without --data.source the text is the sources of the standard library. Each part
replaces its own rows in the JSON file and leaves the others.

A rectangular matrix is turned so that its shorter axis is compressed, the
library's default: gate, up and down projections have one shape here. Times are
medians, after them the median ratio to the time of `exact` in the same round
[its quartiles]: below 1 is faster. LAPACK has one thread, as in train_lm.py;
XLA's matrix products have all cores. `dct` and `random` store no basis: what
they leave undone here, every step does. A synthetic matrix is a product of low
rank, whose singular values fall about as 1/i, with a tenth of its energy in
noise: it shows what a large refresh costs, not what large models' gradients are
like.

Shape suffixes in this file:
  M, N  the axes of a gradient, N <= M; the basis lives on N
  R     rank of the subspace
"""

import os

# As in train_lm.py: OpenBLAS's threads would fight with those of XLA.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import argparse
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import harness, record
from benchmarks.refresh import refresh_report, refresh_runs
from gnlorp_jax import config
from gnlorp_jax.models import llama
from gnlorp_jax.optim import projections
from gnlorp_jax.recipes.pretrain import recipe

RESULTS = pathlib.Path('benchmarks/results/refresh.json')
PLOT = pathlib.Path('docs/results/refresh.png')
GRADIENTS = pathlib.Path('runs/refresh')

FITS = {
  'exact': projections.get('svd', solver='exact'),
  'eigh': projections.get('svd', solver='eigh'),
  'power': projections.get('svd', solver='power'),
  'dct': projections.get('dct'),
  'random': projections.get('random'),
}
JITTED = {name: jax.jit(fit.refresh) for name, fit in FITS.items()}
WAYS = refresh_report.WAYS

# Long and short axis of the kernels of 9m, 60m, 350m, 1b and 7b.
SHAPES = (
  *((128, 128), (352, 128), (512, 512), (1376, 512), (1024, 1024)),
  *((2736, 1024), (2048, 2048), (5461, 2048), (4096, 4096), (11008, 4096)),
)
SYNTHETIC = SHAPES[4:8]  # Those whose energy is worth a long SVD.
SHARES = (4, 16)  # The short axis over the rank; published runs take a quarter.
CURVE = (32, 16, 8, 4, 2)  # The same for energies.
NOISE = 0.1  # Of a synthetic matrix's energy.
FEWEST_ROUNDS, TURN_SECONDS, MOST_REPEATS = 3, 0.01, 200

Row = dict[str, Any]
Save = Callable[[list[Row]], None]
Part = Callable[[argparse.Namespace, harness.Clock, Save], None]


def attempt(call: Callable[[], Row]) -> Row:
  """What `call` returns, or a row with the first line of its error."""
  try:
    return call()
  except Exception as error:  # Whatever it is, the other rows go on.
    line = f'{type(error).__name__}: {error}'.splitlines()[0]
    return {'absent': line}


def rounded(value: Any) -> Any:
  """All numbers of a row with six digits after the point."""
  if isinstance(value, dict):
    return {key: rounded(x) for key, x in value.items()}
  return round(value, 6) if isinstance(value, float) else value


def quartiles(values: Iterable[float]) -> list[float]:
  """First quartile, median, third quartile."""
  return [float(q) for q in np.quantile(list(values), (0.25, 0.5, 0.75))]


def save_part(
  args: argparse.Namespace, clock: harness.Clock, save: Save
) -> None:
  """Trains each size and keeps its gradients."""
  rows: list[Row] = []
  for size, gap in zip(args.size, args.gap, strict=True):
    settings = refresh_runs.settings(
      *(args, size, args.tokenizer),
      steps=3 * gap + 1,
      optim=config.OptimConfig(
        name='galore',
        rank=llama.preset(size).hidden_size // 4,
        update_proj_gap=gap,
        learning_rate=args.learning_rate,
      ),
    )
    share = clock.share(len(args.size) - len(rows))
    path = args.gradients / f'{size}.npz'
    call = functools.partial(_save_row, settings, gap, path, share)
    rows.append({'size': size, 'gap': gap, **attempt(call)})
    save(rows)
    harness.progress(f'save {rows[-1]}')


def _save_row(
  settings: config.TrainConfig,
  gap: int,
  path: pathlib.Path,
  clock: harness.Clock,
) -> Row:
  prepared = recipe.prepare(settings)
  return refresh_runs.save_gradients(prepared, gap, path, clock)


def synthetic(m: int, n: int, seed: int = 0) -> np.ndarray:
  """A matrix ``[M, N]`` of falling singular values and noise, float32."""
  rng = np.random.default_rng(seed)
  draw = functools.partial(rng.standard_normal, dtype=np.float32)
  size = max(n // 4, 1)
  values = 1 / np.arange(1, size + 1, dtype=np.float32)
  signal_MN = (draw((m, size)) * values) @ draw((size, n))
  noise_MN = draw((m, n))
  ratio = np.linalg.norm(signal_MN) / np.linalg.norm(noise_MN)
  weight = np.float32(ratio * math.sqrt(NOISE / (1 - NOISE)))
  return signal_MN + weight * noise_MN


def scaled(grad_MN: np.ndarray) -> jax.Array:
  """The gradient as a refresh hands it over: largest entry 1, float32."""
  return jnp.asarray(grad_MN / np.abs(grad_MN).max(), jnp.float32)


def start_basis(name: str, shape: tuple[int, ...], rank: int) -> Any:
  """What a first fit starts from."""
  return FITS[name].init(shape, rank, 0)


def span(name: str, basis: Any, rank: int) -> np.ndarray:
  """Orthonormal columns of the subspace of a basis, ``[N, R]``, float64."""
  with jax.default_matmul_precision('highest'):
    rows_RN = FITS[name].project_back(jnp.eye(rank), basis)
  return np.linalg.qr(np.asarray(rows_RN, np.float64).T)[0]


def captured(grad_MN: np.ndarray, span_NR: np.ndarray) -> float:
  """Share of a gradient's energy in a subspace, in [0, 1]."""
  inside, whole = np.linalg.norm(grad_MN @ span_NR), np.linalg.norm(grad_MN)
  return float((inside / whole) ** 2)


def overlap(span_NR: np.ndarray, exact_NR: np.ndarray) -> float:
  """Mean squared canonical correlation of two subspaces, in [0, 1]."""
  return float(np.sum((span_NR.T @ exact_NR) ** 2) / span_NR.shape[1])


def spans(
  grad_MN: jax.Array, rank: int, number: int, warm: dict[int, Any]
) -> dict[str, np.ndarray]:
  """The subspace that each way finds; `warm` keeps the power iteration's."""
  found = {}
  for name, fit in JITTED.items():
    start = start_basis(name, grad_MN.shape, rank)
    basis = fit(grad_MN, start, jnp.int32(number))
    if name != 'power':
      found[name] = span(name, basis, rank)
      continue
    found['power first'] = span(name, basis, rank)
    if rank in warm:
      basis = fit(grad_MN, warm[rank], jnp.int32(number))
      found['power warm'] = span(name, basis, rank)
    warm[rank] = basis
  return found


def energy_rows(grads: dict[int, np.ndarray], ranks: list[int]) -> list[Row]:
  """Energy and overlap of every way, for the gradients of one matrix.

  Args:
    grads: Gradients ``[M, N]`` by step. Warm and stale bases come from the
      step before.
    ranks: Ranks of the bases.

  Returns:
    A row for every step, in ascending order: ``best``, the largest share of the
    energy that a rank can hold, and by way and rank ``energy``, relative to
    that, and ``overlap``.
  """
  rows = []
  warm: dict[int, Any] = {}
  stale_NK: np.ndarray | None = None
  for number, grad_MN in sorted(grads.items()):
    row: Row = {'step': number, 'shape': list(grad_MN.shape)}
    rows.append(row)
    if not np.isfinite(grad_MN).all() or not grad_MN.any():
      row['absent'] = 'the gradient is zero or not finite'
      continue
    exact_MN = grad_MN.astype(np.float64)
    _, values_K, right_KN = np.linalg.svd(exact_MN, full_matrices=False)
    shares_K = np.cumsum(values_K**2) / np.sum(values_K**2)
    row['best'] = {rank: float(shares_K[rank - 1]) for rank in ranks}
    row['energy'] = {way: {} for way in WAYS}
    row['overlap'] = {way: {} for way in WAYS}
    for rank in ranks:
      found = spans(scaled(grad_MN), rank, number, warm)
      if stale_NK is not None:
        found['stale'] = stale_NK[:, :rank]
      for way, span_NR in found.items():
        share = captured(exact_MN, span_NR) / row['best'][rank]
        row['energy'][way][rank] = share
        row['overlap'][way][rank] = overlap(span_NR, right_KN[:rank].T)
    stale_NK = right_KN.T
  return rows


def energy_part(
  args: argparse.Namespace, clock: harness.Clock, save: Save
) -> None:
  """Measures all saved gradients, then synthetic ones."""
  rows: list[Row] = []
  for size in args.size:
    path = args.gradients / f'{size}.npz'
    if not path.exists():
      rows.append({'size': size, 'absent': 'no gradients: run `save` first'})
      continue
    gradients = refresh_runs.read_gradients(path)
    # A clock that runs out then lacks some of each kind.
    for place in sorted(gradients, key=lambda place: place[0]):
      named = {'size': size, 'layer': place[0], 'kind': place[1]}
      if not clock.seconds_left:
        rows.append({**named, 'absent': 'left out: out of time'})
        continue
      n = gradients[place][min(gradients[place])].shape[1]
      ranks = sorted({max(n // share, 1) for share in CURVE})
      rows += _energy_of(named, gradients[place], ranks)
      save(rows)
  slowness = 0.0  # Seconds for m n^2 = 1.
  for m, n in SYNTHETIC:
    named = {'size': 'synthetic', 'kind': f'{m} x {n}'}
    if slowness * m * n**2 > clock.seconds_left or not clock.seconds_left:
      rows.append({**named, 'absent': 'left out: out of time'})
      continue
    started = time.perf_counter()
    grads = {0: synthetic(m, n)}
    rows += _energy_of(named, grads, sorted(n // share for share in SHARES))
    slowness = (time.perf_counter() - started) / (m * n**2)
    save(rows)
  save(rows)


def _energy_of(
  named: Row, grads: dict[int, np.ndarray], ranks: list[int]
) -> list[Row]:
  """The rows of a matrix, or one with what went wrong."""
  harness.progress(f'energy {named}')
  found = attempt(lambda: {'rows': energy_rows(grads, ranks)})
  return [{**named, **rounded(row)} for row in found.get('rows', [found])]


class Fit:
  """One refresh of one matrix, compiled and called once."""

  def __init__(self, name: str, grad_MN: jax.Array, rank: int):
    basis = start_basis(name, grad_MN.shape, rank)
    self._args = grad_MN, basis, jnp.int32(1)
    started = time.perf_counter()
    self._compiled = JITTED[name].lower(*self._args).compile()
    self.compile_seconds = time.perf_counter() - started
    self._repeats = 1
    self._repeats = min(max(int(TURN_SECONDS / self()), 1), MOST_REPEATS)

  def __call__(self) -> float:
    """Seconds of one refresh: the mean over a turn's repetitions."""
    started = time.perf_counter()
    for _ in range(self._repeats):
      found = self._compiled(*self._args)
    jax.block_until_ready(found)
    return (time.perf_counter() - started) / self._repeats


def time_row(
  grad_MN: np.ndarray,
  rank: int,
  rounds: int,
  clock: harness.Clock,
  slowness: dict[str, float],
) -> Row:
  """Times all fits of one matrix in turns.

  Args:
    grad_MN: The matrix.
    rank: Rank of the bases.
    rounds: Turns of each fit, fewer where time is short.
    clock: What does not fit is left out.
    slowness: Seconds of each fit for m n^2 = 1, as far as known; updated.

  Returns:
    By fit: quartiles of its seconds, of its ratio to `exact` (None without),
    rounds, seconds of compilation; or why it is absent.
  """
  size = grad_MN.shape[0] * grad_MN.shape[1] ** 2
  matrix = scaled(grad_MN)
  row: Row = {}
  planned = 0.0  # Seconds of the turns of what was taken on.
  for name in reversed(FITS):  # The fast ones first.
    expected = slowness.get(name, 0.0) * size
    turns = FEWEST_ROUNDS * expected
    if planned + turns + expected > clock.seconds_left:
      row[name] = {'absent': f'left out: about {expected:.1f} s a refresh'}
      continue
    planned += turns
    row[name] = attempt(lambda name=name: {'fit': Fit(name, matrix, rank)})
  fits = {name: row[name]['fit'] for name in FITS if 'fit' in row[name]}
  seconds: dict[str, list[float]] = {name: [] for name in fits}
  for number in range(rounds):
    started = time.perf_counter()
    for name in list(fits)[:: -1 if number % 2 else 1]:
      seconds[name].append(fits[name]())
    took = time.perf_counter() - started
    if number + 1 >= FEWEST_ROUNDS and 4 * took > clock.seconds_left:
      break
  for name, fit in fits.items():
    slowness[name] = float(np.median(seconds[name])) / size
    ratios = None
    if 'exact' in fits:
      ratios = quartiles(np.divide(seconds[name], seconds['exact']))
    row[name] = {
      'seconds': quartiles(seconds[name]),
      'ratio': ratios,
      'rounds': len(seconds[name]),
      'compile_seconds': round(fit.compile_seconds, 2),
    }
  return row


def time_part(
  args: argparse.Namespace, clock: harness.Clock, save: Save
) -> None:
  """Times every shape, on a saved gradient where there is one."""
  real: dict[tuple[int, ...], tuple[str, np.ndarray]] = {}
  for path in sorted(args.gradients.glob('*.npz')):
    for (layer, kind), grads in refresh_runs.read_gradients(path).items():
      grad_MN = grads[max(grads)]
      real[grad_MN.shape] = f'gradient: {path.stem} {layer}/{kind}', grad_MN
  groups = sorted(
    [(shape, share) for share in SHARES for shape in SHAPES],
    # The largest may take all the time there is.
    key=lambda g: (g[0][1] > 1024, SHARES.index(g[1]), g[0][1], g[0][0]),
  )
  rows: list[Row] = []
  slowness: dict[str, float] = {}
  for shape, share in groups:
    row: Row = {'shape': list(shape), 'rank': max(shape[1] // share, 1)}
    rows.append(row)
    if not clock.seconds_left:
      row['absent'] = 'left out: out of time'
      save(rows)
      continue
    row['matrix'], grad_MN = real.get(shape) or ('synthetic', synthetic(*shape))
    row |= time_row(grad_MN, row['rank'], args.rounds, clock, slowness)
    save(rows)
    left = f'{clock.seconds_left:.0f} s left'
    harness.progress(f'time {shape}, rank {row["rank"]}: {left}')


def loss_part(
  args: argparse.Namespace, clock: harness.Clock, save: Save
) -> None:
  """Trains with every way of refreshing, seed after seed."""
  size = args.size[0]
  ways = refresh_runs.variants(llama.preset(size).hidden_size)
  rows: list[Row] = []
  slowest = 0.0
  for seed in range(args.seeds):
    for way, variant in ways.items():
      row: Row = {'way': way, 'seed': seed}
      rows.append(row)
      if slowest > clock.seconds_left or not clock.seconds_left:
        row['absent'] = 'left out: out of time'
        save(rows)
        continue
      settings = refresh_runs.settings(
        *(args, size, 'bpe'),
        steps=args.steps,
        seed=seed,
        eval_batches=args.eval_batches,
        optim=refresh_runs.loss_optimizer(variant, args.learning_rate),
      )
      started = time.perf_counter()
      row |= attempt(functools.partial(_loss_row, settings))
      row['seconds'] = round(time.perf_counter() - started, 1)
      slowest = max(slowest, row['seconds'])
      save(rows)
      harness.progress(f'loss {row}')


def _loss_row(settings: config.TrainConfig) -> Row:
  return refresh_runs.loss_row(recipe.prepare(settings))


PARTS: dict[str, Part] = {
  'save': save_part,
  'energy': energy_part,
  'time': time_part,
  'loss': loss_part,
}


def _options(args: argparse.Namespace) -> dict[str, Any]:
  """What of the command line decides the figures; of paths their last part."""
  return {
    'source': ','.join(pathlib.Path(s).name for s in args.source.split(',')),
    'tokenizer': pathlib.Path(args.tokenizer).name,
    **{name: getattr(args, name) for name in ('size', 'gap', 'steps', 'seeds')},
    **{name: getattr(args, name) for name in ('learning_rate', 'batch_size')},
    **{name: getattr(args, name) for name in ('eval_batches', 'rounds')},
    'loss_rank': refresh_runs.RANK,
    'loss_gap': refresh_runs.GAP,
  }


def parse(arguments: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  harness.add_arguments(parser, RESULTS, minutes=40)
  add = parser.add_argument
  add(
    'parts',
    nargs='*',
    metavar='PART',
    help=f'of {", ".join(PARTS)} (default: all)',
  )
  add('--plot', type=pathlib.Path, default=PLOT, help='default: %(default)s')
  add(
    '--gradients',
    type=pathlib.Path,
    default=GRADIENTS,
    help='folder of saved gradients (default: %(default)s)',
  )
  add(
    '--data.source',
    dest='source',
    default='stdlib',
    help='text, as of train_lm.py (default: %(default)s)',
  )
  add(
    '--data.tokenizer',
    dest='tokenizer',
    default='bpe',
    help='tokenizer of `save`, as of train_lm.py (default: a BPE of 4096)',
  )
  add(
    '--size',
    nargs='+',
    choices=llama.PRESETS,
    default=['9m'],
    help='presets whose gradients are saved; `loss` trains the first '
    '(default: 9m)',
  )
  add(
    '--gap',
    nargs='+',
    type=int,
    default=[50],
    help='steps between two saved gradients, one for all sizes or one for each '
    '(default: 50)',
  )
  add('--steps', type=int, default=150, help='of a run of `loss` (%(default)s)')
  add('--seeds', type=int, default=2, help='of `loss` (default: %(default)s)')
  add('--eval-batches', type=int, default=40, help='of `loss` (%(default)s)')
  add('--batch-size', type=int, default=8, help='x 128 tokens (%(default)s)')
  add('--learning-rate', type=float, default=5e-3, help='peak (%(default)s)')
  add('--rounds', type=int, default=9, help='turns of `time` (%(default)s)')
  args = parser.parse_args(arguments)
  unknown = sorted(set(args.parts) - set(PARTS))
  if unknown:
    parser.error(f'{unknown[0]!r} is no part: choose of {", ".join(PARTS)}.')
  if len(args.gap) == 1:
    args.gap *= len(args.size)
  if len(args.gap) != len(args.size):
    parser.error(
      f'--gap has {len(args.gap)} values for {len(args.size)} sizes: give one '
      'for all, or one for each.'
    )
  for name in ('steps', 'seeds', 'eval_batches', 'batch_size', 'rounds'):
    if getattr(args, name) < 1:
      option = name.replace('_', '-')
      parser.error(f'--{option} {getattr(args, name)} must be at least 1.')
  if min(args.gap) < 1:
    parser.error(f'--gap {min(args.gap)} must be at least 1.')
  return args


def main(arguments: list[str] | None = None) -> None:
  """Measures the parts asked for, and writes JSON file, tables and plot."""
  args = parse(arguments)
  clock = harness.start(args)
  results: dict[str, Any] = {}
  if args.output.exists():
    results = json.loads(args.output.read_text())
  asked = [name for name in PARTS if name in (args.parts or PARTS)]
  for number, name in enumerate(asked):
    part = {**harness.environment(), 'options': _options(args), 'rows': []}
    results[name] = part

    def save(rows: list[Row], part: dict[str, Any] = part) -> None:
      part['rows'] = rows
      record.write(args.output, results)

    PARTS[name](args, clock.share(len(asked) - number), save)
  # From the file: its keys are strings, whoever wrote it.
  results = json.loads(args.output.read_text())
  sys.stdout.write(refresh_report.tables(results))
  refresh_report.plot(results, args.plot)


if __name__ == '__main__':
  main()
