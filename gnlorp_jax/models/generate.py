"""Text samples from a language model.

Shape suffixes in this file:
  T  prompt
  S  buffer
  V  vocabulary
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def generate(
  apply_fn: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  prompt_T: np.ndarray,
  num_tokens: int,
  *,
  max_seq_len: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  key: jax.Array,
  eos_id: int | None = None,
) -> np.ndarray:
  """Continues a prompt, one token at a time.

  The whole forward pass is computed anew for every token, on a buffer of fixed
  length that is compiled once. That is simple and fast enough to look at
  samples during training; serving wants a cache of keys and values.

  When the buffer is full its oldest token is dropped: the model then sees the
  last `max_seq_len` tokens, at positions that start from 0 again.

  Args:
    apply_fn: Maps (params, tokens [1, S]) to logits [1, S, V]; causal. Compiled
      once per function, lengths and sampling settings.
    params: Passed to `apply_fn`.
    prompt_T: Token ids, at least one; the last `max_seq_len` of them are used.
    num_tokens: Number of tokens to add, > 0.
    max_seq_len: Longest sequence the model accepts.
    temperature: Logits are divided by it; 0 takes the likeliest token.
    top_k: Sample among the k likeliest tokens only; None: among all.
    key: Random key; the same key gives the same tokens.
    eos_id: Stop after this token; None: never stop early.

  Returns:
    The new tokens, int32, `num_tokens` of them or fewer if the last is
    `eos_id`.

  Raises:
    ValueError: If an argument is outside its interval.

  Examples:
    >>> count = lambda params, tokens: jax.nn.one_hot(tokens + 1, 8)
    >>> generate(
    ...   count,
    ...   None,
    ...   np.array([3]),
    ...   3,
    ...   max_seq_len=8,
    ...   temperature=0,
    ...   key=jax.random.key(0),
    ... )
    array([4, 5, 6], dtype=int32)
  """
  prompt_T = np.asarray(prompt_T, np.int32)
  if prompt_T.ndim != 1 or prompt_T.size == 0:
    raise ValueError(
      f'prompt_T has shape {prompt_T.shape}; it must hold at least one token '
      'along one axis. Begin with a start- or end-of-sequence token.'
    )
  if num_tokens < 1:
    raise ValueError(f'num_tokens={num_tokens} must be positive.')
  if temperature < 0:
    raise ValueError(f'temperature={temperature} must not be negative.')
  if top_k is not None and top_k < 1:
    raise ValueError(f'top_k={top_k} must be positive, or None for no limit.')

  prompt_T = prompt_T[-max_seq_len:]
  buffer_S = np.zeros(
    min(prompt_T.size + num_tokens, max_seq_len), prompt_T.dtype
  )
  buffer_S[: prompt_T.size] = prompt_T
  length = np.int32(prompt_T.size)
  new = []
  for i in range(num_tokens):
    buffer_S, length, token = _extend(
      apply_fn,
      temperature,
      top_k,
      params,
      buffer_S,
      length,
      jax.random.fold_in(key, i),
    )
    new.append(int(token))
    if new[-1] == eos_id:
      break
  return np.array(new, np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _extend(apply_fn, temperature, top_k, params, buffer_S, length, key):
  """Adds a token to the buffer; returns buffer, filled length and token."""
  logits_V = apply_fn(params, buffer_S[None])[0, length - 1]
  token = _sample(logits_V, temperature, top_k, key)
  full = length == buffer_S.size
  buffer_S = jnp.where(full, jnp.roll(buffer_S, -1), buffer_S)
  end = jnp.where(full, length - 1, length)
  return buffer_S.at[end].set(token), end + 1, token


def _sample(logits_V, temperature, top_k, key):
  if temperature == 0:
    return jnp.argmax(logits_V)
  count = min(top_k or logits_V.size, logits_V.size)
  values, ids = jax.lax.top_k(logits_V, count)
  return ids[jax.random.categorical(key, values / temperature)]
