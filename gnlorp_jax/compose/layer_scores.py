"""Files of scores of layers, as `gnlorp_jax.layer_scores` writes them."""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

Kind = Literal['outliers', 'weight_norm', 'gradient_norm', 'hill']
KINDS: tuple[Kind, ...] = get_args(Kind)

_MAKE = 'Write one by python -m gnlorp_jax.layer_scores MODEL --data FILES'


def as_scores(kind: Kind, values: Sequence[float]) -> tuple[float, ...]:
  """What layers are drawn by, in proportion.

  Args:
    kind: What was measured.
    values: What was found, one per layer.

  Returns:
    The values themselves; of ``hill`` their inverses, so that a heavier tail,
    which is a smaller exponent, means a higher score.

  Note:
    That heavy tails deserve training is OwLore's argument for its outliers.
    AlphaPruning takes them for a sign of a layer that is well trained already;
    who follows it draws by the exponents themselves.
  """
  if kind == 'hill':
    return tuple(1 / value for value in values)
  return tuple(values)


def read_scores(
  path: str | os.PathLike[str], num_layers: int
) -> tuple[float, ...]:
  """Reads the scores of a model's layers.

  Args:
    path: JSON of ``python -m gnlorp_jax.layer_scores``, or a text file with a
      number in each line, as OwLore ships them.
    num_layers: The model's, L.

  Returns:
    L scores, at least 0, not all 0: layers are drawn in proportion to them.

  Raises:
    ValueError: If the file cannot be read, is of neither kind, has scores of
      another number of layers, or such that no layer can be drawn by.
  """
  path = pathlib.Path(path).expanduser()
  try:
    text = path.read_text(encoding='utf-8')
  except (OSError, ValueError) as error:
    raise ValueError(f'Cannot read scores of layers: {error}.') from error
  is_json = text.lstrip()[:1] in ('{', '[')
  scores = _of_json(path, text) if is_json else _of_lines(path, text)
  if len(scores) != num_layers:
    raise ValueError(
      f'{path} has scores of {len(scores)} layers, and the model has '
      f'{num_layers}. {_MAKE}, of this model.'
    )
  for layer, score in enumerate(scores):
    if not (math.isfinite(score) and score >= 0):
      raise ValueError(
        f'{path} gives layer {layer} the score {score}; expected a finite '
        f'number of at least 0. {_MAKE}, or correct it.'
      )
  if not any(scores):
    raise ValueError(
      f'{path} gives every layer the score 0, so that none can be drawn. '
      f'{_MAKE} and a smaller --threshold.'
    )
  return scores


def _of_json(path: pathlib.Path, text: str) -> tuple[float, ...]:
  found: Any = None
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{path} is no JSON that can be read: {error}. {_MAKE}.'
    ) from error
  scores = found.get('scores') if isinstance(found, dict) else None
  if not isinstance(scores, list) or not all(map(_is_number, scores)):
    raise ValueError(
      f'{path} holds no scores of layers: expected an object with a list of '
      f'numbers under "scores". {_MAKE}.'
    )
  return tuple(map(float, scores))


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _of_lines(path: pathlib.Path, text: str) -> tuple[float, ...]:
  scores = []
  for number, line in enumerate(text.splitlines(), 1):
    if not line.strip():
      continue
    try:
      scores.append(float(line))
    except ValueError:
      raise ValueError(
        f'{path}:{number} is {line.strip()[:40]!r}; expected one number in '
        f'each line, or JSON. {_MAKE}.'
      ) from None
  return tuple(scores)
