"""Tasks of EleutherAI's lm_eval, asked of a model of this library.

lm_eval is a package of the extra ``eval``, imported when a task of it is asked
for. It needs no PyTorch and, for tasks in files on this machine, no network.
"""

import importlib.util
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from gnlorp_jax.compose import scores
from gnlorp_jax.data.tasks import metrics
from gnlorp_jax.data.tokenizer import Tokenizer
from gnlorp_jax.disk import extras
from gnlorp_jax.models import scoring
from gnlorp_jax.models.interface import Model

_MAX_TOKENS = 256  # Of an answer, where a task does not say; as lm_eval's own.


def check_installed() -> None:
  """Raises ValueError if lm_eval is not there."""
  if importlib.util.find_spec('lm_eval') is None:
    raise ValueError(
      f'Tasks lm_eval:... need the package lm_eval: {extras.install("eval")}'
    )


def evaluate(
  model: Model,
  params: Any,
  tokenizer: Tokenizer,
  task: str,
  *,
  include_path: str | None = None,
  shots: int | None = None,
  limit: int | None = None,
  batch_size: int = 16,
  max_length: int | None = None,
  progress: Callable[[str], Any],
  keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
  """What lm_eval says of a model in one of its tasks, or a group of them.

  Args:
    model: A causal language model.
    params: Its parameters.
    tokenizer: Its tokenizer.
    task: Name of the task or group.
    include_path: Folder of tasks of one's own, which are then the only ones.
    shots: Solved questions before each; None is what the task says.
    limit: Ask the first questions only; None asks all.
    batch_size: Sequences per forward pass.
    max_length: Most tokens that the model is given at a time.
    progress: Opens a progress bar of that title.
    keep: Is called with lm_eval's record of each question.

  Returns:
    ``tasks`` (by name ``questions`` and ``metrics``, each with ``value`` and
    ``stderr`` or None) and ``lm_eval``, its version.

  Raises:
    ValueError: If there is no such task, or lm_eval is not installed.
  """
  check_installed()
  import lm_eval
  from lm_eval.tasks import TaskManager

  if include_path is not None and not pathlib.Path(include_path).is_dir():
    raise ValueError(f'include_path={include_path!r} is no folder.')
  manager = TaskManager(
    include_path=include_path, include_defaults=include_path is None
  )
  if task not in manager.all_tasks:
    where = include_path or 'lm_eval'
    raise ValueError(
      f'{where} has no task {task!r}. Its tasks: '
      f'{_some(sorted(manager.all_tasks))}.'
    )
  found = lm_eval.simple_evaluate(
    model=language_model(
      model, params, tokenizer, batch_size, max_length, progress
    ),
    tasks=[task],
    num_fewshot=shots,
    limit=limit,
    bootstrap_iters=0,
    task_manager=manager,
    log_samples=True,
  )
  for name, samples in found.get('samples', {}).items():
    for sample in samples:
      keep({'task': f'lm_eval:{name}', **_plain(sample)})
  return {
    'tasks': {
      name: {
        'questions': found['n-samples'].get(name, {}).get('effective'),
        'metrics': _metrics(row, found.get('samples', {}).get(name, [])),
      }
      for name, row in found['results'].items()
    },
    'lm_eval': lm_eval.__version__,
  }


def language_model(
  model: Model,
  params: Any,
  tokenizer: Tokenizer,
  batch_size: int,
  max_length: int | None,
  progress: Callable[[str], Any],
) -> Any:
  """A model as lm_eval's `LM`.

  Args:
    model: A causal language model.
    params: Its parameters.
    tokenizer: Its tokenizer.
    batch_size: Sequences per forward pass.
    max_length: Most tokens that the model is given at a time.
    progress: Opens a progress bar of that title.

  Returns:
    An `lm_eval.api.model.LM`, whose class exists once lm_eval is imported.
  """
  from lm_eval.api.model import LM

  held = (model, params)
  options = {'batch_size': batch_size, 'max_length': max_length}

  class LanguageModel(LM):
    """Asked for log-likelihoods and for continuations."""

    def loglikelihood(
      self, requests: Sequence[Any]
    ) -> list[tuple[float, bool]]:
      pairs = [request.args for request in requests]
      with progress('log-likelihoods') as report:
        found = scoring.log_likelihoods(
          *held,
          scores.encode_pairs(tokenizer, pairs),
          progress=report,
          **options,
        )
      return [tuple(score) for score in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
      found = []
      with progress('texts') as report:
        for number, request in enumerate(requests):
          (text,) = request.args
          result = scores.text_perplexity(*held, tokenizer, text, **options)
          found.append(result['log_likelihood'])
          report(number + 1, len(requests))
      return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
      found = [''] * len(requests)
      with progress('answers') as report:
        done = 0
        for how, numbers in _alike([request.args for request in requests]):
          answers = scores.generate_until(
            *held,
            tokenizer,
            [requests[i].args[0] for i in numbers],
            **_limits(how),
            **options,
          )
          for i, answer in zip(numbers, answers, strict=True):
            found[i] = answer
          done += len(numbers)
          report(done, len(requests))
      return found

  return LanguageModel()


def _alike(
  requests: Sequence[tuple[str, dict[str, Any]]],
) -> list[tuple[dict[str, Any], list[int]]]:
  """The numbers of requests for each way of generating."""
  found: dict[str, tuple[dict[str, Any], list[int]]] = {}
  for number, (_, how) in enumerate(requests):
    found.setdefault(repr(how), (how, []))[1].append(number)
  return list(found.values())


def _limits(how: dict[str, Any]) -> dict[str, Any]:
  """lm_eval's words for where an answer ends, as ours."""
  if how.get('do_sample') and how.get('temperature', 1.0) > 0:
    raise ValueError(
      f'The task draws its answers at random ({how}); only the likeliest are '
      'found here. Set do_sample: false in generation_kwargs.'
    )
  until = how.get('until') or []
  return {
    'stop': [until] if isinstance(until, str) else list(until),
    'max_tokens': int(how.get('max_gen_toks', _MAX_TOKENS)),
  }


def _metrics(
  row: dict[str, Any], samples: Sequence[dict[str, Any]]
) -> dict[str, dict[str, float | None]]:
  """lm_eval's flat row, such as ``{'acc,none': 0.5}``, with standard errors.

  Those of lm_eval that are no closed form draw samples in processes of their
  own, which a program that has started JAX must not fork.
  """
  found = {}
  for key, value in row.items():
    name, comma, kind = key.partition(',')
    if not comma or name.endswith('_stderr'):
      continue
    judged = [
      sample[name]
      for sample in samples
      if name in sample and sample.get('filter', kind) == kind
    ]
    is_share = judged and all(result in (0, 1) for result in judged)
    found[name if kind == 'none' else f'{name} ({kind})'] = {
      'value': value,
      'stderr': metrics.mean(judged)['stderr'] if is_share else None,
    }
  return found


def _plain(sample: dict[str, Any]) -> dict[str, Any]:
  """A record of lm_eval, without what JSON cannot say."""
  return json.loads(json.dumps(sample, default=str))


def _some(names: Sequence[str]) -> str:
  shown = ', '.join(names[:20])
  return shown if len(names) <= 20 else f'{shown} and {len(names) - 20} more'
