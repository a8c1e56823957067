"""Repeats training curves recorded from PyTorch, and prints the differences.

A small LLaMA (hidden 128, 4 layers, vocabulary 32000) takes 300 steps on the
same tokens from the same weights as the recorded runs of torch AdamW,
galore-torch and the public release of GradNormLoRP; `gradnormlorp` in its exact
form runs on the same protocol.

  python -m benchmarks.reference_curves --reference ../shared/reference/curves

takes about ten minutes on two CPU cores. `--methods` picks some of the runs.
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gnlorp_jax import optim
from gnlorp_jax.models import llama
from gnlorp_jax.training import loop, losses, sharding, state, step

STEPS = 300
WARMUP = 30
EVAL_BATCHES = range(380, 400)
CONFIG = llama.preset('9m', max_seq_len=128)
LOW_RANK = {'rank': 32, 'update_proj_gap': 60, 'scale': 0.25}


def schedule(
  peak: float | jax.Array, steps: int = STEPS, warmup: int = WARMUP
) -> Callable[[jax.Array], jax.Array]:
  """Linear warm-up, then cosine to a tenth."""

  def value(count):
    warm = (count + 1) / warmup
    angle = jnp.pi * (count - warmup) / (steps - warmup)
    cosine = 0.1 + 0.45 * (1 + jnp.cos(angle))
    return peak * jnp.where(count < warmup, warm, cosine)

  return value


def exact(name: str) -> Any:
  """SVD of every matrix at the same step, as the recorded code does."""
  return {
    'projection': optim.projections.get('svd', solver=name),
    'spread_refreshes': False,
  }


# Name: (recorded curve or None, optimizer).
METHODS: dict[str, tuple[str | None, optax.GradientTransformation]] = {
  'adamw': ('adamw_seed0', optim.adamw(schedule(2e-3))),
  'galore': (
    'galore_adamw_seed0',
    optim.galore(schedule(1e-2), **LOW_RANK, **exact('exact')),
  ),
  'released': (
    'gradnormlorp_released_seed0',
    optim.released_gradnormlorp(schedule(1e-2), **LOW_RANK),
  ),
  'gradnormlorp_exact': (
    None,
    optim.gradnormlorp(schedule(1e-2), **LOW_RANK, **exact('exact')),
  ),
  'gradnormlorp_power': (
    None,
    optim.gradnormlorp(schedule(1e-2), **LOW_RANK, **exact('power')),
  ),
  'gradnormlorp_default': (
    None,
    optim.gradnormlorp(schedule(1e-2), **LOW_RANK),
  ),
}


def initial_params(config: llama.LlamaConfig = CONFIG) -> Any:
  """The recorded runs' weights, in our layout.

  Over the sorted Hugging Face names: vectors of ones, matrices of normal
  numbers times 0.02 in PyTorch's shape.
  """
  shapes = jax.eval_shape(llama.make(config).init, jax.random.key(0))
  rng = np.random.default_rng(0)
  stacked: dict[str, dict[int, np.ndarray]] = {}
  for _, path, layer, transpose in sorted(_tensors(config)):
    shape = _leaf(shapes, path).shape[(1 if layer is not None else 0) :]
    if len(shape) == 1:
      value = np.ones(shape, np.float32)
    else:
      value = rng.standard_normal(
        shape[::-1] if transpose else shape, dtype=np.float32
      ) * np.float32(0.02)
    stacked.setdefault(path, {})[layer or 0] = value.T if transpose else value

  def fill(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    layers = [stacked[name][i] for i in sorted(stacked[name])]
    return jnp.asarray(np.stack(layers)).reshape(leaf.shape)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def _tensors(
  config: llama.LlamaConfig,
) -> Iterator[tuple[str, str, int | None, bool]]:
  for path, template, transpose in llama.HF_TENSORS:
    if '{layer}' not in template:
      yield template, path, None, transpose
      continue
    for layer in range(config.num_layers):
      yield template.format(layer=layer), path, layer, transpose


def _leaf(tree: Any, path: str) -> Any:
  for key in path.split('/'):
    tree = tree[key]
  return tree


def read_tokens(folder: pathlib.Path) -> np.ndarray:
  """The recorded runs' batches, [400, 4, 128] ids."""
  with np.load(folder / 'tokens.npz') as archive:
    return archive[archive.files[0]]


def loss_fn(
  params: Any,
  batch: dict[str, jax.Array],
  config: llama.LlamaConfig = CONFIG,
) -> Any:
  """Sum and count of the next-token losses of a batch of rows."""
  model = llama.make(config)
  x_BTD = model.hidden(params, batch['inputs'])
  return losses.chunked_cross_entropy(
    lambda x: model.logits(params, x),
    x_BTD,
    batch['targets'],
    jnp.ones(batch['targets'].shape, jnp.float32),
    chunk_tokens=512,
  )


def split(rows_BT: np.ndarray) -> dict[str, np.ndarray]:
  """A batch of rows as inputs and the tokens that follow them."""
  rows_BT = rows_BT.astype(np.int32)
  return {'inputs': rows_BT[:, :-1], 'targets': rows_BT[:, 1:]}


@functools.cache
def _eval_step(config: llama.LlamaConfig) -> Callable[..., Any]:
  """Compiled once, however many runs are evaluated."""
  return jax.jit(step.make_eval_step(functools.partial(loss_fn, config=config)))


def evaluate(
  params: Any, tokens_SBT: np.ndarray, config: llama.LlamaConfig = CONFIG
) -> float:
  """Mean loss of the batches no run trains on."""
  sums = [
    _eval_step(config)(params, split(tokens_SBT[i])) for i in EVAL_BATCHES
  ]
  # Every batch has as many targets: the mean of the batches is the mean.
  return float(np.mean([s / n for s, n in sums]))


def compile_training(
  train_step: Callable[..., Any],
  tx: optax.GradientTransformation,
  params: Any,
  tokens_SBT: np.ndarray,
  *numbers: float,
) -> Callable[..., tuple[Any, np.ndarray]]:
  """Compiles the steps of a run on one device.

  Args:
    train_step: Maps (state, batch, *numbers) to (state, metrics); a batch is
      what `split` returns.
    tx: Its `init` makes the optimizer's state.
    params: The parameters to start from.
    tokens_SBT: A step is taken on each of these batches.
    *numbers: What the step takes beside state and batch; those given here
      stand for any.

  Returns:
    A function from such numbers to the trained parameters and the losses of all
    steps, float32. It never compiles again.
  """
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  everywhere = NamedSharding(mesh, PartitionSpec())

  def placed(numbers: Iterable[float]) -> list[jax.Array]:
    return [jax.device_put(jnp.float32(x), everywhere) for x in numbers]

  def start() -> state.TrainState:
    return state.from_params(params, tx, mesh)

  arguments = (
    start(),
    sharding.put_batch(split(tokens_SBT[0]), mesh),
    *placed(numbers),
  )
  jitted = step.jit_train_step(train_step, arguments[0], mesh, *placed(numbers))
  compiled = jitted.lower(*arguments).compile()

  def run(*numbers: float) -> tuple[Any, np.ndarray]:
    train = []
    for taken in loop.steps(
      compiled,
      start(),
      map(split, tokens_SBT),
      mesh,
      range(1, len(tokens_SBT) + 1),
      *placed(numbers),
    ):
      train.append(taken.metrics['loss'])
    return taken.state.params, np.asarray(jax.device_get(train))

  return run


def run(
  tx: optax.GradientTransformation, tokens_SBT: np.ndarray, steps: int
) -> tuple[np.ndarray, float | None]:
  """Losses of `steps` training steps, and the eval loss after 300."""
  train_step = step.make_train_step(loss_fn, tx)
  training = compile_training(
    train_step, tx, initial_params(), tokens_SBT[:steps]
  )
  params, train = training()
  return train, evaluate(params, tokens_SBT) if steps >= STEPS else None


def main() -> None:
  """Runs the methods and prints and saves a row for each."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--reference',
    type=pathlib.Path,
    required=True,
    help='folder with tokens.npz and the recorded *.json',
  )
  parser.add_argument(
    '--methods', nargs='+', choices=METHODS, default=list(METHODS)
  )
  parser.add_argument(
    '--output',
    type=pathlib.Path,
    default=pathlib.Path('benchmarks/results/reference_curves.json'),
  )
  args = parser.parse_args()
  tokens_SBT = read_tokens(args.reference)
  print(
    f'{"method":22}{"eval loss":>10}{"recorded":>10}{"difference":>12}'
    '   largest difference of the training loss before step 60 / 100 / 300'
  )
  rows = {}
  for name in args.methods:
    recorded_name, tx = METHODS[name]
    start = time.time()
    train, evaluation = run(tx, tokens_SBT, STEPS)
    row = {
      'eval_loss': evaluation,
      'train_loss': train.tolist(),
      'seconds': round(time.time() - start, 1),
    }
    line = f'{name:22}{evaluation:10.4f}'
    if recorded_name:
      path = args.reference / f'{recorded_name}.json'
      recorded = json.loads(path.read_text())
      gap = np.abs(train - np.asarray(recorded['train_loss']))
      row['recorded_eval_loss'] = recorded['eval_loss']
      row['largest_difference'] = {
        str(n): float(gap[:n].max()) for n in (60, 100, 300)
      }
      differences = ' / '.join(f'{gap[:n].max():.1e}' for n in (60, 100, 300))
      line += (
        f'{recorded["eval_loss"]:10.4f}'
        f'{evaluation - recorded["eval_loss"]:+12.4f}   {differences}'
      )
    print(line, flush=True)
    rows[name] = row
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
  main()
