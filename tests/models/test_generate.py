import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import adapters, generate, hf, llama, roberta, rope
from gnlorp_jax.models.families import phi3
from gnlorp_jax.models.generate import Sampling
from gnlorp_jax.optim.quantized.weights import (
  dequantize_weights,
  quantize_weights,
)
from gnlorp_jax.training import forward

KEY = jax.random.key(0)
CONFIG = llama.LlamaConfig(
  vocab_size=37,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  max_seq_len=48,
  initializer_std=0.6,
)


@functools.cache
def build():
  model = llama.make(CONFIG)
  return model, model.init(jax.random.key(1))


def prompts(*sizes):
  rng = np.random.default_rng(0)
  return [rng.integers(0, 37, size) for size in sizes]


@functools.lru_cache
def compiled(apply):
  return jax.jit(lambda params, tokens, n: apply(params, tokens)[0, n - 1])


def without_cache(apply, params, prompt, count, sampling, row=0):
  """The whole forward pass for each token, on a buffer of zeros behind."""
  tokens = np.zeros(CONFIG.max_seq_len, np.int32)
  tokens[: len(prompt)] = prompt
  key = jax.random.fold_in(KEY, row)
  for i in range(count):
    n = len(prompt) + i
    logits = compiled(apply)(params, tokens[None], n)
    tokens[n] = sampling.draw(logits, jax.random.fold_in(key, i))
  return tokens[len(prompt) : len(prompt) + count]


@pytest.mark.parametrize(
  'sampling',
  [Sampling(0), Sampling(0.7), Sampling(1.3, 5), Sampling(1.0, None, 0.8)],
)
def test_tokens_equal_those_without_a_cache(sampling):
  model, params = build()
  given = prompts(3, 9, 1)
  found = generate.generate(
    model, params, given, 36, **sampling._asdict(), key=KEY
  )
  for row, (prompt, new) in enumerate(zip(given, found, strict=True)):
    assert new.dtype == np.int32 and new.size == 36
    expected = without_cache(model.apply, params, prompt, 36, sampling, row)
    np.testing.assert_array_equal(new, expected)


def test_greedy_equals_golden_continuation(shared):
  folder = shared / 'data/weights/stories260K'
  model = llama.make(llama.config_from_hf(hf.load_config(folder)))
  params = hf.load_params(
    folder, llama.HF_TENSORS, jax.eval_shape(model.init, KEY)
  )
  ids = np.load(folder / 'golden_logits.npz')['ids']
  (new,) = generate.generate(model, params, [ids[:1]], 64, temperature=0)
  np.testing.assert_array_equal(new, ids[1:])


def test_adapters_and_codes_write_what_the_model_without_them_does():
  model, params = build()
  config = adapters.AdapterConfig(kind='dora', rank=2)
  arrays = adapters.init(config, params, KEY)
  arrays = jax.tree.map(lambda x: x + 0.1, arrays)
  both = adapters.combine(params, arrays)
  adapted = adapters.adapt(config, model)
  codes = quantize_weights(params)
  stored = forward.on_stored(
    model, functools.partial(dequantize_weights, dtype='float32')
  )
  for found, given in ((adapted, both), (stored, codes)):
    (new,) = generate.generate(found, given, prompts(5), 20, temperature=0)
    expected = without_cache(
      found.apply, given, *prompts(5), 20, Sampling(temperature=0)
    )
    np.testing.assert_array_equal(new, expected)


def test_stream_gives_the_tokens_of_generate_when_asked(monkeypatch):
  model, params = build()
  strides, go_on = [], generate._go_on

  def count(*args, stride, **options):
    strides.append(stride)
    return go_on(*args, stride=stride, **options)

  monkeypatch.setattr(generate, '_go_on', count)
  sizes = []
  # The last one does not fit.
  for prompt in prompts(3, 5, 60):
    arguments = (model, params, prompt, 34)
    options = {'temperature': 0.9, 'key': KEY, 'eos_ids': (7,)}
    (whole,) = generate.generate(model, params, [prompt], 34, **options)
    strides.clear()
    found = generate.stream(*arguments, **options)
    assert [next(found), next(found), next(found)] == whole[:3].tolist()
    assert strides == [1, 1]
    assert [*whole[:3], *found] == whole.tolist()
    sizes.append(whole.size)
  assert min(sizes) < max(sizes) == 34  # Ended by a token, and by the number.


def test_stream_refuses_before_it_is_asked():
  model, params = build()
  with pytest.raises(ValueError, match='num_tokens=0 must be positive.'):
    generate.stream(model, params, *prompts(3), 0, temperature=0)


def test_a_row_ends_with_eos_and_the_others_go_on():
  model, params = build()
  given = prompts(4, 6)
  whole = generate.generate(model, params, given, 30, temperature=0)
  eos = int(whole[0][7])
  found = generate.generate(
    model, params, given, 30, temperature=0, eos_ids=(eos, eos)
  )
  for new, expected in zip(found, whole, strict=True):
    hits = np.flatnonzero(expected == eos)
    end = hits[0] + 1 if hits.size else 30
    np.testing.assert_array_equal(new, expected[:end])


def decode(ids):
  return ''.join(chr(ord('a') + i % 26) for i in ids)


def test_a_row_ends_with_the_token_that_completes_a_stop_string():
  model, params = build()
  given = prompts(4, 6)
  whole = generate.generate(model, params, given, 40, key=KEY)
  text = decode(whole[1])
  stop = text[34:37]
  assert stop not in decode(whole[0])
  options = {'stop': ('#', stop), 'decode': decode, 'key': KEY}
  found = generate.generate(model, params, given, 40, **options)
  np.testing.assert_array_equal(found[0], whole[0])
  np.testing.assert_array_equal(found[1], whole[1][: text.index(stop) + 3])


def test_rows_end_where_the_model_does():
  model, params = build()
  given = prompts(40, 3)
  found = generate.generate(model, params, given, 30, temperature=0)
  assert [new.size for new in found] == [8, 30]
  (alone,) = generate.generate(model, params, given[:1], 8, temperature=0)
  np.testing.assert_array_equal(found[0], alone)


def test_a_prompt_that_leaves_no_room_loses_its_beginning():
  model, params = build()
  (prompt,) = prompts(60)
  found = generate.generate(model, params, [prompt], 10, temperature=0)
  expected = generate.generate(model, params, [prompt[-38:]], 10, temperature=0)
  np.testing.assert_array_equal(found, expected)


def test_rows_that_stay_short_are_turned_as_short_ones():
  # Whatever stands in other rows, and however many slots there are.
  scaling = rope.LongRope(
    short_factor=(1.0, 1.5),
    long_factor=(3.0, 9.0),
    factor=3.0,
    original_max_position_embeddings=16,
  )
  sizes = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}
  for name in ('attention_bias', 'mlp_bias'):
    del sizes[name]
  model = phi3.make(phi3.Phi3Config(**sizes | {'rope_scaling': scaling}))
  params = model.init(jax.random.key(1))
  given = prompts(8, 20)
  found = generate.generate(model, params, given, 8, temperature=0)
  for prompt, new in zip(given, found, strict=True):
    tokens = np.append(prompt, new)
    # Every token is the likeliest of the whole row as it is in the end.
    logits = np.asarray(jax.jit(model.apply)(params, tokens[None]))[0]
    expected = logits.argmax(axis=-1)[len(prompt) - 1 : -1]
    np.testing.assert_array_equal(new, expected)


def test_long_prompts_are_read_in_pieces(monkeypatch):
  model, params = build()
  expected = generate.generate(model, params, prompts(30, 7), 9, temperature=0)
  monkeypatch.setattr(generate, '_PIECE', 8)
  found = generate.generate(model, params, prompts(30, 7), 9, temperature=0)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('temperature', [0.5, 2.0])
@pytest.mark.parametrize('top_k, top_p', [(None, None), (3, None), (50, 0.8)])
def test_samples_follow_the_distribution(temperature, top_k, top_p):
  logits = np.array([0.0, 2.0, 1.0, -1.0, 1.5])
  odds = np.exp(logits / temperature)
  if top_k == 3:
    odds[[0, 3]] = 0
  if top_p:
    order = np.argsort(-odds)
    before = np.cumsum(odds[order]) - odds[order]
    odds[order[before >= top_p * odds.sum()]] = 0
    assert 0 < np.count_nonzero(odds) < 5
  expected = odds / odds.sum()
  draw = jax.vmap(Sampling(temperature, top_k, top_p).draw, (None, 0))
  new = jax.jit(draw)(jnp.float32(logits), jax.random.split(KEY, 4000))
  found = np.bincount(new, minlength=5) / 4000
  # Four standard errors of a frequency; exactly zero where it must be.
  error = 4 * np.sqrt(expected * (1 - expected) / 4000)
  assert (np.abs(found - expected) <= error).all()


def test_ties_do_not_widen_top_k():
  draw = jax.vmap(Sampling(top_k=2).draw, (None, 0))
  new = draw(jnp.zeros(5), jax.random.split(KEY, 50))
  assert len(set(np.asarray(new).tolist())) == 2


def test_key_decides_the_samples():
  model, params = build()

  def sample(seed):
    (new,) = generate.generate(
      model, params, prompts(3), 20, key=jax.random.key(seed)
    )
    return new.tolist()

  assert sample(0) == sample(0) != sample(1)


def test_model_is_traced_once_for_prompts_of_like_lengths():
  model, params = build()
  traces = []

  def extend(params, tokens, positions, cache):
    traces.append(tokens.shape)
    return model.extend(params, tokens, positions, cache)

  counted = model._replace(extend=extend)
  for sizes in ((3, 9), (12, 1)):
    generate.generate(counted, params, prompts(*sizes), 12, temperature=0)
  assert traces == [(2, 32), (2, 1)]


def test_no_prompts_give_nothing():
  assert generate.generate(*build(), [], 3, temperature=0) == []


@pytest.mark.parametrize(
  'given, num_tokens, options, text',
  [
    (
      [[1], []],
      1,
      {},
      'Prompt 1 has shape (0,); it must hold at least one token along one '
      'axis. Begin with a start- or end-of-sequence token.',
    ),
    (
      [[[1]]],
      1,
      {},
      'Prompt 0 has shape (1, 1); it must hold at least one token along one '
      'axis. Begin with a start- or end-of-sequence token.',
    ),
    ([[1]], 0, {}, 'num_tokens=0 must be positive.'),
    (
      ['hello'],
      1,
      {},
      'Prompt 0 is text: give token ids, such as the tokenizer makes.',
    ),
    (
      [[1], [3, 37]],
      1,
      {},
      'Prompt 1 has ids from 3 to 37, and the model has those of [0, 37). Use '
      'its own tokenizer.',
    ),
    (
      [[1]],
      1,
      {'temperature': -1},
      'temperature=-1 must be finite and not negative.',
    ),
    (
      [[1]],
      1,
      {'top_k': 0},
      'top_k=0 must be positive, or None for no limit.',
    ),
    (
      [[1]],
      1,
      {'top_p': 1.5},
      'top_p=1.5 must be in (0, 1], or None for no limit.',
    ),
    (
      [[1]],
      1,
      {'key': None},
      'temperature=1.0 draws tokens at random, and key is None. Give a random '
      'key, or a temperature of 0.',
    ),
    (
      [[1]],
      1,
      {'stop': ['x']},
      "stop=('x',) is looked for in text, and decode is None. Give the "
      "tokenizer's decode.",
    ),
  ],
)
def test_impossible_arguments_are_refused(given, num_tokens, options, text):
  with pytest.raises(ValueError) as error:
    generate.generate(*build(), given, num_tokens, **{'key': KEY, **options})
  assert str(error.value) == text


def test_an_encoder_writes_no_text():
  model = roberta.make(roberta.preset('tiny'))
  with pytest.raises(ValueError, match='^A RobertaConfig writes no text'):
    generate.generate(model, {}, [[1]], 1, temperature=0)
