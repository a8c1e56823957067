"""What a fine-tuning program is asked for: typed, frozen, validated settings.

The docstring under a field is its help text on the command line.
"""

import dataclasses
import re
from typing import ClassVar, Literal

from gnlorp_jax.compose import command_line, methods
from gnlorp_jax.compose.settings import (
  OptimConfig,
  RunConfig,
  check_at_least_one,
  check_within,
  free,
  result,
  words,
)
from gnlorp_jax.data import glue
from gnlorp_jax.models.roberta import RobertaConfig

DEMO = 'demo'  # The generated task, which needs no files.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskDataConfig:
  """Where examples come from; the examples themselves decide about a resume."""

  source: str | None = free(None)
  """Folder of GLUE's official files (MRPC/train.tsv, ...), or 'tfds'."""
  train: str | None = free(None)
  """A task of your own: file of training examples (.tsv, .jsonl)."""
  dev: str | None = free(None)
  """File of a task of your own to evaluate on and choose by."""
  test: str | None = free(None)
  """File of a task of your own to predict; its labels are not read."""
  text_columns: str = free('text')
  """Columns of the one text of an example, or of two, joined by a comma."""
  label_column: str = free('label')
  """Column of the label: a class, or a number if `regression`."""
  regression: bool = free(False)
  """Whether the labels of a task of your own are numbers to predict."""
  max_train_examples: int | None = free(None)
  """Train on the first so many examples; None takes all."""
  max_dev_examples: int | None = free(None)
  """Evaluate on the first so many examples; None takes all."""

  def __post_init__(self):
    check_at_least_one(self, 'max_train_examples', 'max_dev_examples')
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
class GlueConfig(RunConfig):
  """Fine-tuning of a RoBERTa on GLUE, one run per task, method and seed.

  Attributes:
    needs_examples: Whether the settings must say where examples are.
  """

  needs_examples: ClassVar[bool] = True

  task: str = free(DEMO)
  """Tasks, joined by commas: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte,
  wnli; 'all' for those that `data.source` has; 'demo' for a generated one that
  needs no files. With `data.train` it names your own."""
  method: str = free('full,lora,gradnormlorp')
  """Methods, joined by commas: full, lora, dora, galore, gradnormlorp,
  gradnormlorp_adapter; 'all' for these; or another optimizer that trains all
  weights: apollo, apollo_mini, fira, ldadam, scale, ...; or layers by turns:
  lisa, badam, owlore, ows. A method is an optimizer and a kind of adapter:
  optim.name and adapter.kind replace them."""
  init_from: str | None = result(None)
  """Hugging Face folder of a RoBERTa, 'hf:OWNER/NAME' of the hub, or a preset
  with random weights: tiny, mini, small, base, large. None is the still smaller
  `model`, for the demo."""
  tokenizer: str | None = free(None)
  """A tokenizer.json, a folder with one, or 'hf:OWNER/NAME'; None is that of
  the model's folder. The demo makes its own."""
  run_dir: str = free('runs/glue')
  """Where runs, results and table go. The same command goes on where it
  stopped, and repeats nothing that is finished."""
  epochs: int | None = result(None)
  """Passes over the training examples; None: 30 of GLUE's tasks."""
  steps: int | None = result(None)
  """Ends a run after so many steps, if the epochs are not over before; the
  learning rate decays over the steps that are taken."""
  batch_size: int | None = result(None)
  """Examples per step, over all devices; None: 16, and 32 for cola."""
  eval_batch_size: int = free(32)
  """Examples per batch of an evaluation."""
  max_length: int | None = None
  """Longest sequence in tokens, the rest is cut off; None: 512, or as much as
  the model takes."""
  dropout: float | None = result(None)
  """Share of features and of attention weights that the model drops; None: as
  the model's folder says, or 0.1; the demo drops nothing."""
  eval_every: int | None = result(None)
  """Steps between two evaluations; None evaluates after every epoch."""
  checkpoint_every: int | None = free(None)
  """Steps between two checkpoints; None saves with every evaluation."""
  checkpoint_keep: int = free(2)
  """Number of checkpoints of an unfinished run."""
  keep: Literal['best', 'all', 'none'] = free('best')
  """Which checkpoints of a finished run are kept."""
  export: bool | None = free(None)
  """Whether to write the best model of a run, adapters merged, as a Hugging
  Face folder; None does if the command is for one run."""
  model: RobertaConfig = RobertaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    max_seq_len=16,
    initializer_std=0.1,
    hidden_dropout=0.0,
    attention_dropout=0.0,
  )
  """Architecture and dtypes. With `init_from` only param_dtype, compute_dtype
  and remat count; of random weights the vocabulary is the tokenizer's."""
  data: TaskDataConfig = TaskDataConfig()
  """Examples."""
  optim: OptimConfig = OptimConfig(
    name=None,
    learning_rate=None,
    schedule='linear',
    warmup_fraction=0.0,
    final_fraction=0.0,
    decay_norms_and_biases=False,
    clip_global_norm=None,
  )
  """Optimizer and schedule. None takes the method's, or what the papers use:
  rank 8, a refresh every 500 steps, learning rate and scale by task and
  method."""

  def __post_init__(self):
    super().__post_init__()
    check_at_least_one(self, 'epochs', 'eval_batch_size', 'max_length')
    check_within(self, '[0, 1)', 'dropout')
    if self.optim.learning_rate is not None and self.learning_rates is not None:
      raise ValueError(
        f'optim.learning_rate={self.optim.learning_rate} and learning_rates='
        f'{self.learning_rates!r} exclude each other: give one rate, or '
        'several to choose from.'
      )
    self._check_names()

  def _check_names(self):
    for name in ('task', 'method'):
      if not words(getattr(self, name)):
        raise ValueError(
          f'{name}={getattr(self, name)!r} names nothing. Give one or more, '
          'joined by commas.'
        )
    for method in self.method_names:
      methods.get_method(method, or_all=True)
    if self.is_custom:
      self._check_own_name()
    elif self.task == DEMO:
      return
    elif self.needs_examples and self.data.source is None:
      raise ValueError(
        f'task={self.task!r} needs data.source: a folder of the official GLUE '
        "files, or 'tfds'; a task of your own needs data.train and data.dev."
      )
    if self.init_from is None:
      raise ValueError(
        f'task={self.task!r} needs a model: give the Hugging Face folder of a '
        'RoBERTa as init_from, or the name of a preset for random weights.'
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
    return words(self.task)

  @property
  def method_names(self) -> tuple[str, ...]:
    """The methods, 'all' replaced."""
    if self.method == 'all':
      return methods.COMPARED
    return words(self.method)

  @property
  def is_single(self) -> bool:
    """Whether the command is for one run."""
    return (
      super().is_single
      and self.task != 'all'
      and len(self.task_names) == len(self.method_names) == 1
    )


ALIASES: command_line.Aliases = {
  'model': ('init_from',),
  'learning_rate': ('optim.learning_rate',),
  'max_steps': ('steps',),
  'rank': ('optim.rank', 'adapter.rank'),
  'scale': ('optim.scale',),
  'update_proj_gap': ('optim.update_proj_gap',),
  'adapter_alpha': ('adapter.alpha',),
  'adapter_dropout': ('adapter.dropout',),
  'weight_decay': ('optim.weight_decay',),
  'warmup_fraction': ('optim.warmup_fraction',),
  'clip_global_norm': ('optim.clip_global_norm',),
  'param_dtype': ('model.param_dtype',),
  'compute_dtype': ('model.compute_dtype',),
  'remat': ('model.remat',),
}
"""Earlier names of options, and what they are called now."""


def parse(
  args: list[str], description: str, kind: type[GlueConfig] = GlueConfig
) -> GlueConfig:
  """Makes a configuration from the command line.

  Args:
    args: Words of the command line, without the program's name.
    description: What `--help` says before the options.
    kind: `GlueConfig`, or a program's own extension of it, whose further
      fields have defaults.

  Returns:
    The configuration.

  Raises:
    SystemExit: After `--help`.
    ValueError: If a field does not exist or a value is not allowed.
  """
  return command_line.override(kind(), args, description, ALIASES)
