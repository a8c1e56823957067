"""Optimizers in two halves: make a gradient small, then act on what is left.

Projecting a gradient is linear. What it leaves may be summed over
micro-batches and devices, and clipped, before an optimizer sees it, in a
fraction of the gradient's memory. A `SplitTransformation` is an ordinary
transformation whose `update` is its two halves in a row, and it offers each
half by itself.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

Labels = Callable[[optax.Params], Any]


class Look(NamedTuple):
  """How a refresh of the bases sees the gradients it is shown.

  Attributes:
    due: bool ``[]``, whether bases may be refitted now; those that are due are.
    total: Maps an array that each device has its own of to their sum.
  """

  due: Any = True
  total: Callable[[jax.Array], jax.Array] = lambda x: x


class SplitTransformation(
  optax.GradientTransformationExtraArgs  # type: ignore[misc]
):
  """A transformation that can stop between a linear half and the rest.

  Attributes:
    init: As of any transformation.
    update: ``project``, then ``apply``.
    project_fn: ``project_fn(grads, state, params, look) -> (small, state)``:
      refits the bases that are due (see `Look`) and makes the gradients small.
      With the bases of the new state, `small` is linear in `grads`.
    apply: ``apply(small, state, params, **extra_args) -> (updates, state)``:
      the rest of the step.
  """

  project_fn: Callable[..., tuple[Any, optax.OptState]]
  apply: Callable[..., tuple[optax.Updates, optax.OptState]]

  def project(
    self,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **look: Any,
  ) -> tuple[Any, optax.OptState]:
    """`project_fn` with the fields of a `Look` by their names."""
    return self.project_fn(grads, state, params, Look(**look))


def split(
  init_fn: Callable[[optax.Params], optax.OptState],
  project_fn: Callable[..., tuple[Any, optax.OptState]],
  apply_fn: Callable[..., tuple[optax.Updates, optax.OptState]],
  update_fn: Callable[..., tuple[optax.Updates, optax.OptState]] | None = None,
) -> SplitTransformation:
  """Makes a `SplitTransformation`; without `update_fn` of the two halves."""

  def both_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    small, state = project_fn(updates, state, params, Look())
    return apply_fn(small, state, params, **extra_args)

  tx = SplitTransformation(init_fn, update_fn or both_fn)
  tx.project_fn = project_fn
  tx.apply = apply_fn
  return tx


def as_split(tx: optax.GradientTransformation) -> SplitTransformation:
  """Any transformation as one that leaves gradients as large as they are."""
  if isinstance(tx, SplitTransformation):
    return tx
  tx = optax.with_extra_args_support(tx)
  return split(
    tx.init,
    lambda grads, state, params, look: (grads, state),
    tx.update,
    tx.update,
  )


def chain(
  first: optax.GradientTransformation, *rest: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """`optax.chain` that stays split where its first link is."""
  whole = optax.chain(first, *rest)
  if not isinstance(first, SplitTransformation):
    return whole
  head = first
  tail = optax.chain(*rest)

  def project_fn(
    grads: optax.Updates, state: Any, params: Any, look: Look
  ) -> tuple[Any, optax.OptState]:
    small, first_state = head.project_fn(grads, state[0], params, look)
    return small, (first_state, *state[1:])

  def apply_fn(
    small: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, first_state = head.apply(small, state[0], params, **extra_args)
    updates, rest_state = tail.update(updates, state[1:], params, **extra_args)
    return updates, (first_state, *rest_state)

  return split(whole.init, project_fn, apply_fn, whole.update)


def partition(
  transforms: Mapping[str, optax.GradientTransformation],
  init_labels: Labels,
  labels: Labels,
) -> optax.GradientTransformationExtraArgs:
  """`optax.partition` that stays split where one of its parts is.

  Args:
    transforms: A transformation for every label.
    init_labels: Maps parameters to their labels; it may complain.
    labels: The same for a part of the parameters, which no longer complains.

  Returns:
    A transformation. Its `update` also takes a part of the parameters, with
    the state of that part.
  """
  init_fn = optax.partition(transforms, init_labels).init
  update_fn = optax.partition(transforms, labels).update
  if not any(isinstance(t, SplitTransformation) for t in transforms.values()):
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
  parts = {label: as_split(tx) for label, tx in transforms.items()}

  def masked(tree: Any, found: Any, label: str) -> Any:
    return jax.tree.map(
      lambda mine, node: node if mine == label else optax.MaskedNode(),
      found,
      tree,
    )

  def project_fn(
    grads: optax.Updates, state: Any, params: Any, look: Look
  ) -> tuple[Any, optax.OptState]:
    found = labels(grads)
    small, states = {}, {}
    for label, tx in parts.items():
      small[label], mine = tx.project_fn(
        masked(grads, found, label),
        state.inner_states[label].inner_state,
        None if params is None else masked(params, found, label),
        look,
      )
      states[label] = optax.MaskedState(mine)
    return small, state._replace(inner_states=states)

  def apply_fn(
    small: Any, state: Any, params: Any, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    found = labels(params)
    updates, states = {}, {}
    for label, tx in parts.items():
      updates[label], mine = tx.apply(
        small[label],
        state.inner_states[label].inner_state,
        masked(params, found, label),
        **extra_args,
      )
      states[label] = optax.MaskedState(mine)
    merged = jax.tree.map(
      lambda label, *candidates: candidates[list(parts).index(label)],
      found,
      *updates.values(),
    )
    return merged, state._replace(inner_states=states)

  return split(init_fn, project_fn, apply_fn, update_fn)
