"""The batch of a step, chosen from a pool: what the training loop calls.

Features and their distances are computed on the devices; which examples are
picked is decided on the host, from two small matrices and a seed, so that it
does not depend on how many devices there are.

Shape suffixes in this file:
  N  examples of a pool
  B  examples of a batch
  F  entries of a feature
  S  sources
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gnlorp_jax.training import sharding
from gnlorp_jax.training.selection import features, normalising, picking
from gnlorp_jax.training.state import TrainState
from gnlorp_jax.training.step import Batch, split_rows

Arrays = dict[str, Any]


class Rule(NamedTuple):
  """How a batch is chosen.

  Attributes:
    pool: N.
    budget: B.
    small: Sources that are kept whole.
    sources: Names of all sources.
    selector: How the others are picked.
    ties: Of facility location.
    features: What examples are compared by; None for a random choice.
    directions: Of ``spsa``.
    adam: Whether features are normalised as Adam does.
    sketch: Most entries of a sketch of ``exact`` features; None: no sketch.
    top: Entries that facility location compares; None compares all.
    rows_at_once: Rows of the pool that go through the model together.
    seed: Decides all that is random.
  """

  pool: int
  budget: int
  small: tuple[int, ...]
  sources: tuple[str, ...]
  selector: picking.Selector
  ties: picking.Ties
  features: Literal['exact', 'spsa'] | None
  directions: int
  adam: bool
  sketch: int | None
  top: int | None
  rows_at_once: int
  seed: int


class Memory(NamedTuple):
  """What goes from step to step, and into checkpoints.

  Attributes:
    step: int32, steps so far.
    moments: Adam's, ``mu`` and ``nu``, float32 ``[F]``; ``{}`` without it.
    offered_S: int32, examples that pools had so far.
    picked_S: int32, examples that batches had.
    not_finite: int32, examples left out because their feature was no number.
    surplus: int32, examples of small sources without room in the batch.
  """

  step: jax.Array
  moments: Arrays
  offered_S: jax.Array
  picked_S: jax.Array
  not_finite: jax.Array
  surplus: jax.Array


class Selection(NamedTuple):
  """Chooses the batch of a step among candidates.

  Attributes:
    abstract: Shapes and shardings of the memory.
    start: Makes the memory at step 0.
    choose: ``choose(memory, state, candidates, *constants)``: the memory after
      the step, the batch, and facts of the choice by name. Constants are what
      steps take beside state and batch: frozen weights.
  """

  abstract: Any
  start: Callable[[], Any]
  choose: Callable[..., tuple[Any, Batch, dict[str, float]]]


def without_memory(choose: Callable[[TrainState, Batch], Batch]) -> Selection:
  """A selection that remembers nothing, by ``choose(state, candidates)``."""
  return Selection(
    abstract={},
    start=dict,
    choose=lambda memory, state, candidates, *constants: (
      memory,
      choose(state, candidates),
      {},
    ),
  )


class Choice(NamedTuple):
  """Which examples of a pool make up a batch.

  Attributes:
    index_B: The examples, int32; what fills up the batch repeats the first.
    counts_B: float32, 0 for what fills it up.
    learns_N: Whether Adam's moments learn an example.
    surplus: Examples of small sources without room.
    error: Relative error of the mean feature; not a number without features.
  """

  index_B: np.ndarray
  counts_B: np.ndarray
  learns_N: np.ndarray
  surplus: int
  error: float


def make(
  rule: Rule, tail: features.Tail | None, mesh: jax.sharding.Mesh
) -> Selection:
  """Puts together how batches are chosen; compiles nothing yet.

  Args:
    rule: The rule.
    tail: The model, where the rule needs features.
    mesh: The devices.
  """
  whole, rows = NamedSharding(mesh, P()), sharding.batch_sharding(mesh)
  measured = jax.jit(
    functools.partial(measure, rule, tail), out_shardings=(rows, whole)
  )
  taken = jax.jit(take, out_shardings=(whole, rows))
  zeros = functools.partial(_start, rule, tail)
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    jax.eval_shape(zeros),
  )

  def choose(
    memory: Memory, state: TrainState, candidates: Batch, frozen: Any
  ) -> tuple[Memory, Batch, dict[str, float]]:
    found, seen = measured(state.params, frozen, memory, candidates)
    host = jax.device_get(seen)
    choice = decide(rule, host, int(jax.device_get(memory.step)))
    memory, batch = taken(
      memory,
      found,
      candidates,
      choice.index_B,
      choice.counts_B,
      choice.learns_N,
      _counts(rule, host, choice),
    )
    # Moments may be as large as the matrix: they stay where they are.
    told = jax.device_get(memory._replace(moments={}))
    return memory, batch, _facts(rule, host, choice, told)

  return Selection(abstract, jax.jit(zeros, out_shardings=whole), choose)


def feature_size(rule: Rule, tail: features.Tail | None) -> int:
  """F, entries of the feature of an example; 0 without features."""
  if tail is None or rule.features is None:
    return 0
  if rule.features == 'spsa' and not rule.adam:
    return rule.directions
  if rule.sketch is not None:
    return math.prod(features.sketch_shape(tail.shape, rule.sketch))
  return math.prod(tail.shape)


def _start(rule: Rule, tail: features.Tail | None) -> Memory:
  # No checkpoint holds arrays without entries.
  names = ('mu', 'nu') if rule.adam else ()
  size = feature_size(rule, tail)
  zero, count = jnp.zeros((), jnp.int32), len(rule.sources)
  return Memory(
    step=zero,
    moments={name: jnp.zeros(size, jnp.float32) for name in names},
    offered_S=jnp.zeros(count, jnp.int32),
    picked_S=jnp.zeros(count, jnp.int32),
    not_finite=zero,
    surplus=zero,
  )


def measure(
  rule: Rule,
  tail: features.Tail | None,
  params: Any,
  frozen: Any,
  memory: Memory,
  candidates: Batch,
) -> tuple[Arrays, Arrays]:
  """Features of a pool, and what the host needs to decide.

  Args:
    rule: The rule.
    tail: The model, if it is asked.
    params: What trains, as stored.
    frozen: What does not.
    memory: Of the steps before.
    candidates: The pool, with ``source`` int32 ``[N]``; without, all is of one.

  Returns:
    ``features`` ``[N, F]``, 0 where they are no numbers; and by name
    ``source``, ``is_real`` (something is learned of it), ``is_finite`` and,
    where there are features, ``gram`` and ``distance``.
  """
  is_real_N = candidates['weights'].sum(axis=1) > 0
  source_N = candidates.get('source')
  if source_N is None:
    source_N = jnp.zeros(is_real_N.shape, jnp.int32)
  seen = {'source': source_N, 'is_real': is_real_N}
  if tail is None or rule.features is None:
    return {}, seen | {'is_finite': jnp.ones_like(is_real_N)}
  found_NF = _features(rule, tail, params, frozen, candidates)
  is_finite_N = jnp.isfinite(found_NF).all(axis=1)
  found_NF = jnp.where(is_finite_N[:, None], found_NF, 0)
  seen |= {'is_finite': is_finite_N, 'gram': normalising.gram(found_NF)}
  if rule.selector == 'facility':
    counts_N = is_real_N & is_finite_N
    seen['distance'] = _distances(rule, found_NF, source_N, counts_N, memory)
  return {'features': found_NF}, seen


def _features(
  rule: Rule,
  tail: features.Tail,
  params: Any,
  frozen: Any,
  candidates: Batch,
) -> jax.Array:
  """Features ``[N, F]``, some rows of the pool after the other."""
  key = jax.random.key(rule.seed)
  stored = tail.parameters.join(params, frozen)
  weights = features.weights_of(tail, stored)
  sketch = None
  if rule.sketch is not None:
    sketch = features.sketch_of(tail, rule.sketch, key)

  def of_rows(batch: Batch) -> jax.Array:
    x_BTD = features.before_last(tail, stored, weights, batch)
    if rule.features == 'exact':
      return features.exact_gradients(tail, weights, x_BTD, batch, sketch)
    slopes_BM = features.derivatives(
      tail, weights, x_BTD, batch, key, rule.directions
    )
    if not rule.adam:
      return slopes_BM / rule.directions**0.5
    return features.reconstructed(tail, slopes_BM, key)

  read = ('inputs', 'segments', 'positions', 'targets', 'weights')
  pool = {name: candidates[name] for name in read if name in candidates}
  count = rule.pool // rule.rows_at_once
  if count == 1:
    return of_rows(pool)
  found_KBF = jax.lax.map(of_rows, split_rows(pool, count))
  # Chunk k had rows k::K.
  return jnp.moveaxis(found_KBF, 0, 1).reshape(rule.pool, -1)


def _distances(
  rule: Rule,
  found_NF: jax.Array,
  source_N: jax.Array,
  counts_N: jax.Array,
  memory: Memory,
) -> jax.Array:
  if rule.adam:
    found_NF = normalising.adam(
      found_NF, memory.moments['mu'], memory.moments['nu'], memory.step + 1
    )
  if rule.top is not None and rule.top < found_NF.shape[1]:
    found_NF = normalising.sparsify(
      found_NF, source_N, counts_N, len(rule.sources), rule.top
    )
  return normalising.distances(found_NF)


def decide(rule: Rule, seen: Arrays, step: int) -> Choice:
  """Chooses the examples of a batch; the same from the same numbers.

  Args:
    rule: The rule.
    seen: What `measure` found, on the host.
    step: Steps before this one.
  """
  source_N = np.asarray(seen['source'])
  can_N = np.asarray(seen['is_real'] & seen['is_finite'])
  rng = np.random.default_rng([rule.seed, step])
  frame = picking.frame(
    source_N, can_N, rule.small, rule.budget, len(rule.sources), rng
  )
  if rule.selector == 'herding':
    picked = picking.herding(seen['gram'], source_N, can_N, frame)
  elif rule.selector == 'facility':
    picked = picking.by_source(
      frame,
      source_N,
      can_N,
      lambda members, quota: members[
        picking.facility(
          seen['distance'][np.ix_(members, members)], quota, rule.ties
        )
      ],
    )
  else:
    picked = picking.by_source(
      frame,
      source_N,
      can_N,
      lambda members, quota: picking.at_random(members, quota, rng),
    )
  taken = np.concatenate([frame.kept, picked])
  filling = rule.budget - len(taken)
  first = taken[0] if len(taken) else 0
  learns_N = np.zeros(rule.pool, bool)
  learns_N[picked] = True
  error = float('nan')
  if 'gram' in seen:
    error = picking.relative_error(seen['gram'], can_N, taken)
  return Choice(
    index_B=np.append(taken, [first] * filling).astype(np.int32),
    counts_B=(np.arange(rule.budget) < len(taken)).astype(np.float32),
    learns_N=learns_N,
    surplus=frame.surplus,
    error=error,
  )


def _counts(rule: Rule, seen: Arrays, choice: Choice) -> Arrays:
  """What this step adds to the counts of the memory."""
  source_N, size = seen['source'], len(rule.sources)
  taken = choice.index_B[choice.counts_B > 0]
  is_lost_N = seen['is_real'] & ~seen['is_finite']
  return {
    'offered_S': np.bincount(source_N[seen['is_real']], minlength=size),
    'picked_S': np.bincount(source_N[taken], minlength=size),
    'not_finite': np.count_nonzero(is_lost_N),
    'surplus': choice.surplus,
  }


def take(
  memory: Memory,
  found: Arrays,
  candidates: Batch,
  index_B: jax.Array,
  counts_B: jax.Array,
  learns_N: jax.Array,
  counts: Arrays,
) -> tuple[Memory, Batch]:
  """The memory after a step, and the batch that was chosen.

  Args:
    memory: Of the steps before.
    found: Features.
    candidates: The pool.
    index_B: As in `Choice`, as are the next two.
    counts_B: What of the batch counts.
    learns_N: What Adam's moments learn.
    counts: What is added to the counts.

  Returns:
    The batch has no ``source``: steps ask for none.
  """
  moments = memory.moments
  if moments:
    mu_F, nu_F = normalising.moments(
      found['features'], moments['mu'], moments['nu'], learns_N
    )
    moments = {'mu': mu_F, 'nu': nu_F}
  added = {
    name: getattr(memory, name) + jnp.asarray(value, jnp.int32)
    for name, value in counts.items()
  }
  batch = {
    name: rows[index_B] for name, rows in candidates.items() if name != 'source'
  }
  batch['weights'] *= counts_B[:, None]
  memory = memory._replace(step=memory.step + 1, moments=moments, **added)
  return memory, batch


def _facts(
  rule: Rule, seen: Arrays, choice: Choice, memory: Memory
) -> dict[str, float]:
  """What rows of metrics say of a choice; counts are of all steps so far."""
  facts = {
    'not_finite': float(memory.not_finite),
    'without_room': float(memory.surplus),
  }
  for number, name in enumerate(rule.sources):
    facts[f'offered/{name}'] = float(memory.offered_S[number])
    facts[f'picked/{name}'] = float(memory.picked_S[number])
  if 'gram' in seen:
    norm_N = np.sqrt(np.diag(seen['gram']))
    can_N = seen['is_real'] & seen['is_finite']
    taken = choice.index_B[choice.counts_B > 0]
    for name, norms in (('pool', norm_N[can_N]), ('picked', norm_N[taken])):
      facts[f'{name}_norm'] = float(norms.mean()) if len(norms) else 0.0
    facts['relative_error'] = choice.error
  return facts
