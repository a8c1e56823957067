"""Which parameters decay, where not all of them do."""

import re
from typing import Any

import jax
import numpy as np
import optax

from gnlorp_jax.optim.parts.plain import (
  broadcast_prefix,
  is_function,
  path_name,
  plain,
)
from gnlorp_jax.optim.parts.split import SplitTransformation, split

# What libraries call biases and the parameters of norms, and their modules.
_SPARED = re.compile(
  r'(?i)(^|/)('
  r'(bias|b|scale|offset)$'
  r'|(\w*_)?(layer|batch|group|instance|rms)?_?norm(_?\w+)?(/|$)'
  r'|(ln|bn)(_?\w*\d\w*|_\w+)?(/|$))'
)


def spare_norms_and_biases(params: optax.Params) -> optax.Params:
  """A `weight_decay_mask` under which norms and biases do not decay.

  As trainers of transformers have it. What decays is told by names alone: a
  path with a bias, a scale, an offset or a norm in it does not.

  Args:
    params: Parameters, or their shapes.

  Returns:
    A plain tree of booleans, see `plain`.

  Examples:
    >>> params = {'mlp': {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones(2)}}
    >>> spare_norms_and_biases(params)
    {'mlp': {'bias': False, 'kernel': True}}
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not _SPARED.search(path_name(path)), plain(params)
  )


def with_decay_mask(
  inner: optax.GradientTransformation, mask: Any
) -> optax.GradientTransformationExtraArgs:
  """Tells `inner` which parameters decay.

  Args:
    inner: A transformation that ends in `descend`.
    mask: A tree of booleans like the parameters, or a prefix of one; or a
      function that makes one of the parameters as the caller has them.

  Returns:
    The wrapped transformation, split where `inner` is; its `update` needs
    `params`.

  Raises:
    ValueError: At `init`, if the mask is no tree of booleans like the
      parameters.
  """
  inner_tx = optax.with_extra_args_support(inner)

  def tree_of(params: Any) -> Any:
    tree = mask(params) if is_function(mask) else mask
    decays = broadcast_prefix('weight_decay_mask', tree, plain(params))
    for path, value in jax.tree_util.tree_leaves_with_path(decays):
      if not isinstance(value, bool | np.bool_):
        raise ValueError(
          f'weight_decay_mask has {value!r} for {path_name(path)!r}: it must '
          'be True or False.'
        )
    return decays

  def init_fn(params: optax.Params) -> optax.OptState:
    if jax.tree.leaves(params):  # optax.tree.map_params asks with none.
      tree_of(params)
    return inner_tx.init(params)

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    return inner_tx.update(
      updates, state, params, decay_mask=tree_of(params), **extra_args
    )

  if not isinstance(inner, SplitTransformation):
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  def apply_fn(
    projected: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    return inner.apply(
      projected, state, params, decay_mask=tree_of(params), **extra_args
    )

  return split(init_fn, inner.project_fn, apply_fn, update_fn)
