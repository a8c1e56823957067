"""What every family of models shares: its functions, its fields, its checks.

A family is a module of `families`. A model of it is a `Model`: pure functions
of a plain nested dict of arrays, whose layers are stacked under 'layers'.

Shape suffixes in this file:
  B, T  batch, position in the sequence
  D     width of the residual stream
  V, C  vocabulary, classes (or 1 for a regression)
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

Config = TypeVar('Config')
Params = dict[str, Any]
Dtype = Literal['float32', 'bfloat16']

FREE_ON_RESUME: Mapping[str, Any] = {'on_resume': 'free'}
"""Metadata of a field that a run may choose anew when it resumes."""

KEPT_FROM_RUN: Mapping[str, Any] = {'from_run': True}
"""Metadata of a field of which a run keeps its value where the architecture
comes from a Hugging Face folder."""

FREE_IN_RUN: Mapping[str, Any] = {**FREE_ON_RESUME, **KEPT_FROM_RUN}
"""Metadata of a field of which both are true."""

CHOSEN_BY_RUN: Mapping[str, Any] = {'on_resume': 'result', **KEPT_FROM_RUN}
"""The same of a field that changes results: runs that are compared share it."""


class LayerFns(NamedTuple):
  """A model layer by layer.

  `embed`, then `block` for every layer with the mask of `mask`, then `head` is
  `Model.apply`, of a masked LM for sequences without padding. Dropout is active
  where a key is given; each call needs one that no other call has.

  Attributes:
    embed: Maps (params, tokens ``[B, T]``, dropout key = None) to x
      ``[B, T, D]``.
    block: Maps (one layer's slice of `params['layers']`, x ``[B, T, D]``, mask
      = None, dropout key = None) to x ``[B, T, D]``. A mask, bool ``[B, T]``,
      is True where a position may be attended to; None: everywhere. A decoder
      takes None alone.
    head: The rest, in float32. Language models: maps (params, x ``[*, D]``,
      dropout key = None) to logits ``[*, V]``; positions are independent, so a
      loss may call it piece by piece. Classifiers: maps (params, x
      ``[B, T, D]``, dropout key = None) to ``[B, C]``.
    mask: Maps tokens ``[B, T]`` to the mask of every block, or to None.

  `embed` and `head` do without `params['layers']`.
  """

  embed: Callable[..., jax.Array]
  block: Callable[..., jax.Array]
  head: Callable[..., jax.Array]
  mask: Callable[[jax.Array], jax.Array | None]


class Model(NamedTuple):
  """A model as pure functions of a plain nested dict of parameters.

  Dropout is active where a key is given: that of the model at the rates of its
  configuration, and that of its adapters (see `adapters.adapt`).

  Attributes:
    config: The architecture.
    init: Maps a random key to params.
    hidden: Maps (params, tokens ``[B, T]``, dropout key = None) to x
      ``[B, T, D]``, in compute dtype: what `logits` takes.
    logits: The head alone, in float32. Language models: maps (params, x
      ``[*, D]``, dropout key = None) to ``[*, V]``; positions are independent,
      so a loss may call it piece by piece. Classifiers: maps (params, x
      ``[B, T, D]``, dropout key = None) to ``[B, C]``, from the first position.
    apply: Maps (params, tokens ``[B, T]``, dropout key = None) to float32
      logits, ``[B, T, V]`` or ``[B, C]``.
    layer_fns: The same layer by layer.
  """

  config: Any
  init: Callable[[jax.Array], Params]
  hidden: Callable[..., jax.Array]
  logits: Callable[..., jax.Array]
  apply: Callable[..., jax.Array]
  layer_fns: LayerFns


def as_function(
  module: nn.Module, method: str = '__call__'
) -> Callable[..., jax.Array]:
  """A method of a Flax module as a function of parameters.

  Args:
    module: The module.
    method: Name of a method of arrays.

  Returns:
    A function of (params, array, dropout key = None).
  """

  def function(
    params: Params, x: jax.Array, key: jax.Array | None = None
  ) -> jax.Array:
    return module.apply({'params': params}, x, method=method, rngs=_rngs(key))

  return function


def as_block(module: nn.Module) -> Callable[..., jax.Array]:
  """A Flax module of one layer as the function `LayerFns.block`.

  Args:
    module: A module that is called with x ``[B, T, D]`` and a mask or None.

  Returns:
    A function of (one layer's params, x, mask = None, dropout key = None).
  """

  def block(
    layer: Params,
    x_BTD: jax.Array,
    mask_BT: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    return module.apply({'params': layer}, x_BTD, mask_BT, rngs=_rngs(key))

  return block


def _rngs(key: jax.Array | None) -> dict[str, jax.Array]:
  return {} if key is None else {'dropout': key}


def init_function(
  module: nn.Module, token_id: int = 0
) -> Callable[[jax.Array], Params]:
  """The function `Model.init`, compiled.

  Args:
    module: A module that is called with tokens ``[B, T]``.
    token_id: Any id of a token.

  Returns:
    A function of a random key.
  """

  # Flax finds the shapes by a forward pass, which jit drops.
  @jax.jit
  def init(key: jax.Array) -> Params:
    return module.init(key, jnp.full((1, 1), token_id, jnp.int32))['params']

  return init


def check_seq_len(tokens_BT: jax.Array, max_seq_len: int) -> None:
  """Raises ValueError if the sequences are longer than the model accepts."""
  if tokens_BT.shape[1] > max_seq_len:
    raise ValueError(
      f'Sequence of {tokens_BT.shape[1]} tokens is longer than '
      f'max_seq_len={max_seq_len}. Use shorter sequences or raise '
      'max_seq_len.'
    )


def find_preset(name: str, presets: Mapping[str, Config]) -> Config:
  """The configuration of that name.

  Args:
    name: Key of `presets`.
    presets: A model's configurations by name.

  Returns:
    The configuration.

  Raises:
    ValueError: If there is no such name.
  """
  if name not in presets:
    near = difflib.get_close_matches(name.lower(), presets, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
      f'Unknown model {name!r}; expected one of {tuple(presets)}.{hint}'
    )
  return presets[name]


def check_positive(config: Any, *names: str) -> None:
  """Raises ValueError if one of these fields is not positive."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not value > 0:
      raise ValueError(f'{name}={value} must be positive.')


def check_rates(config: Any, *names: str) -> None:
  """Raises ValueError unless these fields are None or in [0, 1)."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not 0 <= value < 1:
      raise ValueError(f'{name}={value} must be in [0, 1).')


def check_heads(config: Any) -> None:
  """Raises ValueError unless `num_heads` divides `hidden_size`."""
  if config.hidden_size % config.num_heads:
    raise ValueError(
      f'hidden_size={config.hidden_size} must be a multiple of '
      f'num_heads={config.num_heads}.'
    )


def check_dtypes(config: Any) -> None:
  """Raises ValueError unless both dtypes are float32 or bfloat16."""
  for name in ('param_dtype', 'compute_dtype'):
    value = getattr(config, name)
    if value not in ('float32', 'bfloat16'):
      raise ValueError(
        f"Unknown {name} {value!r}; expected one of ('bfloat16', 'float32')."
      )
