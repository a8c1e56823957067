"""What can be asked of a merge."""

import dataclasses
import re
from typing import Literal

from gnlorp_jax.compose.fields import check_seeds
from gnlorp_jax.compose.settings import check_at_least_one, check_within
from gnlorp_jax.merging import doge, methods
from gnlorp_jax.optim.parts.checks import check_interval

_LAYER_MATRICES = r'\.\d+\.'
_OF_DOGE = ('eta', 'subspace', 'steps', 'rate', 'solver', 'inner', 'project')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
  """A merge of experts, models that were tuned from one base."""

  config: str | None = None
  """A YAML file with the keys of mergekit (merge_method, base_model, models,
  parameters, dtype). Options beside it have the last word."""
  base: str = ''
  """Hugging Face folder of the model that all experts were tuned from, or
  hf:OWNER/NAME of the hub."""
  experts: tuple[str, ...] = ()
  """Folders of the tuned models, of the whole or, as PEFT writes them, of LoRA;
  with spaces or commas between them."""
  out: str = ''
  """Folder to write: none, or an empty one."""
  method: methods.Method = 'average'
  """'average': the mean of the experts. 'task_arithmetic': the base, plus the
  sum of what the experts changed. 'ties': of the largest changes, those of the
  sign that most have. 'dare': changes dropped at random, the others scaled up.
  'tsv': the leading singular directions of all, made orthonormal. 'doge':
  changes of one length, modified to keep tasks apart."""
  weights: tuple[float, ...] = ()
  """A weight of each expert; by default 1. Only those of an average are divided
  by their sum."""
  scale: float | None = None
  """What the sum of changes is multiplied by: by default 0.3 of task_arithmetic
  and dare, 1 of ties and tsv. Of doge with --eta auto, 0.3: see there."""
  keep: tuple[float, ...] = ()
  """Percent of the entries that stay, of all experts or of each: by default 20
  of ties, 10 of dare, 30 of doge."""
  eta: float | Literal['auto'] = 'auto'
  """doge: how long the change of a tensor by each expert becomes. 'auto' is
  --scale times the length of a typical change (the median over tensors); the
  release has 0.07, whatever the experts did."""
  subspace: int = 6
  """doge: one direction in so many is taken as shared by the tasks."""
  steps: int = 400
  """doge: steps of Adam, or the most of conjugate gradients."""
  rate: float = 1e-4
  """doge: Adam's learning rate: no entry moves by more than steps * rate."""
  solver: doge.Solver = 'adam'
  """doge: 'adam' as the release, 'exact' the smallest modification with the
  least loss, which takes a small part of the time."""
  inner: doge.Inner = 'row'
  """doge: the loss has an inner product for each 'row', as the release, or the
  'full' one for each task, as the paper."""
  project: doge.Project = 'complement'
  """doge: the modification lies in the 'complement' of the shared directions,
  as the release, in their 'subspace', as the paper's text, or in 'none'."""
  include: str | None = None
  """Regex of the tensors to merge by the method. By default all; of tsv and
  doge, which merge matrices, those in numbered layers."""
  exclude: str | None = None
  """Regex of tensors that stay the base's, whatever the experts hold."""
  others: Literal['base', 'average'] | None = None
  """What becomes of tensors that are not included: the base's, or the average.
  By default the base's; of tsv the average, as its release does."""
  heads: str = 'base'
  """Heads are the tensors below classifier, score, qa_outputs and lm_head; an
  lm_head that all folders have is merged as any tensor. 'base' keeps
  the base's, NAME those of an expert with its config.json; 'each' the base's,
  and writes those of every expert to heads/NAME.safetensors."""
  dtype: Literal['base', 'float32', 'bfloat16', 'float16'] = 'base'
  """Dtype of the written tensors: each as in the base, or one of all. All is
  computed in float32."""
  seed: int = 0
  """dare: decides what is dropped."""
  shard_gb: float = 5.0
  """Gigabytes (2**30 bytes) of a file of weights."""
  dry_run: bool = False
  """Check the folders and show what would be done to which tensor."""

  def __post_init__(self):
    check_at_least_one(self, 'subspace', 'steps')
    check_seeds('seed', [self.seed])
    self._check_numbers()
    for name in ('include', 'exclude'):
      pattern = getattr(self, name)
      try:
        re.compile(pattern or '')
      except re.error as error:
        raise ValueError(f'{name}={pattern!r} is no regex: {error}.') from error
    count = len(self.folders)
    if self.experts and len(self.weights) not in (0, count):
      raise ValueError(
        f'weights={self.weights} are {len(self.weights)} for {count} experts. '
        'Give one of each, or none.'
      )
    if self.experts and len(self.keep) not in (0, 1, count):
      raise ValueError(
        f'keep={self.keep} are {len(self.keep)} for {count} experts. Give one '
        'of each, or one for all.'
      )
    self._check_effect()

  def _check_numbers(self):
    for keep in self.keep:
      if not 1 <= keep <= 100:
        raise ValueError(
          f'keep={keep:g} must be in [1, 100]: it is in percent, so that a '
          'share of 0.3 is keep=30. To merge nothing leave the expert out.'
        )
    check_within(self, '(0, inf)', 'rate', 'shard_gb')
    check_within(self, '(0, inf)', 'eta', fix="Or give 'auto'.")
    check_within(self, '(-inf, inf)', 'scale')
    for weight in self.weights:
      check_interval('A weight of an expert', weight, '(-inf, inf)')
    if self.method == 'doge' and any(weight <= 0 for weight in self.weights):
      raise ValueError(
        f'weights={self.weights} must be positive in doge, whose coefficients '
        'they multiply. Leave the expert out, or use task_arithmetic.'
      )
    averages = 'average' in (self.method, self.of_others)
    if averages and self.weights and not sum(self.weights) > 0:
      fix = 'task_arithmetic divides by nothing.'
      if self.method != 'average':
        fix = "With others='base' nothing is averaged."
      raise ValueError(
        f'weights={self.weights} of an average are divided by their sum, which '
        f'must be positive. {fix}'
      )

  def _check_effect(self):
    """Refuses what the method does not read: a silent option misleads."""
    ignored = []
    if self.scale is not None and self.method == 'average':
      ignored.append(('scale', 'the mean has no scale'))
    if self.scale is not None and self.method == 'doge' and self.eta != 'auto':
      ignored.append(('scale', f'eta={self.eta} is absolute'))
    if self.keep and self.method not in methods.KEPT:
      ignored.append(('keep', f'{self.method} drops nothing'))
    if self.seed and self.method != 'dare':
      ignored.append(('seed', 'nothing is random'))
    defaults = {f.name: f.default for f in dataclasses.fields(self)}
    if self.method != 'doge':
      ignored += [
        (name, f'it is one of doge, not of {self.method}')
        for name in _OF_DOGE
        if getattr(self, name) != defaults[name]
      ]
    if self.method == 'doge':
      ignored += self._ignored_by_solver(defaults)
    if ignored:
      text = '; '.join(f'{n}={getattr(self, n)}: {why}' for n, why in ignored)
      raise ValueError(
        f'These options have no effect with method={self.method!r}: {text}. '
        'Leave them out.'
      )

  def _ignored_by_solver(
    self, defaults: dict[str, object]
  ) -> list[tuple[str, str]]:
    """What DOGE does not read, and why."""
    is_free = self.project == 'none'
    ignored = []
    if is_free:
      ignored.append(('subspace', "project='none' has none"))
    if self.solver == 'exact':
      ignored.append(('rate', "solver='exact' has none"))
    if self.solver == 'exact' and is_free:
      ignored.append(('steps', 'the solution has a closed form'))
    return [(n, why) for n, why in ignored if getattr(self, n) != defaults[n]]

  @property
  def folders(self) -> tuple[str, ...]:
    """The folders of the experts, one by one."""
    names = (name.strip() for text in self.experts for name in text.split(','))
    return tuple(name for name in names if name)

  @property
  def options(self) -> methods.Options:
    """What the method is told."""
    count = len(self.folders)
    return methods.Options(
      method=self.method,
      weights=self.weights or (1.0,) * count,
      scale=self.scale,
      keep=(self.keep * count if len(self.keep) == 1 else self.keep) or None,
      seed=self.seed,
      **{name: getattr(self, name) for name in _OF_DOGE},
    )

  @property
  def included(self) -> str:
    """The regex of what is merged."""
    if self.include is not None:
      return self.include
    return _LAYER_MATRICES if self.method in methods.MATRICES_ONLY else ''

  @property
  def of_others(self) -> Literal['base', 'average']:
    """What becomes of tensors that are not included."""
    return self.others or ('average' if self.method == 'tsv' else 'base')
