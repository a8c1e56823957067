"""What a language model scores in tasks: text to tokens to metrics.

Tokens are those of lm_eval: a context and an option are encoded together and
parted where the context alone would end, spaces at the end of a context belong
to what follows it, and a tokenizer that begins every text with a token does so
before the context.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gnlorp_jax.data.tasks import metrics
from gnlorp_jax.data.tasks.questions import Choice, FreeAnswer, Task
from gnlorp_jax.data.tokenizer import Tokenizer
from gnlorp_jax.models import generate as generation
from gnlorp_jax.models import scoring
from gnlorp_jax.models.interface import Model

Record = dict[str, Any]

logger = logging.getLogger(__name__)

WINDOW = 4096
"""Tokens of a perplexity's window where none are asked for: scores of attention
grow with their square, and models accept a hundred thousand."""


def evaluate_tasks(
  model: Model,
  params: Any,
  tokenizer: Tokenizer,
  tasks: Sequence[Task],
  *,
  batch_size: int = 16,
  max_length: int | None = None,
  progress: scoring.Progress = lambda done, total: None,
  keep: Callable[[Record], None] = lambda record: None,
) -> dict[str, Any]:
  """What a model scores in tasks.

  Args:
    model: A causal language model.
    params: Its parameters, as `model` takes them.
    tokenizer: Its tokenizer.
    tasks: What it is asked, such as `data.tasks.get` reads.
    batch_size: Sequences per forward pass.
    max_length: Most tokens that the model is given at a time; None: what it
      accepts. What is longer loses its beginning.
    progress: Is called with how many options or answers of a task are done, and
      are there, now and then.
    keep: Is called with what became of each question.

  Returns:
    By task what `metrics.summarise` says, and as ``truncated`` how many
    questions lost their beginning, of which a warning tells too.

  Raises:
    ValueError: If a number is outside its interval, or an option or the answers
      of a task too long for the model.
  """
  for task in tasks:
    check_room(task, model.config.max_seq_len, max_length)
  found = {}
  for task in tasks:
    ask = _choose if task.is_choice else _answer
    rows = ask(model, params, tokenizer, task, batch_size, max_length, progress)
    for number, row in enumerate(rows):
      keep({'task': task.name, 'question': number, **row})
    found[task.name] = metrics.summarise(task, [row['right'] for row in rows])
    cut = sum(row['truncated'] for row in rows)
    found[task.name]['truncated'] = cut
    if cut:
      logger.warning(
        '%d of the %d questions of %s are longer than the %d tokens that the '
        'model is given: they lost their beginning, solved questions first.',
        *(cut, len(rows), task.name, _accepted(model, max_length)),
      )
  return found


def check_room(task: Task, accepted: int, max_length: int | None) -> None:
  """Raises ValueError if the answers of a task leave no room for a question.

  Args:
    task: The task.
    accepted: Most tokens that the model accepts.
    max_length: Most tokens that it is given at a time; None: `accepted`.
  """
  if task.is_choice:
    return
  says = f'{task.name} writes up to {task.max_tokens} tokens after its question'
  if task.max_tokens >= accepted:
    raise ValueError(
      f'{says}; the model accepts {accepted} in all: leave the task out.'
    )
  if max_length is not None and task.max_tokens >= max_length:
    raise ValueError(
      f'{says}, for which max_length={max_length} leaves no room: raise it, or '
      'leave the task out.'
    )


def window_length(accepted: int, max_length: int | None) -> int:
  """Tokens of a window of a perplexity.

  Args:
    accepted: Most tokens that the model accepts.
    max_length: Tokens that are asked for; None: `accepted`, at most `WINDOW`.
  """
  return min(accepted, WINDOW) if max_length is None else max_length


def _accepted(model: Model, max_length: int | None) -> int:
  """Most tokens that the model is given at a time."""
  return model.config.max_seq_len if max_length is None else max_length


def text_perplexity(
  model: Model,
  params: Any,
  tokenizer: Tokenizer,
  text: str,
  *,
  batch_size: int = 1,
  max_length: int | None = None,
  stride: int | None = None,
  progress: scoring.Progress = lambda done, total: None,
) -> dict[str, Any]:
  """How well a model foresees a text, every token once.

  Args:
    model: A causal language model.
    params: Its parameters.
    tokenizer: Its tokenizer.
    text: The text, which is one document.
    batch_size: Windows per forward pass.
    max_length: Tokens of a window; None: what the model accepts, and at most
      `WINDOW`.
    stride: Tokens that each window scores; None is all of them.
    progress: Is called with how many windows are done, and are there.

  Returns:
    ``tokens``, ``window``, ``stride``, ``log_likelihood`` and under ``metrics``
    those of `metrics.text_metrics`.

  Raises:
    ValueError: If the text is empty or a number outside its interval.
  """
  window = window_length(model.config.max_seq_len, max_length)
  (ids,) = encode(tokenizer, [text], has_bos=False)
  total = scoring.rolling(
    model,
    params,
    ids,
    prefix_id=prefix_id(tokenizer),
    stride=stride,
    batch_size=batch_size,
    max_length=window,
    progress=progress,
  )
  return {
    'tokens': ids.size,
    'window': window,
    'stride': window if stride is None else stride,
    'log_likelihood': metrics.finite(total),
    'metrics': metrics.text_metrics(total, text, ids.size),
  }


def encode(
  tokenizer: Tokenizer, texts: Sequence[str], *, has_bos: bool
) -> list[np.ndarray]:
  """Token ids of texts that are not ended by a token.

  Args:
    tokenizer: The tokenizer.
    texts: The texts.
    has_bos: Whether a text begins with the token that the tokenizer puts there,
      if it does so.

  Returns:
    Per text its ids.
  """
  begin = [tokenizer.bos_id] if has_bos and tokenizer.adds_bos else []
  return [
    np.concatenate([np.array(begin, np.int64), ids[:-1]])
    for ids in tokenizer.encode_batch(texts)
  ]


def prefix_id(tokenizer: Tokenizer) -> int:
  """The token before a text that has nothing before it, as in lm_eval."""
  return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode_pairs(
  tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> list[scoring.Request]:
  """Token ids of contexts and what follows them.

  Args:
    tokenizer: The tokenizer.
    pairs: Contexts, which may be empty, and their continuations.

  Returns:
    Per pair the ids of both, which are those of the text that they make.

  Raises:
    ValueError: If a continuation has no token of its own.
  """
  moved = []
  for context, continuation in pairs:
    kept = context.rstrip()
    moved.append((kept, context[len(kept) :] + continuation))
  contexts = list(dict.fromkeys(context for context, _ in moved))
  encoded = encode(tokenizer, contexts, has_bos=True)
  lengths = {
    context: ids.size for context, ids in zip(contexts, encoded, strict=True)
  }
  wholes = encode(tokenizer, [a + b for a, b in moved], has_bos=True)
  requests = []
  for (context, continuation), ids in zip(moved, wholes, strict=True):
    length = lengths[context]
    if length >= ids.size:
      raise ValueError(
        f'{continuation!r} has no token of its own after a context that ends '
        f'in {context[-20:]!r}: the tokenizer makes one token of both.'
      )
    if length == 0:  # An empty context, and no token before a text.
      ids, length = np.concatenate([[prefix_id(tokenizer)], ids]), 1
    requests.append((ids[:length], ids[length:]))
  return requests


def generate_until(
  model: Model,
  params: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  *,
  stop: Sequence[str],
  max_tokens: int,
  batch_size: int,
  max_length: int | None = None,
  progress: scoring.Progress = lambda done, total: None,
) -> list[str]:
  """The likeliest continuations of prompts, token by token.

  Args:
    model: A causal language model.
    params: Its parameters.
    tokenizer: Its tokenizer.
    prompts: The prompts.
    stop: What ends a continuation, and is not part of it.
    max_tokens: Most tokens of a continuation.
    batch_size: Prompts at a time.
    max_length: Most tokens of a prompt and its continuation; None: what the
      model accepts. A longer prompt loses its beginning.
    progress: Is called with how many prompts are done, and are there.

  Returns:
    The continuations.

  Raises:
    ValueError: If `max_tokens` leaves no room for a prompt.
  """
  accepted = _accepted(model, max_length)
  room = accepted - max_tokens
  if room < 1:
    raise ValueError(
      f'max_tokens={max_tokens} leaves no room for a prompt in the {accepted} '
      'tokens that the model accepts. Ask for shorter answers.'
    )
  encoded = []
  for ids in encode(tokenizer, prompts, has_bos=True):
    kept = ids if ids.size else np.array([prefix_id(tokenizer)])
    encoded.append(kept[-room:].astype(np.int32))
  # Decoded text lacks control tokens, and with them a stop string that is one.
  ends = [tokenizer.backend.token_to_id(string) for string in stop]
  eos_ids = (*tokenizer.eos_ids, *(i for i in ends if i is not None))
  # Prompts of about one length together; the longest first.
  order = sorted(range(len(prompts)), key=lambda i: -encoded[i].size)
  texts = [''] * len(prompts)
  for begin in range(0, len(order), batch_size):
    batch = order[begin : begin + batch_size]
    answers = generation.generate(
      model,
      params,
      [encoded[i] for i in batch],
      max_tokens,
      temperature=0,
      eos_ids=eos_ids,
      stop=tuple(stop),
      decode=tokenizer.decode,
    )
    for i, ids in zip(batch, answers, strict=True):
      texts[i] = _cut(tokenizer.decode(ids), stop)
    progress(begin + len(batch), len(prompts))
  return texts


def _cut(text: str, stop: Sequence[str]) -> str:
  """A text up to the first of the strings that end it."""
  for string in stop:
    text = text.split(string, 1)[0]
  return text


def _choose(
  model, params, tokenizer, task: Task, batch_size, max_length, progress
) -> list[Record]:
  questions: Sequence[Choice] = task.questions
  pairs = [
    (question.context, f' {option}')
    for question in questions
    for option in question.options
  ]
  requests = encode_pairs(tokenizer, pairs)
  scores = iter(
    scoring.log_likelihoods(
      model,
      params,
      requests,
      batch_size=batch_size,
      max_length=max_length,
      progress=progress,
    )
  )
  accepted = _accepted(model, max_length)
  # The last token is scored, not read.
  is_cut = iter(a.size + b.size - 1 > accepted for a, b in requests)
  rows = []
  for question in questions:
    values = [next(scores).log_likelihood for _ in question.options]
    chosen = metrics.judge_choice(question, values)
    if not task.has_acc_norm:
      del chosen['acc_norm']
    rows.append(
      {
        'group': question.group,
        'context': question.context,
        'options': question.options,
        'truncated': any([next(is_cut) for _ in question.options]),
        'log_likelihoods': [metrics.finite(value) for value in values],
        'answer': question.answer,
        'chosen': chosen,
        'right': {k: v == question.answer for k, v in chosen.items()},
      }
    )
  return rows


def _answer(
  model, params, tokenizer, task: Task, batch_size, max_length, progress
) -> list[Record]:
  questions: Sequence[FreeAnswer] = task.questions
  answers = generate_until(
    model,
    params,
    tokenizer,
    [question.prompt for question in questions],
    stop=task.stop,
    max_tokens=task.max_tokens,
    batch_size=batch_size,
    max_length=max_length,
    progress=progress,
  )
  room = _accepted(model, max_length) - task.max_tokens
  prompts = encode(tokenizer, [q.prompt for q in questions], has_bos=True)
  is_cut = iter(ids.size > room for ids in prompts)
  rows = []
  for question, answer in zip(questions, answers, strict=True):
    found = {name: extract(answer) for name, extract in task.extract.items()}
    rows.append(
      {
        'group': question.group,
        'context': question.prompt,
        'truncated': next(is_cut),
        'text': answer,
        'answer': question.answer,
        'chosen': found,
        'right': {k: v == question.answer for k, v in found.items()},
      }
    )
  return rows
