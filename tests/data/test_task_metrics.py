import math

import pytest

from gnlorp_jax.data.tasks import Choice, Task, metrics


def test_the_likeliest_option_is_chosen_whole_and_per_character():
  question = Choice('?', ('no', 'certainly'), 1)
  assert metrics.judge_choice(question, [-4.0, -9.0]) == {
    'acc': 0,
    'acc_norm': 1,
  }


def test_of_equals_the_first_is_chosen():
  question = Choice('?', ('a', 'b'), 1)
  assert metrics.judge_choice(question, [-1.0, -1.0])['acc'] == 0


def test_a_model_without_a_number_chooses_nothing():
  question = Choice('?', ('a', 'b'), 1)
  assert metrics.judge_choice(question, [math.nan, -1.0]) == {
    'acc': -1,
    'acc_norm': -1,
  }


def test_scores_come_with_error_and_majority():
  answers = (0, 1, 1, 1, 2)
  task = Task(
    name='mine',
    questions=[Choice('?', ('a', 'b', 'c'), answer) for answer in answers],
    shots=3,
  )
  found = metrics.summarise(task, [{'acc': right} for right in (1, 1, 0, 0, 0)])
  assert found == {
    'questions': 5,
    'shots': 3,
    'metrics': {
      'acc': {
        'value': 0.4,
        'stderr': pytest.approx(math.sqrt(0.4 * 0.6 / 4)),
      }
    },
    'majority': 0.6,
  }


def test_groups_have_scores_of_their_own():
  task = Task(
    name='mine',
    questions=[
      Choice('?', ('a', 'b'), 0, 'art'),
      Choice('?', ('a', 'b'), 1, 'law'),
      Choice('?', ('a', 'b'), 1, 'law'),
    ],
    shots=0,
  )
  found = metrics.summarise(
    task, [{'acc': True}, {'acc': False}, {'acc': False}]
  )
  law = found['groups']['law']
  assert law['questions'] == 2
  assert law['metrics']['acc'] == {'value': 0.0, 'stderr': 0.0}
  assert law['majority'] == 1.0
  assert found['metrics']['acc']['value'] == pytest.approx(1 / 3)


def test_words_and_bytes_are_counted_as_lm_eval_does():
  text = ' Zwei schöne\n\n Wörter '
  found = metrics.text_metrics(-30.0, text, 10)
  words, size = 5, 24  # An empty word at each end; two bytes for an umlaut.
  assert found == {
    'perplexity': pytest.approx(math.exp(3)),
    'word_perplexity': pytest.approx(math.exp(30 / words)),
    'byte_perplexity': pytest.approx(math.exp(30 / size)),
    'bits_per_byte': pytest.approx(30 / size / math.log(2)),
  }


@pytest.mark.parametrize('total', [-1e6, -math.inf, math.nan])
def test_what_is_no_number_is_none(total):
  found = metrics.text_metrics(total, 'word', 1)
  assert found['perplexity'] is None
  assert (found['bits_per_byte'] is None) == (not math.isfinite(total))
