"""From the task vectors of a model, tensor by tensor, to what is added to it.

First all task vectors are seen once or more (`survey`), for what one tensor
cannot know: thresholds over all entries, the scale of DOGE's coefficients. Then
each tensor is merged on its own (`update`).

Shape suffixes in this file: N experts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnlorp_jax.merging import baselines, doge, thresholds

Method = Literal['average', 'task_arithmetic', 'ties', 'dare', 'tsv', 'doge']
MATRICES_ONLY = ('tsv', 'doge')
"""Methods that merge matrices alone."""
SCALES = {
  'task_arithmetic': 0.3,
  'ties': 1.0,
  'dare': 0.3,
  'tsv': 1.0,
  'doge': 0.3,
}
"""What the update is multiplied by, unless the options say otherwise."""
KEPT = {'ties': 20.0, 'dare': 10.0, 'doge': 30.0}
"""Percent of the entries that stay, of methods that drop some."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How task vectors are merged.

  Attributes:
    method: Name of the method. Task vectors play no part in an average.
    weights: A factor of the task vectors of each expert, or of their
      coefficients in DOGE. Nothing divides them by their sum.
    scale: Multiplies the update; of DOGE with `eta` 'auto' it is the length of
      a task vector's part in a typical tensor, over that of the task vector.
      None is that of `SCALES`.
    keep: Percent of the entries that stay, of each expert; None is `KEPT`'s.
    eta: DOGE: the length, in each tensor, of each task vector's part; 'auto' is
      `scale` times the median over the tensors of the mean length of the task
      vectors.
    subspace: DOGE: see `doge.modification`, as for the following.
    steps: Most steps.
    rate: Learning rate of Adam.
    solver: How Delta is found.
    inner: What the loss has an inner product of.
    project: Where Delta lies.
    seed: DARE: decides what is dropped.
  """

  method: Method
  weights: tuple[float, ...]
  scale: float | None = None
  keep: tuple[float, ...] | None = None
  eta: float | Literal['auto'] = 'auto'
  subspace: int = 6
  steps: int = 400
  rate: float = 1e-4
  solver: doge.Solver = 'adam'
  inner: doge.Inner = 'row'
  project: doge.Project = 'complement'
  seed: int = 0

  @property
  def scaled(self) -> float:
    """The scale, the method's own where none is given."""
    return SCALES[self.method] if self.scale is None else self.scale

  @property
  def kept(self) -> tuple[float, ...]:
    """Percent that stays, by expert."""
    if self.keep is None:
      return (KEPT[self.method],) * len(self.weights)
    return self.keep


_PART = 2**21  # Entries of a tensor that are merged at once.


class Survey(NamedTuple):
  """What is known of all tensors before any is merged.

  Attributes:
    norms: Frobenius norms of the task vectors by tensor, ``[n]`` each.
    thresholds_N: Sizes below which entries are dropped, ``[n]``; None where the
      method has none.
    majority: The sign that stands for sums of zero in TIES.
    eta: DOGE's, as a number.
  """

  norms: dict[str, np.ndarray]
  thresholds_N: np.ndarray | None = None
  majority: float = 0.0
  eta: float | None = None


Read = Callable[[str], np.ndarray]
"""Gives the task vectors of a tensor by name, ``[n, *]``, float32."""


def stack(
  name: str, labels: Sequence[str], taus: Iterable[np.ndarray]
) -> np.ndarray:
  """Task vectors of one tensor side by side, ``[n, *]``, float32.

  Args:
    name: Name of the tensor.
    labels: Names of the experts.
    taus: Their task vectors, ``[*]``, taken one by one.

  Raises:
    ValueError: If a number is not finite.
  """
  tau_N = None
  for index, (label, tau) in enumerate(zip(labels, taus, strict=True)):
    if tau_N is None:
      tau_N = np.empty((len(labels), *tau.shape), np.float32)
    if not np.isfinite(tau).all():
      raise ValueError(
        f'{name} of {label} differs from the base by numbers that are not '
        'finite: one of the two holds NaN or infinity. Get the folders again, '
        f'or leave the tensor alone: --exclude {name}'
      )
    tau_N[index] = tau
  return tau_N


def survey(
  options: Options,
  names: Sequence[str],
  read: Read,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
  """Looks at all task vectors, one tensor at a time.

  Args:
    options: How they are merged.
    names: The tensors.
    read: Reads their task vectors; it is called up to three times for each.
    progress: Is called with how many tensors were read, and are to be read.

  Raises:
    ValueError: As `read`.
  """
  is_trimmed = options.method in ('ties', 'doge')
  count = len(options.weights)
  passes = {'ties': 3, 'doge': 2}.get(options.method, 1)
  done = 0

  def stream() -> Iterable[tuple[str, np.ndarray]]:
    nonlocal done
    for name in names:
      yield name, read(name)
      done += 1
      progress(done, passes * len(names))

  norms, sizes = {}, [0] * count
  coarse = thresholds.Histogram(count)
  for name, tau_N in stream():
    norms[name] = _norms(tau_N)
    sizes = [size + tau_N[0].size for size in sizes]
    if is_trimmed:
      coarse.add(tau_N)
    del tau_N  # Before the next one is read.
  found = Survey(norms)
  if options.method == 'doge':
    found = found._replace(eta=_eta(options, norms))
  if not is_trimmed or not names:
    return found
  ranks = [
    thresholds.rank(size, keep)
    for size, keep in zip(sizes, options.kept, strict=True)
  ]
  buckets, inside = coarse.find([rank or 0 for rank in ranks])
  fine = thresholds.Histogram(count, buckets)
  for _, tau_N in stream():
    fine.add(tau_N)
    del tau_N
  lows, _ = fine.find(inside)
  thresholds_N = np.array(
    [
      0 if rank is None else thresholds.value(bucket, low)
      for rank, bucket, low in zip(ranks, buckets, lows, strict=True)
    ],
    np.float32,
  )
  found = found._replace(thresholds_N=thresholds_N)
  if options.method == 'ties':
    total = 0.0
    for _, tau_N in stream():
      flat_N = tau_N.reshape(count, -1)
      for part in _parts(flat_N):
        signs = _signs(flat_N[:, part], _weights(options), thresholds_N)
        total += float(signs.sum())
      del tau_N, flat_N
    found = found._replace(majority=float(np.sign(total)))
  return found


def update(
  options: Options,
  found: Survey,
  name: str,
  labels: Sequence[str],
  tau_N: np.ndarray | jax.Array,
) -> tuple[np.ndarray, dict[str, Any]]:
  """What is added to a tensor of the base.

  Args:
    options: How task vectors are merged.
    found: What `survey` found.
    name: Name of the tensor.
    labels: Names of the experts.
    tau_N: Their task vectors, ``[n, *]``, of which one at least is not zero.

  Returns:
    The update, ``[*]``, and what there is to tell of it, numbers by name.
  """
  weights_N = _weights(options)
  if options.method not in MATRICES_ONLY:
    return _by_entries(options, found, name, labels, tau_N)
  # What the caller gave is forgotten: no more than one stack is held on.
  tau_N = jnp.asarray(tau_N)
  is_changed_N = found.norms[name] > 0
  if not is_changed_N.all():
    tau_N, weights_N = tau_N[is_changed_N], weights_N[is_changed_N]
  if options.method == 'tsv':
    scaled_N = tau_N * weights_N[:, None, None]
    merged = _tsv(scaled_N, num_experts=len(labels))
    return options.scaled * np.asarray(merged), {}
  return _doge(options, found, tau_N, weights_N, is_changed_N)


def _by_entries(
  options: Options,
  found: Survey,
  name: str,
  labels: Sequence[str],
  tau_N: np.ndarray,
) -> tuple[np.ndarray, dict[str, Any]]:
  """The update of a method that sees no rows and columns, in parts."""
  scaled_N = np.float32(options.scaled) * _weights(options)
  keys_N = [baselines.key_of(options.seed, name, label) for label in labels]
  flat_N = tau_N.reshape(len(tau_N), -1)
  merged = np.empty(flat_N.shape[1], np.float32)
  for index, part in enumerate(_parts(flat_N)):
    tau_part_N = flat_N[:, part]
    if options.method == 'task_arithmetic':
      merged[part] = _sum(tau_part_N, scaled_N)
    elif options.method == 'ties':
      merged[part] = options.scaled * _ties(
        tau_part_N, _weights(options), found.thresholds_N, found.majority
      )
    else:
      part_keys_N = [jax.random.fold_in(key, index) for key in keys_N]
      kept_N = np.array(options.kept, np.float32)
      merged[part] = _dare(tau_part_N, scaled_N, kept_N, jnp.stack(part_keys_N))
  notes = {}
  if options.method == 'ties':
    notes = _shares(tau_N, found.thresholds_N)
  return merged.reshape(tau_N.shape[1:]), notes


def _norms(tau_N: np.ndarray) -> np.ndarray:
  """Lengths of task vectors, ``[n]``, without a copy of all of them."""
  flat_N = tau_N.reshape(len(tau_N), -1)
  squares = [
    np.square(flat_N[:, part]).sum(1, dtype=np.float64)
    for part in _parts(flat_N)
  ]
  return np.sqrt(np.sum(squares, axis=0))


def _parts(flat_N: np.ndarray) -> list[slice]:
  """Entries that are merged at once: copies of them are small."""
  return [
    slice(start, start + _PART) for start in range(0, flat_N.shape[1], _PART)
  ]


def _doge(
  options: Options,
  found: Survey,
  tau_NOI: jax.Array,
  weights_N: np.ndarray,
  is_changed_N: np.ndarray,
) -> tuple[np.ndarray, dict[str, Any]]:
  """DOGE's update of a matrix, by the experts that changed it."""
  thresholds_N = found.thresholds_N[is_changed_N]
  lambda_N = weights_N * _coefficients(tau_NOI, found.eta)
  made = doge.modification(
    tau_NOI,
    lambda_N,
    num_experts=len(is_changed_N),
    subspace=options.subspace,
    steps=options.steps,
    rate=options.rate,
    solver=options.solver,
    inner=options.inner,
    project=options.project,
  )
  merged = _combine(tau_NOI, made.delta_OI, lambda_N, thresholds_N)
  length = float(jnp.linalg.norm(made.delta_OI))
  of_task = float(np.mean([np.linalg.norm(tau) for tau in tau_NOI]))
  all_lambda_N = np.zeros(len(is_changed_N))
  all_lambda_N[is_changed_N] = lambda_N
  return np.asarray(merged), {
    'lambda': all_lambda_N.tolist(),
    'loss_before': float(made.loss_before),
    'loss_after': float(made.loss_after),
    'delta_over_tau': length / of_task,
    **_shares(tau_NOI, thresholds_N),
  }


def _eta(options: Options, norms: dict[str, np.ndarray]) -> float:
  """The number that 'auto' stands for."""
  if options.eta != 'auto':
    return options.eta
  means = [float(n[n > 0].mean()) for n in norms.values() if (n > 0).any()]
  return options.scaled * float(np.median(means)) if means else 0.0


def _weights(options: Options) -> np.ndarray:
  return np.array(options.weights, np.float32)


def _shares(tau_N: np.ndarray, thresholds_N: np.ndarray) -> dict[str, Any]:
  """The share of entries that stay, over the experts."""
  kept = sum(
    np.count_nonzero(np.abs(tau) >= threshold)
    for tau, threshold in zip(tau_N, thresholds_N, strict=True)
  )
  return {'kept': kept / max(1, math.prod(tau_N.shape))}


@jax.jit
def _trimmed(tau_N, weights_N, thresholds_N):
  trimmed_N = baselines.trim(tau_N, thresholds_N)
  return trimmed_N * weights_N.reshape(-1, *[1] * (tau_N.ndim - 1))


@jax.jit
def _signs(tau_N, weights_N, thresholds_N):
  return baselines.signs(_trimmed(tau_N, weights_N, thresholds_N))


@jax.jit
def _ties(tau_N, weights_N, thresholds_N, majority):
  return baselines.ties(_trimmed(tau_N, weights_N, thresholds_N), majority)


@jax.jit
def _dare(tau_N, weights_N, keep_N, keys_N):
  def add(total, one):
    tau, weight, keep, key = one
    return total + weight * baselines.dare(tau, keep, key), None

  start = jnp.zeros_like(tau_N[0])
  return jax.lax.scan(add, start, (tau_N, weights_N, keep_N, keys_N))[0]


_sum = jax.jit(baselines.task_arithmetic)
_tsv = jax.jit(baselines.tsv, static_argnames='num_experts')
_coefficients = jax.jit(doge.coefficients)
_combine = jax.jit(doge.combine)
