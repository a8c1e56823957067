"""The keywords that optimizers share: named, typed and explained once.

An optimizer takes a group of them as ``**options: Unpack[Group]``, under the
decorator `with_options`, and hands the parts of the group on with `pick`.
"""

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, cast, get_args

import jax

from gnlorp_jax.optim.methods.assemble import assemble
from gnlorp_jax.optim.parts.adam import DecayOrder, EpsMode, scale_by_adam
from gnlorp_jax.optim.parts.checks import check_interval
from gnlorp_jax.optim.parts.kernel_axes import DimensionNumbers, KernelAxes
from gnlorp_jax.optim.parts.labels import ParamLabels
from gnlorp_jax.optim.projections import Projection
from gnlorp_jax.optim.quantized.moments import MomentBits
from gnlorp_jax.optim.subspace.lazy import LazyRefresh
from gnlorp_jax.optim.subspace.low_rank import with_low_rank_projection
from gnlorp_jax.optim.subspace.moments import MomentsOnRefresh
from gnlorp_jax.optim.subspace.sides import Side

P = ParamSpec('P')
T = TypeVar('T')

# Of optimizers that compare a gradient with its image along the axis that is
# not compressed, or whose moments keep that axis.
OneSide = Literal['short', 'long', 'in', 'out']


class AdamOptions(TypedDict, total=False):
  """Adam's numbers.

  Attributes:
    b1: Decay of the first moments, in [0, 1).
    b2: Decay of the second moments, in [0, 1).
    eps: Added to the root of the second moments, at least 0.
  """

  b1: float
  b2: float
  eps: float


class AdamModeOptions(AdamOptions, total=False):
  """Adam's numbers, and where eps stands.

  Attributes:
    eps_mode: ``standard`` or ``hf``: whether eps is added after the bias
      correction or before it, see `scale_by_adam`.
  """

  eps_mode: EpsMode


class SubspaceOptions(TypedDict, total=False):
  """Which subspace a kernel gets, and when.

  Attributes:
    projection: Name of a module of `projections` (``svd``, ``random``,
      ``dct``), or a `Projection` such as
      ``projections.get('svd', solver='exact')``.
    spread_refreshes: Refresh one matrix at a time instead of all in one step.
  """

  projection: str | Projection
  spread_refreshes: bool


class OneSideOptions(SubspaceOptions, total=False):
  """Subspaces of one axis.

  Attributes:
    side: Axis that is compressed: ``short``, ``long``, ``in`` or ``out``, see
      `compressed_axes`.
  """

  side: OneSide


class RefreshOptions(SubspaceOptions, total=False):
  """Subspaces of any axes, in few bits, refreshed where needed.

  Attributes:
    side: Axis that is compressed: ``short``, ``long``, ``in``, ``out`` or
      ``both``, see `compressed_axes`.
    basis_bits: 32, 16, 8 or 4 bits for every element of the bases, see
      `quantize_basis`.
    lazy_refresh: Lets a matrix whose subspace rests wait longer for its next
      refresh, see `LazyRefresh`; None refreshes all equally often.
  """

  side: Side
  basis_bits: int
  lazy_refresh: LazyRefresh | None


class GaloreSubspace(AdamModeOptions, RefreshOptions, total=False):
  """Adam in a subspace.

  Attributes:
    moments_on_refresh: ``keep``, ``reset`` or ``rotate`` the moments when their
      basis changes, see `moment_rule`.
  """

  moments_on_refresh: MomentsOnRefresh


class CommonOptions(TypedDict, total=False):
  """What every optimizer takes.

  Attributes:
    weight_decay: Decoupled decay of the weights, at least 0: a step shrinks
      them by ``learning_rate * weight_decay`` of themselves, whatever `scale`
      is.
    weight_decay_mask: Which parameters decay: a tree of booleans like the
      parameters, or a function from these to one, as in Optax; None decays all
      of them. `spare_norms_and_biases` is such a function.
    decay_order: ``before`` or ``after`` the step, see `descend`.
    moment_bits: 32, 8 or 4 bits for every element of the moments, but 32 for
      embeddings; or ordered rules ``(regex, bits)`` over the paths, where what
      no rule finds keeps 32. So do small matrices, see `quantize_moments`.
    param_labels: ``all`` to treat embeddings and heads as kernels too, or
      ``blocks``, as by default, not to; rules ``(regex, label)`` or what
      `optax.partition` takes, with the labels ``low_rank`` (treated as a
      kernel, whether the optimizer projects kernels or not), ``full`` (the
      fallback, mostly Adam) and ``frozen``. See `labels.assign` and, for a dry
      run, `report`.
    skip_nonfinite: Leave out and count the steps whose gradients are not
      finite. False where the training step does so around the whole update,
      which needs less memory; see `skip_nonfinite`.
    update_dtype: Dtype of the updates; None for that of each parameter, as in
      Optax. ``float32`` lets `optax.apply_updates` round a bfloat16 parameter
      once, after the addition.
  """

  weight_decay: float
  weight_decay_mask: Any
  decay_order: DecayOrder
  moment_bits: MomentBits
  param_labels: ParamLabels | None
  skip_nonfinite: bool
  update_dtype: jax.typing.DTypeLike | None


class KernelOptions(CommonOptions, total=False):
  """What every optimizer of kernels takes.

  Attributes:
    kernel_axes: Rules ``(regex, num_in, num_out)`` for kernels with more than
      one input or output axis, such as those of Flax's attention modules; see
      `with_kernel_axes`. Any other kernel is ``[*, in, out]``.
    weight_dimension_numbers: Which axes of a weight are its inputs and which
      its outputs, as in `optax.contrib.muon`: a `WeightDimensionNumbers` for
      all weights, a tree of them with None for what is not projected, or a
      function from the parameters to such a tree.
  """

  kernel_axes: KernelAxes
  weight_dimension_numbers: DimensionNumbers | None


class WeightNormOptions(KernelOptions, total=False):
  """What every optimizer of kernels but `gradnormlorp` takes.

  Attributes:
    weight_norm: Whether kernels move as magnitude times direction, which is
      what `gradnormlorp` does; see `with_weight_norm`.
  """

  weight_norm: bool


class _Positional(TypedDict, total=False):
  """What stands before the keywords.

  Attributes:
    learning_rate: A number or an Optax schedule.
    rank: Rank of the subspaces, at least 1, a Python int.
    update_proj_gap: Steps between two refreshes of a basis, >= 1, a Python int.
    scale: Multiplies the expanded update of projected kernels.
  """


_GROUPS = (
  *(_Positional, AdamOptions, AdamModeOptions, SubspaceOptions),
  *(OneSideOptions, RefreshOptions, GaloreSubspace),
  *(CommonOptions, KernelOptions, WeightNormOptions),
)

# What fixes shapes or the program, and what `optax.inject_hyperparams` would
# take for a schedule.
_STATIC = (
  *('rank', 'update_proj_gap', 'basis_bits', 'error_bits', 'moment_bits'),
  *('granularity', 'norm', 'iterations', 'ns_steps', 'leading'),
  *('update_dtype', 'param_labels'),
  *('weight_decay_mask', 'weight_dimension_numbers'),
)


def pick(options: Mapping[str, object], group: type[T]) -> T:
  """Those of the options that belong to a group."""
  names = group.__annotations__
  return cast(T, {name: options[name] for name in names if name in options})


def with_options(
  like: Callable[..., Any] | None = None, **defaults: Any
) -> Callable[[Callable[P, T]], Callable[P, T]]:
  """Fills in, checks and explains the shared keywords of an optimizer.

  The function has its own arguments and ``**options: Unpack[Group]``. It is
  given all options of the group. Its signature and its documentation, as
  `help` shows them, have all of them too.

  Args:
    like: A function with arguments of the same meanings, whose explanations of
      them serve here too.
    **defaults: Where the function's defaults are not the common ones, which are
      those of `assemble`, `with_low_rank_projection` and `scale_by_adam`.

  Returns:
    The decorator.
  """

  def decorate(method: Callable[P, T]) -> Callable[P, T]:
    own = inspect.signature(method)
    (group,) = get_args(own.parameters['options'].annotation)
    shared = {
      name: inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default={**_common_defaults(), **defaults}[name],
        annotation=annotation,
      )
      for name, annotation in group.__annotations__.items()
    }
    arguments = [p for name, p in own.parameters.items() if name != 'options']
    signature = own.replace(parameters=[*arguments, *shared.values()])
    options = {name: p.default for name, p in shared.items()}
    name = method.__name__

    @functools.wraps(method)
    def with_all_options(*args: P.args, **kwargs: P.kwargs) -> T:
      try:
        bound = signature.bind(*args, **kwargs)
      except TypeError as error:
        raise TypeError(f'{name}() {error}') from None
      _check_static(name, bound.arguments)
      for argument, value in bound.arguments.items():
        check_interval(argument, value, '(-inf, inf)')
      return method(*args, **{**options, **kwargs})

    # What unwraps functions to document them would lose the shared options.
    del with_all_options.__wrapped__
    with_all_options.__signature__ = signature  # type: ignore[attr-defined]
    with_all_options.__doc__ = _explained(method, like, signature)
    return with_all_options

  return decorate


@functools.cache
def _common_defaults() -> dict[str, Any]:
  """The defaults of the functions that options end in."""
  ends = (scale_by_adam, with_low_rank_projection, assemble)
  return {'moments_on_refresh': 'keep'} | {
    name: parameter.default
    for end in ends
    for name, parameter in inspect.signature(end).parameters.items()
    if parameter.default is not inspect.Parameter.empty
  }


def _check_static(method: str, arguments: Mapping[str, object]) -> None:
  """Raises a `ValueError` that names all arrays among what must be static."""
  found = [
    name for name in _STATIC if isinstance(arguments.get(name), jax.Array)
  ]
  if found:
    injected = int | float | jax.Array
    needed = tuple(
      name
      for name in _STATIC
      if isinstance(arguments.get(name), injected)
      or callable(arguments.get(name))
    )
    raise ValueError(
      f'{method}: {", ".join(found)} must be known at build time, got arrays: '
      'they fix shapes or the program. With optax.inject_hyperparams, pass '
      f'static_args={needed!r}.'
    )


def _explained(
  method: Callable[..., Any],
  like: Callable[..., Any] | None,
  signature: inspect.Signature,
) -> str:
  """The docstring with every argument explained, in the signature's order."""
  text = method.__doc__ or ''
  head, own, tail = text.partition('  Args:\n')
  if own:
    tail = tail.partition('\n\n')[2]
  else:
    head, returns, tail = text.partition('  Returns:\n')
    tail = returns + tail
  texts = _texts_of_groups(signature)
  if like is not None:
    texts |= _arguments(_section(like.__doc__ or '', '  Args:\n'))
  texts |= _arguments(_section(text, '  Args:\n'))
  arguments = '\n'.join(texts[name] for name in signature.parameters)
  return f'{head}  Args:\n{arguments}\n\n{tail}'


def _section(text: str, head: str) -> str:
  """A section of a docstring, up to the next empty line."""
  return text.partition(head)[2].partition('\n\n')[0].rstrip()


def _texts_of_groups(signature: inspect.Signature) -> dict[str, str]:
  """What groups say of arguments; of two types, what is said of the same."""
  texts = {}
  for group in _GROUPS:
    found = _arguments(_section(group.__doc__ or '', '  Attributes:\n'))
    for name in found.keys() & signature.parameters.keys():
      given = signature.parameters[name].annotation
      if group.__annotations__.get(name, given) == given:
        texts[name] = found[name]
  return texts


def _arguments(text: str) -> dict[str, str]:
  """The paragraphs of an ``Args:`` section by the names they begin with."""
  parts = re.split(r'^(?=    \w+: )', text, flags=re.MULTILINE)
  return {
    part.strip().partition(':')[0]: textwrap.indent(
      textwrap.dedent(part.rstrip()), '    '
    )
    for part in parts
    if part.strip()
  }
