"""From settings to a choice of batches: which matrix, which rule."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import jax

from gnlorp_jax import models
from gnlorp_jax.compose.coreset_settings import CoresetOptions
from gnlorp_jax.compose.program import Program
from gnlorp_jax.models.decoder_config import DecoderConfig
from gnlorp_jax.optim.inspect import format_bytes
from gnlorp_jax.training import objectives
from gnlorp_jax.training.parameters import LAYERS
from gnlorp_jax.training.selection import features
from gnlorp_jax.training.selection import selection as selecting
from gnlorp_jax.training.selection.quotas import small_sources

_logger = logging.getLogger(__name__)

_SKETCH, _TOP = 4096, 2560
_WHOLE = ('text',)  # What a source without a name is called.


def check(options: CoresetOptions, batch_size: int, micro_batches: int) -> None:
  """Checks a pool against the batch that is chosen from it.

  Args:
    options: What is asked for.
    batch_size: Rows of a batch.
    micro_batches: Pieces of a batch; the pool goes through the model in pieces
      of the same size.

  Raises:
    ValueError: If the sizes do not fit.
  """
  if not options.is_on:
    return
  if options.pool <= batch_size:
    raise ValueError(
      f'coreset.pool={options.pool} must be more than batch_size={batch_size}, '
      'the rows that are chosen from it. Raise it, or leave it out.'
    )
  rows = batch_size // micro_batches
  if options.pool % rows:
    below = options.pool // rows * rows
    near = [n for n in (below, below + rows) if n > batch_size]
    raise ValueError(
      f'coreset.pool={options.pool} must be a multiple of batch_size / '
      f'micro_batches={rows}, the rows that go through the model at once. Use '
      f'{" or ".join(map(str, near))}.'
    )


def rule(
  options: CoresetOptions,
  batch_size: int,
  micro_batches: int,
  seed: int,
  names: Sequence[str] = (),
  sizes: Sequence[int] = (),
) -> selecting.Rule:
  """How batches are chosen.

  Args:
    options: What is asked for; on.
    batch_size: Rows of a batch.
    micro_batches: Pieces of a batch.
    seed: Decides all that is random.
    names: Names of the sources; without, all is of one.
    sizes: Rows of each in the whole data set.
  """
  assert options.pool is not None
  found = (options.features or 'exact') if options.needs_model else None
  sketch = options.sketch
  if sketch is None and found == 'exact' and not options.adam:
    sketch = _SKETCH
  top = options.top
  if top is None and options.adam:
    top = _TOP
  return selecting.Rule(
    pool=options.pool,
    budget=batch_size,
    small=small_sources(sizes) if options.keep_small else (),
    sources=tuple(names) or _WHOLE,
    selector=options.selector,
    ties=options.ties,
    features=found,
    directions=options.directions or 1,
    adam=options.adam,
    sketch=sketch or None,
    top=top or None,
    rows_at_once=batch_size // micro_batches,
    seed=seed,
  )


def tail(
  program: Program, architecture: models.Config, chunk_tokens: int
) -> features.Tail:
  """The end of a model, and the matrix that examples are compared by.

  That is the last value projection, in a fused one its columns; where it has an
  adapter, the factor on the side of the outputs.

  Args:
    program: What a run computes.
    architecture: The model's, of a decoder.
    chunk_tokens: Tokens whose logits exist at once.

  Raises:
    ValueError: If the model is no decoder.
  """
  if not isinstance(architecture, DecoderConfig):
    raise ValueError(
      'coreset.selector compares gradients of decoders alone, and this is '
      f"{architecture.model_type!r}. Use coreset.selector='random'."
    )
  held = program.parameters
  stored = held.join(program.abstract_state.params, held.frozen)
  layers = jax.eval_shape(held.decode, stored[LAYERS])
  name = 'qkv_proj' if architecture.fused else 'v_proj'
  arrays = layers['attn'][name]
  leaf = 'lora_b' if 'lora_b' in arrays else 'kernel'
  inputs, outputs = arrays[leaf].shape[-2:]
  columns = architecture.kv_heads * architecture.head_size
  return features.Tail(
    pieces=objectives.language_model(program.model, chunk_tokens).pieces,
    parameters=held,
    path=('attn', name, leaf),
    start=outputs - columns,
    shape=(inputs, columns),
    num_layers=architecture.num_layers,
  )


def make(
  options: CoresetOptions,
  program: Program,
  architecture: models.Config,
  *,
  batch_size: int,
  micro_batches: int,
  chunk_tokens: int,
  seed: int,
  names: Sequence[str] = (),
  sizes: Sequence[int] = (),
) -> selecting.Selection | None:
  """How a run chooses its batches, or None; says what that is.

  Args:
    options: What is asked for.
    program: What the run computes.
    architecture: The model's.
    batch_size: Rows of a batch.
    micro_batches: Pieces of a batch.
    chunk_tokens: Tokens whose logits exist at once.
    seed: Of the run.
    names: As of `rule`, as are the sizes.
    sizes: Rows of each source.

  Raises:
    ValueError: If the model cannot be asked.
  """
  if not options.is_on:
    return None
  found = rule(options, batch_size, micro_batches, seed, names, sizes)
  asked = None
  if options.needs_model:
    asked = tail(program, architecture, chunk_tokens)
  _tell(found, asked, sizes)
  return selecting.make(found, asked, program.mesh)


def _tell(
  found: selecting.Rule, asked: features.Tail | None, sizes: Sequence[int]
) -> None:
  """Says how batches are chosen, and what may surprise."""
  how = 'at random'
  if asked is not None:
    of = '/'.join(('layers', *asked.path))
    how = (
      f'by {found.selector} on {found.features} features of the last {of}, '
      f'{selecting.feature_size(found, asked)} numbers a row'
    )
  kept = [found.sources[i] for i in found.small]
  _logger.info(
    'Each step trains on %d of %d rows, chosen %s. Rows by source: %s; kept '
    'whole: %s.',
    *(found.budget, found.pool, how),
    dict(zip(found.sources, sizes, strict=False)) or 'not told apart',
    ', '.join(kept) or 'none',
  )
  if found.features == 'spsa' and found.directions == 1:
    _logger.warning(
      'coreset.directions=1 gives one number a row, which says almost nothing '
      'of its gradient: the choice is near to a random one within the quotas. '
      "coreset.features='exact' costs as much."
    )
  if found.selector == 'random' and len(found.sources) == 1:
    _logger.warning(
      "coreset.selector='random' among rows of one source is what shuffling "
      'does already: name the sources, or leave coreset.pool out.'
    )


def cost(
  options: CoresetOptions,
  program: Program,
  architecture: models.Config,
  abstract_batch: dict[str, Any],
  micro_batches: int,
) -> dict[str, int]:
  """Bytes on one device of what choosing takes.

  Args:
    options: What is asked for.
    program: What the run computes.
    architecture: The model's.
    abstract_batch: Shapes of a batch.
    micro_batches: Pieces of a batch.

  Returns:
    ``pool`` (its rows), ``features`` (piece by piece, in their order and, of
    Adam, normalised), ``gradients`` (of the rows that go through the model at
    once, beside matrices that each of them moves for itself), ``moments``
    (Adam's, which stay) and ``forward`` (the input and output of the block that
    these are in); empty where nothing is chosen.
  """
  if not options.is_on:
    return {}
  batch_size, seq_len = abstract_batch['inputs'].shape
  found = rule(options, batch_size, micro_batches, 0)
  devices = program.mesh.size
  row_bytes = sum(
    math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
    for leaf in abstract_batch.values()
  )
  sizes = {'pool': found.pool * row_bytes // devices}
  if not options.needs_model:
    return sizes
  asked = tail(program, architecture, chunk_tokens=1)
  entries = selecting.feature_size(found, asked)
  rows = found.rows_at_once // devices
  width = jax.numpy.dtype(architecture.compute_dtype).itemsize
  is_exact = found.features == 'exact'
  return sizes | {
    'features': (2 + found.adam) * 4 * found.pool * entries // devices,
    'gradients': 3 * 4 * rows * math.prod(asked.shape) * is_exact,
    'moments': 8 * entries * found.adam,
    'forward': 2 * rows * seq_len * architecture.hidden_size * width,
  }


def describe(
  options: CoresetOptions,
  program: Program,
  architecture: models.Config,
  abstract_batch: dict[str, Any],
  micro_batches: int,
) -> str:
  """What choosing takes, as a line of a report; empty where nothing is chosen.

  The arguments are those of `cost`.
  """
  found = cost(options, program, architecture, abstract_batch, micro_batches)
  if not found:
    return ''
  parts = ', '.join(f'{n} {format_bytes(size)}' for n, size in found.items())
  return f'Choosing a batch from {options.pool} rows: {parts}.\n'
