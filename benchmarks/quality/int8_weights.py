"""Trains a small LLaMA layer by layer with its kernels in 32, 16 and 8 bits.

The protocol is that of `reference_curves` (300 batches of Wikipedia, schedule;
rank 32, refresh every 60 steps, no clipping) with two differences. The training
step is that of `training.layerwise`. And only the first 4096 tokens are told
apart, the rest are one: the head of a full vocabulary is nine tenths of the
arithmetic, and takes no part in what is compared. Runs differ in how the
kernels of the blocks are kept between steps and in nothing else: all other
parameters, gradients and products are float32. One learning rate is good for
this run, at the other a step is small beside the distance of two 8-bit values.
Results go to a JSON file after every run; runs it holds already are not
repeated. Table and plot come at the end, or from `--report`.

  python -m benchmarks.int8_weights --reference ../shared/reference/curves

takes about half a minute per run on one CPU core. The table has a row for each
way to keep the kernels, and for each optimizer and peak learning rate the eval
loss of float32 kernels and the others less that, and by how much of their size
the kernels moved.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import optax

from benchmarks.common.tables import markdown, number
from benchmarks.quality import protocol, runs
from gnlorp_jax import optim
from gnlorp_jax.compose import parameters as composed
from gnlorp_jax.compose.settings import StepConfig
from gnlorp_jax.models import llama
from gnlorp_jax.optim.quantized.weights import (
  dequantize_weights,
  quantize_weights,
  requantize_weights,
)
from gnlorp_jax.training import parameters, sharding

RATES = (5e-3, 1e-3)
MODEL = dataclasses.replace(protocol.CONFIG, vocab_size=4096)
OPTIMIZERS = {
  'galore': optim.galore,
  'gradnormlorp': optim.gradnormlorp,
  'q_galore': optim.q_galore,
}


class Format(NamedTuple):
  """How the kernels of the blocks are kept between steps."""

  keep: Callable[[Any], Any] = lambda layers: layers  # From float32 layers.
  # Makes `Parameters.store` for a model, where plain arrays need no other.
  store: Callable[[llama.LlamaConfig], Callable[..., Any]] | None = None
  link: optax.GradientTransformation | None = None  # Last of the optimizer.


def to_bfloat16(layers: Any) -> Any:
  """Layers with their kernels, and nothing else, in bfloat16."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(jnp.bfloat16) if path[-1].key == 'kernel' else x,
    layers,
  )


def to_float32(params: Any) -> Any:
  """Parameters in float32, however they were kept."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float32), dequantize_weights(params, jnp.float32)
  )


def stochastic(model: llama.LlamaConfig) -> Callable[..., Any]:
  """As train_lm.py stores with ``--step.weight-bits 8``."""
  held, _ = composed.plan(
    llama.make,
    model,
    mesh=sharding.make_mesh(devices=1),
    adapter=None,
    step=StepConfig(mode='layerwise', weight_bits=8),
    rules=llama.LABEL_RULES,
    seed=0,
  )
  return held.store


def nearest(model: llama.LlamaConfig) -> Callable[..., Any]:
  """The same without random numbers."""
  del model
  return lambda new, old, step, first: requantize_weights(new, old, None)


FORMATS = {
  'float32': Format(),
  'bfloat16, nearest': Format(to_bfloat16),
  'bfloat16, stochastic': Format(to_bfloat16, link=optim.stochastic_rounding()),
  'int8, stochastic': Format(quantize_weights, stochastic),
  'int8, nearest': Format(quantize_weights, nearest),
}


def distance_moved(layers: Any, start: Any) -> float:
  """|W - W0| / |W0| over all kernels of the blocks."""

  def size(tree: Any) -> jax.Array:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return optax.tree.norm(
      [w for path, w in leaves if path[-1].key == 'kernel']
    )

  return float(size(jax.tree.map(jnp.subtract, layers, start)) / size(start))


def describe(trained: protocol.Trained, folder: pathlib.Path) -> runs.Row:
  """What a row says of the kernels."""
  del folder
  start = protocol.initial_params(trained.config)['layers']
  layers = trained.params['layers']
  return {
    'moved': distance_moved(to_float32(layers), start),
    'layer_bytes': optim.inspect.tree_bytes(layers),
  }


def method(optimizer: str, kept: str) -> protocol.Method:
  """A key of `OPTIMIZERS` with one of `FORMATS`."""
  how = FORMATS[kept]

  def make(schedule: optax.Schedule) -> optax.GradientTransformation:
    tx = OPTIMIZERS[optimizer](
      schedule, **protocol.LOW_RANK, skip_nonfinite=False
    )
    return tx if how.link is None else optim.split.chain(tx, how.link)

  def keep(
    params: Any, model: llama.LlamaConfig
  ) -> tuple[Any, parameters.Parameters]:
    params = {**params, 'layers': how.keep(params['layers'])}
    # Gradients are float32, whatever is kept.
    held = parameters.plain(params)._replace(decode=to_float32)
    if how.store is not None:
      held = held._replace(decode_exact=to_float32, store=how.store(model))
    return params, held

  return protocol.Method(make, RATES, keep, describe)


METHODS = {
  f'{optimizer}, {kept}': method(optimizer, kept)
  for optimizer in OPTIMIZERS
  for kept in FORMATS
}


def groups(rows: Sequence[runs.Row]) -> dict[str, dict[str, runs.Row]]:
  """The runs of each optimizer and rate by format, float32 among them."""
  by_key = {runs.key(row)[:2]: row for row in runs.trained(rows)}
  found = {}
  for rate, optimizer in itertools.product(RATES, OPTIMIZERS):
    keys = {kept: (f'{optimizer}, {kept}', rate) for kept in FORMATS}
    if keys['float32'] in by_key:
      found[f'{optimizer}, lr {rate:g}'] = {
        kept: by_key[key] for kept, key in keys.items() if key in by_key
      }
  return found


def table(rows: Sequence[runs.Row]) -> str:
  """A Markdown row per format."""
  found = groups(rows)
  lines = []
  for kept in FORMATS:
    mine = [group[kept] for group in found.values() if kept in group]
    if not mine:
      continue
    line = [kept, f'{mine[0]["layer_bytes"]}']
    for group in found.values():
      row, zero = group.get(kept), runs.final(group['float32'])
      loss = row and runs.final(row) - (0 if kept == 'float32' else zero)
      line.append(number(loss, '.4f' if kept == 'float32' else '+.4f'))
      line.append(number(row and row['moved'], '.3f'))
    lines.append(line)
  heads = [head for name in found for head in (name, 'moved')]
  return markdown(['kernels', 'bytes of the blocks', *heads], lines)


def plot(rows: Sequence[runs.Row], path: pathlib.Path) -> None:
  """Training losses less those of float32, a panel per optimizer and rate."""
  found = groups(rows)
  if not found:
    return
  figure = matplotlib.figure.Figure(
    figsize=(1 + 4 * len(found), 4), layout='constrained'
  )
  panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
  for axes, (name, group) in zip(panels, found.items(), strict=True):
    _, zero = runs.curve(group['float32'])
    for kept, row in group.items():
      steps, losses = runs.curve(row)
      color = f'C{list(FORMATS).index(kept)}'
      label = f'{runs.final(row):.4f}  {kept}'
      axes.plot(steps, losses - zero, color=color, lw=1.3, label=label)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel('step')
    axes.legend(title='eval loss', fontsize=7, title_fontsize=7)
  panels[0].set_ylabel('training loss less that of float32 kernels')
  runs.save(figure, path)


COMPARISON = runs.Comparison('int8_weights', table, plot)
PAGE, tables, plots = runs.PAGE, COMPARISON.tables, COMPARISON.plots


def main(
  arguments: list[str] | None = None, model: llama.LlamaConfig = MODEL
) -> None:
  """Runs what is missing, then reports; one of several processes only runs."""
  protocol.main(__doc__, COMPARISON, METHODS, model, arguments)


if __name__ == '__main__':
  main()
