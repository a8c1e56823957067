"""From settings to layers that are drawn: methods by name, what stays on."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gnlorp_jax.compose import layer_scores
from gnlorp_jax.compose.optimizer import LabelRules
from gnlorp_jax.compose.settings import AdapterOptions, LayerSamplingOptions
from gnlorp_jax.training.layer_sampling import LayerSampling
from gnlorp_jax.training.parameters import LAYERS

_logger = logging.getLogger(__name__)


class Preset(NamedTuple):
  """What a published method takes where nothing is asked for.

  Attributes:
    draw: How layers are drawn.
    layers: How many at a time.
    every: Steps between two draws.
    always_on: Whether embedding, final norm and head train all the time.
  """

  draw: str
  layers: int
  every: int
  always_on: bool = True


PRESETS = {
  # Li et al., OwLore, 2024, arXiv:2405.18380: the released scripts. OWS is the
  # same draw with optimizers of full rank, and LISA's number of layers.
  'owlore': Preset('scores', 5, 50),
  'ows': Preset('scores', 2, 50),
  # Pan et al., LISA, 2024, arXiv:2403.17919: intervals from 1 to 50.
  'lisa': Preset('uniform', 2, 20),
  # Luo et al., BAdam, 2024, arXiv:2404.02827.
  'badam': Preset('shuffled', 1, 50, always_on=False),
}
_PLAIN = Preset('uniform', 2, 20)


def resolve(
  options: LayerSamplingOptions, num_layers: int
) -> LayerSampling | None:
  """How layers are drawn, or None where all train.

  Args:
    options: What is asked for.
    num_layers: L, layers of the model.

  Raises:
    ValueError: If options do not fit each other or the model, or scores cannot
      be read.
  """
  if not options.is_on:
    _check_unused(options)
    return None
  _check_regexes(options)
  preset = PRESETS.get(options.method or '', _PLAIN)
  draw = options.draw or preset.draw
  weights = _weights(draw, options.scores, num_layers)
  try:
    found = LayerSampling(
      num_layers=num_layers,
      layers=options.layers or min(preset.layers, num_layers),
      every=options.every or preset.every,
      draw='shuffled' if draw == 'shuffled' else 'weighted',
      weights=weights,
      on_leave=options.on_leave,
      carry=options.carry,
      reset_always=options.reset_always,
      warmup_steps=options.warmup_steps,
    )
  except ValueError as error:
    by = 'defaults' if options.method is None else f'those of {options.method}'
    raise ValueError(
      f'{error} These are options of sampling; what is not given of them are '
      f'{by}.'
    ) from error
  return found


def _check_regexes(options: LayerSamplingOptions) -> None:
  for pattern in options.always_on or ():
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(
        f'sampling.always_on: {pattern!r} is no regex: {error}. Correct it.'
      ) from error


def check_run(
  options: LayerSamplingOptions,
  sampling: LayerSampling | None,
  trained: Any,
  steps: int,
  adapter: AdapterOptions,
) -> None:
  """Checks a run against how its layers are drawn; says what has no effect.

  Args:
    options: What is asked for.
    sampling: How layers are drawn; None: all train.
    trained: What trains, a nested dict.
    steps: Steps of the run; 0 if that is not known yet.
    adapter: What trains in place of the model's weights, if anything does.

  Raises:
    ValueError: If nothing in the layers trains.
  """
  if sampling is None:
    return
  if LAYERS not in trained:
    raise ValueError(
      'Layers are to be drawn (sampling), and nothing in them trains: label '
      'some of their parameters other than frozen (optim.param_labels).'
    )
  unused = {}
  if options.on_leave != 'drop':
    why = f'sampling.on_leave={options.on_leave!r} keeps all states'
    unused['carry'] = why
  if adapter.kind is not None:
    unused['always_on'] = 'beside adapters it is not asked'
  if set(trained) == {LAYERS}:
    why = 'nothing outside of the layers trains'
    unused |= dict.fromkeys(('always_on_state', 'reset_always'), why)
  for field in dataclasses.fields(options):
    value = getattr(options, field.name)
    if field.name in unused and value != field.default:
      _logger.warning(
        'sampling.%s=%r has no effect: %s.',
        *(field.name, value, unused[field.name]),
      )
  if sampling.layers == sampling.num_layers:
    _logger.warning(
      'All %d layers train at a time: nothing is drawn. Lower sampling.layers.',
      sampling.num_layers,
    )
  draws = -(-steps // sampling.every)
  if steps and draws * sampling.layers < sampling.num_layers:
    _logger.warning(
      'In %d steps %d layers are drawn %d times: not all of the %d layers are '
      'trained. Lower sampling.every (now %d).',
      *(steps, sampling.layers, draws, sampling.num_layers, sampling.every),
    )


def _check_unused(options: LayerSamplingOptions) -> None:
  """Raises a ValueError if options are given where all layers train."""
  for field in dataclasses.fields(options):
    if (value := getattr(options, field.name)) != field.default:
      raise ValueError(
        f'sampling.{field.name}={value!r} has no effect where all layers '
        "train: give sampling.method (or, in fine-tuning, method='lisa' and "
        'the like), or sampling.draw.'
      )


def _weights(
  draw: str, scores: str | None, num_layers: int
) -> tuple[float, ...] | None:
  if draw == 'decreasing':
    return tuple(float(num_layers - i) for i in range(num_layers))
  if draw == 'scores':
    if scores is None:
      raise ValueError(
        'Layers drawn by their scores need a file of them, sampling.scores: '
        'one number per line, or what python -m gnlorp_jax.layer_scores MODEL '
        '--data TEXT writes for a decoder. Or draw them otherwise, such as '
        "sampling.draw='uniform'."
      )
    return layer_scores.read_scores(scores, num_layers)
  if scores is not None:
    raise ValueError(
      f"sampling.scores={scores!r} needs sampling.draw='scores', got {draw!r}."
    )
  return None


def label_rules(
  options: LayerSamplingOptions,
  rules: LabelRules,
  outer: Mapping[str, Any],
  always_trained: tuple[str, ...],
  *,
  has_subspaces: bool,
) -> LabelRules:
  """Label rules that say which parameters outside of the layers train.

  Args:
    options: What is asked for.
    rules: The rules without.
    outer: All parameters outside of the layers, or their shapes, by their
      ``/``-joined paths.
    always_trained: Prefixes of paths that always train, such as those of a new
      head.
    has_subspaces: Whether the optimizer projects matrices.

  Returns:
    Rules for each path, then `rules`.

  Raises:
    ValueError: If `always_on` names something that is not there, or its state
      cannot be projected.
  """
  if options.always_on_state == 'low_rank' and not has_subspaces:
    raise ValueError(
      "sampling.always_on_state='low_rank' needs an optimizer with subspaces, "
      "such as optim.name='galore'; or use 'int8'."
    )
  preset = PRESETS.get(options.method or '', _PLAIN)
  patterns = options.always_on
  if patterns is None:
    patterns = ('.*',) if preset.always_on else ()
  for pattern in patterns:
    if not any(re.search(pattern, name) for name in outer):
      raise ValueError(
        f'sampling.always_on names {pattern!r}, which is in the path of no '
        f'parameter outside of the layers: {list(outer)}.'
      )
  found = []
  for name, leaf in outer.items():
    is_on = name.startswith(always_trained) or any(
      re.search(pattern, name) for pattern in patterns
    )
    exact = f'^{re.escape(name)}$'
    if not is_on:
      found.append((exact, 'frozen'))
    elif options.always_on_state == 'low_rank' and leaf.ndim == 2:
      found.append((exact, 'low_rank'))
  return (*found, *rules)
