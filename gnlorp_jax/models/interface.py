"""What every family of models shares: its functions, its fields, its checks.

A family is a module of `families`. A model of it is a `Model`: pure functions
of a plain nested dict of arrays, whose layers are stacked under 'layers'.

Shape suffixes in this file:
  L     layers
  B, T  batch, position in the sequence
  D     width of the residual stream
  V, C  vocabulary, classes (or 1 for a regression)
  S     slots of a cache
  K, H  key/value heads, width of one
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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


class Cache(NamedTuple):
  """Keys and values of the tokens that a decoder has seen.

  All rows fill the same slots; a shorter row begins with slots of padding.

  Attributes:
    k_LBSKH: Keys, rotated.
    v_LBSKH: Values.
    positions_BS: int32, positions of what the slots hold; less than 0 where
      there is padding or nothing.
    length: int32 scalar, number of slots that are taken.
    longest_B: int32, the most tokens that each row will have.
  """

  k_LBSKH: jax.Array
  v_LBSKH: jax.Array
  positions_BS: jax.Array
  length: jax.Array
  longest_B: jax.Array

  def open(self, positions_BT: jax.Array) -> 'Cache':
    """Takes the next slots for tokens of these positions."""
    start = (jnp.int32(0), self.length)
    return self._replace(
      positions_BS=jax.lax.dynamic_update_slice(
        self.positions_BS, positions_BT.astype(jnp.int32), start
      ),
      length=self.length + positions_BT.shape[1],
    )

  def newest(self, count: int) -> jax.Array:
    """Positions of the `count` tokens of the slots that were taken last."""
    return jax.lax.dynamic_slice_in_dim(
      self.positions_BS, self.length - count, count, axis=1
    )

  def put(
    self, number: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
  ) -> 'Cache':
    """Writes a layer's keys and values into the slots that were taken last."""
    zero = jnp.int32(0)
    start = (number, zero, self.length - k_BTKH.shape[1], zero, zero)
    write = jax.lax.dynamic_update_slice
    return self._replace(
      k_LBSKH=write(self.k_LBSKH, k_BTKH[None], start),
      v_LBSKH=write(self.v_LBSKH, v_BTKH[None], start),
    )

  def layer(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values."""
    pick = jax.lax.dynamic_index_in_dim
    k_BSKH = pick(self.k_LBSKH, number, keepdims=False)
    return k_BSKH, pick(self.v_LBSKH, number, keepdims=False)


class LayerFns(NamedTuple):
  """A model layer by layer.

  `embed`, then `block` for every layer with what `context` gives, then `head`
  is `Model.apply`, of a masked LM for sequences without padding. Dropout is
  active where a key is given; each call needs one that no other call has.

  Attributes:
    embed: Maps (params, tokens ``[B, T]``, dropout key = None) to x
      ``[B, T, D]``.
    block: Maps (one layer's slice of `params['layers']`, x ``[B, T, D]``,
      context = None, number of the layer = None, dropout key = None) to x
      ``[B, T, D]``. The number, an int32 scalar, is needed by a model whose
      layers differ.
    head: The rest, in float32. Language models: maps (params, x ``[*, D]``,
      dropout key = None) to logits ``[*, V]``; positions are independent, so a
      loss may call it piece by piece. Classifiers: maps (params, x
      ``[B, T, D]``, dropout key = None) to ``[B, C]``.
    context: Maps (tokens ``[B, T]``, segments ``[B, T]`` = None) to what every
      block must know of the batch, a pytree or None. Of a decoder it says where
      documents begin; of an encoder it is the mask ``[B, T]``, True where there
      is no padding. An encoder takes no segments.
    extend: `block` with a cache: maps (one layer's slice, x, number of the
      layer, a `Cache` whose slots are taken) to (x, the cache). None of a model
      that has no cache.

  `embed` and `head` do without `params['layers']`.
  """

  embed: Callable[..., jax.Array]
  block: Callable[..., jax.Array]
  head: Callable[..., jax.Array]
  context: Callable[..., Any]
  extend: Callable[..., tuple[jax.Array, Cache]] | None = None


class Model(NamedTuple):
  """A model as pure functions of a plain nested dict of parameters.

  Dropout is active where a key is given: that of the model at the rates of its
  configuration, and that of its adapters (see `adapters.adapt`). Segments,
  int32 ``[B, T]``, are the numbers of documents that are packed in a row: a
  token attends to its own document alone, and positions restart in each.

  Attributes:
    config: The architecture.
    init: Maps a random key to params.
    hidden: Maps (params, tokens ``[B, T]``, dropout key = None, segments =
      None) to x ``[B, T, D]``, in compute dtype: what `logits` takes.
    logits: The head alone, in float32. Language models: maps (params, x
      ``[*, D]``, dropout key = None) to ``[*, V]``; positions are independent,
      so a loss may call it piece by piece. Classifiers: maps (params, x
      ``[B, T, D]``, dropout key = None) to ``[B, C]``, from the first position.
    apply: Maps (params, tokens ``[B, T]``, dropout key = None, segments = None)
      to float32 logits, ``[B, T, V]`` or ``[B, C]``.
    layer_fns: The same layer by layer.
    extend: `hidden` of new tokens behind those of a cache: maps (params, tokens
      ``[B, T]``, positions ``[B, T]``, a `Cache`) to (x ``[B, T, D]``, the
      cache). Positions less than 0 are padding. None of an encoder.
    start_cache: Maps (batch B, slots S, longest_B of `Cache` = None, for as
      many as there are slots) to an empty cache. None of an encoder.
    head_of: Maps params to a function of x: `logits` of these params, for those
      who call it piece by piece. What is computed of the params alone is
      computed once. None where that is nothing.
  """

  config: Any
  init: Callable[[jax.Array], Params]
  hidden: Callable[..., jax.Array]
  logits: Callable[..., jax.Array]
  apply: Callable[..., jax.Array]
  layer_fns: LayerFns
  extend: Callable[..., tuple[jax.Array, Cache]] | None = None
  start_cache: Callable[..., Cache] | None = None
  head_of: Callable[[Params], Callable[..., jax.Array]] | None = None


def as_function(
  module: nn.Module, method: str = '__call__'
) -> Callable[..., jax.Array]:
  """A method of a Flax module as a function of parameters.

  Args:
    module: The module.
    method: Name of a method of an array, and of segments if it takes them.

  Returns:
    A function of (params, array, dropout key = None, segments = None).
  """

  def function(
    params: Params,
    x: jax.Array,
    key: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
  ) -> jax.Array:
    inputs = (x,) if segments_BT is None else (x, segments_BT)
    return module.apply(
      {'params': params}, *inputs, method=method, rngs=_rngs(key)
    )

  return function


def as_block(module: nn.Module) -> Callable[..., jax.Array]:
  """A Flax module of one layer as the function `LayerFns.block`.

  Args:
    module: A module that is called with x ``[B, T, D]``, a context or None, and
      the number of the layer or None.

  Returns:
    A function of (one layer's params, x, context = None, number = None, dropout
    key = None).
  """

  def block(
    layer: Params,
    x_BTD: jax.Array,
    context: Any = None,
    number: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    return module.apply(
      {'params': layer}, x_BTD, context, number, rngs=_rngs(key)
    )

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


def check_ids(what: str, ids: np.ndarray, vocab_size: int) -> None:
  """Raises ValueError if a model has no embedding of one of the ids.

  JAX raises no error there: it takes another row, or NaN.
  """
  if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
    raise ValueError(
      f'{what} has ids from {ids.min()} to {ids.max()}, and the model has '
      f'those of [0, {vocab_size}). Use its own tokenizer.'
    )


def first_layers(config: Any, count: int) -> Any:
  """The configuration of a model's first layers.

  Args:
    config: The architecture, of whose fields tuples hold a value per layer.
    count: How many layers.

  Returns:
    The configuration of a model of these layers.
  """
  by_layer = {
    field.name: value[:count]
    for field in dataclasses.fields(config)
    if isinstance(value := getattr(config, field.name), tuple)
  }
  return dataclasses.replace(config, num_layers=count, **by_layer)


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
  """Raises ValueError if one of these fields is no number that can be used."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not math.isfinite(value):
      raise ValueError(f'{name}={value} must be a finite number.')
    if value is not None and not value > 0:
      raise ValueError(f'{name}={value} must be positive.')
    # The length of an axis is an int32 in XLA's programs.
    if isinstance(value, int) and value >= 2**31:
      raise ValueError(f'{name}={value} must be less than 2**31.')


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
