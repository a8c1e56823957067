import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlorp_jax.compose import scores
from gnlorp_jax.data.tasks import Choice, FreeAnswer, Task
from tests.compose import small_lm


@pytest.fixture(scope='module')
def tokenizer():
  return small_lm.tokenizer()


def plain(tokenizer, context, continuation):
  """The log-likelihood of what follows a context, one sequence at a time."""
  model, params = small_lm.model()
  ids = [list(text.encode()) for text in (context, continuation)]
  first, second = (
    tokenizer.encode_batch([text])[0][:-1].tolist()
    for text in (context, continuation)
  )
  assert [len(x) for x in ids] == [len(first), len(second)]  # Bytes.
  first = first or [tokenizer.bos_id]
  tokens = np.zeros((1, 128), np.int32)
  tokens[0, : len(first + second)] = first + second
  logits = np.asarray(PLAIN(params, tokens)[0], np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  positions = range(len(first), len(first + second))
  return sum(log_probs[i - 1, tokens[0, i]] for i in positions)


PLAIN = jax.jit(small_lm.model()[0].apply)


# Text to tokens.


def as_text(tokenizer, request):
  return tuple(tokenizer.decode(ids) for ids in request)


def test_pairs_are_parted_where_the_context_ends(tokenizer):
  pairs = [('Is it so?', ' yes'), ('Is it so? ', 'no'), ('a \n', 'b')]
  found = scores.encode_pairs(tokenizer, pairs)
  assert [as_text(tokenizer, request) for request in found] == [
    ('Is it so?', ' yes'),
    ('Is it so?', ' no'),
    ('a', ' \nb'),
  ]


def test_nothing_before_a_text_is_the_token_that_begins_one(tokenizer):
  ((context, continuation),) = scores.encode_pairs(tokenizer, [('', 'ab')])
  assert context.tolist() == [tokenizer.bos_id]
  assert tokenizer.decode(continuation) == 'ab'


def test_a_token_that_begins_every_text_stands_before_the_context(tokenizer):
  begins = small_lm.tokenizer()
  begins.adds_bos = True
  found = scores.encode_pairs(begins, [('ab', 'c'), ('', 'c')])
  assert [list(context[:1]) for context, _ in found] == [[begins.bos_id]] * 2
  assert [context.size for context, _ in found] == [3, 1]
  assert [begins.decode(rest) for _, rest in found] == ['c', 'c']


def test_pairs_are_encoded_together():
  tokenizer = small_lm.tokenizer(merges=[('b', 'c')])
  ((context, continuation),) = scores.encode_pairs(tokenizer, [('ab', 'cbc')])
  # 'abcbc' is a, bc, bc; the context alone has two tokens.
  assert [context.size, continuation.size] == [2, 1]
  with pytest.raises(ValueError) as error:
    scores.encode_pairs(tokenizer, [('ab', 'c')])
  assert str(error.value) == (
    "'c' has no token of its own after a context that ends in 'ab': the "
    'tokenizer makes one token of both.'
  )


# Questions with options.

QUESTIONS = [
  Choice('Q: one?\nA:', ('left', 'right', 'in the middle'), 1, 'x'),
  Choice('Q: two?\nA:', ('up', 'down'), 0, 'y'),
  Choice('Q: three?\nA:', ('yes', 'no'), 1, 'y'),
]


@pytest.mark.parametrize('batch_size', [1, 8])
def test_options_are_scored_as_one_at_a_time(tokenizer, batch_size):
  task = Task(name='mine', questions=QUESTIONS, shots=0)
  records, counts = [], []
  found = scores.evaluate_tasks(
    *small_lm.model(),
    tokenizer,
    [task],
    batch_size=batch_size,
    keep=records.append,
    progress=lambda *now: counts.append(now),
  )
  acc, acc_norm = [], []
  for question, record in zip(QUESTIONS, records, strict=True):
    values = [
      plain(tokenizer, question.context, f' {option}')
      for option in question.options
    ]
    np.testing.assert_allclose(record['log_likelihoods'], values, rtol=1e-5)
    normed = np.array(values) / [len(option) for option in question.options]
    acc.append(int(np.argmax(values)) == question.answer)
    acc_norm.append(int(np.argmax(normed)) == question.answer)
    assert record['right'] == {'acc': acc[-1], 'acc_norm': acc_norm[-1]}
    assert record['context'] == question.context
  metrics = found['mine']['metrics']
  assert metrics['acc']['value'] == np.mean(acc)
  assert metrics['acc_norm']['value'] == np.mean(acc_norm)
  assert found['mine']['majority'] == 2 / 3
  assert set(found['mine']['groups']) == {'x', 'y'}
  assert [record['question'] for record in records] == [0, 1, 2]
  assert counts[-1] == (7, 7)


def test_a_task_may_have_no_acc_norm(tokenizer):
  task = Task(name='mine', questions=QUESTIONS, shots=0, has_acc_norm=False)
  found = scores.evaluate_tasks(*small_lm.model(), tokenizer, [task])
  assert set(found['mine']['metrics']) == {'acc'}


# Free answers.


@pytest.fixture
def said(monkeypatch, tokenizer):
  """Answers by the last character of the prompt, in place of a model's."""
  calls = []
  answers = {'1': ' 12. Q: more', '2': 'none', '3': ' 7 it is'}

  def generate(model, params, prompts, num_tokens, **options):
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    calls.append((texts, num_tokens, options))
    return [
      tokenizer.encode_batch([answers[text[-1]]])[0][:-1] for text in texts
    ]

  monkeypatch.setattr(scores.generation, 'generate', generate)
  return calls


def number(text):
  digits = ''.join(c for c in text if c.isdigit())
  return digits or 'nothing'


def test_free_answers_end_before_a_stop_string_and_must_be_equal(
  tokenizer, said
):
  task = Task(
    name='sums',
    questions=[
      FreeAnswer('short 1', '12'),
      FreeAnswer('longest of them 2', '3'),
      FreeAnswer('longer one 3', '7'),
    ],
    shots=0,
    stop=('Q:', '\n'),
    max_tokens=20,
    extract={'exact_match': number, 'first': lambda text: text[:3].strip()},
  )
  records, counts = [], []
  found = scores.evaluate_tasks(
    *small_lm.model(),
    tokenizer,
    [task],
    batch_size=2,
    keep=records.append,
    progress=lambda *now: counts.append(now),
  )
  assert [record['text'] for record in records] == [
    ' 12. ',
    'none',
    ' 7 it is',
  ]
  assert [record['right']['exact_match'] for record in records] == [
    *(True, False, True)
  ]
  metrics = found['sums']['metrics']
  assert metrics['exact_match']['value'] == 2 / 3
  assert metrics['first']['value'] == 2 / 3
  # The longest first, as many as a batch has.
  assert [texts for texts, _, _ in said] == [
    ['longest of them 2', 'longer one 3'],
    ['short 1'],
  ]
  _, count, options = said[0]
  assert count == 20
  assert options['temperature'] == 0
  assert options['stop'] == ('Q:', '\n')
  assert tokenizer.eos_id in options['eos_ids']
  assert counts[-1] == (3, 3)


def test_answers_are_the_likeliest_tokens(tokenizer):
  _, params = small_lm.model()
  prompts = ['One', 'Another one']
  found = scores.generate_until(
    *small_lm.model(), tokenizer, prompts, stop=(), max_tokens=6, batch_size=2
  )
  for prompt, answer in zip(prompts, found, strict=True):
    ids = tokenizer.encode(prompt).tolist()
    for _ in range(6):
      tokens = np.zeros((1, 128), np.int32)
      tokens[0, : len(ids)] = ids
      ids.append(int(PLAIN(params, tokens)[0, len(ids) - 1].argmax()))
      if ids[-1] in tokenizer.eos_ids:
        break
    assert answer == tokenizer.decode(ids[len(prompt) :])


def test_a_stop_string_may_be_a_control_token(tokenizer):
  model, params = small_lm.model()
  # The model writes nothing else, and decoded text has no trace of it.
  begin = tokenizer.bos_id
  always = model._replace(
    logits=lambda params, x: jax.nn.one_hot(
      jnp.full(x.shape[:-1], begin), model.config.vocab_size
    )
  )
  lengths = []
  decode = tokenizer.decode
  tokenizer = copy.copy(tokenizer)
  tokenizer.decode = lambda ids: lengths.append(len(ids)) or decode(ids)
  scores.generate_until(
    *(always, params, tokenizer, ['One']),
    stop=('<s>', 'Q:'),
    max_tokens=6,
    batch_size=1,
  )
  assert max(lengths) == 1


def test_long_prompts_lose_their_beginning(tokenizer, said):
  prompt = 'x' * 200 + '1'
  (text,) = scores.generate_until(
    *small_lm.model(),
    tokenizer,
    [prompt],
    stop=(),
    max_tokens=28,
    batch_size=4,
  )
  assert text == ' 12. Q: more'
  assert said[0][0] == [prompt[-100:]]


def test_answers_as_long_as_the_model_reads_are_refused(tokenizer):
  with pytest.raises(ValueError) as error:
    scores.generate_until(
      *small_lm.model(),
      tokenizer,
      ['x'],
      stop=(),
      max_tokens=128,
      batch_size=1,
    )
  assert str(error.value) == (
    'max_tokens=128 leaves no room for a prompt in the 128 tokens that the '
    'model accepts. Ask for shorter answers.'
  )


# Texts.


def test_perplexity_of_a_short_text_is_that_of_its_bytes(tokenizer):
  text = 'A few words,\nand no more.'
  found = scores.text_perplexity(*small_lm.model(), tokenizer, text)
  total = plain(tokenizer, '', text)
  np.testing.assert_allclose(found['log_likelihood'], total, rtol=1e-5)
  size = len(text)
  assert found['tokens'] == size
  assert found['metrics'] == {
    'perplexity': pytest.approx(math.exp(-total / size), rel=1e-5),
    'byte_perplexity': pytest.approx(math.exp(-total / size), rel=1e-5),
    'word_perplexity': pytest.approx(math.exp(-total / 6), rel=1e-3),
    'bits_per_byte': pytest.approx(-total / size / math.log(2), rel=1e-5),
  }


def test_perplexity_of_a_long_text_takes_windows(tokenizer):
  text = ''.join(chr(97 + i * i % 26) for i in range(300))
  options = {'max_length': 100, 'batch_size': 2}
  side_by_side = scores.text_perplexity(
    *small_lm.model(), tokenizer, text, **options
  )
  parts = [('', text[:100]), (text[99:100], text[100:200])]
  parts.append((text[199:200], text[200:]))
  total = sum(plain(tokenizer, *part) for part in parts)
  np.testing.assert_allclose(side_by_side['log_likelihood'], total, rtol=1e-5)
  assert (side_by_side['window'], side_by_side['stride']) == (100, 100)
  strided = scores.text_perplexity(
    *small_lm.model(), tokenizer, text, stride=50, **options
  )
  assert strided['stride'] == 50
  assert strided['log_likelihood'] != side_by_side['log_likelihood']


def test_answers_must_leave_room_for_a_question(tokenizer):
  task = Task(name='sums', questions=[FreeAnswer('1?', '1')], shots=0)
  says = 'sums writes up to 256 tokens after its question'
  with pytest.raises(ValueError) as error:
    scores.evaluate_tasks(*small_lm.model(), tokenizer, [task])
  assert str(error.value) == (
    f'{says}; the model accepts 128 in all: leave the task out.'
  )
  with pytest.raises(ValueError) as error:
    scores.check_room(task, 512, 256)
  assert str(error.value) == (
    f'{says}, for which max_length=256 leaves no room: raise it, or leave the '
    'task out.'
  )
  scores.check_room(task, 512, 257)
