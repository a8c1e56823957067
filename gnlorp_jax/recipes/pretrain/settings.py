"""What a pre-training program is asked for, and how it is given.

A configuration is a `TrainConfig`. It comes from a Python file that holds one
under the name ``config`` (see `configs/`), with any field overridden on the
command line.
"""

import dataclasses
import pathlib
from typing import Literal, TypeVar

from gnlorp_jax import models
from gnlorp_jax.compose import command_line, config_file
from gnlorp_jax.compose.coreset_settings import CoresetOptions
from gnlorp_jax.compose.settings import (
  OptimConfig,
  RunConfig,
  TaskOptions,
  check_at_least_one,
  check_within,
  free,
  result,
)
from gnlorp_jax.models.decoder_config import DecoderConfig
from gnlorp_jax.models.generate import Sampling
from gnlorp_jax.models.llama import LlamaConfig
from gnlorp_jax.models.roberta import RobertaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Text and how it becomes tokens."""

  source: str = 'stdlib'
  """Training text: files (.txt, .jsonl, .json.gz as in C4, .parquet), folders
  and globs, joined by commas; 'tfds:NAME' for TensorFlow Datasets;
  'hf:OWNER/NAME:CONFIG:SPLIT[:N]' for the first N documents of a set on the
  Hugging Face hub; 'stdlib' for the sources of the running Python's standard
  library. NAME=SPEC names each of several sources, whose documents then share
  no row and whose losses are told apart."""
  validation_source: str | None = result(None)
  """Validation text, named like `source`; None holds out the end of it."""
  validation_fraction: float = free(0.05)
  """Share of `source` held out where there is no `validation_source`."""
  text_column: str = free('text')
  """The field of JSON lines, or the column of a table or a data set, that holds
  the text."""
  tokenizer: str = free('bpe')
  """A tokenizer.json, a folder with one, 'hf:OWNER/NAME' of the Hugging Face
  hub, or 'bpe' to train one on the text, as large as the model's vocabulary."""
  mode: Literal['packed', 'padded'] = 'packed'
  """'packed' joins documents and cuts them every `seq_len` tokens; 'padded'
  puts one document in a row, cut or padded, as the GaLore protocol does."""
  add_bos: bool = False
  """Begin every document with the tokenizer's beginning-of-sequence token, as
  LLaMA's training does; the exported tokenizer then does so as well."""
  document_mask: bool = False
  """Keep the packed documents of a row apart: none attends to another, each
  starts at position 0, and its first token is not guessed from the one
  before. Needs mode 'packed'."""
  seq_len: int = 128
  """Tokens per sequence, at most the model's max_seq_len."""
  cache_dir: str = free('~/.cache/gnlorp_jax')
  """Where tokenized text and trained tokenizers are kept between runs."""

  def __post_init__(self):
    check_at_least_one(self, 'seq_len')
    check_within(self, '(0, 1)', 'validation_fraction')
    if self.mode == 'padded' and self.seq_len < 2:
      raise ValueError(
        f"data.seq_len={self.seq_len} must be at least 2 with data.mode='padded"
        "': a token, and that which ends a document."
      )
    if self.document_mask and self.mode != 'packed':
      raise ValueError(
        "data.document_mask=True needs data.mode='packed', got "
        f'{self.mode!r}: there every row is one document, its padding comes '
        'after it, and no token attends to later ones, so there is nothing to '
        'keep apart. Leave it out.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """The text generated at the end of a run."""

  prompt: str = free('\n')
  """What the text continues."""
  num_tokens: int = free(100)
  """Length of the continuation, in tokens; 0 generates none."""
  temperature: float = free(0.8)
  """Randomness: 0 takes the likeliest token."""
  top_k: int = free(50)
  """Tokens to choose among at each position."""
  top_p: float | None = free(None)
  """Choose among the likeliest tokens that together have this probability;
  None: among all that `top_k` leaves."""

  def __post_init__(self):
    check_within(self, '[0, inf)', 'num_tokens')
    Sampling(self.temperature, self.top_k, self.top_p).check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
  """Pre-training of a language model, each field an option of the program."""

  objective: Literal['causal', 'masked'] = 'causal'
  """What the model learns to guess: 'causal' the next token (a LLaMA), 'masked'
  tokens left out of a text (a RoBERTa)."""
  mask_rate: float = 0.15
  """Share of the tokens to be guessed, with the masked objective."""
  run_dir: str = free('runs/stdlib')
  """Where checkpoints, metrics, plot and export go. A run directory that holds
  checkpoints is resumed."""
  steps: int = result(300)
  """Number of optimizer steps of the whole run."""
  batch_size: int = result(16)
  """Sequences per step, over all devices. A run may go on with another, from
  the sequence behind the last that was seen."""
  eval_every: int = result(100)
  """Steps between two evaluations on the validation text."""
  eval_batches: int | None = result(None)
  """Batches of an evaluation; None evaluates all of the validation text."""
  checkpoint_every: int = free(100)
  """Steps between two checkpoints."""
  keep_best: bool = result(False)
  """Keep the parameters with the lowest validation loss as well; they are what
  is exported, sampled from and told of at the end."""
  loss_chunk_tokens: int = free(1024)
  """Tokens whose logits exist at once in the loss."""
  model: models.Config = LlamaConfig(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=352,
    num_layers=4,
    num_heads=4,
    max_seq_len=128,
  )
  """Architecture and dtypes: that of a decoder, such as a LlamaConfig, or,
  masked, a RobertaConfig."""
  data: DataConfig = DataConfig()
  """Text and tokens."""
  optim: OptimConfig = OptimConfig()
  """Optimizer and schedule; without a rank it is 32."""
  sample: SampleConfig = SampleConfig()
  """Text generated at the end."""
  eval: TaskOptions = TaskOptions()
  """Tasks asked at every evaluation; only of a causal model."""
  coreset: CoresetOptions = CoresetOptions()
  """Training on a choice of a larger pool of rows."""

  def __post_init__(self):
    super().__post_init__()
    check_at_least_one(self, 'eval_batches', 'loss_chunk_tokens')
    check_within(self, '(0, 1)', 'mask_rate')
    if self.patience is not None and not self.keep_best:
      raise ValueError(
        f'patience={self.patience} counts evaluations since the best one, and '
        'with keep_best=False there is none. Add --keep-best.'
      )
    for name in ('name', 'learning_rate'):
      if getattr(self.optim, name) is None:
        raise ValueError(
          f'optim.{name} must be given in pre-training, got None. Only '
          'fine-tuning has methods and tables to take it from.'
        )
    self._check_objective()
    # With init_from the folder's own length counts; it is checked there.
    if self.init_from is None and self.data.seq_len > self.model.max_seq_len:
      raise ValueError(
        f'data.seq_len={self.data.seq_len} is longer than the model accepts: '
        f'model.max_seq_len={self.model.max_seq_len}. Lower the former or '
        'raise the latter.'
      )

  def _check_objective(self):
    expected, name = (
      (RobertaConfig, 'an encoder, such as a RobertaConfig')
      if self.is_masked
      else (DecoderConfig, 'a decoder, such as a LlamaConfig')
    )
    if not isinstance(self.model, expected):
      raise ValueError(
        f'TrainConfig.objective={self.objective!r} trains {name}, and model '
        f'is a {type(self.model).__name__}. Choose a configuration of that '
        'kind.'
      )
    if not self.is_masked:
      return
    if self.coreset.needs_model:
      raise ValueError(
        f'coreset.selector={self.coreset.selector!r} compares gradients of '
        "decoders, and objective='masked' trains an encoder. Use "
        "coreset.selector='random'."
      )
    if self.eval.names:
      raise ValueError(
        f"eval.tasks={self.eval.tasks!r} needs objective='causal': a masked "
        'model continues no text.'
      )
    if self.data.seq_len < 3:
      raise ValueError(
        f'data.seq_len={self.data.seq_len} must be at least 3 with objective='
        "'masked': a token to guess, and those that begin and end a sequence."
      )
    if self.data.mode != 'packed':
      raise ValueError(
        "TrainConfig.objective='masked' needs data.mode='packed', got "
        f'{self.data.mode!r}.'
      )
    if self.data.document_mask:
      raise ValueError(
        "data.document_mask=True is for objective='causal', got 'masked': an "
        'encoder attends to all of its row. Leave it out.'
      )
    if self.data.add_bos:
      raise ValueError(
        "data.add_bos=True is for objective='causal', got 'masked': there "
        'every sequence begins with that token, documents within it do not. '
        'Leave it out.'
      )

  @property
  def is_masked(self) -> bool:
    """Whether the objective is to guess tokens left out of a text."""
    return self.objective == 'masked'


MASKED = TrainConfig(
  objective='masked',
  run_dir='runs/stdlib_masked',
  model=RobertaConfig(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    max_seq_len=128,
    hidden_dropout=0.0,
    attention_dropout=0.0,
  ),
)
"""What a run with the masked objective starts from without a file."""


def load(path: str | pathlib.Path) -> TrainConfig:
  """Reads a file that defines ``config = TrainConfig(...)``.

  Raises:
    ValueError: If there is no such file or it defines no configuration.
  """
  return config_file.load(path, TrainConfig)


Config = TypeVar('Config', bound=TrainConfig)


def parse(
  args: list[str], description: str, kind: type[Config] = TrainConfig
) -> Config:
  """Makes a configuration from the command line.

  ``--config FILE`` chooses the file that overrides start from; without it they
  start from the defaults of `TrainConfig`, or with ``--objective masked`` from
  `MASKED`.

  Args:
    args: Words of the command line, without the program's name.
    description: What `--help` says before the options.
    kind: `TrainConfig`, or a program's own extension of it, whose further
      fields have defaults.

  Returns:
    The configuration.

  Raises:
    SystemExit: After `--help`.
    ValueError: If a field does not exist or a value is not allowed.
  """
  loaded, args = _default(args)
  default = kind(
    **{f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)}
  )
  return command_line.override(default, args, description, takes_file=True)


def _default(args: list[str]) -> tuple[TrainConfig, list[str]]:
  """What overrides start from, and the words that are left."""
  path, args = config_file.take(args)
  if path is not None:
    return load(path), args
  masked = any(
    words in (['--objective', 'masked'], ['--objective=masked'])
    for i in range(len(args))
    for words in (args[i : i + 2], args[i : i + 1])
  )
  return MASKED if masked else TrainConfig(), args
