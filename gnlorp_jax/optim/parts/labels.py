"""Which parameter gets which treatment, by name and shape.

Three labels exist:

  low_rank  what a method treats as a kernel. Most project it, hence the name;
            `muon`, `racs`, `scale` and `sinkgd` take it whole.
  full      the method's fallback, mostly Adam with moments of full size
  frozen    no update, no state
"""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import optax

from gnlorp_jax.optim.parts.checks import check_regex
from gnlorp_jax.optim.parts.kernel_axes import (
  DimensionNumbers,
  dimension_numbers,
)
from gnlorp_jax.optim.parts.plain import (
  broadcast_prefix,
  is_function,
  path_name,
  plain,
)

LABELS = ('low_rank', 'full', 'frozen')
PRESETS = ('blocks', 'all')

# Fewest rows of an embedding that is projected: smaller tables, such as those
# of token types, have nothing to save.
_FEWEST_ROWS = 64

# Kernels that stay full-rank by default. Their gradients are sparse over rows
# (embeddings) or over classes (heads), and published runs do not project them.
_FULL_RANK_NAMES = re.compile(
  r'(?<![^/])(\w*embed\w*|\w*emb|tok|lm_head|head|logits|classifier|score|pooler'
  r'|\w*norm\w*|vocab|wte|wpe)(?![^/])',
  re.IGNORECASE,
)

# Their gradients are sparse over rows: few bits would lose most rows' moments.
EMBEDDINGS = r'(?i)(?<![^/])(\w*embed\w*|\w*emb|tok|wte|wpe)(?![^/])'

# The last layer's: of these some methods remember more than of other kernels.
_HEADS = re.compile(
  r'(?<![^/])(lm_head|head|logits|classifier|score)/(.*/)?(kernel|weight|w)$',
  re.IGNORECASE,
)

# Flax's attention modules hold [d, heads, head_dim] and [heads, head_dim, d]
# under these names; a scan may stack [layers, d, d] under the same ones.
_ATTENTION_NAMES = re.compile(r'(^|/)(query|key|value|out)/kernel$')

_CONVOLUTIONS = re.compile(r'(?i)(^|/)\w*conv\w*/')

Rules = Sequence[tuple[str, str]]
ParamLabels = str | Rules | Callable[[optax.Params], Any] | Any


class Assignment(NamedTuple):
  """A parameter's label and why it has it."""

  label: str
  reason: str


def default_assignment(name: str, shape: tuple[int, ...]) -> Assignment:
  """Label of a parameter that no rule speaks about.

  Kernels of dense layers, stacked or not, are ``low_rank``; everything that is
  no kernel, and kernels of embeddings, heads and norms, is ``full``. So is what
  may be a stack of matrices or one matrix with several axes in or out: kernels
  of more than three axes, and of three where the path ends in ``query/kernel``,
  ``key/kernel``, ``value/kernel`` or ``out/kernel`` (Flax's attention modules)
  or names a convolution. Any other kernel of three axes is a stack. Flax says
  ``kernel``; the ``weight`` of Equinox and the ``w`` of Haiku are kernels where
  they have two axes.
  """
  last = name.split('/')[-1]
  if len(shape) > 1 and re.search(EMBEDDINGS, last):
    return Assignment(
      'full', 'default: an embedding, kept out on purpose; see param_labels'
    )
  if last not in ('kernel', 'weight', 'w'):
    return Assignment(
      'full', "default: its name does not end in 'kernel', 'weight' or 'w'"
    )
  if len(shape) < 2:
    return Assignment('full', f'default: {len(shape)} axis, no matrix')
  most = 3 if last == 'kernel' else 2
  if len(shape) > most or (
    len(shape) == 3
    and (_ATTENTION_NAMES.search(name) or _CONVOLUTIONS.search(name))
  ):
    return Assignment(
      'full',
      f'default: {len(shape)} axes may be a stack of matrices or one with '
      'several axes in or out; label it, and give kernel_axes or '
      'weight_dimension_numbers for the latter',
    )
  special = _FULL_RANK_NAMES.search(name)
  if special:
    return Assignment('full', f'default: {special.group()!r} in its name')
  return Assignment('low_rank', 'default: a kernel')


def all_assignment(name: str, shape: tuple[int, ...]) -> Assignment:
  """As `default_assignment`, but embeddings and heads are projected too.

  That is, matrices called ``embedding``, ``kernel``, ``weight`` or ``w`` whose
  path names an embedding or a head; tables of fewer than 64 rows are not.
  """
  is_embedding = bool(re.search(EMBEDDINGS, name))
  kinds = ('embedding', 'kernel', 'weight', 'w')
  is_matrix = len(shape) == 2 and name.split('/')[-1] in kinds
  if is_matrix and is_embedding and shape[0] < _FEWEST_ROWS:
    return Assignment('full', f'preset all: a table of {shape[0]} rows')
  if is_matrix and (is_embedding or is_head(name)):
    what = 'an embedding' if is_embedding else 'a head'
    return Assignment('low_rank', f'preset all: {what}')
  return default_assignment(name, shape)


def is_head(name: str) -> bool:
  """Whether a path is that of a head's kernel.

  Examples:
    >>> is_head('lm_head/kernel'), is_head('classifier/dense/kernel')
    (True, True)
    >>> is_head('classifier/dense/bias'), is_head('layers/heads/kernel')
    (False, False)
  """
  return bool(_HEADS.search(name))


def rule_assignment(name: str, rules: Rules) -> Assignment | None:
  """The first rule whose regex occurs in `name`, or None."""
  for pattern, label in rules:
    if re.search(pattern, name):
      return Assignment(label, f'rule {pattern!r}')
  return None


def assign(
  params: optax.Params,
  param_labels: ParamLabels | None = None,
  *,
  weight_dimension_numbers: DimensionNumbers | None = None,
  is_part: bool = False,
) -> Any:
  """Label and reason of every parameter.

  Args:
    params: Parameters, or their shapes; seen as a plain tree, see `plain`.
    param_labels: None or ``blocks`` for the defaults (`default_assignment`);
      ``all`` to project embeddings and heads too (`all_assignment`); ordered
      rules ``(regex, label)`` over the ``/``-joined path, the first regex found
      in it decides; or what `optax.partition` takes: a tree of labels or a
      function from parameters to one.
    weight_dimension_numbers: As in `with_kernel_axes`. Where there are any,
      they take the place of the defaults: None is ``full``, others are
      ``low_rank``.
    is_part: Whether `params` may be a part of all parameters, about which some
      rules decide nothing.

  Returns:
    A tree of `Assignment`, shaped like ``plain(params)``.

  Raises:
    ValueError: If a label is unknown, a rule is no regular expression, a
      parameter has no rule, or a rule decides about no parameter.

  Examples:
    >>> params = {'dense': {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones(2)}}
    >>> assign(params)['dense']['kernel'].label
    'low_rank'
    >>> assign(params, [('bias', 'frozen'), ('.*', 'full')])['dense']['bias']
    Assignment(label='frozen', reason="rule 'bias'")
  """
  params = plain(params)
  paths, treedef = jax.tree_util.tree_flatten_with_path(params)
  if not paths:  # optax.tree.map_params asks with an empty tree.
    return params
  names = [path_name(path) for path, _ in paths]
  if param_labels is None and weight_dimension_numbers is not None:
    numbers = dimension_numbers(params, weight_dimension_numbers)
    found = [_assign_by_numbers(numbers[name]) for name in names]
  elif param_labels is None or _is_preset(param_labels):
    assign_one = all_assignment if param_labels == 'all' else default_assignment
    found = [
      assign_one(name, leaf.shape)
      for name, (_, leaf) in zip(names, paths, strict=True)
    ]
  elif _is_rules(param_labels):
    found = _assign_by_rules(names, param_labels, is_part)
  else:
    tree = param_labels(params) if is_function(param_labels) else param_labels
    found = [
      Assignment(label, 'given by param_labels')
      for label in jax.tree.leaves(
        broadcast_prefix('param_labels', tree, params)
      )
    ]
  for name, assignment in zip(names, found, strict=True):
    if assignment.label not in LABELS:
      others = ''
      if isinstance(param_labels, str):
        others = f', or param_labels={" or ".join(map(repr, PRESETS))}, or '
        others += 'rules [(regex, label), ...]'
      raise ValueError(
        f'Unknown label {assignment.label!r} for parameter {name!r}; expected '
        f'one of {LABELS}{others}.'
      )
  return jax.tree.unflatten(treedef, found)


def check_rules_match(
  option: str, patterns: Sequence[str], params: optax.Params
) -> None:
  """Raises a `ValueError` if a rule's regex is found in no path.

  Args:
    option: What the rules belong to.
    patterns: Their regexes.
    params: All parameters, a plain tree.
  """
  paths = jax.tree_util.tree_leaves_with_path(params)
  names = [path_name(path) for path, _ in paths]
  for pattern in patterns:
    if names and not any(re.search(pattern, name) for name in names):
      near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
      raise ValueError(
        f'The {option} rule for {pattern!r} decides about no parameter: no '
        'path contains it. Remove it, or correct its regex. Similar paths: '
        f'{near or names[:3]}.'
      )


def _assign_by_numbers(numbers: Any) -> Assignment:
  if numbers is None:
    return Assignment('full', 'weight_dimension_numbers has None for it')
  return Assignment('low_rank', f'weight_dimension_numbers: {numbers!r}')


def labels(
  param_labels: ParamLabels | None = None,
  *,
  weight_dimension_numbers: DimensionNumbers | None = None,
  is_part: bool = False,
) -> Callable[[optax.Params], Any]:
  """`assign` as the function from parameters to labels of `optax.partition`."""
  if param_labels is not None and _is_rules(param_labels):
    _check_regexes(param_labels)

  def label_fn(params: optax.Params) -> Any:
    return jax.tree.map(
      lambda assignment: assignment.label,
      assign(
        params,
        param_labels,
        weight_dimension_numbers=weight_dimension_numbers,
        is_part=is_part,
      ),
      is_leaf=lambda x: isinstance(x, Assignment),
    )

  return label_fn


def _is_preset(param_labels: ParamLabels) -> TypeGuard[str]:
  return isinstance(param_labels, str) and param_labels in PRESETS


def _is_rules(param_labels: ParamLabels) -> TypeGuard[Rules]:
  if not isinstance(param_labels, list | tuple) or not all(
    isinstance(rule, list | tuple)
    and len(rule) == 2
    and all(isinstance(part, str) for part in rule)
    for rule in param_labels
  ):
    return False
  # Pairs of labels are a tree of them, such as that of [(W, b), ...].
  return not param_labels or any(rule[0] not in LABELS for rule in param_labels)


def _check_regexes(rules: Rules) -> None:
  for rule in rules:
    check_regex('param_labels', rule)


def _assign_by_rules(
  names: list[str], rules: Rules, is_part: bool
) -> list[Assignment]:
  """Applies rules strictly: each parameter matched, each rule used.

  In a part of the parameters a rule may have no use.
  """
  _check_regexes(rules)
  found = [rule_assignment(name, rules) for name in names]
  missed = [name for name, a in zip(names, found, strict=True) if a is None]
  if missed:
    raise ValueError(
      f'No label rule matches the parameters {missed}. Rules: {list(rules)}. '
      "Add one for them, or ('.*', 'full') as the last rule."
    )
  used = {assignment.reason for assignment in found if assignment}
  for pattern, label in rules:
    if f'rule {pattern!r}' not in used and not is_part:
      near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
      raise ValueError(
        f'The label rule {(pattern, label)!r} decides about no parameter: no '
        'path contains it, or earlier rules took all that do. Remove it, move '
        f'it up, or correct its regex. Similar paths: {near or names[:3]}.'
      )
  return [assignment for assignment in found if assignment]
