import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.models import hf, llama
from gnlorp_jax.models.generate import generate

VOCAB = 11
KEY = jax.random.key(0)


def sum_model(params, tokens):
  """Causal: the next token is the weighted sum of the tokens so far."""
  position = 1 + jnp.arange(tokens.shape[1])
  total = jnp.cumsum(tokens * position[None], axis=1) + params
  return jax.nn.one_hot(total % VOCAB, VOCAB)


def constant_model(params, tokens):
  """The same distribution everywhere."""
  return jnp.broadcast_to(params, (*tokens.shape, params.size))


def test_greedy_equals_golden_continuation(shared):
  folder = shared / 'data/weights/stories260K'
  model = llama.make(llama.config_from_hf(hf.load_config(folder)))
  params = hf.load_params(
    folder, llama.HF_TENSORS, jax.eval_shape(model.init, KEY)
  )
  ids = np.load(folder / 'golden_logits.npz')['ids']
  new = generate(
    model.apply,
    params,
    ids[:1],
    64,
    max_seq_len=model.config.max_seq_len,
    temperature=0,
    key=KEY,
  )
  np.testing.assert_array_equal(new, ids[1:])


@pytest.mark.parametrize('prompt_length', [1, 4, 6, 9])
def test_window_slides_when_full(prompt_length):
  prompt = np.arange(3, 3 + prompt_length)
  tokens = list(prompt)
  for _ in range(12):
    window = np.array(tokens[-6:])
    tokens.append((window * (1 + np.arange(window.size))).sum() + 2)
    tokens[-1] %= VOCAB
  new = generate(
    sum_model, 2, prompt, 12, max_seq_len=6, temperature=0, key=KEY
  )
  assert new.dtype == np.int32
  np.testing.assert_array_equal(new, tokens[prompt_length:])


def test_generation_ends_with_eos():
  options = {'max_seq_len': 30, 'temperature': 0, 'key': KEY}
  whole = generate(sum_model, 1, [1], 20, **options)
  eos = int(whole[7])
  first = list(whole).index(eos)
  short = generate(sum_model, 1, [1], 20, eos_id=eos, **options)
  np.testing.assert_array_equal(short, whole[: first + 1])


@pytest.mark.parametrize('temperature', [0.5, 2.0])
@pytest.mark.parametrize('top_k', [None, 3, 50])
def test_samples_follow_the_distribution(temperature, top_k):
  logits = np.array([0.0, 2.0, 1.0, -1.0, 1.5])
  odds = np.exp(logits / temperature)
  if top_k == 3:
    odds[[0, 3]] = 0
  expected = odds / odds.sum()
  new = generate(
    constant_model,
    jnp.asarray(logits, jnp.float32),
    [0],
    1000,
    max_seq_len=4,
    temperature=temperature,
    top_k=top_k,
    key=KEY,
  )
  found = np.bincount(new, minlength=5) / 1000
  # Four standard errors of a frequency; exactly zero where it must be.
  error = 4 * np.sqrt(expected * (1 - expected) / 1000)
  assert (np.abs(found - expected) <= error).all()


def test_ties_do_not_widen_top_k():
  new = generate(
    constant_model, jnp.zeros(5), [0], 50, max_seq_len=4, top_k=2, key=KEY
  )
  assert len(set(new)) == 2


def test_key_decides_the_samples():
  def sample(seed):
    return generate(
      constant_model,
      jnp.zeros(VOCAB),
      [0],
      20,
      max_seq_len=4,
      key=jax.random.key(seed),
    ).tolist()

  assert sample(0) == sample(0)
  assert sample(0) != sample(1)


def test_model_is_traced_once_for_all_tokens():
  traces = []

  def traced_model(params, tokens):
    traces.append(tokens.shape)
    return sum_model(params, tokens)

  for params in (1, 2):
    generate(traced_model, params, [1], 20, max_seq_len=8, key=KEY)
  assert traces == [(1, 8)]


@pytest.mark.parametrize(
  'prompt, num_tokens, options, text',
  [
    (
      [],
      1,
      {},
      'prompt_T has shape (0,); it must hold at least one token along one '
      'axis. Begin with a start- or end-of-sequence token.',
    ),
    (
      [[1]],
      1,
      {},
      'prompt_T has shape (1, 1); it must hold at least one token along one '
      'axis. Begin with a start- or end-of-sequence token.',
    ),
    ([1], 0, {}, 'num_tokens=0 must be positive.'),
    ([1], 1, {'temperature': -1}, 'temperature=-1 must not be negative.'),
    (
      [1],
      1,
      {'top_k': 0},
      'top_k=0 must be positive, or None for no limit.',
    ),
  ],
)
def test_impossible_arguments_are_refused(prompt, num_tokens, options, text):
  with pytest.raises(ValueError) as error:
    generate(
      sum_model, 1, prompt, num_tokens, max_seq_len=4, key=KEY, **options
    )
  assert str(error.value) == text
