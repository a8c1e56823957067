"""What a run is: typed, frozen, validated settings, and how they are given.

A configuration is a `TrainConfig`. It comes from a Python file that holds one
under the name ``config`` (see `configs/`), with any field overridden on the
command line. The docstring under a field is its help text there.
"""

import dataclasses
import difflib
import importlib.util
import pathlib
import sys
from typing import Any, Literal, TypeVar

from gnlorp_jax import models
from gnlorp_jax.models.llama import LlamaConfig
from gnlorp_jax.models.roberta import RobertaConfig


def check_positive(config: Any, *names: str) -> None:
  """Raises ValueError unless the named fields are at least 1."""
  for name in names:
    value = getattr(config, name)
    if value < 1:
      raise ValueError(
        f'{type(config).__name__}.{name} must be at least 1, got {value}.'
      )


def check_interval(config: Any, name: str, low: float, high: float) -> None:
  """Raises ValueError unless a field lies in [low, high]."""
  value = getattr(config, name)
  if not low <= value <= high:
    raise ValueError(
      f'{type(config).__name__}.{name} must be in [{low}, {high}], got {value}.'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Text and how it becomes tokens."""

  source: str = 'stdlib'
  """Training text: files (.txt, .jsonl, .json.gz as in C4, ...), folders
  and globs, joined by commas; 'tfds:NAME' for TensorFlow Datasets; 'stdlib' for
  the sources of the running Python's standard library."""
  validation_source: str | None = None
  """Validation text, named like `source`; None holds out the end of it."""
  validation_fraction: float = 0.05
  """Share of `source` held out where there is no `validation_source`."""
  tokenizer: str = 'bpe'
  """A tokenizer.json, a folder with one, a Hugging Face name, or 'bpe' to train
  one on the text, as large as the model's vocabulary."""
  mode: Literal['packed', 'padded'] = 'packed'
  """'packed' joins documents and cuts them every `seq_len` tokens; 'padded'
  puts one document in a row, cut or padded, as the GaLore protocol does."""
  seq_len: int = 128
  """Tokens per sequence, at most the model's max_seq_len."""
  cache_dir: str = '~/.cache/gnlorp_jax'
  """Where tokenized text and trained tokenizers are kept between runs."""

  def __post_init__(self):
    check_positive(self, 'seq_len')
    if not 0 < self.validation_fraction < 1:
      raise ValueError(
        'DataConfig.validation_fraction must lie between 0 and 1, got '
        f'{self.validation_fraction}.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """Optimizer, its subspaces, and the learning-rate schedule."""

  name: Literal[
    'gradnormlorp',
    'galore',
    'q_galore',
    'galore_adafactor',
    'dct_adamw',
    'vlorp',
    'projfactor',
    'apollo',
    'apollo_mini',
    'fira',
    'ldadam',
    'adamw',
  ] = 'gradnormlorp'
  """Which optimizer trains the model. Of the options below each has those that
  mean something to it, and where they are None its own defaults."""
  learning_rate: float = 1e-2
  """Learning rate at its peak, after the warm-up."""
  warmup_fraction: float = 0.1
  """Share of the steps over which the learning rate rises to its peak."""
  final_fraction: float = 0.1
  """Where the cosine ends, as a share of the peak."""
  rank: int | None = None
  """Rank of the subspaces; clipped to a matrix's shorter axis."""
  update_proj_gap: int | None = None
  """Steps between two refreshes of a subspace."""
  scale: float | None = None
  """Multiplies the updates of projected matrices; of apollo, its root does."""
  projection: str | None = None
  """How a subspace is chosen: a module of gnlorp_jax.optim.projections."""
  granularity: float | None = None
  """Pieces that vlorp and projfactor cut every row into; `rank` is then that of
  a piece."""
  solver: Literal['power', 'eigh', 'exact'] | None = None
  """How 'svd' finds its subspace: warm-started power iteration, eigenvectors
  of the Gram matrix, or a full SVD."""
  side: Literal['short', 'long', 'in', 'out', 'both'] | None = None
  """Which axis of a matrix is compressed."""
  spread_refreshes: bool = True
  """Whether to refresh one matrix at a time instead of all in one step."""
  basis_bits: Literal[32, 16, 8, 4] | None = None
  """Bits for every element of the bases."""
  lazy_refresh: Literal['never', 'overlap', 'abs_cosine', 'cosine'] | None = (
    None
  )
  """Whether a matrix whose subspace rests waits longer for its next refresh,
  and by which similarity of old and new subspace."""
  moments_on_refresh: Literal['keep', 'reset', 'rotate'] | None = None
  """What becomes of the moments when their subspace changes."""
  error_bits: Literal[32, 8, 4, 0] | None = None
  """Bits for every element of a buffer that feeds back what projecting lost;
  0 feeds nothing back."""
  weight_norm: bool = False
  """Whether kernels move as magnitude times direction; gradnormlorp always
  does."""
  norm_state: Literal['synced', 'tracked'] | None = None
  """Whether the direction's length is reset to the magnitude after each step
  (no state) or kept, as classical weight normalisation does."""
  moment_bits: Literal[32, 8, 4] | None = None
  """Bits for every element of the moments."""
  stochastic_rounding: bool = False
  """Whether bfloat16 parameters are rounded up or down at random, so that no
  small update is lost on average."""
  b1: float | None = None
  """Decay of the first moment."""
  b2: float | None = None
  """Decay of the second moment."""
  eps: float | None = None
  """Added to the root of the second moment."""
  eps_mode: Literal['standard', 'hf'] | None = None
  """Where eps stands."""
  weight_decay: float = 0.0
  """Decoupled weight decay of all trained weights."""
  clip_global_norm: float | None = 1.0
  """Gradients are scaled down to this global norm; None does not clip."""
  param_labels: tuple[tuple[str, str], ...] | None = None
  """Ordered pairs (regex, label) over parameter paths; the labels are low_rank,
  full and frozen. None is the model's own: attention and MLP are projected."""

  def __post_init__(self):
    for name in ('rank', 'update_proj_gap'):
      if getattr(self, name) is not None:
        check_positive(self, name)
    if self.learning_rate <= 0:
      raise ValueError(
        f'OptimConfig.learning_rate must be positive, got {self.learning_rate}.'
      )
    if self.clip_global_norm is not None and self.clip_global_norm <= 0:
      raise ValueError(
        'OptimConfig.clip_global_norm must be positive, got '
        f'{self.clip_global_norm}. Use None not to clip.'
      )
    check_interval(self, 'warmup_fraction', 0, 1)
    check_interval(self, 'final_fraction', 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """How a training step goes through the model."""

  mode: Literal['whole', 'layerwise'] = 'whole'
  """'whole' computes all gradients, then updates; 'layerwise' updates each
  block as the backward pass reaches it, so that the gradient of one block
  exists at a time."""
  accumulate: Literal['gradient', 'projected'] = 'gradient'
  """What is summed over micro-batches in layerwise mode: 'gradient' keeps the
  blocks' inputs for the whole batch and is exact; 'projected' keeps those of
  one micro-batch, and projected gradients, which are all that devices along
  mesh.data exchange."""
  clipping: Literal['waiting', 'recompute'] = 'waiting'
  """How layerwise mode knows the norm to clip before it updates: 'waiting'
  keeps the projected gradients of all blocks, 'recompute' takes a backward pass
  before, which needs more time and no memory. Optimizers that need the whole
  gradient always take that."""
  offload: bool = False
  """Keep the blocks' inputs in the host's memory (layerwise, on a GPU)."""
  weight_bits: Literal[8] | None = None
  """8 keeps the kernels of the blocks in 8 bits and rounds their updates
  stochastically (layerwise); None keeps them in model.param_dtype."""

  def __post_init__(self):
    if self.accumulate == 'projected' and self.clipping == 'recompute':
      raise ValueError(
        "StepConfig.clipping='recompute' measures gradients that "
        "accumulate='projected' does not sum. Use one or the other."
      )
    if self.mode == 'layerwise':
      return
    for field in dataclasses.fields(self):
      name, value = field.name, getattr(self, field.name)
      if value != field.default:
        raise ValueError(
          f"StepConfig.{name}={value!r} needs mode='layerwise', got mode="
          f'{self.mode!r}.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How devices are arranged."""

  data: int = -1
  """Number of copies of the state; -1 takes all devices that `fsdp` leaves."""
  fsdp: int = 1
  """Number of pieces each copy is split into."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """The text generated at the end of a run."""

  prompt: str = '\n'
  """What the text continues."""
  num_tokens: int = 100
  """Length of the continuation, in tokens; 0 generates none."""
  temperature: float = 0.8
  """Randomness: 0 takes the likeliest token."""
  top_k: int = 50
  """Tokens to choose among at each position."""

  def __post_init__(self):
    check_positive(self, 'top_k')
    check_interval(self, 'num_tokens', 0, float('inf'))
    check_interval(self, 'temperature', 0, float('inf'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Pre-training of a language model, each field an option of the program."""

  objective: Literal['causal', 'masked'] = 'causal'
  """What the model learns to guess: 'causal' the next token (a LLaMA), 'masked'
  tokens left out of a text (a RoBERTa)."""
  mask_rate: float = 0.15
  """Share of the tokens to be guessed, with the masked objective."""
  run_dir: str = 'runs/stdlib'
  """Where checkpoints, metrics, plot and export go. A run directory that holds
  checkpoints is resumed."""
  steps: int = 300
  """Number of optimizer steps of the whole run."""
  batch_size: int = 16
  """Sequences per step, over all devices."""
  micro_batches: int = 1
  """Pieces of a batch that are worked through one after the other, to save
  activation memory."""
  seed: int = 0
  """Decides initial weights, order of the data, and samples."""
  init_from: str | None = None
  """Hugging Face folder of a model to start from; its architecture replaces
  `model`, except for the dtypes, remat and dropout."""
  eval_every: int = 100
  """Steps between two evaluations on the validation text."""
  eval_batches: int | None = None
  """Batches of an evaluation; None evaluates all of the validation text."""
  checkpoint_every: int = 100
  """Steps between two checkpoints."""
  checkpoint_keep: int = 3
  """Number of checkpoints kept."""
  log_every: int = 10
  """Steps between two lines of metrics."""
  loss_chunk_tokens: int = 1024
  """Tokens whose logits exist at once in the loss."""
  dry_run: bool = False
  """Only report what would happen to every parameter, and how many bytes the
  optimizer takes."""
  model: models.Config = LlamaConfig(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=352,
    num_layers=4,
    num_heads=4,
    max_seq_len=128,
  )
  """Architecture and dtypes: a LlamaConfig or, masked, a RobertaConfig."""
  data: DataConfig = DataConfig()
  """Text and tokens."""
  optim: OptimConfig = OptimConfig(rank=32)
  """Optimizer and schedule."""
  step: StepConfig = StepConfig()
  """Whole steps, or layer by layer."""
  mesh: MeshConfig = MeshConfig()
  """Devices."""
  sample: SampleConfig = SampleConfig()
  """Text generated at the end."""

  def __post_init__(self):
    check_positive(
      self,
      'steps',
      'batch_size',
      'micro_batches',
      'eval_every',
      'checkpoint_every',
      'checkpoint_keep',
      'log_every',
      'loss_chunk_tokens',
    )
    if self.eval_batches is not None:
      check_positive(self, 'eval_batches')
    self._check_objective()
    # With init_from the folder's own length counts; it is checked there.
    if self.init_from is None and self.data.seq_len > self.model.max_seq_len:
      raise ValueError(
        f'data.seq_len={self.data.seq_len} is longer than the model accepts: '
        f'model.max_seq_len={self.model.max_seq_len}. Lower the former or '
        'raise the latter.'
      )

  def _check_objective(self):
    masked = self.objective == 'masked'
    expected = RobertaConfig if masked else LlamaConfig
    if not isinstance(self.model, expected):
      raise ValueError(
        f'TrainConfig.objective={self.objective!r} trains a '
        f'{expected.__name__}, and model is a {type(self.model).__name__}. '
        'Choose a configuration of that kind.'
      )
    if not masked:
      return
    if not 0 < self.mask_rate < 1:
      raise ValueError(
        f'TrainConfig.mask_rate must lie between 0 and 1, got {self.mask_rate}.'
      )
    if self.data.mode != 'packed':
      raise ValueError(
        "TrainConfig.objective='masked' needs data.mode='packed', got "
        f'{self.data.mode!r}.'
      )
    if self.step.mode == 'layerwise' and (
      self.model.hidden_dropout or self.model.attention_dropout
    ):
      raise ValueError(
        "StepConfig.mode='layerwise' goes without dropout, got "
        f'model.hidden_dropout={self.model.hidden_dropout}, '
        f'model.attention_dropout={self.model.attention_dropout}. Set both to '
        '0.'
      )


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
  """Reads a configuration file.

  Args:
    path: A Python file that defines ``config = TrainConfig(...)``.

  Returns:
    The configuration.

  Raises:
    ValueError: If there is no such file or it defines no configuration.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    beside = sorted(str(p) for p in path.parent.glob('*.py'))
    near = difflib.get_close_matches(str(path), beside, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else f' Files there: {beside}.'
    raise ValueError(f'No configuration file {str(path)!r}.{hint}')
  spec = importlib.util.spec_from_file_location('run_config', path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = getattr(module, 'config', None)
  if not isinstance(config, TrainConfig):
    raise ValueError(
      f'{str(path)!r} defines no configuration: it must assign a TrainConfig '
      "to the name 'config'."
    )
  return config


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
  return override(default, args, description)


Settings = TypeVar('Settings')


def override(default: Settings, args: list[str], description: str) -> Settings:
  """Replaces fields of a configuration by those of the command line.

  Args:
    default: A dataclass, whose fields may be dataclasses.
    args: Words of the command line, without the program's name.
    description: What `--help` says before the options.

  Returns:
    The configuration.

  Raises:
    SystemExit: After `--help`.
    ValueError: If a field does not exist or a value is not allowed.
  """
  # Who runs no command line, such as a benchmark, need not have it.
  import tyro

  _check_fields(args, default)
  return tyro.cli(
    type(default),
    default=default,
    args=args,
    description=description,
    # The model is of the kind that is there: its fields are options as others.
    config=(tyro.conf.AvoidSubcommands,),
  )


def _default(args: list[str]) -> tuple[TrainConfig, list[str]]:
  """Takes ``--config FILE`` or ``--config=FILE`` off the command line."""
  for i, word in enumerate(args):
    if word == '--config':
      if i + 1 == len(args):
        raise ValueError('--config needs the path of a configuration file.')
      return load(args[i + 1]), args[:i] + args[i + 2 :]
    if word.startswith('--config='):
      return load(word.split('=', 1)[1]), args[:i] + args[i + 1 :]
  masked = any(
    words in (['--objective', 'masked'], ['--objective=masked'])
    for i in range(len(args))
    for words in (args[i : i + 2], args[i : i + 1])
  )
  return MASKED if masked else TrainConfig(), args


def _check_fields(args: list[str], default: Any) -> None:
  """Names the nearest field for an option that does not exist."""
  for word in args:
    if word.startswith('--') and word != '--help':
      _check_option(word.split('=')[0], default)


def _check_option(option: str, default: Any) -> None:
  """Follows an option such as ``--optim.rank`` through the fields."""
  node: Any = default
  for field in option[2:].replace('-', '_').split('.'):
    names = [f.name for f in dataclasses.fields(node)]
    known = field if field in names else field.removeprefix('no_')  # A flag.
    if known not in names:
      near = difflib.get_close_matches(field, names, n=1)
      near = near or [f for f in _nested(node) if f.endswith(f'.{field}')]
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise ValueError(
        f'{type(node).__name__} has no field {field!r} (from {option}).{hint} '
        f'Fields: {names}.'
      )
    node = getattr(node, known)
    if not dataclasses.is_dataclass(node):
      return  # tyro judges the rest.


def _nested(node: Any) -> list[str]:
  """Dotted names of the fields of a configuration's groups."""
  return [
    f'{group.name}.{field.name}'
    for group in dataclasses.fields(node)
    if dataclasses.is_dataclass(getattr(node, group.name))
    for field in dataclasses.fields(getattr(node, group.name))
  ]


def exit_with_message(error: Exception) -> None:
  """Ends the program with the message of a user's mistake, no traceback."""
  sys.stderr.write(f'error: {error}\n')
  raise SystemExit(2)
