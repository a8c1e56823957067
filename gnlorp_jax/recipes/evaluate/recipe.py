"""From a Hugging Face folder and names of tasks to scores."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, TextIO

import jax

from gnlorp_jax.compose import pretrained, scores
from gnlorp_jax.compose.progress import Progress
from gnlorp_jax.data import tasks as data_tasks
from gnlorp_jax.data import tokenizer as tokenizers
from gnlorp_jax.data.files import check_file, check_suffix
from gnlorp_jax.models.interface import Model
from gnlorp_jax.recipes.evaluate import harness
from gnlorp_jax.recipes.evaluate.settings import (
  HARNESS,
  PERPLEXITY,
  EvaluateConfig,
)


class Loaded(NamedTuple):
  """A language model, ready to be asked."""

  model: Model
  params: Any
  tokenizer: tokenizers.Tokenizer


def load(
  config: EvaluateConfig, asked: Collection[data_tasks.Task | str] = ()
) -> Loaded:
  """Reads the model and its tokenizer.

  Args:
    config: The settings.
    asked: The tasks and texts, which must fit into what the model accepts. The
      weights are read after this is known.

  Returns:
    The model, its parameters on the first device, and its tokenizer.

  Raises:
    ValueError: If the folder holds no language model of a known family, or no
      tokenizer, a file is damaged, or something is asked that the model
      cannot do.
  """
  found = pretrained.find(
    config.folder, dtype=config.dtype, tokenizer=config.tokenizer
  )
  accepted = found.model.config.max_seq_len
  if config.max_length is not None and config.max_length > accepted:
    raise ValueError(
      f'max_length={config.max_length} must be in [1, {accepted}], what the '
      'model accepts.'
    )
  _check_lengths(config, asked, accepted)
  return Loaded(found.model, found.read(), found.tokenizer)


def _check_lengths(
  config: EvaluateConfig,
  asked: Collection[data_tasks.Task | str],
  accepted: int,
) -> None:
  window = scores.window_length(accepted, config.max_length)
  for one in asked:
    if not isinstance(one, str):
      scores.check_room(one, accepted, config.max_length)
    elif config.stride is not None and config.stride > window:
      raise ValueError(
        f'stride={config.stride} must be in [1, {window}], the length of a '
        'window.'
      )


def read_tasks(config: EvaluateConfig) -> dict[str, data_tasks.Task | str]:
  """What is asked, by name: tasks of our own, and the texts of perplexities.

  Raises:
    ValueError: If a file is missing or damaged.
  """
  found: dict[str, data_tasks.Task | str] = {}
  for name in config.task_names:
    kind, _, file = name.partition(':')
    if kind == PERPLEXITY:
      found[name] = _read_text(pathlib.Path(file or config.text).expanduser())
    elif kind != HARNESS:
      found[name] = data_tasks.get(
        name, config.data, shots=config.shots, limit=config.limit
      )
  return found


def evaluate(config: EvaluateConfig, progress: Progress) -> dict[str, Any]:
  """Scores a model.

  Args:
    config: The settings.
    progress: ``progress(title)`` is a context whose value is called with how
      much is done, and is there.

  Returns:
    The settings, and by task what `scores` and lm_eval say, under ``results``.

  Raises:
    ValueError: If a file is missing or damaged, or something is asked that the
      model cannot do.
  """
  asked = read_tasks(config)  # Before the weights, which take longer.
  if any(name.startswith(f'{HARNESS}:') for name in config.task_names):
    harness.check_installed()
  loaded = load(config, asked.values())
  results = {}
  # GPUs would round the factors of float32 products otherwise.
  exact = jax.default_matmul_precision('float32')
  with _records(config.samples) as keep, exact:
    for name in config.task_names:
      begin = time.perf_counter()
      results[name] = _one(
        config, loaded, name, asked.get(name), progress, keep
      )
      results[name]['seconds'] = round(time.perf_counter() - begin, 1)
  return {
    'model': config.folder,
    'settings': dataclasses.asdict(config),
    'device': jax.devices()[0].device_kind,
    'results': results,
  }


def _one(
  config: EvaluateConfig,
  loaded: Loaded,
  name: str,
  asked: data_tasks.Task | str | None,
  progress: Progress,
  keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
  options = {'batch_size': config.batch_size, 'max_length': config.max_length}
  if asked is None:
    return harness.evaluate(
      *loaded,
      name.partition(':')[2],
      include_path=config.include_path,
      shots=config.shots,
      limit=config.limit,
      progress=progress,
      keep=keep,
      **options,
    )
  with progress(name.rpartition('/')[2]) as report:
    if isinstance(asked, str):
      return scores.text_perplexity(
        *loaded, asked, stride=config.stride, progress=report, **options
      )
    found = scores.evaluate_tasks(
      *loaded, [asked], progress=report, keep=keep, **options
    )
  return found[name]


def _read_text(path: pathlib.Path) -> str:
  if path.exists():
    check_suffix(path)
    check_file(path)
  try:
    text = path.read_text(encoding='utf-8')
  except (OSError, ValueError) as error:
    raise ValueError(f'Cannot read the text {path}: {error}') from error
  if not text.strip():
    raise ValueError(f'The text {path} is empty, and has no perplexity.')
  return text


@contextlib.contextmanager
def _records(
  path: str | None,
) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Writes records as lines of JSON, if there is a file for them."""
  if path is None:
    yield lambda record: None
    return
  with pathlib.Path(path).expanduser().open('w', encoding='utf-8') as file:
    yield lambda record: _write_line(file, record)


def _write_line(file: TextIO, record: dict[str, Any]) -> None:
  file.write(json.dumps(record, ensure_ascii=False) + '\n')
