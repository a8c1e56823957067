"""Which parameters decay, where not all of them do."""

import re

import jax
import optax

from gnlorp_jax.optim.parts.plain import path_name, plain

# What libraries call the parameters of norms, and biases.
_SPARED = re.compile(
  r'(?i)(?<![^/])(bias|b|scale|offset|\w*norm\w*|ln(_\w+)?)(?![^/])'
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
