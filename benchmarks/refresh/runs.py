"""The training runs of `benchmarks.refresh`: for gradients, and for the loss.

They are those of `train_lm.py`, but for a vocabulary of 4096: the head for a
larger one would take most of the time.

Shape suffixes in this file:
  L, I, O  layers, and a kernel's input and output axes
  M, N     the axes of a gradient, N <= M
"""

import contextlib
import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import harness
from benchmarks.common.cases import Row
from gnlorp_jax import config
from gnlorp_jax.models import llama
from gnlorp_jax.optim.subspace import sides
from gnlorp_jax.recipes.pretrain import recipe
from gnlorp_jax.training import loop
from gnlorp_jax.training.selection.selection import without_memory

KINDS = {
  **{name: ('attn', f'{name}_proj') for name in ('q', 'k', 'v', 'o')},
  **{name: ('mlp', f'{name}_proj') for name in ('gate', 'up', 'down')},
}
SEQ_LEN, BATCH_SIZE, RATE = 128, 8, 5e-3
# Of the runs for the loss.
SCALE, RANK, GAP = 0.25, 32, 50
STEPS, EVAL_BATCHES = 150, 40
NEVER = 10**6  # Steps between refreshes where there is only the first one.
LAST = 20  # Steps over which a training loss is averaged.

# Gradients [M, N] by (layer, kind), and of each by step.
Gradients = dict[tuple[int, str], dict[int, np.ndarray]]


def variants(hidden_size: int) -> dict[str, dict[str, Any]]:
  """Ways of refreshing, as options of an `OptimConfig`.

  A random basis is not orthonormal: its updates are sqrt(n / r) times as long
  as those of the others, which its scale takes back.
  """
  shorter = SCALE * math.sqrt(RANK / hidden_size)
  return {
    'exact': {'solver': 'exact'},
    'power': {'solver': 'power'},
    'dct': {'projection': 'dct'},
    'random': {'projection': 'random', 'scale': shorter},
    'power, first step only': {'solver': 'power', 'update_proj_gap': NEVER},
    'eigh': {'solver': 'eigh'},
  }


def loss_optimizer(variant: dict[str, Any]) -> config.OptimConfig:
  """`gradnormlorp` with one way of refreshing."""
  fixed = {'name': 'gradnormlorp', 'rank': RANK, 'learning_rate': RATE}
  options = {'scale': SCALE, 'update_proj_gap': GAP, **variant}
  return config.OptimConfig(**fixed, **options)


def _prepare(size: str, source: str, **options: Any) -> recipe.Prepared:
  """A run on a text, with a tokenizer that is trained on it."""
  text = {'source': source, 'tokenizer': 'bpe', 'seq_len': SEQ_LEN}
  data, batch = config.DataConfig(**text), {'batch_size': BATCH_SIZE}
  model = llama.preset(size, max_seq_len=SEQ_LEN, vocab_size=4096)
  run = config.TrainConfig(model=model, data=data, **batch, **options)
  return recipe.prepare(run)


def train(
  run: loop.Run,
  clock: harness.Clock,
  before_step: Callable[[int, Any, Any], None] = lambda *_: None,
) -> tuple[Any, list[float]]:
  """Takes the steps that there is time for: trained parameters, and losses.

  `before_step` is called with a step's number, parameters and batch.
  """

  def select(state: Any, batch: Any) -> Any:
    before_step(int(state.step) + 1, state.params, batch)
    return batch

  state, constants = run.start()
  numbers = itertools.takewhile(
    lambda _: clock.seconds_left > 0, range(1, run.steps + 1)
  )
  losses: list[float] = []
  with contextlib.closing(run.batches):
    for taken in loop.steps(
      *(run.train_step, state, run.batches, run.mesh, numbers, constants),
      select=without_memory(select),
    ):
      state = taken.state
      losses.append(float(taken.metrics['loss']))
  return state.params, losses


def _kernel_gradients(
  prepared: recipe.Prepared,
) -> Callable[[Any, Any], dict[str, jax.Array]]:
  """A function from parameters and a batch to the gradients of kernels.

  They are those of the mean loss, of a first, a middle and the last layer: by
  ``layer/kind`` ``[M, N]``, float32, the shorter axis last.
  """
  depth = prepared.config.model.num_layers
  layers = sorted({0, depth // 2, depth - 1})

  @jax.jit
  def gradients(params, batch):
    def mean_loss(blocks):
      params_now = {**params, 'layers': blocks}
      loss, weight = prepared.program.objective.loss(params_now, batch)
      return loss / weight

    grads = jax.grad(mean_loss)(params['layers'])
    found = {}
    for kind, (group, name) in KINDS.items():
      grad_LIO = grads[group][name]['kernel'].astype(jnp.float32)
      (axis,) = sides.compressed_axes(grad_LIO.shape, 'short')
      for layer in layers:
        found[f'{layer}/{kind}'] = sides.toward(grad_LIO[layer], axis)
    return found

  return gradients


def save_row(
  size: str, gap: int, source: str, path: pathlib.Path, clock: harness.Clock
) -> Row:
  """Trains a size with `galore` and keeps its gradients."""
  rank = llama.preset(size).hidden_size // 4
  options = {'rank': rank, 'update_proj_gap': gap, 'learning_rate': RATE}
  optim = config.OptimConfig(name='galore', **options)
  prepared = _prepare(size, source, steps=3 * gap + 1, optim=optim)
  return save_gradients(prepared, gap, path, clock)


def save_gradients(
  prepared: recipe.Prepared, gap: int, path: pathlib.Path, clock: harness.Clock
) -> Row:
  """Trains, and keeps the gradients of steps 1, gap + 1, ... in `path`."""
  config = prepared.config
  gradients, kept = _kernel_gradients(prepared), {}

  def keep(number: int, params: Any, batch: Any) -> None:
    if (number - 1) % gap == 0:
      kept[number] = jax.device_get(gradients(params, batch))

  _, losses = train(recipe.make_run(prepared, config), clock, keep)
  if kept:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{f'{n}/{k}': g for n in kept for k, g in kept[n].items()})
  row = {
    'steps': list(kept),
    'losses': [losses[number - 1] for number in kept],
    'batch_tokens': config.batch_size * config.data.seq_len,
  }
  if len(losses) < config.steps:
    row['left_out'] = f'steps from {len(losses) + 1} on: out of time'
  return row


def read_gradients(path: pathlib.Path) -> Gradients:
  """What `save_gradients` kept."""
  found: Gradients = {}
  with np.load(path) as archive:
    for name in archive.files:
      number, layer, kind = name.split('/')
      by_step = found.setdefault((int(layer), kind), {})
      by_step[int(number)] = archive[name]
  return found


def loss_row(size: str, source: str, seed: int, variant: dict[str, Any]) -> Row:
  """Trains with one way of refreshing."""
  options = {'steps': STEPS, 'eval_batches': EVAL_BATCHES, 'seed': seed}
  optim = loss_optimizer(variant)
  return trained(_prepare(size, source, optim=optim, **options))


def trained(prepared: recipe.Prepared) -> Row:
  """Trains a run to its end and evaluates it."""
  run = recipe.make_run(prepared, prepared.config)
  params, losses = train(run, harness.Clock(math.inf))
  # No weight is frozen.
  return {
    'eval_loss': run.evaluate(params, {})['loss'],
    'train_loss': float(np.mean(losses[-LAST:])),
  }
