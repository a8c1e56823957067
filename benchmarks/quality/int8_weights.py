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

takes about half a minute per run on one CPU core.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax

from benchmarks.common import record
from benchmarks.quality import reference_curves as reference
from gnlorp_jax import optim
from gnlorp_jax.compose import parameters as runs
from gnlorp_jax.compose.settings import StepConfig
from gnlorp_jax.models import llama
from gnlorp_jax.optim.quantized_weights import (
  dequantize_weights,
  quantize_weights,
  requantize_weights,
)
from gnlorp_jax.training import layerwise, objectives, parameters, sharding
from gnlorp_jax.training.parameters import Parameters
from gnlorp_jax.training.state import TrainState
from gnlorp_jax.training.step import Batch, Metrics

RESULTS = pathlib.Path('benchmarks/results/int8_weights.json')
PLOT = pathlib.Path('docs/results/int8_weights.png')
RATES = (5e-3, 1e-3)
VOCAB, UNKNOWN = 4096, 2
MODEL = dataclasses.replace(reference.CONFIG, vocab_size=VOCAB)
LOW_RANK = {**reference.LOW_RANK, 'skip_nonfinite': False}
OPTIMIZERS = {
  'galore': optim.galore,
  'gradnormlorp': optim.gradnormlorp,
  'q_galore': optim.q_galore,
}
Row = dict[str, Any]


class Format(NamedTuple):
  """How the kernels of the blocks are kept between steps."""

  keep: Callable[[Any], Any]  # Maps float32 layers to layers as they are kept.
  # Maps parameters as they are kept, and their model, to how a run holds them.
  hold: Callable[[Any, llama.LlamaConfig], Parameters]
  link: optax.GradientTransformation | None = None  # Last of the optimizer.


def to_bfloat16(layers: Any) -> Any:
  """Layers with their kernels, and nothing else, in bfloat16."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(jnp.bfloat16) if path[-1].key == 'kernel' else x,
    layers,
  )


def to_float32(layers: Any) -> Any:
  """Layers in float32, however they were kept."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float32), dequantize_weights(layers, jnp.float32)
  )


def hold_plain(params: Any, model: llama.LlamaConfig) -> Parameters:
  """Plain arrays."""
  del model
  return parameters.plain(params)


def hold_bfloat16(params: Any, model: llama.LlamaConfig) -> Parameters:
  """Arrays that are decoded to float32, so that gradients are float32 too."""
  del model
  return parameters.plain(params)._replace(decode=to_float32)


def hold_int8(
  params: Any, model: llama.LlamaConfig, seed: int = 0
) -> Parameters:
  """As train_lm.py does with ``--step.weight-bits 8`` and this seed."""
  held, _ = runs.plan(
    llama.make,
    model,
    mesh=sharding.make_mesh(devices=1),
    adapter=None,
    step=StepConfig(mode='layerwise', weight_bits=8),
    rules=llama.LABEL_RULES,
    seed=seed,
  )
  return parameters.plain(params)._replace(
    decode=held.decode, decode_exact=held.decode_exact, store=held.store
  )


def hold_int8_nearest(params: Any, model: llama.LlamaConfig) -> Parameters:
  """The same without random numbers."""
  return hold_int8(params, model)._replace(
    store=lambda new, old, step, first: requantize_weights(new, old, None)
  )


FORMATS = {
  'float32': Format(lambda layers: layers, hold_plain),
  'bfloat16, nearest': Format(to_bfloat16, hold_bfloat16),
  'bfloat16, stochastic': Format(
    to_bfloat16, hold_bfloat16, optim.stochastic_rounding()
  ),
  'int8, stochastic': Format(quantize_weights, hold_int8),
  'int8, nearest': Format(quantize_weights, hold_int8_nearest),
  # How far other random numbers alone take a run.
  'int8, stochastic, seed 1': Format(
    quantize_weights, functools.partial(hold_int8, seed=1)
  ),
}


def compile_training(
  name: str, kept: str, tokens_SBT: np.ndarray, model: llama.LlamaConfig
) -> Callable[[float], tuple[Any, np.ndarray]]:
  """Compiles the steps of a run, one per batch, for every learning rate.

  Args:
    name: Key of `OPTIMIZERS`.
    kept: Key of `FORMATS`.
    tokens_SBT: The batches of the run, int ids (S batches, B sequences, T
      positions).
    model: The architecture.

  Returns:
    A function from the peak learning rate to the trained parameters, as they
    are kept, and the losses of all steps.
  """
  how, steps = FORMATS[kept], len(tokens_SBT)
  # A chunk of one sequence, whose logits stay in the cache.
  objective = objectives.language_model(
    llama.make(model), tokens_SBT.shape[2] - 1
  )
  params = reference.initial_params(model)
  params = {**params, 'layers': how.keep(params['layers'])}
  held = how.hold(params, model)

  def optimizer(peak: float | jax.Array) -> optax.GradientTransformation:
    schedule = reference.schedule(peak, steps, max(steps // 10, 1))
    tx = OPTIMIZERS[name](schedule, **LOW_RANK)
    return tx if how.link is None else optim.split.chain(tx, how.link)

  def train_step(
    now: TrainState, batch: Batch, peak: jax.Array
  ) -> tuple[TrainState, Metrics]:
    take_step = layerwise.make_train_step(
      objective.pieces, optimizer(peak), held
    )
    weights = jnp.ones(batch['targets'].shape, jnp.float32)
    return take_step(now, {**batch, 'weights': weights})

  tx = optimizer(0.0)  # No rate is part of a state.
  on_kept = optax.GradientTransformation(
    lambda params: tx.init(held.decode_exact(params)), tx.update
  )
  return reference.compile_training(
    train_step, on_kept, params, tokens_SBT, 0.0
  )


def distance_moved(layers: Any, start: Any) -> float:
  """|W - W0| / |W0| over all kernels of the blocks."""
  difference, size = 0.0, 0.0
  for (path, w), w0 in zip(
    jax.tree_util.tree_leaves_with_path(layers),
    jax.tree.leaves(start),
    strict=True,
  ):
    if path[-1].key == 'kernel':
      difference += float(jnp.sum((w - w0) ** 2))
      size += float(jnp.sum(w0**2))
  return math.sqrt(difference / size)


def measure(
  name: str,
  rate: float,
  kept: str,
  tokens_SBT: np.ndarray,
  steps: int,
  model: llama.LlamaConfig,
) -> Row:
  """One run; the last batches of the tokens are those of its evaluation."""
  began = time.time()
  run = compile_training(name, kept, tokens_SBT[:steps], model)
  ready = time.time()
  params, losses = run(rate)
  layers = to_float32(params['layers'])
  loaded = {**params, 'layers': layers}
  eval_loss = reference.evaluate(loaded, tokens_SBT, model)
  return {
    'optimizer': name,
    'learning_rate': rate,
    'weights': kept,
    'steps': steps,
    'eval_loss': eval_loss,
    'train_loss': losses.tolist(),
    'moved': distance_moved(layers, reference.initial_params(model)['layers']),
    'layer_bytes': optim.inspect.tree_bytes(params['layers']),
    'compile_seconds': round(ready - began, 1),
    'seconds': round(time.time() - ready, 1),
    'commit': record.commit(),
  }


def read(path: pathlib.Path) -> list[Row]:
  """The rows of a file; none where it is absent."""
  return json.loads(path.read_text())['runs'] if path.exists() else []


def pick(rows: list[Row], name: str, rate: float) -> dict[str, Row]:
  """The runs of an optimizer and a rate, by how kernels were kept."""
  return {
    row['weights']: row
    for kept in FORMATS
    for row in rows
    if (row['optimizer'], row['learning_rate']) == (name, rate)
    and row['weights'] == kept
  }


def groups(rows: list[Row]) -> list[tuple[str, float]]:
  """Optimizers and rates of which there are runs, float32 among them."""
  return [
    (name, rate)
    for name in OPTIMIZERS
    for rate in RATES
    if 'float32' in pick(rows, name, rate)
  ]


def table(rows: list[Row]) -> str:
  """A Markdown row per run."""
  lines = [
    '| optimizer, peak rate | kernels | eval loss | less float32 | moved |',
    '|---|---|---|---|---|',
  ]
  for name, rate in groups(rows):
    found = pick(rows, name, rate)
    zero = found['float32']['eval_loss']
    for kept, row in found.items():
      lines.append(
        f'| {name}, {rate:g} | {kept} | {row["eval_loss"]:.4f} '
        f'| {row["eval_loss"] - zero:+.4f} | {row["moved"]:.3f} |'
      )
  return '\n'.join(lines) + '\n'


def plot(rows: list[Row], path: pathlib.Path) -> None:
  """Training losses less those of float32, a panel per optimizer and rate."""
  shown = groups(rows)
  names = [name for name in OPTIMIZERS if name in dict(shown)]
  figure = matplotlib.figure.Figure(
    figsize=(5 * len(RATES), 1 + 2.6 * len(names)), layout='constrained'
  )
  panels = figure.subplots(
    len(names), len(RATES), sharex=True, sharey=True, squeeze=False
  )
  for name, rate in shown:
    axes = panels[names.index(name), RATES.index(rate)]
    found = pick(rows, name, rate)
    zero = np.asarray(found['float32']['train_loss'])
    window = max(len(zero) // 15, 1)
    steps = np.arange(window, len(zero) + 1)
    for kept, row in found.items():
      gap = np.convolve(
        np.asarray(row['train_loss']) - zero, np.ones(window) / window, 'valid'
      )
      color = f'C{list(FORMATS).index(kept)}'
      label = f'{row["eval_loss"]:.4f}  {kept}'
      axes.plot(steps, gap, color=color, lw=1.3, label=label)
    axes.set_title(f'{name}, peak learning rate {rate:g}', fontsize=10)
    axes.legend(title='eval loss', fontsize=7, title_fontsize=7)
    axes.grid(color='0.9')
    axes.set_axisbelow(True)
  for axes in panels.flat:
    if axes.lines:
      axes.set_xlabel('step')
    else:
      axes.set_visible(False)
  figure.supylabel('training loss less that of float32 kernels, smoothed')
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


def main(
  arguments: list[str] | None = None, model: llama.LlamaConfig | None = None
) -> None:
  """Runs what is missing, then reports."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--reference', type=pathlib.Path, help='folder with tokens.npz')
  add('--optimizers', nargs='+', choices=OPTIMIZERS, default=list(OPTIMIZERS))
  add('--steps', type=int, default=reference.STEPS, help='steps of a run')
  add('--report', action='store_true', help='only table and plot')
  add('--output', type=pathlib.Path, default=RESULTS)
  add('--plot', type=pathlib.Path, default=PLOT)
  args = parser.parse_args(arguments)
  rows = read(args.output)
  if not args.report:
    if args.reference is None:
      parser.error('--reference is missing: the folder with tokens.npz.')
    tokens_SBT = reference.read_tokens(args.reference)
    tokens_SBT = np.where(tokens_SBT < VOCAB, tokens_SBT, UNKNOWN)
    done = {(r['optimizer'], r['learning_rate'], r['weights']) for r in rows}
    wanted = [
      (name, rate, kept)
      for name in args.optimizers
      for rate in RATES
      for kept in FORMATS
    ]
    for key in wanted:
      if key in done:
        continue
      row = measure(*key, tokens_SBT, args.steps, model or MODEL)
      rows.append(row)
      record.write(args.output, {'runs': rows})
      sys.stdout.write(f'{key}: {row["eval_loss"]:.4f}, {row["seconds"]} s\n')
      sys.stdout.flush()
  sys.stdout.write(table(rows))
  plot(rows, args.plot)


if __name__ == '__main__':
  main()
