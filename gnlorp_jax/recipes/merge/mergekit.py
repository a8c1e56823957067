"""Settings of a merge from a YAML file with mergekit's keys.

A key that is not known is an error: what is passed over would be merged another
way than its author meant. For the same reason, what a file leaves out is what
mergekit takes then, not what the command does, in the methods that it has.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

import yaml

from gnlorp_jax.merging import methods
from gnlorp_jax.recipes.merge.settings import MergeConfig

_METHODS = {
  'linear': 'average',
  'task_arithmetic': 'task_arithmetic',
  'ties': 'ties',
  'dare_linear': 'dare',
  'tsv': 'tsv',
  'doge': 'doge',
}
_TOP = ('merge_method', 'base_model', 'models', 'parameters', 'dtype')
_OF_MODEL = ('weight', 'density')
# Ours, under `parameters`, by the names that the command has too.
_NUMBERS, _WHOLE = ('eta', 'rate'), ('subspace', 'steps', 'seed')
_CHOICES = ('solver', 'inner', 'project', 'others')
_TEXTS = ('include', 'exclude', 'heads')
_OURS = (*_NUMBERS, *_WHOLE, *_CHOICES, *_TEXTS)
# What mergekit takes where a file says nothing.
_SCALE, _DENSITY = 1.0, 1.0


def read(path: str) -> MergeConfig:
  """The settings that a file asks for; folders are not looked at.

  Args:
    path: The file.

  Returns:
    The settings, without a place to write.

  Raises:
    ValueError: If the file holds no such configuration.
  """
  try:
    found = yaml.safe_load(pathlib.Path(path).read_text(encoding='utf-8'))
  except (OSError, ValueError, yaml.YAMLError) as error:
    raise ValueError(f'Cannot read {path}: {error}') from error
  _check_keys(path, 'the file', found, _TOP)
  method = _METHODS.get(found.get('merge_method'))
  if method is None:
    raise ValueError(
      f'{path}: merge_method={found.get("merge_method")!r}; expected one of '
      f'{tuple(_METHODS)}.'
    )
  models = _models(path, found)
  common = found.get('parameters') or {}
  _check_keys(
    path, 'parameters', common, (*_OF_MODEL, 'lambda', 'normalize', *_OURS)
  )
  fields = {
    name: _of_ours(path, name, common[name])
    for name in _OURS
    if common.get(name) is not None
  }
  weights = _of_models(path, models, common, 'weight')
  densities = _of_models(path, models, common, 'density')
  is_mergekits = found['merge_method'] not in ('tsv', 'doge')
  weights = _as_normalised(path, method, common.get('normalize'), weights)
  if 'lambda' in common:
    fields['scale'] = _number(path, 'lambda', common['lambda'])
  elif is_mergekits and method != 'average':
    fields['scale'] = _SCALE
  if weights:
    fields['weights'] = weights
  if densities and method not in methods.KEPT:
    raise ValueError(f'{path}: density has no effect: {method} drops nothing.')
  if not densities and is_mergekits and method in methods.KEPT:
    densities = (_DENSITY,)
  if densities:
    fields['keep'] = tuple(_percent(path, density) for density in densities)
  if found.get('dtype') is not None:
    fields['dtype'] = _one_of(path, 'dtype', found['dtype'])
  return MergeConfig(
    base=str(found.get('base_model') or ''),
    experts=tuple(model['model'] for model in models),
    method=method,
    **fields,
  )


def _models(path: str, found: dict[str, Any]) -> list[dict[str, Any]]:
  """The experts; the base among them, as is usual there, is none."""
  models = found.get('models')
  if not isinstance(models, list) or not models:
    raise ValueError(f'{path} has no list of models.')
  for model in models:
    _check_keys(path, 'models', model, ('model', 'parameters'))
    if not isinstance(model.get('model'), str):
      raise ValueError(f'{path}: a model has no name: {model}.')
    if model.get('parameters') is not None:
      _check_keys(path, model['model'], model['parameters'], _OF_MODEL)
  return [
    model
    for model in models
    if model['model'] != found.get('base_model') or model.get('parameters')
  ]


def _of_models(
  path: str, models: list[dict[str, Any]], common: dict[str, Any], key: str
) -> tuple[float, ...]:
  """A number of each expert, or of all; empty where none is given."""
  values = [
    (model.get('parameters') or {}).get(key, common.get(key))
    for model in models
  ]
  if all(value is None for value in values):
    return ()
  lacking = [
    model['model']
    for model, value in zip(models, values, strict=True)
    if value is None
  ]
  if lacking:
    raise ValueError(f'{path}: {key} is given of some, not of {lacking}.')
  return tuple(_number(path, key, value) for value in values)


def _number(path: str, key: str, value: Any) -> float:
  # Of YAML, 1e-4 is a text: it wants a point in a number with an exponent.
  if isinstance(value, int | float | str) and not isinstance(value, bool):
    with contextlib.suppress(ValueError):
      return float(value)
  raise ValueError(
    f'{path}: {key}={value!r} must be a number. Gradients over layers and '
    'filters by name are not supported; merge in parts with --include.'
  )


def _percent(path: str, density: float) -> float:
  if not 0.01 <= density <= 1:
    raise ValueError(
      f'{path}: density={density:g} must be in [0.01, 1]: it is the share of '
      'the entries that stay.'
    )
  return 100 * density


def _of_ours(path: str, name: str, value: Any) -> Any:
  """The value of an option of ours, which the command line would check."""
  if name in _CHOICES or value == 'auto':
    return _one_of(path, name, value)
  if name in _NUMBERS:
    return _number(path, name, value)
  kind, what = (int, 'a whole number') if name in _WHOLE else (str, 'a text')
  if not isinstance(value, kind) or isinstance(value, bool):
    raise ValueError(f'{path}: {name}={value!r} must be {what}.')
  return value


def _one_of(path: str, key: str, value: Any) -> Any:
  """Checks a choice, which the command line would check."""
  (field,) = (f for f in dataclasses.fields(MergeConfig) if f.name == key)
  choices = [
    choice
    for part in (field.type, *getattr(field.type, '__args__', ()))
    for choice in (part, *getattr(part, '__args__', ()))
    if isinstance(choice, str)
  ]
  if value not in choices:
    raise ValueError(
      f'{path}: unknown {key} {value!r}; expected one of {tuple(choices)}.'
    )
  return value


def _as_normalised(
  path: str, method: str, normalize: bool | None, weights: tuple[float, ...]
) -> tuple[float, ...]:
  """The weights that give what a file asks for.

  Raises:
    ValueError: If none do.
  """
  if method == 'ties':
    # mergekit divides by the sum of the weights that agree, by default; here
    # ties divides by their number.
    if normalize in (None, True) and len({*weights, 1.0}) == 1:
      return weights
    if normalize in (None, True) and len(set(weights)) == 1 and weights[0] > 0:
      return (1.0,) * len(weights)
    raise ValueError(
      f'{path}: normalize={True if normalize is None else normalize} and '
      f'weights {weights}, but ties takes the mean over the experts that agree '
      'of what their weights multiply. Say normalize: true with equal positive '
      'weights, or give --weights on the command line without this file.'
    )
  does = method == 'average'
  if normalize not in (None, does):
    does_what = 'divides by the sum of' if does else 'does not touch'
    raise ValueError(
      f'{path}: normalize={normalize}, but {method} {does_what} the weights. '
      f'Say normalize: {str(does).lower()}, and choose the weights.'
    )
  return weights


def _check_keys(
  path: str, where: str, value: Any, known: tuple[str, ...]
) -> None:
  if not isinstance(value, dict):
    raise ValueError(f'{path}: {where} must hold keys, not {value!r}.')
  unknown = [key for key in value if key not in known]
  if unknown:
    raise ValueError(
      f'{path}: {where} has the unknown keys {unknown}. Known: {known}.'
    )
