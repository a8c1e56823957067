"""What a run is asked for: typed, frozen, validated groups of settings.

Every recipe's configuration is a `RunConfig` and adds its data and evaluation,
so that every optimizer, adapter and way of stepping can be asked of each. A
function takes the group it needs, never the whole configuration. The docstring
under a field is its help text on the command line.

What becomes of a run that is resumed with another value of a field stands in
the field's metadata: see `fields`.
"""

import dataclasses
from typing import Literal, Self

from gnlorp_jax.compose.device_settings import MeshConfig as MeshConfig
from gnlorp_jax.compose.device_settings import ProcessOptions as ProcessOptions
from gnlorp_jax.compose.fields import ON_RESUME as ON_RESUME
from gnlorp_jax.compose.fields import (
  check_at_least_one,
  check_seeds,
  check_within,
  free,
  numbers,
  result,
  words,
)
from gnlorp_jax.compose.fields import fixed_settings as fixed_settings
from gnlorp_jax.compose.fields import since_before as since_before
from gnlorp_jax.data import tasks as data_tasks
from gnlorp_jax.optim import methods
from gnlorp_jax.optim.parts.checks import check_interval
from gnlorp_jax.optim.projections.svd import Solver
from gnlorp_jax.training import metrics

OptimizerName = Literal[methods.names()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """Optimizer, its subspaces, and the learning-rate schedule."""

  name: OptimizerName | None = 'gradnormlorp'
  """Which optimizer trains the model; None, in fine-tuning, is that of the
  method. Of the options below each has those that mean something to it, and
  where they are None its own defaults."""
  learning_rate: float | None = result(1e-2)
  """Learning rate at its peak, after the warm-up; None, in fine-tuning, is
  what suits the method, and on GLUE the task."""
  schedule: Literal['cosine', 'linear', 'jagged'] = 'cosine'
  """How the learning rate falls after the warm-up; 'jagged' is a cosine that
  rises again from near 0 in every cycle, when adapters restart."""
  warmup_fraction: float = result(0.1)
  """Share of the steps over which the learning rate rises to its peak."""
  final_fraction: float = result(0.1)
  """Where the schedule ends, as a share of the peak."""
  cycle: int | None = result(None)
  """Steps of a cycle of the jagged schedule; None is adapter.restart_every."""
  restart_warmup_fraction: float = result(0.1)
  """Share of a cycle of the jagged schedule over which the learning rate rises
  again; at least one step."""
  rank: int | None = None
  """Rank of the subspaces; clipped to a matrix's shorter axis."""
  update_proj_gap: int | None = None
  """Steps between two refreshes of a subspace."""
  scale: float | None = result(None)
  """Multiplies the updates of projected matrices; of apollo, its root does."""
  projection: str | None = None
  """How a subspace is chosen: a module of gnlorp_jax.optim.projections."""
  granularity: float | None = None
  """Pieces that vlorp and projfactor cut every row into; `rank` is then that of
  a piece."""
  solver: Solver | None = result(None)
  """How 'svd' finds its subspace: warm-started power iteration, eigenvectors
  of the Gram matrix, a full SVD, singular vectors drawn by their values, or a
  step along a geodesic from the last subspace."""
  leading: int | None = result(None)
  """Columns of a basis of 'svd' that are leading singular directions; the
  others are drawn from their complement at every refresh. None: all, but 5 of
  16 of alice and alice0."""
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
  b1: float | None = result(None)
  """Decay of the first moment."""
  b2: float | None = result(None)
  """Decay of the second moment."""
  eps: float | None = result(None)
  """Added to the root of the second moment."""
  eps_mode: Literal['standard', 'hf'] | None = result(None)
  """Where eps stands."""
  weight_decay: float = result(0.0)
  """Decoupled weight decay."""
  decay_norms_and_biases: bool = result(True)
  """Whether norms and biases decay too, or kernels and embeddings alone."""
  clip_global_norm: float | None = result(1.0)
  """Gradients are scaled down to this global norm; None does not clip."""
  param_labels: (
    Literal['blocks', 'all'] | tuple[tuple[str, str], ...] | None
  ) = result(None)
  """Ordered pairs (regex, label) over parameter paths; the labels are low_rank,
  full and frozen. 'blocks', or None, is the model's own: attention and MLP are
  projected; with an adapter, its factors. 'all' projects embedding and head
  too, whose states are then as small."""

  def __post_init__(self):
    check_at_least_one(self, 'rank', 'update_proj_gap', 'leading', 'cycle')
    check_within(self, '(0, inf)', 'learning_rate', 'granularity')
    check_within(
      self, '(0, inf)', 'clip_global_norm', fix='Use None not to clip.'
    )
    check_within(self, '[0, inf)', 'scale', 'eps', 'weight_decay')
    check_within(self, '[0, 1)', 'b1', 'b2')
    check_within(
      self,
      '[0, 1]',
      'warmup_fraction',
      'final_fraction',
      'restart_warmup_fraction',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
  """Low-rank changes beside frozen kernels, which train in their place."""

  kind: Literal['lora', 'dora', 'gradnormlorp'] | None = None
  """Kind of the adapters; None trains the model's own weights, or, in
  fine-tuning, does what the method says."""
  rank: int | None = None
  """Rank of the change of a kernel; None is 8."""
  alpha: float | None = None
  """The change is multiplied by alpha / rank; None is 16; on
  conversations twice the rank, or twice its root if `rank_stabilized`."""
  rank_stabilized: bool = False
  """Whether it is multiplied by alpha / sqrt(rank) instead (rsLoRA), so that a
  higher rank changes no less."""
  dropout: float | None = result(None)
  """Share of the adapters' inputs that is dropped in training; None is 0.1
  on GLUE, and otherwise 0."""
  rules: tuple[str, ...] | None = None
  """Regexes over paths of kernels, of which one must occur in the path of a
  kernel for it to be adapted; None adapts all matrices of the blocks."""
  init_from: str | None = None
  """Folder of PEFT with the adapters to start from, of the same kind; None
  draws them. Rank, alpha and what is adapted are those of the folder."""
  train_others: bool | None = None
  """Whether what is not adapted (embeddings, norms, head) trains beside the
  adapters; None trains it where adapters restart."""
  restart_every: int | None = None
  """Steps after which adapters are folded into their kernels and drawn anew
  (ReLoRA); None never does."""
  restart_prune: Literal['magnitude', 'random', 'reset'] = result('magnitude')
  """Which moments of the factors a restart sets to zero: a share of the
  smallest, a share at random, or all."""
  restart_prune_share: float = result(0.9)
  """The share of 'magnitude' and 'random'."""

  def __post_init__(self):
    if self.init_from is not None and self.kind == 'gradnormlorp':
      raise ValueError(
        f'AdapterOptions.init_from={self.init_from!r} needs the kind of the '
        f"adapters there, 'lora' or 'dora', got kind={self.kind!r}."
      )
    check_at_least_one(self, 'rank', 'restart_every')
    check_within(self, '(0, inf)', 'alpha')
    check_within(self, '[0, 1)', 'dropout')
    check_within(self, '[0, 1]', 'restart_prune_share')


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """How a training step goes through the model, and how weights are stored."""

  mode: Literal['whole', 'layerwise'] = result('whole')
  """'whole' computes all gradients, then updates; 'layerwise' updates each
  block as the backward pass reaches it, so that the gradient of one block
  exists at a time. Where layers are drawn, all gradients are those of these."""
  accumulate: Literal['gradient', 'projected'] = result('gradient')
  """What is summed over micro-batches in layerwise mode: 'gradient' keeps the
  blocks' inputs for the whole batch and is exact; 'projected' keeps those of
  one micro-batch, and projected gradients, which are all that devices along
  mesh.data exchange."""
  clipping: Literal['waiting', 'recompute'] = result('waiting')
  """How layerwise mode knows the norm to clip before it updates: 'waiting'
  keeps the projected gradients of all blocks, 'recompute' takes a backward pass
  before, which needs more time and no memory. Optimizers that need the whole
  gradient, and steps of layers that are drawn, always take that."""
  offload: bool = free(False)
  """Keep the blocks' inputs in the host's memory (layerwise, on a GPU)."""
  weight_bits: Literal[8, 4] | None = None
  """8 keeps the kernels of the blocks in 8 bits: those that train, layerwise,
  round their updates stochastically; those beside adapters stay as they are. 4
  keeps those beside adapters in NF4, as QLoRA does. None keeps them in
  model.param_dtype."""

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
      if name != 'weight_bits' and value != field.default:
        raise ValueError(
          f"StepConfig.{name}={value!r} needs mode='layerwise', got mode="
          f'{self.mode!r}.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSamplingOptions:
  """Training some layers at a time, others drawn every so many steps."""

  method: Literal['owlore', 'ows', 'lisa', 'badam'] | None = None
  """How published methods draw layers: owlore and ows by outlier scores, lisa
  all alike, badam one after the other, with nothing else trained. What is None
  below is theirs; the optimizer is the run's. None trains all layers, unless
  `draw` is given."""
  draw: Literal['uniform', 'decreasing', 'scores', 'shuffled'] | None = None
  """How likely a layer is drawn: all alike, the lower the likelier, by
  `scores`, or each has its turn."""
  layers: int | None = None
  """Layers that train at a time."""
  every: int | None = None
  """Steps between two draws."""
  scores: str | None = free(None)
  """File of python -m gnlorp_jax.layer_scores, or one number per line. It may
  lie elsewhere when a run is resumed; its scores cannot change."""
  always_on: tuple[str, ...] | None = None
  """Regexes over paths outside of the layers (embed, norm, lm_head) of what
  trains all the time; the rest is frozen. Without a word after the option
  nothing does; None is the method's: everything, of badam nothing."""
  always_on_state: Literal['full', 'int8', 'low_rank'] = 'full'
  """The optimizer's state of that: as that of layers, moments in 8 bits, or
  projected (needs an optimizer with subspaces)."""
  on_leave: Literal['drop', 'keep', 'offload'] = 'drop'
  """What becomes of the optimizer's state of a layer that leaves: 'drop'
  forgets it, 'keep' holds the states of all layers, as published code does,
  'offload' too, but those of layers that rest in the memory of the host."""
  carry: bool = True
  """Whether a layer that is drawn twice in a row keeps its state; the paper of
  lisa does without."""
  reset_always: bool = False
  """Whether what is always on begins anew with every draw too."""
  warmup_steps: int = result(0)
  """Steps after a draw over which the learning rate of the drawn layers rises,
  of those that stay too; metrics show it without."""

  @property
  def is_on(self) -> bool:
    """Whether layers are drawn."""
    return self.method is not None or self.draw is not None

  def __post_init__(self):
    check_at_least_one(self, 'layers', 'every')
    check_within(self, '[0, inf)', 'warmup_steps')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
  """Tasks that a language model is asked at every evaluation of a run."""

  tasks: str | None = free(None)
  """Names of tasks (arc_challenge, arc_easy, boolq, gsm8k, mmlu, openbookqa,
  piqa), joined by commas; None asks none. Perplexities of texts and tasks of
  lm_eval are asked by python -m gnlorp_jax.evaluate alone."""
  data: str | None = free(None)
  """Folder with the files of the tasks, which may lie in folders in it."""
  limit: int | None = free(200)
  """Ask the first questions only, of MMLU those of each subject; None asks
  all."""
  shots: int | None = free(None)
  """Solved questions before each question; None is what a task is usually asked
  with."""
  batch_size: int = free(16)
  """Options or answers per forward pass."""

  def __post_init__(self):
    check_at_least_one(self, 'limit', 'batch_size')
    check_within(self, '[0, inf)', 'shots')
    for name in self.names:
      if name not in data_tasks.names():
        raise ValueError(
          f'eval.tasks names {name!r}; expected some of {data_tasks.names()}, '
          'joined by commas. Perplexities of texts and tasks of lm_eval are '
          'asked by python -m gnlorp_jax.evaluate alone.'
          f'{data_tasks.suggest(name, data_tasks.names())}'
        )
    if self.data is not None and not self.names:
      raise ValueError('eval.data is given, and eval.tasks asks nothing.')
    if self.names and self.data is None:
      raise ValueError(
        f'eval.tasks={self.tasks!r} is read from files on this machine: name '
        'their folder as eval.data.'
      )
    data_tasks.check_data(self.names, self.data, 'eval.')

  @property
  def names(self) -> tuple[str, ...]:
    """What `tasks` names, one by one."""
    return words(self.tasks or '')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """What every recipe is asked for; each adds model, data and evaluation."""

  run_dir: str = free('runs/run')
  """Where checkpoints, metrics and results go. A run directory that holds
  checkpoints is resumed."""
  steps: int | None = result(None)
  """Number of optimizer steps of the whole run."""
  batch_size: int | None = result(None)
  """Sequences per step, over all devices."""
  micro_batches: int = result(1)
  """Pieces of a batch that are worked through one after the other, to save
  activation memory."""
  seed: int = 0
  """Decides initial weights, order of the data, dropout and samples."""
  seeds: str | None = free(None)
  """Seeds of several runs, joined by commas; None is one run with `seed`."""
  learning_rates: str | None = free(None)
  """Learning rates to search, joined by commas: the first seed runs with each,
  the others with the best of them. Nothing is compiled anew for another."""
  init_from: str | None = result(None)
  """Hugging Face folder of a trained model to start from, or hf:OWNER/NAME of
  the hub; or a preset (60m, 7b, llama-3.1-8b, qwen2.5-0.5b, ...), an
  architecture that gets random weights. Its architecture replaces `model`,
  except for the dtypes, remat and dropout."""
  eval_every: int | None = result(None)
  """Steps between two evaluations."""
  patience: int | None = result(None)
  """End a run early, after so many evaluations in a row that were no better
  than the best; needs a run that keeps the best. None takes all steps."""
  checkpoint_every: int | None = free(None)
  """Steps between two checkpoints."""
  checkpoint_keep: int = free(3)
  """Number of checkpoints kept."""
  log_every: int = free(10)
  """Steps between two lines of metrics."""
  log: Literal['wandb'] | None = free(None)
  """Where metrics go beside the files of the run: 'wandb' is Weights & Biases
  (needs the extra wandb; with WANDB_MODE=offline in the environment nothing
  leaves this machine)."""
  accept: str | None = free(None)
  """Settings and data, joined by commas as the error names them, in which a run
  directory may differ from the command that resumes it."""
  dry_run: bool = free(False)
  """Only report what would happen to every parameter, and how many bytes the
  optimizer takes."""
  optim: OptimConfig = OptimConfig()
  """Optimizer and schedule."""
  adapter: AdapterOptions = AdapterOptions()
  """Low-rank changes beside frozen kernels."""
  step: StepConfig = StepConfig()
  """Whole steps, or layer by layer; bits of the weights."""
  sampling: LayerSamplingOptions = LayerSamplingOptions()
  """Training some layers at a time."""
  mesh: MeshConfig = MeshConfig()
  """Devices."""
  processes: ProcessOptions = ProcessOptions()
  """Several processes."""

  def __post_init__(self):
    check_at_least_one(
      self,
      'steps',
      'batch_size',
      'micro_batches',
      'eval_every',
      'patience',
      'checkpoint_every',
      'checkpoint_keep',
      'log_every',
    )
    metrics.check_log(self.log)
    if self.sampling.is_on and self.step.accumulate == 'projected':
      raise ValueError(
        "step.accumulate='projected' adds up projected gradients of all "
        "layers, and sampling trains some: use accumulate='gradient'."
      )
    for name in ('seeds', 'learning_rates'):
      text = getattr(self, name)
      if text is not None and not words(text):
        raise ValueError(
          f'{name}={text!r} names nothing. Give one or more, joined by commas.'
        )
    check_seeds('seed', self.seed_numbers)
    for rate in self.searched_rates or ():
      check_interval('A learning rate', rate, '(0, inf)')

  @property
  def seed_numbers(self) -> tuple[int, ...]:
    """The seeds as numbers."""
    if self.seeds is None:
      return (self.seed,)
    return numbers('seeds', self.seeds, int)

  @property
  def searched_rates(self) -> tuple[float, ...] | None:
    """The learning rates to search as numbers, or None."""
    if self.learning_rates is None:
      return None
    return numbers('learning_rates', self.learning_rates, float)

  @property
  def num_runs(self) -> int:
    """Runs of the command: all rates with one seed, the best with all."""
    return len(self.searched_rates or (None,)) + len(self.seed_numbers) - 1

  @property
  def is_single(self) -> bool:
    """Whether one learning rate and one seed are asked for."""
    return self.learning_rates is None and len(self.seed_numbers) == 1

  def on_one_device(self) -> Self:
    """The settings of the same run on one device, as a report needs them.

    What it says of every parameter is the same on any number of devices, which
    need not be there: plan these settings for the number 1.
    """
    mesh = dataclasses.replace(self.mesh, data=1, fsdp=1)
    return dataclasses.replace(self, mesh=mesh)
