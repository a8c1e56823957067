"""Scores of a task, with what they must be compared with.

A score comes with its standard error, that of the mean of as many independent
questions, and beside all of them stands the share of the most frequent answer,
which a model has that always gives the same one.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

from gnlorp_jax.data.tasks.questions import Choice, Task


def judge_choice(
  question: Choice, log_likelihoods: Sequence[float]
) -> dict[str, int]:
  """What a model chooses.

  Args:
    question: The question.
    log_likelihoods: Of its options.

  Returns:
    By metric the index of the option: ``acc`` takes the likeliest, ``acc_norm``
    the one with the largest logarithm per character. Of equals, the first. It
    is -1 where the model gives no number.
  """
  if any(math.isnan(value) for value in log_likelihoods):
    return {'acc': -1, 'acc_norm': -1}
  per_character = [
    value / max(1, len(option))
    for value, option in zip(log_likelihoods, question.options, strict=True)
  ]
  return {
    'acc': log_likelihoods.index(max(log_likelihoods)),
    'acc_norm': per_character.index(max(per_character)),
  }


def summarise(task: Task, judged: Sequence[dict[str, bool]]) -> dict[str, Any]:
  """The scores of a task.

  Args:
    task: The task.
    judged: Per question, by metric, whether it is answered rightly.

  Returns:
    ``questions`` (their number), ``shots``, ``metrics`` (by name ``value`` and
    ``stderr``, both in [0, 1]), ``majority`` (in [0, 1]) and, where questions
    belong to several groups, ``groups``: by name the same without ``shots``.
  """
  found = {
    'questions': len(judged),
    'shots': task.shots,
    'metrics': {
      name: mean([row[name] for row in judged]) for name in judged[0]
    },
    'majority': _majority(task.questions),
  }
  groups = collections.defaultdict(list)
  for question, row in zip(task.questions, judged, strict=True):
    groups[question.group].append((question, row))
  if len(groups) > 1:
    found['groups'] = {
      name: {
        'questions': len(pairs),
        'metrics': {
          metric: mean([row[metric] for _, row in pairs])
          for metric in judged[0]
        },
        'majority': _majority([question for question, _ in pairs]),
      }
      for name, pairs in groups.items()
    }
  return found


def text_metrics(
  log_likelihood: float, text: str, num_tokens: int
) -> dict[str, float | None]:
  """How well a text was foreseen, per token, per word and per byte.

  Args:
    log_likelihood: Of the text, a natural logarithm.
    text: The text.
    num_tokens: Tokens that it has with the model's tokenizer.

  Returns:
    ``perplexity`` per token, which only models of one tokenizer share;
    ``word_perplexity``, ``byte_perplexity`` and ``bits_per_byte`` as in
    lm_eval, where words are what white space parts. What is not finite, or too
    large for a number, is None.
  """
  words, size = len(re.split(r'\s+', text)), len(text.encode())
  return {
    'perplexity': _exp(-log_likelihood / num_tokens),
    'word_perplexity': _exp(-log_likelihood / words),
    'byte_perplexity': _exp(-log_likelihood / size),
    'bits_per_byte': finite(-log_likelihood / size / math.log(2)),
  }


def finite(value: float) -> float | None:
  """A number, or None for what JSON cannot say."""
  return value if math.isfinite(value) else None


def _exp(value: float) -> float | None:
  # A model that knows nothing finds a long text hopeless, word by word.
  return finite(math.exp(value)) if value < 700 else None


def mean(values: Sequence[bool]) -> dict[str, float]:
  """The share of what is right.

  Args:
    values: Of each question whether it is answered rightly; at least one.

  Returns:
    ``value``, in [0, 1], and ``stderr``, the standard error of the mean, from
    the deviation of a sample as lm_eval has it; 0 for a single question.
  """
  share = sum(values) / len(values)
  error = math.sqrt(share * (1 - share) / max(len(values) - 1, 1))
  return {'value': share, 'stderr': error}


def _majority(questions: Sequence[Any]) -> float:
  counts = collections.Counter(question.answer for question in questions)
  return counts.most_common(1)[0][1] / len(questions)
