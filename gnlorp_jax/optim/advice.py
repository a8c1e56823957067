"""Which optimizer fits a budget of memory and is worth it: measured rows.

`measured.json` beside this module has the rows of one record, whose optimizers
were all trained in the same way; `python -m benchmarks.report quality.advice`
makes it. Rows of different records would not compare.
"""

import dataclasses
import functools
import importlib.resources
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

from gnlorp_jax.optim import methods
from gnlorp_jax.optim.inspect import (
  format_bytes,
  state_bytes,
  subspaces,
  tree_bytes,
)
from gnlorp_jax.optim.parts.checks import check_interval
from gnlorp_jax.optim.parts.kernel_axes import DimensionNumbers, KernelAxes
from gnlorp_jax.optim.parts.labels import ParamLabels
from gnlorp_jax.optim.parts.plain import arrays, plain


@dataclasses.dataclass(frozen=True)
class Row:
  """How one optimizer ended in the record, at the best of the rates tried.

  Attributes:
    name: What the record calls it.
    optimizer: Its name in this package.
    options: Options as `OptimConfig` has them; bits are those of all moments.
    of_width: Options that follow the width of a model, as shares of it.
    rates: The peak rates that were tried, ascending.
    learning_rate: The best of them.
    loss: Mean of the eval losses over the seeds, nats per token.
    deviation: Their standard deviation.
    seeds: Their number, at least 2.
  """

  name: str
  optimizer: str
  options: Mapping[str, Any]
  of_width: Mapping[str, float]
  rates: tuple[float, ...]
  learning_rate: float
  loss: float
  deviation: float
  seeds: int

  def at_width(self, width: int) -> dict[str, Any]:
    """All options, for a model whose kernels are so wide."""
    shares = self.of_width.items()
    scaled = {name: max(round(share * width), 1) for name, share in shares}
    return {**scaled, **self.options}

  @property
  def edge(self) -> str | None:
    """Whether the best rate is the ``lowest`` or ``highest`` that was tried.

    None where both lower and higher ones were tried; of a single rate it is the
    lowest.
    """
    if self.learning_rate == min(self.rates):
      return 'lowest'
    return 'highest' if self.learning_rate == max(self.rates) else None


@dataclasses.dataclass(frozen=True)
class Record:
  """The measured rows, and what they were measured on.

  Attributes:
    source: The file of all runs.
    model: The preset whose width and depth it was.
    parameters: Number of the model's parameters.
    width: Its hidden size.
    dtype: Of its parameters and states.
    compute_dtype: Of all else.
    steps: Steps of a run.
    tokens: Tokens of a run.
    rows: The optimizers, the lowest loss first.
  """

  source: str
  model: str
  parameters: int
  width: int
  dtype: str
  compute_dtype: str
  steps: int
  tokens: int
  rows: tuple[Row, ...]

  @property
  def places(self) -> tuple[int, ...]:
    """The place of each row; rows that are not told apart share one.

    A place begins with the lowest loss that has none yet, and holds the rows
    behind it as long as they lie within two standard errors of the difference.
    It does not depend on a budget, so that more memory never advises worse.
    """
    places, first = [], 0
    for number, row in enumerate(self.rows):
      if not are_tied(self.rows[first], row):
        first = number
      places.append(first + 1)
    return tuple(places)

  def grounds(self, parameters: int) -> str:
    """What advice for a model of so many parameters rests on, in sentences."""
    counts = sorted({row.seeds for row in self.rows})
    seeds = ' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    dtypes = self.dtype
    if self.compute_dtype != self.dtype:
      dtypes += f' (computed in {self.compute_dtype})'
    text = (
      f'Losses are those of {self.source}: LLaMA-{self.model} with '
      f'{self.parameters / 1e6:.1f} million parameters in {dtypes}, '
      f'{self.tokens / 1e6:.1f} million tokens in {self.steps} whole steps, '
      f'{seeds} seeds.'
    )
    text = ' '.join([text, *self._open_ends()])
    if parameters <= self.parameters:
      return text
    return (
      f'{text} This model has {parameters / 1e6:.1f} million parameters, '
      f'{parameters / self.parameters:.0f} times as many: that the order is '
      'the same is an extrapolation.'
    )

  def _open_ends(self) -> Iterator[str]:
    """Sentences about optimizers whose best rate is at an edge of the tried."""
    for edge, beyond in (('lowest', 'lower'), ('highest', 'higher')):
      names = [row.name for row in self.rows if row.edge == edge]
      if names:
        whose = ', '.join(names)
        if len(names) == len(self.rows) > 1:
          whose = 'every optimizer'
        yield (
          f'The best rate of {whose} was the {edge} that was tried: {beyond} '
          'ones may be better, and the order of the optimizers another.'
        )


@dataclasses.dataclass(frozen=True)
class Advice:
  """An optimizer that fits.

  Attributes:
    name: What the record calls it.
    optimizer: Its name in `gnlorp_jax`.
    options: Keywords for it, `rank` and bits among them; all else is as its
      defaults are.
    learning_rate: The best of the peak rates that the record tried, which may
      be the lowest or the highest of them, see `grounds`. Tune it for your
      model.
    bytes: Bytes of ``weights``, ``gradients``, of the state by `state_bytes`,
      and of the ``activations`` that were given.
    loss: Mean eval loss in the record, nats per token.
    deviation: Its standard deviation over the seeds.
    seeds: Number of seeds.
    place: Its place in the record; what shares one is not told apart.
    grounds: What this rests on, in sentences.
  """

  name: str
  optimizer: str
  options: Mapping[str, Any]
  learning_rate: float
  bytes: Mapping[str, int]
  loss: float
  deviation: float
  seeds: int
  place: int
  grounds: str

  @property
  def need(self) -> int:
    """Bytes in all."""
    return sum(self.bytes.values())


@functools.cache
def record() -> Record:
  """The record that this package advises by."""
  file = importlib.resources.files('gnlorp_jax.optim') / 'measured.json'
  return from_json(json.loads(file.read_text()))


def from_json(found: dict[str, Any]) -> Record:
  """A record from what its file holds."""
  rows = tuple(
    Row(**{**row, 'rates': tuple(row['rates'])}) for row in found['rows']
  )
  return Record(**{**found, 'rows': rows})


def are_tied(one: Row, other: Row) -> bool:
  """Whether two losses differ by no more than two standard errors of that."""
  variances = [row.deviation**2 / row.seeds for row in (one, other)]
  return abs(one.loss - other.loss) <= 2 * math.sqrt(sum(variances))


def recommend(
  params: optax.Params,
  budget_bytes: int,
  *,
  activation_bytes: int = 0,
  param_labels: ParamLabels | None = None,
  kernel_axes: KernelAxes = (),
  weight_dimension_numbers: DimensionNumbers | None = None,
) -> list[Advice]:
  """Optimizers whose state fits a budget, by the losses measured with them.

  It counts weights, gradients, as large as these, and the optimizer's state
  from the shapes that its `init` gives; nothing is allocated. **Activations are
  not counted unless you give them**; they often need most. The command
  ``python -m gnlorp_jax.plan --budget`` counts them, and steps layer by layer.

  Which optimizers there are, with which bits and rank (as a share of a model's
  width), is what one record of short runs of one small model has: see the
  `grounds` of each advice. Others are not advised, however good.

  Args:
    params: Parameters, or their shapes, in the dtype that they train in.
    budget_bytes: What weights, gradients, state and activations may take.
    activation_bytes: What activations take at most, at least 0.
    param_labels: As every optimizer takes it, which is given it too.
    kernel_axes: Likewise.
    weight_dimension_numbers: Likewise.

  Returns:
    What fits, best first: by the place in the record, and where the record does
    not tell optimizers apart, the smaller first.

  Raises:
    ValueError: If nothing fits, no parameter is labelled ``low_rank``, or
      `activation_bytes` is negative; as the optimizers do.

  Examples:
    >>> params = {'dense': {'kernel': jnp.ones((256, 512))}}
    >>> best, *_ = recommend(params, 2**21)
    >>> best.options['rank'], best.need <= 2**21
    (64, True)
    >>> tx = methods.get(best.optimizer)(best.learning_rate, **best.options)
  """
  check_interval('activation_bytes', activation_bytes, '[0, inf)')
  shared = {
    'param_labels': param_labels,
    'kernel_axes': kernel_axes,
    'weight_dimension_numbers': weight_dimension_numbers,
  }
  width = _width(params, shared)
  leaves = jax.tree.leaves(arrays(plain(params)))
  weights = tree_bytes(leaves)
  grounds = record().grounds(sum(math.prod(leaf.shape) for leaf in leaves))
  found = []
  for row, place in zip(record().rows, record().places, strict=True):
    options = arguments(row, width)
    tx = make(row.optimizer, row.learning_rate, {**options, **shared})
    sizes = {
      'weights': weights,
      'gradients': weights,
      **state_bytes(jax.eval_shape(tx.init, params)),
      'activations': activation_bytes,
    }
    found.append(
      Advice(
        name=row.name,
        optimizer=row.optimizer,
        options=options,
        learning_rate=row.learning_rate,
        bytes=sizes,
        loss=row.loss,
        deviation=row.deviation,
        seeds=row.seeds,
        place=place,
        grounds=grounds,
      )
    )
  fitting = [advice for advice in found if advice.need <= budget_bytes]
  if not fitting:
    raise ValueError(_nothing_fits(found, budget_bytes))
  return sorted(fitting, key=lambda advice: (advice.place, advice.need))


def arguments(row: Row, width: int) -> dict[str, Any]:
  """The options of a row as keywords of its optimizer."""
  options = row.at_width(width)
  default = _parameters(row.optimizer)['moment_bits'].default
  bits = options.pop('moment_bits', default)
  # A number alone would leave the moments of embeddings in 32 bits.
  return options if bits == 32 else {**options, 'moment_bits': (('.*', bits),)}


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
  return inspect.signature(methods.get(name)).parameters


def make(
  name: str, learning_rate: float, options: Mapping[str, Any]
) -> optax.GradientTransformation:
  """An optimizer, with those of the options that it has."""
  known = _parameters(name)
  chosen = {key: value for key, value in options.items() if key in known}
  return methods.get(name)(learning_rate, **chosen)


def _width(params: optax.Params, shared: Mapping[str, Any]) -> int:
  """The longest of the shorter axes of all kernels that are projected."""
  # A basis of the shorter axis is [*, axis, rank].
  tx = make('galore', 1.0, {'rank': 1, **shared})
  found = subspaces(jax.eval_shape(tx.init, params)).values()
  bases = jax.tree.leaves([subspace.basis for subspace in found])
  if not bases:
    raise ValueError(
      'No parameter is labelled low_rank, so nothing is known about how '
      'optimizers would do. Give param_labels; report() tells why each '
      'parameter has its label.'
    )
  return max(basis.shape[-2] for basis in bases)


def _nothing_fits(found: Sequence[Advice], budget_bytes: int) -> str:
  least = min(found, key=lambda advice: advice.need)
  parts = ', '.join(
    f'{name} {format_bytes(size)}' for name, size in least.bytes.items() if size
  )
  return (
    f'Nothing fits budget_bytes={budget_bytes} ({format_bytes(budget_bytes)}): '
    f'the smallest need is {least.need} bytes, of {least.name!r} ({parts}). '
    'Raise the budget, keep the parameters in bfloat16, or train layer by '
    'layer, with weights in 8 bits: python -m gnlorp_jax.plan --budget says '
    'what that takes.'
  )
