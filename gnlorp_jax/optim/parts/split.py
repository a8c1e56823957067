"""Optimizers in two halves: project the gradients, then act on the result.

Projecting a gradient is linear. Projected gradients may be summed over
micro-batches and devices, and clipped, before an optimizer sees them, in a
fraction of the gradients' memory. A `SplitTransformation` is an ordinary
transformation whose `update` is its two halves in a row, and it offers each
half by itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

LabelFn = Callable[[optax.Params], Any]


class RefreshContext(NamedTuple):
  """Whether bases may be refitted, and which gradients they are fitted to.

  Attributes:
    due: bool ``[]``, whether bases may be refitted now; those that are due are.
    total: Maps an array that each device has its own of to their sum.
  """

  due: Any = True
  total: Callable[[jax.Array], jax.Array] = lambda x: x


ProjectFn = Callable[
  [optax.Updates, Any, Any, RefreshContext], tuple[Any, optax.OptState]
]
ApplyFn = Callable[..., tuple[optax.Updates, optax.OptState]]
UpdateFn = Callable[..., tuple[optax.Updates, optax.OptState]]


@dataclasses.dataclass(frozen=True)
class SplitUpdate:
  """The update function of a transformation in two halves.

  Attributes:
    project: ``project(grads, state, params, context) -> (projected, state)``:
      refits the bases that are due (see `RefreshContext`) and projects the
      gradients. With the bases of the new state, `projected` is linear in
      `grads`.
    apply: ``apply(projected, state, params, **extra_args) -> (updates,
      state)``: the rest of the step.
    whole: The update function itself, where calling the two halves one after
      the other would do work twice or ask for parameters that it can do
      without; None calls them.
  """

  project: ProjectFn
  apply: ApplyFn
  whole: UpdateFn | None = None

  def __call__(
    self,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    """Updates and state after a step, as of any transformation."""
    if self.whole is not None:
      return self.whole(updates, state, params, **extra_args)
    projected, state = self.project(updates, state, params, RefreshContext())
    return self.apply(projected, state, params, **extra_args)


class SplitTransformation(optax.GradientTransformationExtraArgs):
  """A transformation that can stop between a linear half and the rest.

  Attributes:
    init: As of any transformation.
    update: Both halves in a row; it holds them, so that this is a pair of
      functions like every transformation.
  """

  update: SplitUpdate

  @property
  def project_fn(self) -> ProjectFn:
    """The first half, see `SplitUpdate`."""
    return self.update.project

  @property
  def apply(self) -> ApplyFn:
    """The second half, see `SplitUpdate`."""
    return self.update.apply

  def project(
    self,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **context: Any,
  ) -> tuple[Any, optax.OptState]:
    """The first half, with the fields of a `RefreshContext` by their names."""
    return self.project_fn(grads, state, params, RefreshContext(**context))


def split(
  init_fn: Callable[[optax.Params], optax.OptState],
  project_fn: ProjectFn,
  apply_fn: ApplyFn,
  update_fn: UpdateFn | None = None,
) -> SplitTransformation:
  """Makes a `SplitTransformation` of the parts of a `SplitUpdate`."""
  return SplitTransformation(
    init_fn, SplitUpdate(project_fn, apply_fn, update_fn)
  )


def as_split(tx: optax.GradientTransformation) -> SplitTransformation:
  """Any transformation as one that leaves gradients as large as they are."""
  if isinstance(tx, SplitTransformation):
    return tx
  tx = optax.with_extra_args_support(tx)
  return split(
    tx.init,
    lambda grads, state, params, context: (grads, state),
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
  head, tail = first, optax.chain(*rest)

  def project_fn(
    grads: optax.Updates, state: Any, params: Any, context: RefreshContext
  ) -> tuple[Any, optax.OptState]:
    projected, first_state = head.project_fn(grads, state[0], params, context)
    return projected, (first_state, *state[1:])

  def apply_fn(
    projected: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, first_state = head.apply(projected, state[0], params, **extra_args)
    updates, rest_state = tail.update(updates, state[1:], params, **extra_args)
    return updates, (first_state, *rest_state)

  return split(whole.init, project_fn, apply_fn, whole.update)


def partition(
  transforms: Mapping[str, optax.GradientTransformation],
  init_labels: LabelFn,
  labels: LabelFn,
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
  halves = {label: as_split(tx) for label, tx in transforms.items()}

  def project_fn(
    grads: optax.Updates, state: Any, params: Any, context: RefreshContext
  ) -> tuple[Any, optax.OptState]:
    tree = labels(grads)
    projected, states = {}, {}
    for label, tx in halves.items():
      projected[label], inner_state = tx.project_fn(
        _labelled(grads, tree, label),
        state.inner_states[label].inner_state,
        None if params is None else _labelled(params, tree, label),
        context,
      )
      states[label] = optax.MaskedState(inner_state)
    return projected, state._replace(inner_states=states)

  def apply_fn(
    projected: Any, state: Any, params: Any, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    tree = labels(params)
    updates, states = {}, {}
    for label, tx in halves.items():
      updates[label], inner_state = tx.apply(
        projected[label],
        state.inner_states[label].inner_state,
        _labelled(params, tree, label),
        **extra_args,
      )
      states[label] = optax.MaskedState(inner_state)
    merged = jax.tree.map(
      lambda label, *updates: updates[list(halves).index(label)],
      tree,
      *updates.values(),
    )
    return merged, state._replace(inner_states=states)

  return split(init_fn, project_fn, apply_fn, update_fn)


def _labelled(tree: Any, labels: Any, label: str) -> Any:
  """What bears a label; in the place of the rest stands nothing."""
  return jax.tree.map(
    lambda found, node: node if found == label else optax.MaskedNode(),
    labels,
    tree,
  )
