"""Text from a language model, token by token, with a cache.

Keys and values of the tokens so far are kept, so that a new token costs one
pass over itself alone. Many prompts go on side by side.

Shape suffixes in this file:
  B     prompts
  P     tokens of a prompt, padded
  T     tokens of a piece of it
  N     pieces of a prompt
  V, C  vocabulary, candidates
  D     width of the residual stream
"""

import bisect
import functools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnlorp_jax.models.interface import Cache, Model, check_ids
from gnlorp_jax.models.on_host import to_host

# Prompts are padded to multiples, so that few lengths are compiled, and long
# ones read in pieces, so that the scores of a piece exist at a time.
_MULTIPLE, _PIECE = 32, 256
# Tokens between two looks at what was written, where nobody waits for them.
_STRIDE = 32


class Sampling(NamedTuple):
  """How the next token is chosen.

  Attributes:
    temperature: Logits are divided by it; 0 takes the likeliest token.
    top_k: Only the k likeliest tokens are candidates; None: all are.
    top_p: Only the likeliest tokens that together have at least this
      probability are candidates, after `top_k`; None: all are.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def check(self) -> None:
    """Raises ValueError if a number is outside its interval."""
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
        f'temperature={self.temperature} must be finite and not negative.'
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(
        f'top_k={self.top_k} must be positive, or None for no limit.'
      )
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(
        f'top_p={self.top_p} must be in (0, 1], or None for no limit.'
      )

  def draw(self, logits_V: jax.Array, key: jax.Array) -> jax.Array:
    """The next token."""
    if self.temperature == 0:
      return jnp.argmax(logits_V).astype(jnp.int32)
    logits_V = logits_V / self.temperature
    if self.top_k is None and self.top_p is None:
      return jax.random.categorical(key, logits_V).astype(jnp.int32)
    count = min(self.top_k or logits_V.size, logits_V.size)
    logits_C, ids_C = jax.lax.top_k(logits_V, count)
    if self.top_p is not None:
      odds_C = jax.nn.softmax(logits_C)
      likelier_C = jnp.cumsum(odds_C) - odds_C
      logits_C = jnp.where(likelier_C < self.top_p, logits_C, -jnp.inf)
    return ids_C[jax.random.categorical(key, logits_C)].astype(jnp.int32)


class _State(NamedTuple):
  """Where the rows are."""

  cache: Cache
  last_B: jax.Array  # int32, the newest tokens, not yet in the cache.
  position_B: jax.Array  # int32, their positions.
  count: jax.Array  # int32 scalar, how many tokens were added.
  done_B: jax.Array  # bool


def generate(
  model: Model,
  params: Any,
  prompts: Sequence[np.ndarray],
  num_tokens: int,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  key: jax.Array | None = None,
  eos_ids: Sequence[int] = (),
  stop: Sequence[str] = (),
  decode: Callable[[np.ndarray], str] | None = None,
) -> list[np.ndarray]:
  """Continues prompts, each by itself.

  Args:
    model: A decoder; adapters and weights in 8 bits are read as they are.
    params: Its parameters.
    prompts: Token ids, at least one in each. Of a prompt that leaves no room
      the first tokens are not read: it is cut to `num_tokens` less than the
      model accepts, and at least to one.
    num_tokens: Most tokens to add to each, > 0. No row gets longer than the
      model's `max_seq_len`.
    temperature: Logits are divided by it; 0 takes the likeliest token.
    top_k: Only the k likeliest tokens are candidates; None: all are.
    top_p: Only the likeliest tokens that together have at least this
      probability are candidates, after `top_k`; None: all are.
    key: Random key; the same key gives the same tokens to a row, whatever
      stands in other rows. Not needed with a temperature of 0.
    eos_ids: A row ends after one of these tokens.
    stop: A row ends after the token with which one of these strings is in its
      new text.
    decode: Text of token ids; needed with `stop`.

  Returns:
    The new tokens of each prompt, int32, the one that ended the row included.

  Raises:
    ValueError: If an argument is outside its interval, or the model is no
      decoder.
  """
  sampling = Sampling(temperature, top_k, top_p)
  if stop and decode is None:
    raise ValueError(
      f'stop={tuple(stop)} is looked for in text, and decode is None. Give the '
      "tokenizer's decode."
    )
  _check(model, prompts, num_tokens, sampling, key)
  if not prompts:
    return []
  prompts, limits_B = _fitted(model, prompts, num_tokens)
  end_of = functools.partial(_end_of, frozenset(eos_ids), tuple(stop), decode)
  blocks = _blocks(
    model, params, prompts, limits_B, sampling, key, eos_ids, _STRIDE
  )
  new_BT = next(blocks)
  ends: list[int | None] = [None] * len(prompts)
  while True:
    ends = [
      end_of(row, limit) if end is None else end
      for row, limit, end in zip(new_BT, limits_B, ends, strict=True)
    ]
    if None not in ends:
      return [row[:end] for row, end in zip(new_BT, ends, strict=True)]
    done_B = np.array([end is not None for end in ends])
    new_BT = np.concatenate([new_BT, blocks.send(done_B)], axis=1)


def stream(
  model: Model,
  params: Any,
  prompt: np.ndarray,
  num_tokens: int,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  key: jax.Array | None = None,
  eos_ids: Sequence[int] = (),
) -> Iterator[int]:
  """Continues one prompt, and gives each token as soon as it is drawn.

  Args:
    model: As in `generate`, as are the others.
    params: Its parameters.
    prompt: Token ids.
    num_tokens: Most tokens to add.
    temperature: Logits are divided by it.
    top_k: Only the k likeliest tokens are candidates.
    top_p: Only tokens that together have at least this probability are.
    key: Random key.
    eos_ids: The last token is one of these, if it comes.

  Returns:
    The tokens that `generate` returns for the same arguments. Who stops asking
    for them stops the model.

  Raises:
    ValueError: As `generate`, before the first token is asked for.
  """
  sampling = Sampling(temperature, top_k, top_p)
  _check(model, [prompt], num_tokens, sampling, key)
  prompts, limits_B = _fitted(model, [prompt], num_tokens)

  def tokens() -> Iterator[int]:
    blocks = _blocks(
      model, params, prompts, limits_B, sampling, key, eos_ids, 1
    )
    token = int(next(blocks).item())
    yield token
    for _ in range(limits_B[0] - 1):
      if token in eos_ids:
        return
      token = int(blocks.send(np.zeros(1, bool)).item())
      yield token

  return tokens()


def _check_ids(model, prompts):
  for number, prompt in enumerate(prompts):
    if isinstance(prompt, str):
      raise ValueError(
        f'Prompt {number} is text: give token ids, such as the tokenizer makes.'
      )
    check_ids(f'Prompt {number}', np.asarray(prompt), model.config.vocab_size)


def _check(model, prompts, num_tokens, sampling, key):
  _check_ids(model, prompts)
  if model.extend is None:
    raise ValueError(
      f'A {type(model.config).__name__} writes no text: it is no decoder. Use '
      'a language model that guesses the next token.'
    )
  for number, prompt in enumerate(map(np.asarray, prompts)):
    if prompt.ndim != 1 or prompt.size == 0:
      raise ValueError(
        f'Prompt {number} has shape {prompt.shape}; it must hold at least one '
        'token along one axis. Begin with a start- or end-of-sequence token.'
      )
  if num_tokens < 1:
    raise ValueError(f'num_tokens={num_tokens} must be positive.')
  if model.config.max_seq_len < 2:
    raise ValueError(
      f'max_seq_len={model.config.max_seq_len} leaves no room for a new token.'
    )
  sampling.check()
  if sampling.temperature > 0 and key is None:
    raise ValueError(
      f'temperature={sampling.temperature} draws tokens at random, and key is '
      'None. Give a random key, or a temperature of 0.'
    )


def _fitted(
  model: Model, prompts: Sequence[np.ndarray], num_tokens: int
) -> tuple[list[np.ndarray], np.ndarray]:
  """Prompts that leave room, and how many tokens each gets at most."""
  longest = model.config.max_seq_len
  room = max(longest - num_tokens, 1)
  arrays = [np.asarray(prompt, np.int32) for prompt in prompts]
  arrays = [p if p.size < longest else p[-room:] for p in arrays]
  return arrays, np.array([min(num_tokens, longest - p.size) for p in arrays])


def _blocks(
  model: Model,
  params: Any,
  prompts: list[np.ndarray],
  limits_B: np.ndarray,
  sampling: Sampling,
  key: jax.Array | None,
  eos_ids: Sequence[int],
  stride: int,
) -> Generator[np.ndarray, np.ndarray, None]:
  """Writes, and waits after each block to be sent which rows have ended.

  Yields:
    New tokens, int32 ``[B, T]``: the first of each row, then `stride` at most.
  """
  key = jax.random.key(0) if key is None else key
  tokens_BP, positions_BP, piece = _padded(prompts, model.config.max_seq_len)
  fixed = model, sampling, tuple(sorted(set(eos_ids)))
  # Whatever the stride: the same shapes round sums in the same way.
  slots = math.ceil(int(limits_B.max()) / _STRIDE) * _STRIDE
  state = _start(
    params,
    tokens_BP,
    positions_BP,
    limits_B,
    key,
    fixed=fixed,
    piece=piece,
    slots=tokens_BP.shape[1] + slots,
  )
  count = 1
  done_B = yield to_host(state.last_B)[:, None]
  while True:
    state, block_BT = _go_on(
      params,
      state._replace(done_B=done_B),
      limits_B,
      key,
      fixed=fixed,
      stride=stride,
    )
    added = int(state.count) - count
    count += added
    done_B = yield to_host(block_BT)[:, :added]


def _padded(
  prompts: list[np.ndarray], longest: int
) -> tuple[np.ndarray, np.ndarray, int]:
  """Tokens and positions ``[B, P]``, padded on the left, and a piece's T."""
  most = max(prompt.size for prompt in prompts)
  piece = min(_PIECE, longest)
  if most <= piece:
    # No longer than the model accepts.
    piece = min(math.ceil(most / _MULTIPLE) * _MULTIPLE, piece)
  length = math.ceil(most / piece) * piece
  tokens_BP = np.zeros((len(prompts), length), np.int32)
  positions_BP = np.full((len(prompts), length), -1, np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BP[row, length - prompt.size :] = prompt
    positions_BP[row, length - prompt.size :] = np.arange(prompt.size)
  return tokens_BP, positions_BP, piece


def _end_of(
  eos: frozenset[int],
  stop: tuple[str, ...],
  decode: Callable[[np.ndarray], str] | None,
  row: np.ndarray,
  limit: int,
) -> int | None:
  """How many of a row's new tokens count; None while it goes on."""
  hits = [i + 1 for i, token in enumerate(row.tolist()) if token in eos]
  end = min([limit, *hits])
  row = row[:end]

  def stops(length: int) -> bool:
    return any(text in decode(row[:length]) for text in stop)

  if stop and stops(row.size):
    # The first length with which it stops: text only grows with tokens.
    return 1 + bisect.bisect_left(range(1, row.size + 1), True, key=stops)
  return end if row.size == end else None


@functools.partial(jax.jit, static_argnames=('fixed', 'piece', 'slots'))
def _start(
  params, tokens_BP, positions_BP, limits_B, key, *, fixed, piece, slots
):
  """Reads the prompts and draws the first token of each row."""
  model = fixed[0]
  batch = len(tokens_BP)

  def read(cache, xs):
    x_BTD, cache = model.extend(params, *xs, cache)
    return cache, x_BTD[:, -1]

  pieces = tuple(
    jnp.moveaxis(x.reshape(batch, -1, piece), 1, 0)
    for x in (tokens_BP, positions_BP)
  )
  longest_B = positions_BP[:, -1] + 1 + limits_B
  cache = model.start_cache(batch, slots, longest_B)
  cache, x_NBD = jax.lax.scan(read, cache, pieces)
  state = _State(
    cache=cache,
    last_B=jnp.zeros((batch,), jnp.int32),
    position_B=positions_BP[:, -1],
    count=jnp.int32(0),
    done_B=jnp.zeros((batch,), bool),
  )
  return _draw(fixed, params, x_NBD[-1], state, limits_B, key)


def _draw(fixed, params, x_BD, state, limits_B, key):
  """Takes the next token of each row."""
  model, sampling, eos = fixed

  def draw(row, logits_V):
    row_key = jax.random.fold_in(jax.random.fold_in(key, row), state.count)
    return sampling.draw(logits_V, row_key)

  rows_B = jnp.arange(len(x_BD))
  last_B = jax.vmap(draw)(rows_B, model.logits(params, x_BD))
  count = state.count + 1
  ended_B = functools.reduce(
    jnp.logical_or, [last_B == token for token in eos], count >= limits_B
  )
  return state._replace(
    last_B=last_B,
    position_B=state.position_B + 1,
    count=count,
    done_B=state.done_B | ended_B,
  )


@functools.partial(
  jax.jit, static_argnames=('fixed', 'stride'), donate_argnames='state'
)
def _go_on(params, state, limits_B, key, *, fixed, stride):
  """Adds tokens until all rows are done, `stride` at most."""
  model = fixed[0]
  first = state.count

  def goes_on(loop):
    state, _ = loop
    return (state.count - first < stride) & ~jnp.all(state.done_B)

  def step(loop):
    state, block_BT = loop
    x_BTD, cache = model.extend(
      params, state.last_B[:, None], state.position_B[:, None], state.cache
    )
    state = state._replace(cache=cache)
    state = _draw(fixed, params, x_BTD[:, 0], state, limits_B, key)
    at = (jnp.int32(0), state.count - first - 1)
    block_BT = jax.lax.dynamic_update_slice(block_BT, state.last_B[:, None], at)
    return state, block_BT

  block_BT = jnp.zeros((len(limits_B), stride), jnp.int32)
  return jax.lax.while_loop(goes_on, step, (state, block_BT))
