"""From a Hugging Face folder and text to one score per layer.

Shape suffixes in this file:
  L  layers
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gnlorp_jax.compose import layer_scores as files
from gnlorp_jax.compose import pretrained
from gnlorp_jax.compose.layer_scores import Kind
from gnlorp_jax.compose.progress import Progress
from gnlorp_jax.models import adapters, layer_scores
from gnlorp_jax.models.interface import Model
from gnlorp_jax.recipes.layer_scores import data
from gnlorp_jax.recipes.layer_scores.settings import LayerScoresConfig
from gnlorp_jax.training import objectives
from gnlorp_jax.training.layerwise import gradient_norms

_logger = logging.getLogger(__name__)

LONGEST = 2048
"""Most tokens of a sequence where no length is asked for."""
_CHUNK_TOKENS = 1024


def measure(config: LayerScoresConfig, progress: Progress) -> dict[str, Any]:
  """Measures the layers of a model.

  Args:
    config: The settings.
    progress: ``progress(title)`` is a context whose value is called with how
      much is done, and is there.

  Returns:
    What is written as JSON: ``model``, ``data``, ``kind``, ``threshold``, the
    L ``scores``, all that was measured under ``all``, and how many sequences
    and tokens the model read.

  Raises:
    ValueError: If a file is missing or damaged, something is asked that the
      model cannot do, no weight stands out by the threshold, or a measure is no
      finite number.
  """
  found = pretrained.find(
    config.folder, dtype=config.dtype, tokenizer=config.tokenizer
  )
  architecture = found.model.config
  length = _length(config.length, architecture.max_seq_len)
  sequences = data.load(
    config, found.tokenizer, length, architecture.vocab_size
  )
  params = found.read()
  by_kind: dict[Kind, Callable[[], Any]] = {
    'outliers': lambda: _outliers(
      config, found.model, params, sequences.batches, progress
    ),
    'weight_norm': lambda: layer_scores.weight_norms(
      layer_scores.kernels_of(params)
    ),
    'gradient_norm': lambda: _gradient_norms(
      found.model, params, sequences.batches, config.gradient_batches, progress
    ),
    'hill': lambda: _hill_exponents(params, progress),
  }
  measured = {
    kind: _as_lists(kind, by_kind[kind]()) for kind in config.measured
  }
  values = measured[config.kind]
  if config.kind == 'outliers':
    values = values[name_of(config.threshold)]
  scores = files.as_scores(config.kind, values)
  never = [layer for layer, score in enumerate(scores) if score == 0]
  if never:
    _logger.warning(
      'The layers %s have the score 0: they will never be drawn.', never
    )
  return {
    'model': config.folder,
    'data': config.data,
    'kind': config.kind,
    'threshold': config.threshold,
    'scores': scores,
    'all': measured,
    'format': config.format,
    'sequences': sequences.num_sequences,
    'length': length,
    'tokens': sequences.num_tokens,
    'batch_size': config.batch_size,
    'gradient_batches': config.gradient_batches,
    'seed': config.seed,
    'dtype': config.dtype,
  }


def name_of(threshold: float) -> str:
  """What a file calls a threshold, such as ``5`` or ``7.5``."""
  return f'{threshold:.12g}'


def _length(asked: int | None, accepted: int) -> int:
  if asked is None:
    return min(LONGEST, accepted)
  if asked > accepted:
    raise ValueError(
      f'length={asked} must be in [2, {accepted}], what the model accepts.'
    )
  return asked


def _as_lists(kind: Kind, found: Any) -> Any:
  """Numbers of JSON, with as many digits as float32 has."""
  if isinstance(found, dict):
    return {name: _as_lists(kind, values_L) for name, values_L in found.items()}
  values_L = np.asarray(found)
  for layer, value in enumerate(values_L):
    if not np.isfinite(value):
      raise ValueError(
        f'The {kind} of layer {layer} is {value}, which is no score: its '
        'weights, or what they read, are not finite, or a matrix of it is 0. '
        'Check the model, or name what to measure by --measure.'
      )
  return [float(f'{value:.7g}') for value in values_L]


def _outliers(
  config: LayerScoresConfig,
  model: Model,
  params: Any,
  batches: Sequence[data.Batch],
  progress: Progress,
) -> dict[str, Any]:
  """Shares in percent, ``[L]``, by the names of thresholds."""
  read = jax.jit(functools.partial(layer_scores.input_squares, model))
  add = jax.jit(functools.partial(jax.tree.map, jax.numpy.add))
  squares = None
  with progress('Inputs of the matrices') as report:
    report(0, len(batches))
    for done, batch in enumerate(batches, 1):
      found = read(params, batch['inputs'], batch['is_token'])
      squares = found if squares is None else add(squares, found)
      jax.block_until_ready(squares)
      report(done, len(batches))
  shares_ML, times_L = layer_scores.outlier_shares(
    layer_scores.kernels_of(params), squares, config.thresholds
  )
  shares = dict(
    zip(map(name_of, config.thresholds), np.asarray(shares_ML), strict=True)
  )
  # A model that is not finite is told of later, as what it is.
  largest = float(np.max(times_L))
  if config.kind == 'outliers' and not shares[name_of(config.threshold)].any():
    raise ValueError(_no_outliers(config.threshold, shares, largest))
  return shares


def _no_outliers(
  threshold: float, shares: dict[str, np.ndarray], largest: float
) -> str:
  found = [name for name, shares_L in shares.items() if shares_L.any()]
  advice = f'less than {largest:.3g}'
  if found:  # Ascending: the last is the one that finds least.
    layers = np.count_nonzero(shares[found[-1]])
    advice = f'{found[-1]}, which finds some in {layers} layers'
  return (
    f'threshold={threshold:g} finds no weight that stands out in any layer: '
    'all scores would be 0, and no layer could be drawn. The largest is '
    f'{largest:.3g} times the mean of its layer. Use a smaller --threshold, '
    f'such as {advice}.'
  )


def _gradient_norms(
  model: Model,
  params: Any,
  batches: Sequence[data.Batch],
  count: int,
  progress: Progress,
) -> np.ndarray:
  """Mean over batches of the squared norm of the gradient of the mean loss."""
  pieces = objectives.language_model(model, _CHUNK_TOKENS).pieces
  frozen, trained = adapters.split(
    params, lambda path: path.startswith('layers/') and path.endswith('/kernel')
  )
  squares = jax.jit(functools.partial(gradient_norms.squared_norms, pieces))
  # Of conversations the longest come first: some of each length are taken.
  last = len(batches) - 1
  numbers = np.unique(np.linspace(0, last, count).round().astype(int))
  found = []
  with progress('Gradients') as report:
    report(0, len(numbers))
    for done, number in enumerate(numbers, 1):
      batch = dict(batches[number])
      del batch['is_token']  # Losses go by weights.
      found.append(np.asarray(squares(trained, frozen, batch)))
      report(done, len(numbers))
  return np.mean(found, axis=0)


def _hill_exponents(params: Any, progress: Progress) -> np.ndarray:
  kernels = layer_scores.kernels_of(params)
  count = len(jax.tree.leaves(kernels)[0])
  found = []
  with progress('Spectra of the matrices') as report:
    report(0, count)
    for layer in range(count):
      one = {
        name: kernel[layer : layer + 1] for name, kernel in kernels.items()
      }
      found.append(np.asarray(layer_scores.hill_exponents(one)))
      report(layer + 1, count)
  return np.concatenate(found)
