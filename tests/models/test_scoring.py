import functools

import jax
import numpy as np
import pytest

from gnlorp_jax.models import llama, scoring

KEY = jax.random.key(3)
LONGEST = 40
VOCAB = 61


@functools.cache
def model():
  made = llama.make(
    llama.LlamaConfig(
      vocab_size=VOCAB,
      hidden_size=32,
      intermediate_size=44,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      max_seq_len=LONGEST,
      initializer_std=0.3,
    )
  )
  return made, made.init(KEY)


def ids(*lengths, seed=0):
  generator = np.random.default_rng(seed)
  return [generator.integers(0, VOCAB, length) for length in lengths]


def requests():
  """Contexts and continuations of many lengths, some shared, some too long."""
  pairs = [tuple(ids(a, b, seed=a)) for a in (1, 2, 9, 17, 30) for b in (1, 4)]
  shared = pairs[4][0]
  pairs += [(shared, [token]) for token in (0, 5, 60)]
  pairs += [tuple(ids(57, 3, seed=7)), tuple(ids(3, LONGEST, seed=8))]
  return pairs


@functools.cache
def compiled():
  return jax.jit(model()[0].apply)


def expected(context, continuation):
  """By the logits of one sequence alone, with a softmax in float64."""
  _, params = model()
  sequence = np.concatenate([context, continuation])[-LONGEST - 1 :]
  padded = np.zeros((1, LONGEST), np.int32)
  padded[0, : sequence.size - 1] = sequence[:-1]
  logits = np.asarray(compiled()(params, padded)[0], np.float64)
  total, is_greedy = 0.0, True
  for position in range(sequence.size - len(continuation), sequence.size):
    row = logits[position - 1]
    largest = row.max()
    total += row[sequence[position]] - largest
    total -= np.log(np.exp(row - largest).sum())
    is_greedy &= row.argmax() == sequence[position]
  return total, is_greedy


def greedy_continuation(context, count):
  tokens = list(context)
  for _ in range(count):
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = compiled()(model()[1], padded)
    tokens.append(int(logits[0, len(tokens) - 1].argmax()))
  return tokens[len(context) :]


def close(found, wanted):
  np.testing.assert_allclose(
    [score.log_likelihood for score in found],
    [total for total, _ in wanted],
    rtol=1e-5,
  )
  assert [score.is_greedy for score in found] == [flag for _, flag in wanted]


def test_log_likelihoods_equal_a_float64_softmax():
  context = ids(5)[0]
  likeliest = greedy_continuation(context, 3)
  pairs = [*requests(), (context, likeliest), (context, likeliest[:1])]
  found = scoring.log_likelihoods(*model(), pairs, batch_size=3)
  close(found, [expected(*pair) for pair in pairs])
  assert [score.is_greedy for score in found[-2:]] == [True, True]


@pytest.mark.parametrize('batch_size', [1, 5, 64])
def test_batch_size_length_and_order_do_not_matter(batch_size, monkeypatch):
  monkeypatch.setattr(scoring, 'PADDED_LENGTHS', (7, 23))
  monkeypatch.setattr(scoring, 'TOKENS_PER_PASS', 16)
  pairs = requests()
  order = np.random.default_rng(batch_size).permutation(len(pairs))
  found = scoring.log_likelihoods(
    *model(), [pairs[i] for i in order], batch_size=batch_size
  )
  close(found, [expected(*pairs[i]) for i in order])


def test_options_of_one_token_share_a_forward_pass():
  made, params = model()
  shapes = []

  def hidden(params, tokens):
    shapes.append(tokens.shape)
    return made.hidden(params, tokens)

  watched = made._replace(hidden=hidden)
  context, other = ids(9, 11)
  pairs = [(context, [i]) for i in range(4)] + [(other, [i]) for i in range(4)]
  found = scoring.log_likelihoods(watched, params, pairs, batch_size=8)
  assert shapes == [(2, 16)]
  # Each in a pass of its own.
  alone = [
    scoring.log_likelihoods(made, params, [pair], batch_size=1)[0]
    for pair in pairs
  ]
  close(found, alone)


def test_few_programs_are_compiled():
  made, params = model()
  shapes = []

  def hidden(params, tokens):
    shapes.append(tokens.shape)
    return made.hidden(params, tokens)

  pairs = [tuple(ids(length, 1)) for length in range(1, 39)]
  watched = made._replace(hidden=hidden)
  scoring.log_likelihoods(watched, params, pairs, batch_size=4)
  assert sorted(shapes) == [(4, 16), (4, 24), (4, 32), (4, LONGEST)]


def test_logits_of_all_positions_never_exist():
  made, params = model()
  shapes = []

  def logits(params, x):
    shapes.append(x.shape)
    return made.logits(params, x)

  pairs = [tuple(ids(1, 39, seed=i)) for i in range(20)]
  scoring.log_likelihoods(
    made._replace(logits=logits), params, pairs, batch_size=20
  )
  assert shapes == [(scoring.TOKENS_PER_PASS, 32)]


def test_progress_counts_every_request_once():
  counts = []
  pairs = requests()
  scoring.log_likelihoods(
    *model(), pairs, batch_size=4, progress=lambda *now: counts.append(now)
  )
  done, totals = zip(*counts, strict=True)
  assert done[0] == 0 and done[-1] == len(pairs) and len(set(done)) > 3
  assert set(totals) == {len(pairs)} and list(done) == sorted(done)


def test_long_sequences_come_in_smaller_batches(monkeypatch):
  monkeypatch.setattr(scoring, 'FULL_BATCH_LENGTH', 16)
  made, params = model()
  shapes = []

  def hidden(params, tokens):
    shapes.append(tokens.shape)
    return made.hidden(params, tokens)

  pairs = [tuple(ids(length, 1)) for length in (9, 10, 11, 12, 35, 36, 37)]
  found = scoring.log_likelihoods(
    made._replace(hidden=hidden), params, pairs, batch_size=4
  )
  assert sorted(shapes) == [(1, LONGEST), (4, 16)]
  close(found, [expected(*pair) for pair in pairs])


def test_nothing_is_asked():
  assert scoring.log_likelihoods(*model(), []) == []


@pytest.mark.parametrize(
  'pair, text',
  [
    (
      ([], [1]),
      'Request 0 has 0 tokens of context and 1 to score: neither may be empty. '
      'Begin with a start- or end-of-sequence token.',
    ),
    (
      ([1, 2], []),
      'Request 0 has 2 tokens of context and 0 to score: neither may be empty. '
      'Begin with a start- or end-of-sequence token.',
    ),
    (
      ([1, 99], [2]),
      'Request 0 has ids from 1 to 99, and the model has those of [0, 61). Use '
      'its own tokenizer.',
    ),
    (
      ([1], np.zeros(41, int)),
      'Request 0 has 41 tokens to score, more than the 40 that the model is '
      'given at a time. Use `rolling`.',
    ),
  ],
)
def test_impossible_requests_are_refused(pair, text):
  with pytest.raises(ValueError) as error:
    scoring.log_likelihoods(*model(), [pair])
  assert str(error.value) == text


@pytest.mark.parametrize(
  'options, text',
  [
    ({'batch_size': 0}, 'batch_size=0 must be positive.'),
    (
      {'max_length': 41},
      'max_length=41 must be in [1, 40], what the model accepts.',
    ),
  ],
)
def test_impossible_options_are_refused(options, text):
  with pytest.raises(ValueError) as error:
    scoring.log_likelihoods(*model(), requests(), **options)
  assert str(error.value) == text


# Texts longer than the model accepts.


def windows(count, **options):
  return [
    (list(context), list(scored))
    for context, scored in scoring.rolling_windows(
      range(1, count + 1), prefix_id=0, **options
    )
  ]


def test_windows_lie_side_by_side_and_the_last_is_full():
  assert windows(10, stride=None, length=4) == [
    ([0], [1, 2, 3, 4]),
    ([4], [5, 6, 7, 8]),
    ([6, 7, 8], [9, 10]),
  ]


def test_windows_overlap_by_what_the_stride_leaves():
  assert windows(9, stride=3, length=4) == [
    ([0], [1, 2, 3, 4]),
    ([3, 4], [5, 6, 7]),
    ([5, 6, 7], [8, 9]),
  ]


@pytest.mark.parametrize('count', [1, 4, 5, 23])
@pytest.mark.parametrize('stride', [1, 2, 4, None])
def test_every_token_is_scored_once_in_a_full_window(count, stride):
  found = windows(count, stride=stride, length=4)
  assert sum((scored for _, scored in found), []) == list(range(1, count + 1))
  lengths = [len(context) + len(scored) - 1 for context, scored in found]
  assert lengths == [min(4, count)] + [4] * (len(found) - 1)


@pytest.mark.parametrize('stride', [None, 10])
def test_rolling_equals_the_sum_of_its_windows(stride):
  (text,) = ids(100)
  counts = []
  found = scoring.rolling(
    *model(),
    text,
    prefix_id=2,
    stride=stride,
    batch_size=3,
    progress=lambda *now: counts.append(now),
  )
  parts = scoring.rolling_windows(
    text, prefix_id=2, stride=stride, length=LONGEST
  )
  wanted = sum(expected(*part)[0] for part in parts)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  assert counts[-1] == (len(parts), len(parts))


@pytest.mark.parametrize(
  'text, options, message',
  [
    ([], {}, 'The text has no tokens, and so no perplexity.'),
    (
      [1],
      {'stride': 41},
      'stride=41 must be in [1, 40], the length of a window.',
    ),
    (
      [1],
      {'stride': 0},
      'stride=0 must be in [1, 40], the length of a window.',
    ),
  ],
)
def test_impossible_texts_are_refused(text, options, message):
  with pytest.raises(ValueError) as error:
    scoring.rolling(*model(), text, prefix_id=0, **options)
  assert str(error.value) == message
