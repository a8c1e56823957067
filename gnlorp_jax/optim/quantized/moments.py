"""Keeps the moments of any optimizer in 8 or 4 bits between its steps."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gnlorp_jax.optim.parts.boundary import for_any_tree
from gnlorp_jax.optim.parts.checks import check_regex, check_static
from gnlorp_jax.optim.parts.plain import path_name
from gnlorp_jax.optim.parts.split import (
  RefreshContext,
  SplitTransformation,
  split,
)
from gnlorp_jax.optim.quantized.arrays import (
  QuantizedArray,
  dequantize,
  quantize,
  requantize,
)
from gnlorp_jax.optim.quantized.codecs import Codec, dynamic, linear

# Bits of all moments, or ordered rules (regex over the path, bits).
MomentBits = int | Sequence[tuple[str, int]]

# Fields of optimizer states that hold moments, and their codecs by bits.
MOMENT_FIELDS = ('mu', 'nu', 'trace')
MIN_SIZE = 4096  # Elements of a matrix from which they are quantised.
_CODECS: dict[int, dict[str, Codec]] = {
  32: {},
  8: {
    'mu': dynamic(8, signed=True),
    'nu': dynamic(8, signed=False, floor=True),
    'trace': dynamic(8, signed=True),
  },
  # A dynamic or linear code with a zero would make the step explode for nu.
  4: {
    'mu': dynamic(4, signed=True, block=128),
    'nu': linear(4, block=128),
    'trace': dynamic(4, signed=True, block=128),
  },
}

# What Flax calls its vectors. The shape cannot tell a stack of them, [layers,
# d], from a matrix.
_VECTORS = re.compile(r'^(scale|bias)$')

# Compiled, so that `init` outside jit is not dozens of programs per shape.
_quantize = jax.jit(quantize, static_argnames='codec')
_dequantize = jax.jit(dequantize)
_requantize = jax.jit(requantize)


def _codec_at(path: tuple[Any, ...], bits: MomentBits) -> Codec | None:
  """The codec of the moment field that a key path passes, if any.

  The outermost counts: what follows is the path of a parameter. Bases and error
  buffers belong to others. Those of vectors have none.
  """
  if any(_VECTORS.match(str(getattr(key, 'key', ''))) for key in path):
    return None
  for index, key in enumerate(path):
    name = key.name if isinstance(key, jax.tree_util.GetAttrKey) else None
    if name in ('subspace', 'recovery', 'error'):
      return None
    if name in MOMENT_FIELDS:
      return _CODECS[_bits_of(path_name(path[index + 1 :]), bits)].get(name)
  return None


def _bits_of(name: str, bits: MomentBits) -> int:
  """The bits of a parameter's moments."""
  if not isinstance(bits, Sequence):
    return bits
  return next((b for pattern, b in bits if re.search(pattern, name)), 32)


def check_moment_bits(bits: MomentBits) -> None:
  """Raises a `ValueError` unless all bits are 32, 8 or 4, and rules regexes."""
  given: list[Any] = [bits]
  if isinstance(bits, Sequence) and not isinstance(bits, str):
    given = [
      rule[1] if isinstance(rule, tuple | list) and len(rule) == 2 else None
      for rule in bits
    ]
  for one in given:
    if one is not None:
      check_static('moment_bits', one)
    if one not in _CODECS:
      raise ValueError(
        f'moment_bits must be 32, 8 or 4, or rules (regex, bits), got {bits!r}.'
      )
  for rule in bits if isinstance(bits, Sequence) else ():
    check_regex('moment_bits', rule)


def encode_moments(
  state: optax.OptState, bits: MomentBits, min_size: int
) -> optax.OptState:
  """Quantises the moments of a state; everything else stays as it is."""

  def encode(path: tuple[Any, ...], leaf: Any) -> Any:
    codec = _codec_at(path, bits)
    if codec is None or getattr(leaf, 'dtype', None) != jnp.float32:
      return leaf
    if leaf.ndim == 0 or math.prod(leaf.shape[-2:]) < min_size:
      return leaf
    return _quantize(leaf, codec)

  return jax.tree_util.tree_map_with_path(encode, state)


def decode_moments(state: optax.OptState, bits: MomentBits) -> optax.OptState:
  """The state with quantised moments as float32."""

  def decode(path: tuple[Any, ...], node: Any) -> Any:
    # Bases and error buffers may be quantised too; their owners decode them.
    if isinstance(node, QuantizedArray) and _codec_at(path, bits):
      return _dequantize(node)
    return node

  return jax.tree_util.tree_map_with_path(
    decode, state, is_leaf=lambda node: isinstance(node, QuantizedArray)
  )


def quantize_moments(
  inner: optax.GradientTransformation,
  bits: MomentBits,
  min_size: int = MIN_SIZE,
) -> optax.GradientTransformationExtraArgs:
  """Keeps the moments of `inner` in 8 or 4 bits between its steps.

  They are decoded before a step and encoded after it; the step itself uses the
  new moments before they are encoded. Moments are the float32 arrays below a
  field ``mu``, ``nu`` or ``trace`` of a state, however deep inside `inner`.

  In 8 bits all take `codecs.dynamic` codes in blocks of 256. In 4 bits,
  in blocks of 128, ``mu`` and ``trace`` do, and ``nu`` takes
  `codecs.linear`.

  Args:
    inner: Any transformation.
    bits: 8, 4 or 32 for all of them; 32 quantises none. Or ordered
      rules ``(regex, bits)`` over the ``/``-joined paths of the parameters, of
      which the first regex found decides; without any 32.
    min_size: Elements a matrix ``[m, n]``, the last two axes of a moment, must
      have; the moments of smaller ones stay float32, and those of parameters
      named ``scale`` or ``bias``. A stack of vectors ``[layers, d]`` of another
      name is taken for a matrix, and a kernel ``[d, heads, head_dim]`` for a
      stack of small ones. `report` tells what stays float32.

  Returns:
    The wrapped transformation; each quantised moment of its state is a
    `arrays.QuantizedArray`.

  Raises:
    ValueError: If `bits` is something else.

  Examples:
    >>> tx = quantize_moments(optax.scale_by_adam(), bits=8)
    >>> state = tx.init({'kernel': jnp.ones((3, 64, 64)), 'bias': jnp.ones(64)})
    >>> state.mu['kernel'].codes.shape, state.mu['kernel'].scale.shape
    ((3, 64, 64), (3, 16))
    >>> state.mu['bias'].dtype
    dtype('float32')

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization`, 2021,
    arXiv:2110.02861; Li et al., `Memory Efficient Optimizers with 4-bit
    States`, 2023, arXiv:2309.01507.

  Note:
    bitsandbytes resets the two moments of an element whose gradient is not
    finite; wrap the optimizer in `skip_nonfinite` instead. The 4-bit paper
    scales second moments by rows and columns, here blocks of 128 do.

    In bitsandbytes' code a second moment below 1.6e-7 of its block's largest
    becomes 0, and should the next gradient of that element be as small, its
    step is up to ``mu / eps``. Here it takes the first positive value; all
    others keep bitsandbytes' codes.
  """
  check_moment_bits(bits)
  return for_any_tree(with_moment_bits(inner, bits, min_size))


def with_moment_bits(
  inner: optax.GradientTransformation,
  bits: MomentBits,
  min_size: int = MIN_SIZE,
) -> optax.GradientTransformationExtraArgs:
  """`quantize_moments` of plain trees, as `assemble` has them already."""
  inner_tx = optax.with_extra_args_support(inner)
  if bits == 32:
    return inner_tx

  def init_fn(params: optax.Params) -> optax.OptState:
    # Behind the barrier: XLA would spend seconds on folding constant moments.
    state = inner_tx.init(params)
    state = jax.lax.optimization_barrier(state)  # type: ignore[no-untyped-call]
    return encode_moments(state, bits, min_size)

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, state = inner_tx.update(
      updates, decode_moments(state, bits), params, **extra_args
    )
    return updates, encode_moments(state, bits, min_size)

  if not isinstance(inner, SplitTransformation):
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
  halves = inner

  def project_fn(
    grads: optax.Updates,
    state: optax.OptState,
    params: Any,
    context: RefreshContext,
  ) -> tuple[Any, optax.OptState]:
    decoded = decode_moments(state, bits)
    projected, new = halves.project_fn(grads, decoded, params, context)

    def encode(old: Any, same: Any, node: Any) -> Any:
      if node is same:
        return old
      # Bases may be quantised too, and are encoded already.
      is_moment = isinstance(old, QuantizedArray) and isinstance(
        node, jax.Array
      )
      return _requantize(node, old) if is_moment else node

    encoded = jax.tree.map(
      encode,
      state,
      decoded,
      new,
      is_leaf=lambda node: isinstance(node, QuantizedArray),
    )
    return projected, encoded

  def apply_fn(
    projected: Any, state: optax.OptState, params: Any, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, state = halves.apply(
      projected, decode_moments(state, bits), params, **extra_args
    )
    return updates, encode_moments(state, bits, min_size)

  return split(init_fn, project_fn, apply_fn, update_fn)
