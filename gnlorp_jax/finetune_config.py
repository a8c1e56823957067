"""What a fine-tuning program is asked for: typed, frozen, validated settings.

The docstring under a field is its help text on the command line.
"""

import dataclasses
import re
from typing import Any, Literal

from gnlorp_jax import methods
from gnlorp_jax.config import MeshConfig, check_interval, check_positive
from gnlorp_jax.data import glue

DEMO = 'demo'  # The generated task, which needs no files.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskDataConfig:
  """Where examples come from."""

  source: str | None = None
  """Folder of GLUE's official files (MRPC/train.tsv, ...), or 'tfds'."""
  train: str | None = None
  """A task of your own: file of training examples (.tsv, .jsonl)."""
  dev: str | None = None
  """File of a task of your own to evaluate on and choose by."""
  test: str | None = None
  """File of a task of your own to predict; its labels are not read."""
  text_columns: str = 'text'
  """Columns of the one text of an example, or of two, joined by a comma."""
  label_column: str = 'label'
  """Column of the label: a class, or a number if `regression`."""
  regression: bool = False
  """Whether the labels of a task of your own are numbers to predict."""
  max_train_examples: int | None = None
  """Train on the first so many examples; None takes all."""
  max_dev_examples: int | None = None
  """Evaluate on the first so many examples; None takes all."""

  def __post_init__(self):
    for name in ('max_train_examples', 'max_dev_examples'):
      if getattr(self, name) is not None:
        check_positive(self, name)
    if (self.train is None) != (self.dev is None):
      raise ValueError(
        f'A task of your own needs data.train and data.dev, got train='
        f'{self.train!r} and dev={self.dev!r}.'
      )
    if self.train is not None and self.source is not None:
      raise ValueError(
        f'data.source={self.source!r} names GLUE, data.train={self.train!r} a '
        'task of your own: give one of them.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
  """Fine-tuning of a RoBERTa on GLUE, one run per task, method and seed."""

  task: str = DEMO
  """Tasks, joined by commas: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte,
  wnli; 'all' for those that `data.source` has; 'demo' for a generated one that
  needs no files. With `data.train` it names your own."""
  method: str = 'full,lora,gradnormlorp'
  """Methods, joined by commas: full, lora, dora, galore, gradnormlorp,
  gradnormlorp_adapter; 'all' for these; or another optimizer that trains all
  weights: apollo, apollo_mini, fira, ldadam, q_galore, ..."""
  model: str | None = None
  """Hugging Face folder of a RoBERTa, or a preset with random weights: tiny,
  mini, small, base, large. None is a still smaller one, for the
  demo."""
  tokenizer: str | None = None
  """A tokenizer.json or a folder with one; None is that of the model's folder.
  The demo makes its own."""
  seeds: str = '0'
  """Seeds, joined by commas: each is a run with its own classifier, order of
  the data and dropout."""
  run_dir: str = 'runs/glue'
  """Where runs, results and table go. The same command goes on where it
  stopped, and repeats nothing that is finished."""
  dry_run: bool = False
  """Only report what each method would do with every parameter, and how many
  bytes its optimizer takes."""

  learning_rate: float | None = None
  """Learning rate of every run; None takes the table's, by task and method."""
  learning_rates: str | None = None
  """Learning rates to search, joined by commas: the first seed runs with each,
  the others with the best of them, judged by the task's main dev metric."""
  epochs: int | None = None
  """Passes over the training examples; None takes the table's, 30 for GLUE."""
  max_steps: int | None = None
  """Ends a run after so many steps, if the epochs are not over before; the
  learning rate decays over the steps that are taken."""
  batch_size: int | None = None
  """Examples per step, over all devices; None: 16, and 32 for cola."""
  micro_batches: int = 1
  """Pieces of a batch that are worked through one after the other."""
  eval_batch_size: int = 32
  """Examples per batch of an evaluation."""
  max_length: int | None = None
  """Longest sequence in tokens, the rest is cut off; None: 512, or as much as
  the model takes."""
  rank: int = 8
  """Rank of subspaces and adapters; GaLore published rates for 4 and 8."""
  scale: float | None = None
  """Multiplies the updates of projected matrices; None takes the table's."""
  update_proj_gap: int | None = None
  """Steps between two refreshes of a subspace; None takes the table's, 500."""
  adapter_alpha: float | None = None
  """Adapters' changes are multiplied by alpha / rank; None takes 16."""
  adapter_dropout: float | None = None
  """Share of the adapters' inputs that is dropped; None takes 0.1."""
  weight_decay: float | None = None
  """Decoupled decay of all trained weights; None takes 0."""
  warmup_fraction: float | None = None
  """Share of the steps over which the learning rate rises; None takes 0."""
  clip_global_norm: float | None = None
  """Gradients are scaled down to this global norm; None does not clip."""
  dropout: float | None = None
  """Share of features and of attention weights that the model drops; None: as
  the model's folder says, or 0.1."""

  eval_every: int | None = None
  """Steps between two evaluations; None evaluates after every epoch."""
  checkpoint_every: int | None = None
  """Steps between two checkpoints; None saves with every evaluation."""
  log_every: int = 10
  """Steps between two lines of metrics."""
  keep: Literal['best', 'all', 'none'] = 'best'
  """Which checkpoints of a finished run are kept."""
  export: bool | None = None
  """Whether to write the best model of a run, adapters merged, as a Hugging
  Face folder; None does if the command is for one run."""
  param_dtype: Literal['float32', 'bfloat16'] = 'float32'
  """Dtype of the model's parameters."""
  compute_dtype: Literal['float32', 'bfloat16'] = 'float32'
  """Dtype of activations and matrix products."""
  remat: bool = False
  """Recompute each block in the backward pass: less memory, more time."""
  data: TaskDataConfig = TaskDataConfig()
  """Examples."""
  mesh: MeshConfig = MeshConfig()
  """Devices."""

  def __post_init__(self):
    check_positive(self, 'micro_batches', 'eval_batch_size', 'rank')
    check_positive(self, 'log_every')
    for name in (
      'epochs',
      'max_steps',
      'batch_size',
      'max_length',
      'update_proj_gap',
      'eval_every',
      'checkpoint_every',
    ):
      if getattr(self, name) is not None:
        check_positive(self, name)
    for rate in (self.learning_rate, *(self.searched_rates or ())):
      if rate is not None and not rate > 0:
        raise ValueError(f'A learning rate must be positive, got {rate}.')
    if self.learning_rate is not None and self.learning_rates is not None:
      raise ValueError(
        f'learning_rate={self.learning_rate} and learning_rates='
        f'{self.learning_rates!r} exclude each other: give one rate, or '
        'several to choose from.'
      )
    if self.clip_global_norm is not None and not self.clip_global_norm > 0:
      raise ValueError(
        'FinetuneConfig.clip_global_norm must be positive, got '
        f'{self.clip_global_norm}. Use None not to clip.'
      )
    for name in ('adapter_dropout', 'dropout', 'warmup_fraction'):
      if getattr(self, name) is not None:
        check_interval(self, name, 0, 1)
    self._check_names()

  def _check_names(self):
    for name in ('task', 'method', 'seeds', 'learning_rates'):
      words = getattr(self, name)
      if words is not None and not _words(words):
        raise ValueError(
          f'{name}={words!r} names nothing. Give one or more, joined by commas.'
        )
    for method in self.method_names:
      methods.get_method(method)
    if min(self.seed_numbers) < 0:
      raise ValueError(
        f'seeds={self.seeds!r}: a seed must not be less than 0. Give others.'
      )
    if self.is_custom:
      self._check_own_name()
    elif self.task == DEMO:
      return
    elif self.data.source is None:
      raise ValueError(
        f'task={self.task!r} needs data.source: a folder of the official GLUE '
        "files, or 'tfds'; a task of your own needs data.train and data.dev."
      )
    if self.model is None:
      raise ValueError(
        f'task={self.task!r} needs a model: give the Hugging Face folder of a '
        'RoBERTa, or the name of a preset for random weights.'
      )

  def _check_own_name(self):
    where = f'task={self.task!r} with data.train={self.data.train!r}'
    if not re.fullmatch(r'\w[\w.-]*', self.task) or self.task == 'all':
      raise ValueError(
        f'{where}: a task of your own has one name, of letters, digits, ".", '
        '"-" and "_": it becomes a folder.'
      )
    if self.task in glue.TASKS:
      raise ValueError(
        f'{where}: that is the name of a task of GLUE, whose averages it would '
        'enter. Give your task another name.'
      )

  @property
  def is_custom(self) -> bool:
    """Whether the task is the user's own."""
    return self.data.train is not None

  @property
  def task_names(self) -> tuple[str, ...]:
    """The tasks that were named."""
    return _words(self.task)

  @property
  def method_names(self) -> tuple[str, ...]:
    """The methods, 'all' replaced."""
    if self.method == 'all':
      return methods.COMPARED
    return _words(self.method)

  @property
  def seed_numbers(self) -> tuple[int, ...]:
    """The seeds as numbers."""
    return _numbers('seeds', self.seeds, int)

  @property
  def searched_rates(self) -> tuple[float, ...] | None:
    """The learning rates to search as numbers, or None."""
    if self.learning_rates is None:
      return None
    return _numbers('learning_rates', self.learning_rates, float)

  @property
  def is_single(self) -> bool:
    """Whether the command is for one run."""
    return (
      self.task != 'all'
      and self.learning_rates is None
      and len(self.task_names) == len(self.method_names) == 1
      and len(self.seed_numbers) == 1
    )

  def hyperparameters(self, task: str, method: str) -> methods.Hyperparameters:
    """The numbers of a run: those given here, or else the table's."""
    table = methods.hyperparameters(task, method, self.rank)
    given = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(table)
      if getattr(self, field.name) is not None
    }
    return dataclasses.replace(table, **given)


def _words(text: str) -> tuple[str, ...]:
  """The words between commas, each once."""
  words = (word.strip() for word in text.split(','))
  return tuple(dict.fromkeys(word for word in words if word))


def _numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
  try:
    return tuple(dict.fromkeys(kind(word) for word in _words(text)))
  except ValueError as error:
    raise ValueError(
      f'{name}={text!r} must be numbers joined by commas: {error}.'
    ) from None
