"""How the training curves that PyTorch recorded came about, repeated here.

A small LLaMA (hidden 128, 4 layers, vocabulary 32000) takes 300 steps on the
recorded batches from the recorded weights.

Shape suffixes in this file:
  S, B, T  batches, sequences in a batch, positions
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.common import harness
from benchmarks.quality import runs
from gnlorp_jax.models import llama
from gnlorp_jax.optim.inspect import state_bytes
from gnlorp_jax.training import (
  layerwise,
  loop,
  objectives,
  parameters,
  sharding,
  state,
  step,
)

STEPS = 300
EVAL_BATCHES = range(380, 400)
UNKNOWN = 2  # The token for those that a smaller vocabulary lacks.
CONFIG = llama.preset('9m', max_seq_len=128)
LOW_RANK = {'rank': 32, 'update_proj_gap': 60, 'scale': 0.25}


class Trained(NamedTuple):
  """What a run leaves."""

  config: llama.LlamaConfig
  losses: np.ndarray  # Of all steps.
  params: Any  # As they are kept between steps.


class Method(NamedTuple):
  """What is compared on the protocol.

  Attributes:
    make: Makes the optimizer of a schedule of learning rates.
    rates: Peak learning rates, the likeliest first.
    keep: Maps the initial parameters and their model to the parameters as they
      are kept between steps, and to how a run holds them. With it training is
      layer by layer.
    describe: What a row says beside losses and memory, from a run and the
      folder of the recorded curves.
  """

  make: Callable[[optax.Schedule], optax.GradientTransformation]
  rates: tuple[float, ...]
  keep: (
    Callable[[Any, llama.LlamaConfig], tuple[Any, parameters.Parameters]] | None
  ) = None
  describe: Callable[[Trained, pathlib.Path], runs.Row] = lambda *_: {}


def schedule(peak: float | jax.Array, steps: int = STEPS) -> optax.Schedule:
  """Linear warm-up over a tenth of the steps, then cosine to a tenth."""
  warmup = max(steps // 10, 1)

  def value(count):
    warm = (count + 1) / warmup
    angle = jnp.pi * (count - warmup) / (steps - warmup)
    cosine = 0.1 + 0.45 * (1 + jnp.cos(angle))
    return peak * jnp.where(count < warmup, warm, cosine)

  return value


def initial_params(config: llama.LlamaConfig = CONFIG) -> Any:
  """The recorded runs' weights, in our layout.

  Over the sorted Hugging Face names: vectors of ones, matrices of normal
  numbers times 0.02 in PyTorch's shape.
  """
  shapes = jax.eval_shape(llama.make(config).init, jax.random.key(0))
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  # Later rows of a path name copies.
  rows = {row[0]: row for row in reversed(llama.HF_TENSORS)}
  tensors = [
    (template.format(layer=layer), leaves[path][place], is_transposed)
    for path, template, is_transposed in rows.values()
    if path in leaves
    for layer, place in (
      [(i, i) for i in range(config.num_layers)]
      if '{layer}' in template
      else [(0, ...)]
    )
  ]
  rng = np.random.default_rng(0)
  for _, part, is_transposed in sorted(tensors, key=lambda tensor: tensor[0]):
    if part.ndim > 1:
      theirs = part.T if is_transposed else part
      theirs[:] = rng.standard_normal(theirs.shape, np.float32)
      theirs *= np.float32(0.02)
  return jax.tree.map(jnp.asarray, params)


def read_tokens(folder: pathlib.Path) -> np.ndarray:
  """The recorded runs' batches, [400, 4, 128] ids."""
  with np.load(folder / 'tokens.npz') as archive:
    return archive[archive.files[0]]


def split(rows_BT: np.ndarray) -> dict[str, np.ndarray]:
  """A batch of rows as inputs and the tokens that follow them."""
  rows_BT = rows_BT.astype(np.int32)
  inputs_BT, targets_BT = rows_BT[:, :-1], rows_BT[:, 1:]
  weights_BT = np.ones(targets_BT.shape, np.float32)
  return {'inputs': inputs_BT, 'targets': targets_BT, 'weights': weights_BT}


class Training:
  """The runs of one method; the step is compiled once for all learning rates.

  Args:
    method: The method.
    tokens_SBT: A step is taken on each of the first batches; the last ones
      are those of the evaluations.
    config: The architecture.
    steps: How many steps the schedule is for.
  """

  def __init__(
    self,
    method: Method,
    tokens_SBT: np.ndarray,
    config: llama.LlamaConfig = CONFIG,
    steps: int = STEPS,
  ):
    self._method, self._config, self._steps = method, config, steps
    self._tokens_SBT = tokens_SBT
    self._mesh = sharding.make_mesh(devices=jax.devices()[:1])
    # A chunk is as long as one sequence: its logits stay in the cache.
    objective = objectives.language_model(
      llama.make(config), tokens_SBT.shape[2] - 1
    )
    self._eval_step = jax.jit(objective.evaluate)
    self.params = initial_params(config)
    held = parameters.plain(self.params)
    if method.keep is not None:
      self.params, held = method.keep(self.params, config)
    self._decode = held.decode

    def train_step(now, batch, peak):
      tx = method.make(schedule(peak, steps))
      if method.keep is None:
        return step.make_train_step(objective.loss, tx)(now, batch)
      return layerwise.make_train_step(objective.pieces, tx, held)(now, batch)

    tx = method.make(schedule(0.0, steps))  # No rate is part of a state.
    self._tx = optax.GradientTransformation(
      lambda params: tx.init(held.decode_exact(params)), tx.update
    )
    self._train_step = step.jit_train_step(
      train_step, self._start(), self._mesh, self._place(0.0)
    )

  def _place(self, number: float) -> jax.Array:
    everywhere = NamedSharding(self._mesh, PartitionSpec())
    return jax.device_put(jnp.float32(number), everywhere)

  def _start(self) -> state.TrainState:
    return state.from_params(self.params, self._tx, self._mesh)

  def train(
    self, peak: float, steps: int
  ) -> tuple[np.ndarray, state.TrainState]:
    """Takes the first steps: their losses, and the state after them."""
    found = []
    for taken in loop.steps(
      *(self._train_step, self._start(), map(split, self._tokens_SBT)),
      *(self._mesh, range(1, steps + 1), self._place(peak)),
    ):
      found.append(taken.metrics['loss'])
    return np.asarray(jax.device_get(found)), taken.state

  def evaluate(self, params: Any) -> float:
    """Mean loss of the batches no run trains on."""
    params = self._decode(params)
    batches = [split(self._tokens_SBT[i]) for i in EVAL_BATCHES]
    sums = [self._eval_step(params, batch) for batch in batches]
    # Every batch has as many targets: the mean of the batches is the mean.
    return float(np.mean([s / n for s, n in sums]))

  def run(self, peak: float, folder: pathlib.Path) -> runs.Row:
    """What a row says of a whole run; the recorded curves are in a folder."""
    losses, end = self.train(peak, self._steps)
    evals = [
      [0, self.evaluate(self.params)],
      [self._steps, self.evaluate(end.params)],
    ]
    return {
      **runs.ending(evals, losses, end.skipped),
      'state_bytes': state_bytes(end.opt_state),
      **self._method.describe(
        Trained(self._config, losses, end.params), folder
      ),
    }


def main(
  doc: str,
  comparison: runs.Comparison,
  methods: dict[str, Method],
  config: llama.LlamaConfig,
  arguments: list[str] | None,
) -> None:
  """Runs what is missing on the recorded batches, then reports.

  Args:
    doc: The help of the command.
    comparison: Where the rows go.
    methods: What is compared, by name.
    config: The architecture; what its vocabulary lacks becomes `UNKNOWN`.
    arguments: The command line.
  """
  parser = harness.parser(doc)
  comparison.add_arguments(parser, methods)
  parser.add_argument(
    '--reference', type=pathlib.Path, help='folder of the recorded curves'
  )
  parser.add_argument('--steps', type=int, default=STEPS, help='steps of a run')
  args = parser.parse_args(arguments)
  if not 2 <= args.steps <= EVAL_BATCHES[0]:
    parser.error(
      f'--steps {args.steps} must be in [2, {EVAL_BATCHES[0]}]: the batches '
      'after these are those of the evaluation.'
    )
  if not args.report and args.reference is None:
    parser.error('--reference is missing: the folder with tokens.npz.')

  def prepare():
    tokens_SBT = read_tokens(args.reference)
    tokens_SBT = np.where(tokens_SBT < config.vocab_size, tokens_SBT, UNKNOWN)

    def make(name: str) -> runs.Trainer:
      training = Training(methods[name], tokens_SBT, config, args.steps)
      # Weights and batches are the recorded ones, whatever the seed.
      return lambda rate, seed: training.run(rate, args.reference)

    return {'steps': args.steps}, make

  plan = runs.Plan({name: method.rates for name, method in methods.items()})
  comparison.run(parser, args, plan, prepare)
