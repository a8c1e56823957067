"""What takes the training steps that `benchmarks.train` times.

`Ours` is this package's model and step, with its optimizers or Optax's;
`Theirs` is transformers' PyTorch LLaMA with the optimizers of `peers`. Both are
built from a `Case`.

Shape suffixes in this file:
  B, T, D  batch, position in the sequence, width of the residual stream
"""

import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

# PyTorch and jax share a GPU: jax must not take most of it beforehand.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks.common import harness, methods, peers, programs, turns
from gnlorp_jax.models import hf, llama
from gnlorp_jax.optim import inspect
from gnlorp_jax.training import losses, step
from gnlorp_jax.training.state import TrainState

RATE = 1e-4
BATCHES = 4  # Different ones, used in turn.
SAME_START = 100_000_000  # Parameters up to which weights are exchanged.


@dataclasses.dataclass(frozen=True)
class Case:
  """What all methods of a comparison have in common."""

  config: llama.LlamaConfig
  batch_size: int
  seq_len: int
  setting: peers.Setting
  loss_chunk: int  # Tokens whose logits ours has at once.
  device: str

  @property
  def tokens(self) -> int:
    """Tokens of a step."""
    return self.batch_size * self.seq_len

  @functools.cached_property
  def batches(self) -> list[dict[str, np.ndarray]]:
    """As `programs.random_batch`."""
    sizes = self.config.vocab_size, self.batch_size, self.seq_len
    return [programs.random_batch(*sizes, seed) for seed in range(BATCHES)]


class Ours(turns.Method):
  """Steps of this package, or of an optimizer of Optax on its model."""

  def __init__(self, case: Case, tx: optax.GradientTransformation):
    model = llama.make(case.config)

    def loss_fn(params: Any, batch: dict[str, jax.Array]) -> Any:
      x_BTD = model.hidden(params, batch['inputs'])
      return losses.chunked_cross_entropy(
        functools.partial(model.logits, params),
        *(x_BTD, batch['targets'], batch['weights']),
        chunk_tokens=case.loss_chunk,
      )

    self._batches = jax.tree.map(jnp.asarray, case.batches)
    params = model.init(jax.random.key(0))
    opt_state = jax.jit(tx.init)(params)
    self.state_bytes = inspect.tree_bytes(opt_state)
    zero = jnp.zeros((), jnp.int32)
    self._state = TrainState(zero, jnp.copy(zero), params, opt_state)
    train_step = step.make_train_step(loss_fn, tx)
    self._step, self.compile_s = programs.compiled(
      lambda: jax.jit(train_step, donate_argnums=0).lower(
        self._state, self._batches[0]
      )
    )
    self.peak_bytes = programs.memory(self._step)['total']

  def step(self, index: int) -> None:
    """As `turns.Method`."""
    self._state, values = self._step(self._state, self._batches[index])
    loss = float(jax.block_until_ready(values)['loss'])
    self.loss = loss if self.loss is None else self.loss


class Theirs(peers.TorchMethod):
  """Steps of transformers' PyTorch LLaMA with an optimizer for PyTorch.

  Args:
    case: What is trained.
    name: Key of `peers.TORCH`.
    adapters: Options of PEFT's LoRA, whose weights then are trained alone.
  """

  def __init__(
    self, case: Case, name: str, adapters: dict[str, Any] | None = None
  ):
    super().__init__(harness.PLATFORMS[case.device])
    model = _torch_model(case).to(self.platform)
    if adapters is not None:
      peft = peers.module('peft')
      targets = [f'{x}_proj' for x in ('q', 'k', 'v', 'o')]
      targets += [f'{x}_proj' for x in ('gate', 'up', 'down')]
      rank = case.setting.rank
      model = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, target_modules=targets, **adapters)
      )
    if case.config.remat:
      model.gradient_checkpointing_enable()
    model.train()
    low, full = [], []
    for weight_name, weight in model.named_parameters():
      if weight.requires_grad:
        in_block = 'self_attn' in weight_name or 'mlp' in weight_name
        (low if weight.ndim == 2 and in_block else full).append(weight)
    self._model = model
    self.optimizer = peers.TORCH[name](low, full, case.setting)
    self._batches = [
      [
        self.torch.from_numpy(batch[key]).long().to(self.platform)
        for key in ('inputs', 'targets')
      ]
      for batch in case.batches
    ]

  def take(self, index: int) -> None:
    """As `peers.TorchMethod`."""
    inputs, targets = self._batches[index]
    logits = self._model(input_ids=inputs, use_cache=False).logits
    loss = self.torch.nn.functional.cross_entropy(
      logits.float().flatten(0, 1), targets.flatten()
    )
    loss.backward()
    self.optimizer.step()
    self.optimizer.zero_grad()
    value = float(loss.detach())  # Waits for the device.
    self.loss = value if self.loss is None else self.loss


def _torch_model(case: Case) -> Any:
  """Transformers' model, with the weights that `Ours` starts from."""
  torch, transformers = peers.module('torch'), peers.module('transformers')
  dtype = getattr(torch, case.config.param_dtype)
  described = llama.config_to_hf(case.config)
  if llama.num_params(case.config) > SAME_START:
    config = transformers.LlamaConfig.from_dict(described)
    return transformers.LlamaForCausalLM(config).to(dtype)
  params = llama.make(case.config).init(jax.random.key(0))
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'hf')
    hf.export(path, params, llama.HF_TENSORS, described)
    return transformers.LlamaForCausalLM.from_pretrained(path, dtype=dtype)


def _unstacked(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """`tx` on one matrix per layer: `optax.contrib.galore` projects no stack."""

  def take_apart(tree: Any) -> Any:
    layers = tree['layers']
    count = jax.tree.leaves(layers)[0].shape[0]
    parts = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)]
    return {**tree, 'layers': parts}

  def update(grads: Any, state: Any, params: Any) -> Any:
    updates, state = tx.update(take_apart(grads), state, take_apart(params))
    layers = jax.tree.map(lambda *parts: jnp.stack(parts), *updates['layers'])
    return {**updates, 'layers': layers}, state

  return optax.GradientTransformation(
    lambda params: tx.init(take_apart(params)), update
  )


def _optax_galore(setting: peers.Setting) -> optax.GradientTransformation:
  def labels(tree: Any) -> Any:
    return {
      key: jax.tree.map(
        lambda x, key=key: 'low' if key == 'layers' and x.ndim == 2 else 'full',
        node,
      )
      for key, node in tree.items()
    }

  rate, rank, gap = setting
  low = optax.contrib.galore(rate, rank, gap, peers.SCALE)
  transforms = {'low': low, 'full': optax.adamw(rate, weight_decay=0)}
  return _unstacked(optax.partition(transforms, labels))


def _ours(name: str) -> Callable[[Case], Ours]:
  def make(case: Case) -> Ours:
    tx = methods.build(
      *methods.OURS[name],
      learning_rate=case.setting.learning_rate,
      rank=case.setting.rank,
      update_proj_gap=case.setting.gap,
      skip_nonfinite=False,  # The training step has a guard of its own.
    )
    return Ours(case, tx)

  return make


def _theirs(name: str, **adapters: Any) -> Callable[[Case], Theirs]:
  return lambda case: Theirs(case, name, adapters or None)


METHODS: dict[str, Callable[[Case], Ours | Theirs]] = {
  'gradnormlorp': _ours('gradnormlorp'),
  'galore-torch': _theirs('galore-torch'),
  'adamw': _ours('adamw'),
  'torch-adamw': _theirs('torch-adamw'),
  **{
    name: _ours(name)
    for name in ('galore', 'gradnormlorp-8bit', 'apollo', 'fira')
  },
  **{
    name: _theirs(name)
    for name in (
      *('torch-adamw-fused', 'bitsandbytes-adamw8bit', 'galore-torch-8bit'),
      'apollo-torch',
    )
  },
  'optax-adamw': lambda case: Ours(case, optax.adamw(RATE, weight_decay=0)),
  'optax-galore': lambda case: Ours(case, _optax_galore(case.setting)),
  'optax-adafactor': lambda case: Ours(case, optax.adafactor(RATE)),
  'peft-lora': _theirs('torch-adamw', use_dora=False),
  'peft-dora': _theirs('torch-adamw', use_dora=True),
}
"""Of a size, in the order of their worth."""
