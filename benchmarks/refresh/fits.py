"""How bases are fitted in `benchmarks.refresh`: what each captures, and takes.

Shape suffixes in this file:
  M, N  the axes of a gradient, N <= M; the basis lives on N
  R     rank of the subspace
  K     all singular values
"""

import argparse
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import programs, turns
from benchmarks.common.cases import Case, Row
from benchmarks.common.harness import Clock
from benchmarks.common.methods import AbsentError
from benchmarks.refresh import runs
from benchmarks.refresh.tables import CURVE, SHARES, SYNTHETIC, WAYS, ranks_of
from gnlorp_jax.optim import projections

FITS = {
  'exact': projections.get('svd', solver='exact'),
  'eigh': projections.get('svd', solver='eigh'),
  'power': projections.get('svd', solver='power'),
  'dct': projections.get('dct'),
  'random': projections.get('random'),
}
JITTED = {name: jax.jit(fit.refresh) for name, fit in FITS.items()}

# Long and short axis of the kernels of 9m, 60m, 350m, 1b and 7b.
SHAPES = (
  *((128, 128), (352, 128), (512, 512), (1376, 512), (1024, 1024)),
  *((2736, 1024), (2048, 2048), (5461, 2048), (4096, 4096), (11008, 4096)),
)
SYNTHETIC_SHAPES = SHAPES[4:8]  # Those whose energy is worth a long SVD.
NOISE = 0.1  # Of a synthetic matrix's energy.
DIGITS, OVERLAP_DIGITS = 5, 4  # That tables and picture need.
FEWEST_ROUNDS, MOST_ROUNDS = 3, 9
TURN_SECONDS, MOST_REPEATS = 0.01, 200


def synthetic(m: int, n: int, seed: int = 0) -> np.ndarray:
  """A matrix ``[M, N]`` of singular values that fall about as 1/i, and noise.

  It shows what a large refresh costs, not what gradients are like; float32.
  """
  rng = np.random.default_rng(seed)
  draw = functools.partial(rng.standard_normal, dtype=np.float32)
  size = max(n // 4, 1)
  values = 1 / np.arange(1, size + 1, dtype=np.float32)
  signal_MN = (draw((m, size)) * values) @ draw((size, n))
  noise_MN = draw((m, n))
  ratio = np.linalg.norm(signal_MN) / np.linalg.norm(noise_MN)
  weight = np.float32(ratio * math.sqrt(NOISE / (1 - NOISE)))
  return signal_MN + weight * noise_MN


def _scaled(grad_MN: np.ndarray) -> jax.Array:
  """The gradient as a refresh hands it over: largest entry 1, float32."""
  return jnp.asarray(grad_MN / np.abs(grad_MN).max(), jnp.float32)


# Energy and overlap.


def _span(name: str, basis: Any, rank: int) -> np.ndarray:
  """Orthonormal columns of the subspace of a basis, ``[N, R]``, float64."""
  with jax.default_matmul_precision('highest'):
    rows_RN = FITS[name].project_back(jnp.eye(rank), basis)
  return np.linalg.qr(np.asarray(rows_RN, np.float64).T)[0]


def _spans(
  grad_MN: jax.Array, rank: int, number: int, warm: dict[int, Any]
) -> dict[str, np.ndarray]:
  """The subspace that each way finds; `warm` keeps the power iteration's."""
  found = {}
  for name, fit in JITTED.items():
    start = FITS[name].init(grad_MN.shape, rank, 0)
    basis = fit(grad_MN, start, jnp.int32(number))
    way = 'power first' if name == 'power' else name
    found[way] = _span(name, basis, rank)
    if name == 'power':
      if rank in warm:
        basis = fit(grad_MN, warm[rank], jnp.int32(number))
        found['power warm'] = _span(name, basis, rank)
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
    energy that each rank can hold; ``energy``, a list for each of `WAYS`,
    relative to that; and ``overlap``, the mean squared canonical correlation
    with the exact subspace, at the ranks of the table alone. Lists of ways that
    there are not are empty.
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
    energies_K = np.cumsum(values_K**2)
    energy: dict[str, list[float]] = {way: [] for way in WAYS}
    overlaps: dict[str, list[float]] = {way: [] for way in WAYS}
    for rank in ranks:
      found = _spans(_scaled(grad_MN), rank, number, warm)
      if stale_NK is not None:
        found['stale'] = stale_NK[:, :rank]
      for way, span_NR in found.items():
        inside = np.sum((exact_MN @ span_NR) ** 2)
        energy[way].append(inside / energies_K[rank - 1])
        if rank in ranks_of(grad_MN.shape[1], SHARES):
          cosines_RR = right_KN[:rank] @ span_NR
          overlaps[way].append(np.sum(cosines_RR**2) / rank)
    best = energies_K[np.array(ranks) - 1] / energies_K[-1]
    row['best'] = _short(best, DIGITS)
    row['energy'] = [_short(energy[way], DIGITS) for way in WAYS]
    row['overlap'] = [_short(overlaps[way], OVERLAP_DIGITS) for way in WAYS]
    stale_NK = right_KN.T
  return rows


def _short(values: Any, digits: int) -> list[float]:
  """Rounded numbers, whole ones as int: most of a JSON file are ones."""
  rounded = [round(float(value), digits) for value in values]
  return [value if value % 1 else int(value) for value in rounded]


def energy_cases(args: argparse.Namespace) -> Iterator[Case]:
  """All saved gradients, then synthetic ones."""

  def no_gradients():
    raise AbsentError('no gradients: run `save` first')

  for size in args.size:
    path = args.gradients / f'{size}.npz'
    if not path.exists():
      yield Case({'size': size}, no_gradients)
      continue
    # A clock that runs out then lacks some of each kind.
    for (layer, kind), grads in sorted(
      runs.read_gradients(path).items(), key=lambda item: item[0][0]
    ):
      ranks = ranks_of(grads[min(grads)].shape[1], CURVE)
      key = {'size': size, 'layer': layer, 'kind': kind}
      yield Case(key, functools.partial(energy_rows, grads, ranks))
  for m, n in SYNTHETIC_SHAPES:
    yield Case(
      {'size': SYNTHETIC, 'kind': f'{m} x {n}'},
      lambda m=m, n=n: energy_rows({0: synthetic(m, n)}, ranks_of(n, SHARES)),
    )


# Time.


def racer(name: str, grad_MN: jax.Array, rank: int) -> turns.Racer:
  """A fit, compiled, whose steps repeat it so often that they can be timed."""
  given = grad_MN, FITS[name].init(grad_MN.shape, rank, 0), jnp.int32(1)
  lowered = JITTED[name].lower(*given)
  program = programs.Repeated(lowered, lambda compiled: compiled(*given))
  found = turns.Racer(name, program)
  repeats = int(TURN_SECONDS / found.second_s)
  program.repeats = min(max(repeats, 1), MOST_REPEATS)
  return found


def time_row(
  grad_MN: np.ndarray, rank: int, slowness: dict[str, float], clock: Clock
) -> Row:
  """Times all fits of one matrix in turns.

  Fits that would take longer than there is time are left out: `slowness` keeps
  the seconds of each for m n^2 = 1, as far as they are known.
  """
  size = grad_MN.shape[0] * grad_MN.shape[1] ** 2
  matrix = _scaled(grad_MN)
  row: Row = {}
  racers: dict[str, turns.Racer] = {}
  planned = 0.0  # Seconds of what was taken on, with the two first steps.
  for name in reversed(FITS):  # The fast ones first.
    expected = slowness.get(name, 0.0) * size
    try:
      if planned + (FEWEST_ROUNDS + 2) * expected > clock.seconds_left:
        raise AbsentError(f'left out: about {expected:.1f} s a refresh')
      racers[name] = racer(name, matrix, rank)
      planned += FEWEST_ROUNDS * expected
    except Exception as error:  # Whatever it is, the others race.
      row[name] = {'absent': turns.reason(error)}
  # A quarter of the time for more rounds than the fewest.
  limits = {'least': FEWEST_ROUNDS, 'clock': clock.share(4), 'rest': 0}
  turns.rounds(list(racers.values()), MOST_ROUNDS, 1, **limits)
  exact = racers.get('exact')
  for name, found in racers.items():
    repeats = found.method.repeats
    seconds = [x / repeats for x in turns.quartiles(found.turns)]
    slowness[name] = seconds[1] / size
    row[name] = {'seconds': seconds, 'ratio': None}
    if exact:
      ratios = turns.ratio_quartiles(found.turns, exact.turns)
      row[name]['ratio'] = [x / repeats * exact.method.repeats for x in ratios]
    row[name]['rounds'] = len(found.turns)
    row[name]['compile_seconds'] = round(found.method.compile_s, 2)
  return row


def time_cases(args: argparse.Namespace) -> Iterator[Case]:
  """Every shape, on a saved gradient where there is one."""
  real: dict[tuple[int, ...], tuple[str, np.ndarray]] = {}
  for path in sorted(args.gradients.glob('*.npz')):
    for (layer, kind), grads in runs.read_gradients(path).items():
      grad_MN = grads[max(grads)]
      real[grad_MN.shape] = f'gradient: {path.stem} {layer}/{kind}', grad_MN
  slowness: dict[str, float] = {}

  def take(shape: tuple[int, int], rank: int, clock: Clock) -> Row:
    name, grad_MN = real.get(shape) or (SYNTHETIC, synthetic(*shape))
    return {'matrix': name, **time_row(grad_MN, rank, slowness, clock)}

  shares = sorted(SHARES)
  for shape, share in sorted(
    itertools.product(SHAPES, shares),
    # The largest may take all the time there is.
    key=lambda g: (g[0][1] > 1024, shares.index(g[1]), g[0][1], g[0][0]),
  ):
    (rank,) = ranks_of(shape[1], (share,))
    key = {'shape': list(shape), 'rank': rank}
    yield Case(key, functools.partial(take, shape, rank), clock='all')
