"""What can be asked of an evaluation."""

import dataclasses

from gnlorp_jax.compose import command_line, pretrained
from gnlorp_jax.compose.settings import words
from gnlorp_jax.data import tasks as data_tasks
from gnlorp_jax.models.interface import Dtype

PERPLEXITY = 'perplexity'
HARNESS = 'lm_eval'


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
  """An evaluation of one model."""

  folder: str = ''
  """Hugging Face folder of a language model, such as the hf/ of a run, or
  hf:OWNER/NAME of the hub; on the command line the first word."""
  tasks: str = ''
  """What to ask, parted by commas: names of tasks (arc_challenge, arc_easy,
  boolq, gsm8k, mmlu, openbookqa, piqa), perplexity (of --text) or
  perplexity:FILE, lm_eval:TASK for a task of lm_eval (needs the extra eval)."""
  data: str | None = None
  """Folder with the files of the tasks, which may lie in folders in it; of a
  single task also its file."""
  text: str | None = None
  """Text file whose perplexity is measured."""
  include_path: str | None = None
  """Folder with tasks of lm_eval of your own, YAML files. With it, lm_eval
  looks for tasks there alone."""
  shots: int | None = None
  """Solved questions before each question. By default those that a task is
  usually asked with: 5 of MMLU and GSM8K, 0 of the others."""
  limit: int | None = None
  """Ask the first questions only, of MMLU those of each subject. By default
  all."""
  batch_size: int = 16
  """Options or answers per forward pass. Fewer need less memory."""
  max_length: int | None = None
  """Most tokens that the model is given at a time, and the window of a
  perplexity. By default what it accepts, and of a perplexity at most 4096.
  Contexts that are longer lose their beginning."""
  stride: int | None = None
  """Tokens that a window of a perplexity scores; those before them are context.
  By default all of the window."""
  tokenizer: str | None = None
  """Folder or file of a tokenizer. By default that of the model's folder."""
  dtype: Dtype = 'float32'
  """Dtype of the weights and of the arithmetic. In bfloat16 logits are rounded
  too; the softmax is float32 in both."""
  output: str | None = None
  """JSON file to write the scores to."""
  samples: str | None = None
  """JSON-lines file to write what became of each question to."""

  def __post_init__(self):
    for name in ('batch_size', 'limit', 'max_length', 'stride'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name}={value} must be positive.')
    if self.shots is not None and self.shots < 0:
      raise ValueError(f'shots={self.shots} must not be negative.')

  @property
  def task_names(self) -> tuple[str, ...]:
    """What `tasks` names, one by one and each once."""
    return words(self.tasks)


def parse(args: list[str], description: str) -> EvaluateConfig:
  """The settings of a command line, whose first word is the folder.

  Args:
    args: Words of the command line, without the program's name.
    description: What `--help` says before the options.

  Returns:
    The settings.

  Raises:
    SystemExit: After `--help`.
    ValueError: If an option does not exist or a value is not allowed, if there
      is no folder, or nothing to ask.
  """
  config = command_line.override_with_folder(
    EvaluateConfig(), args, description
  )
  check(config)
  return config


def check(config: EvaluateConfig) -> None:
  """Raises ValueError for what can be known before anything is loaded."""
  pretrained.check_name(
    config.folder, 'python -m gnlorp_jax.evaluate FOLDER --tasks ...'
  )
  for option in ('output', 'samples'):
    command_line.check_place(option, getattr(config, option))
  known = (*data_tasks.names(), PERPLEXITY)
  if not config.task_names and config.text is not None:
    raise ValueError(f'--text alone asks nothing: add --tasks {PERPLEXITY}.')
  if not config.task_names:
    raise ValueError(
      f'tasks={config.tasks!r} asks nothing; expected some of {known} or '
      f'{HARNESS}:TASK, parted by commas.'
    )
  ours = []
  for name in config.task_names:
    kind, _, rest = name.partition(':')
    if kind in (PERPLEXITY, HARNESS) and rest:
      continue
    if name not in known:
      raise ValueError(
        f'Unknown task {name!r}; expected one of {known}, {PERPLEXITY}:FILE or '
        f'{HARNESS}:TASK.{_suggest(name)}'
      )
    ours.append(name)
  if PERPLEXITY in ours and config.text is None:
    raise ValueError('tasks=perplexity needs a text: --text FILE.')
  for name in ours:
    if name != PERPLEXITY and config.data is None:
      raise ValueError(
        f'Task {name} is read from files on this machine: name their folder by '
        '--data FOLDER.'
      )
  data_tasks.check_data([x for x in ours if x != PERPLEXITY], config.data)


def _suggest(name: str) -> str:
  """Which task a misspelt one may mean, with what stands behind its colon."""
  kind, colon, rest = name.partition(':')
  if rest:
    whole = (f'{PERPLEXITY}:{rest}', f'{HARNESS}:{rest}')
    return data_tasks.suggest(f'{kind.lower()}:{rest}', whole)
  return data_tasks.suggest(kind, (*data_tasks.names(), PERPLEXITY))
