"""What an instruction-tuning program is asked for.

The docstring under a field is its help text on the command line.
"""

import dataclasses
import math
from typing import Literal

from gnlorp_jax import models
from gnlorp_jax.compose import command_line, config_file, methods
from gnlorp_jax.compose.coreset_settings import CoresetOptions
from gnlorp_jax.compose.settings import (
  AdapterOptions,
  OptimConfig,
  RunConfig,
  TaskOptions,
  check_at_least_one,
  check_within,
  free,
  result,
)
from gnlorp_jax.models.llama import LlamaConfig

DEMO = 'demo'  # The generated instructions, which need no files.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatDataConfig:
  """Conversations and how they become tokens.

  A resumed run must have the same training examples, whatever they come from.
  """

  source: str | None = free(None)
  """Files (.json, .jsonl, .parquet), folders and globs, joined by commas:
  alpaca, sharegpt, messages, prompt and completion, or plain text, told apart
  by their keys. NAME=FILE names a source, FILE@0.5 takes a half of it, the same
  in every epoch, FILE@2 takes it twice. 'demo' is a generated set; None is that
  where no model is named."""
  validation_source: str | None = free(None)
  """Conversations to evaluate on, named like `source`; None holds out
  `val_size` of it."""
  val_size: float = free(0.02)
  """Examples of `source` held out: a number of them, or below 1 a share; 0
  holds out none, and then nothing is evaluated but tasks."""
  template: str | None = free(None)
  """How a conversation becomes text: 'tokenizer' (the template beside the
  model's tokenizer), 'alpaca', 'none' (prompt and answer alone), or a Jinja
  file; None is 'tokenizer' where there is one, or else 'alpaca'. It is exported
  with the model."""
  tokenizer: str | None = free(None)
  """A tokenizer.json, a folder with one, or 'hf:OWNER/NAME'; None is that of
  the model. The demo makes its own."""
  train_on: Literal['assistant', 'last', 'all'] = free('assistant')
  """What of a conversation is learned: every answer of the assistant, the last
  one alone, or all text. A message's own `train` or `weight` counts more."""
  max_length: int | None = None
  """Most tokens of an example, and of a packed row; None: 1024, or as much as
  the model accepts."""
  overflow: Literal['truncate', 'drop', 'raise'] = free('truncate')
  """What becomes of longer examples: their end is cut off, they are left out,
  or the first one ends the program."""
  packing: bool = True
  """Put several examples into a row, none of which attends to another; without,
  every row is one example and padding."""
  limit: int | None = None
  """Train on the first so many examples; None takes all."""

  def __post_init__(self):
    check_at_least_one(self, 'max_length', 'limit')
    size = self.val_size
    if not 0 <= size < math.inf or (size > 1 and size % 1):
      raise ValueError(
        f'data.val_size={self.val_size} must be a number of examples, such as '
        '100, a share below 1, such as 0.02, or 0 for none.'
      )
    if self.validation_source is not None and self._is_demo:
      raise ValueError(
        f'data.validation_source={self.validation_source!r} is given, and '
        "data.source is 'demo', which holds out some of its own. Name the "
        'conversations to train on as data.source.'
      )

  @property
  def holds_out(self) -> bool:
    """Whether there are examples to evaluate on."""
    return bool(self.val_size or self.validation_source or self._is_demo)

  @property
  def _is_demo(self) -> bool:
    return self.source in (None, DEMO)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftEvalOptions(TaskOptions):
  """What a model is asked at every evaluation beside its validation loss."""

  generate: int | None = free(None)
  """Answers to write to the first so many held-out prompts, to samples.jsonl;
  0 writes none; None: 8, and 64 of the demo."""
  max_tokens: int = free(128)
  """Most tokens of such an answer."""
  temperature: float = free(0.0)
  """Randomness of the answers: 0 takes the likeliest token."""

  def __post_init__(self):
    super().__post_init__()
    check_at_least_one(self, 'max_tokens')
    check_within(self, '[0, inf)', 'generate', 'temperature')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig(RunConfig):
  """Fine-tuning on conversations, each field an option of the program."""

  method: str = 'gradnormlorp'
  """What trains and how: full (AdamW), lora, dora, gradnormlorp_adapter, or an
  optimizer that trains all weights (galore, q_galore, apollo, fira,
  gradnormlorp, vlorp, ...), or layers by turns (lisa, badam, owlore, ows). A
  method is an optimizer and a kind of adapter: optim.name and adapter.kind
  replace them."""
  init_from: str | None = result(None)
  """Hugging Face folder of the model to fine-tune, or hf:OWNER/NAME of the hub
  (also --model); or a preset with random weights. None, for the demo, is the
  small `model`."""
  run_dir: str | None = free(None)
  """Where checkpoints, metrics, samples and export go; None is runs/sft, and of
  the demo runs/sft_demo. A run directory that holds checkpoints is resumed: for
  other data give another."""
  epochs: float | None = result(None)
  """Passes over the training examples; None: 1, and of the demo 4."""
  steps: int | None = result(None)
  """Ends a run after so many steps, if the epochs are not over before; the
  learning rate decays over the steps that are taken."""
  batch_size: int | None = result(None)
  """Rows per step, over all devices; None: 8, and 16 of the demo. A run may go
  on with another, from the row behind the last that was seen."""
  eval_every: int | None = result(None)
  """Steps between two evaluations; None evaluates after every epoch."""
  checkpoint_every: int | None = free(None)
  """Steps between two checkpoints; None is the shorter of a tenth of the run
  and the steps between two evaluations."""
  checkpoint_keep: int = free(2)
  """Number of checkpoints kept."""
  keep_best: bool = result(True)
  """Keep the parameters with the lowest validation loss as well; they are what
  is exported and told of at the end."""
  export: Literal['merged', 'adapter', 'none'] = free('merged')
  """What is left at the end: 'merged' is a Hugging Face folder of the whole
  model (hf/), 'adapter' a PEFT folder of the adapters alone (adapter/)."""
  preview: bool = free(False)
  """Only print the first examples as the model reads them, what is learned
  marked."""
  loss_chunk_tokens: int = free(1024)
  """Tokens whose logits exist at once in the loss."""
  model: models.Config = LlamaConfig(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=352,
    num_layers=4,
    num_heads=4,
    max_seq_len=128,
  )
  """Architecture and dtypes. With `init_from` only param_dtype, compute_dtype,
  remat and dropout count; of the demo the vocabulary is the tokenizer's."""
  data: ChatDataConfig = ChatDataConfig()
  """Conversations."""
  optim: OptimConfig = OptimConfig(
    name=None,
    learning_rate=None,
    warmup_fraction=0.05,
    decay_norms_and_biases=False,
  )
  """Optimizer and schedule; None takes the method's. Learning rates, where none
  is given, are starting points (docs/instruction-tuning.md): search around
  them."""
  adapter: AdapterOptions = AdapterOptions()
  """Low-rank changes beside frozen kernels."""
  eval: SftEvalOptions = SftEvalOptions()
  """Answers and tasks asked at every evaluation."""
  coreset: CoresetOptions = CoresetOptions()
  """Training on a choice of a larger pool of rows; examples of different
  sources then share no row."""

  def __post_init__(self):
    super().__post_init__()
    check_at_least_one(self, 'loss_chunk_tokens')
    check_within(self, '(0, inf)', 'epochs')
    if self.patience is not None and not self._finds_best:
      raise ValueError(
        f'patience={self.patience} counts evaluations since the best one; that '
        'needs keep_best=True and held-out examples (data.val_size).'
      )
    chosen = methods.get_method(self.method)
    if self.optim.learning_rate is not None and self.learning_rates is not None:
      raise ValueError(
        f'optim.learning_rate={self.optim.learning_rate} and learning_rates='
        f'{self.learning_rates!r} exclude each other: give one rate, or '
        'several to choose from.'
      )
    if self.learning_rates is not None and not self.data.holds_out:
      raise ValueError(
        f'learning_rates={self.learning_rates!r} are chosen by the validation '
        'loss, and data.val_size=0 holds out nothing.'
      )
    kind = self.adapter.kind or chosen.adapter
    # --rank sets that of subspaces and that of adapters.
    rank = self.optim.rank
    if kind is None and self.adapter not in (
      AdapterOptions(),
      AdapterOptions(rank=rank),
    ):
      raise ValueError(
        f'method={self.method!r} has no adapters for options of adapter to '
        'change. Add --method lora, dora or gradnormlorp_adapter.'
      )
    if self.export == 'adapter' and kind not in ('lora', 'dora'):
      trains = 'all weights' if kind is None else f'adapters of kind {kind!r}'
      raise ValueError(
        "export='adapter' writes adapters of kind lora or dora for PEFT, and "
        f"method={self.method!r} trains {trains}. Use export='merged', or "
        'another method.'
      )
    if self.export == 'adapter' and (
      self.adapter.restart_every or self.adapter.train_others
    ):
      raise ValueError(
        "export='adapter' writes what changes the model of init_from, and with "
        'adapter.restart_every or adapter.train_others its own weights change '
        "too. Use export='merged'."
      )
    if self.data.source not in (None, DEMO) and self.init_from is None:
      raise ValueError(
        f'data.source={self.data.source!r} needs a model: give its Hugging '
        'Face folder, or hf:OWNER/NAME, as init_from (or --model).'
      )

  @property
  def _finds_best(self) -> bool:
    return self.keep_best and self.data.holds_out

  @property
  def is_demo(self) -> bool:
    """Whether a small model of its own learns the generated instructions."""
    return self.data.source in (None, DEMO) and self.init_from is None


SHORT_NAMES: command_line.Aliases = {
  'data': ('data.source',),
  'learning_rate': ('optim.learning_rate',),
  'max_length': ('data.max_length',),
  'model': ('init_from',),
  'rank': ('optim.rank', 'adapter.rank'),
}
"""Short names of options, and the fields that they set."""


def parse(
  args: list[str], description: str, kind: type[SftConfig] = SftConfig
) -> SftConfig:
  """Makes a configuration from the command line.

  ``--config FILE`` names the file that overrides start from. ``--data`` takes
  several files, with spaces between them.

  Args:
    args: Words of the command line, without the program's name.
    description: What `--help` says before the options.
    kind: `SftConfig`, or a program's own extension of it, whose further fields
      have defaults.

  Returns:
    The configuration.

  Raises:
    SystemExit: After `--help`.
    ValueError: If a field does not exist or a value is not allowed.
  """
  path, args = config_file.take(args)
  default = kind()
  if path is not None:
    loaded = config_file.load(path, SftConfig)
    default = kind(
      **{f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)}
    )
  return command_line.override(
    default,
    _join_files(args),
    description,
    short_names=SHORT_NAMES,
    takes_file=True,
  )


def _join_files(args: list[str]) -> list[str]:
  """All words after ``--data``, up to the next option, as one at the end."""
  files: list[str] = []
  others: list[str] = []
  is_file = False
  for word in args:
    if word.startswith('--'):
      is_file = word == '--data'
    elif is_file:
      files.append(word)
      continue
    if not is_file:
      others.append(word)
  if not files and '--data' in args:
    raise ValueError('--data needs files of conversations.')
  return [*others, '--data', ','.join(files)] if files else others
