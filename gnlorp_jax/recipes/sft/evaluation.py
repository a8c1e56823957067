"""What a fine-tuned model says of held-out conversations, and to them."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gnlorp_jax.compose import language_model
from gnlorp_jax.compose.program import Program
from gnlorp_jax.data import chat
from gnlorp_jax.data.tasks.questions import Task
from gnlorp_jax.disk import writing
from gnlorp_jax.models.generate import generate
from gnlorp_jax.models.interface import Model
from gnlorp_jax.recipes.sft import data
from gnlorp_jax.recipes.sft.settings import SftConfig
from gnlorp_jax.training import distributed, interrupt, records

SAMPLES_FILE = 'samples.jsonl'


def evaluator(
  program: Program,
  found: data.Chat,
  tasks: Sequence[Task],
  config: SftConfig,
  steps_taken: Callable[[], int],
) -> Callable[[Any, Any], dict[str, float]]:
  """What a run finds out about its model every now and then.

  Args:
    program: What the run computes.
    found: Its examples.
    tasks: What it is asked.
    config: Its settings.
    steps_taken: Tells how many steps were taken.

  Returns:
    A function of trained and frozen weights, which returns the mean ``loss``
    of the held-out tokens that count, the ``perplexity``, the share of them
    that is the likeliest (``token_accuracy``), the share of generated answers
    that are the expected ones (``exact_match``), and of each task
    ``TASK/METRIC`` and ``TASK/METRIC_stderr``. The answers are added to
    ``samples.jsonl``.
  """

  def evaluate(trained: Any, frozen: Any) -> dict[str, float]:
    weights = (trained, frozen)
    result = {}
    if found.examples.validation:
      result |= losses(program, found, config, *weights)
      result |= _answers(program, found, config, *weights, steps_taken())
    return result | language_model.ask(
      program, *weights, found.tokenizer, tasks, config.eval.batch_size
    )

  return evaluate


def losses(
  program: Program,
  found: data.Chat,
  config: SftConfig,
  trained: Any,
  frozen: Any,
) -> dict[str, float]:
  """Mean loss, perplexity and token accuracy of the validation examples.

  Args:
    program: What the run computes.
    found: Its examples.
    config: Its settings.
    trained: The parameters that train.
    frozen: The others.
  """
  batches = data.evaluation_batches(config, found, program.mesh)
  loss, weight, right = language_model.evaluate(
    *(program, batches, trained, frozen),
    config.batch_size // config.micro_batches,
  )
  return {
    'loss': float(loss / weight),
    'perplexity': float(np.exp(loss / weight)),
    'token_accuracy': float(right / weight),
  }


def _answers(
  program: Program,
  found: data.Chat,
  config: SftConfig,
  trained: Any,
  frozen: Any,
  step: int,
) -> dict[str, float]:
  """Answers held-out prompts, and keeps what it says."""
  asked = [
    conversation
    for conversation in found.examples.validation_conversations
    # A call of a tool is no text that could be compared.
    if conversation.kind == 'chat' and not conversation.messages[-1].calls_tools
  ][: config.eval.generate]
  if not asked:
    return {}
  texts = answer(
    program.model,
    program.parameters.join(trained, frozen),
    found,
    [conversation.messages[:-1] for conversation in asked],
    [conversation.tools for conversation in asked],
    config,
  )
  rows = [
    {
      'step': step,
      'messages': [
        {'role': message.role, 'content': message.content}
        for message in conversation.messages[:-1]
      ],
      'answer': text,
      'expected': conversation.messages[-1].content,
      'exact_match': text == conversation.messages[-1].content.strip(),
    }
    for conversation, text in zip(asked, texts, strict=True)
  ]
  if distributed.is_first():
    keep_samples(pathlib.Path(config.run_dir) / SAMPLES_FILE, step, rows)
  return {'exact_match': float(np.mean([row['exact_match'] for row in rows]))}


def answer(
  model: Model,
  params: Any,
  found: data.Chat,
  conversations: Sequence[Sequence[chat.Message]],
  tools: Sequence[Sequence[dict[str, Any]]],
  config: SftConfig,
) -> list[str]:
  """What a model answers, white space around it removed.

  Args:
    model: The model.
    params: Its parameters.
    found: Tokenizer and template.
    conversations: The messages before each answer.
    tools: The functions that may be called in each.
    config: The settings: how many tokens, how random, how many at a time.
  """
  prompts = [
    found.template.prompt(messages, functions)
    for messages, functions in zip(conversations, tools, strict=True)
  ]
  size = config.eval.batch_size
  stop_ids = found.template.stop_ids
  texts = []
  for start in interrupt.until_stopped(range(0, len(prompts), size)):
    answers = generate(
      model,
      params,
      prompts[start : start + size],
      min(config.eval.max_tokens, model.config.max_seq_len - 1),
      temperature=config.eval.temperature,
      key=jax.random.fold_in(jax.random.key(config.seed), start),
      eos_ids=stop_ids,
    )
    texts += [found.tokenizer.decode(ids).strip() for ids in answers]
  return texts


def keep_samples(
  path: pathlib.Path, step: int, rows: Sequence[dict[str, Any]]
) -> None:
  """Adds the rows of a step to a file of JSON lines, which stays whole.

  Args:
    path: The file.
    step: The step. What is there of it and of later ones, which a run that was
      interrupted left, is replaced.
    rows: Its rows.
  """
  kept = []
  if path.is_file():
    kept = [row for row in read_samples(path) if row['step'] < step]
  lines = [json.dumps(row, ensure_ascii=False) for row in (*kept, *rows)]
  path.parent.mkdir(parents=True, exist_ok=True)
  writing.write_text(path, '\n'.join(lines) + '\n')


def read_samples(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a file that `keep_samples` wrote.

  Raises:
    ValueError: If a line is damaged.
  """
  return records.read_rows(path, 'Repair or remove the line.')
