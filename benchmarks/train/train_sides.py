"""What takes the training steps that `benchmarks.train` times.

This package's model and step, with its optimizers or Optax's, and transformers'
PyTorch LLaMA with the optimizers of `peers`. Both are built from a `Case`.

Shape suffixes in this file:
  B, T, D  batch, position in the sequence, width of the residual stream
"""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

# PyTorch and jax share a GPU: jax must not take most of it beforehand.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np
import optax

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

  @cached_property
  def batches(self) -> list[dict[str, np.ndarray]]:
    """As `programs.random_batch`."""
    sizes = self.config.vocab_size, self.batch_size, self.seq_len
    return [programs.random_batch(*sizes, seed) for seed in range(BATCHES)]


class _Ours(programs.Steps):
  """Steps of this package, or of an optimizer of Optax on its model."""

  def __init__(self, case: Case, tx: optax.GradientTransformation):
    model = llama.make(case.config)

    def loss_fn(params: Any, batch: dict[str, jax.Array]) -> Any:
      x_BTD = model.hidden(params, batch['inputs'])
      return losses.chunked_cross_entropy(
        partial(model.logits, params),
        *(x_BTD, batch['targets'], batch['weights']),
        chunk_tokens=case.loss_chunk,
      )

    batches = jax.tree.map(jnp.asarray, case.batches)
    params = model.init(jax.random.key(0))
    opt_state = jax.jit(tx.init)(params)
    self.state_bytes = inspect.tree_bytes(opt_state)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, jnp.copy(zero), params, opt_state)
    jitted = jax.jit(step.make_train_step(loss_fn, tx), donate_argnums=0)
    compiled, self.compile_s = programs.compiled(
      lambda: jitted.lower(state, batches[0])
    )
    self.peak_bytes = programs.memory(compiled)['total']
    super().__init__(lambda *known: compiled(*known[:2]), (state, ()), batches)


class _Theirs(peers.TorchTraining):
  """Steps of transformers' PyTorch LLaMA with an optimizer of `peers.TORCH`.

  `adapters` are options of PEFT's LoRA, whose weights then are trained alone.
  """

  def __init__(self, case: Case, name: str, **adapters: Any):
    super().__init__(harness.PLATFORMS[case.device])
    model = _torch_model(case).to(self.platform)
    if adapters:
      peft = peers.module('peft')
      targets = [*'qkvo', 'gate', 'up', 'down']
      lora = peft.LoraConfig(
        r=case.setting.rank,
        target_modules=[f'{target}_proj' for target in targets],
        **adapters,
      )
      model = peft.get_peft_model(model, lora)
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

  def loss_of(self, index: int) -> Any:
    """As `peers.TorchTraining`."""
    inputs, targets = self._batches[index]
    logits = self._model(input_ids=inputs, use_cache=False).logits
    return self.torch.nn.functional.cross_entropy(
      logits.float().flatten(0, 1), targets.flatten()
    )


def _torch_model(case: Case) -> Any:
  """Transformers' model, with the weights that `_Ours` starts from."""
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


def _low_or_full(tree: Any) -> Any:
  """Whether GaLore projects a weight: the matrices of layers."""
  return {
    key: jax.tree.map(
      lambda x, key=key: 'low' if key == 'layers' and x.ndim == 2 else 'full',
      node,
    )
    for key, node in tree.items()
  }


def _ours(case: Case, name: str) -> _Ours:
  # The training step has a guard of its own.
  return _Ours(case, methods.ours(name, case.setting, skip_nonfinite=False))


def _optax(case: Case, name: str) -> _Ours:
  tx = peers.OPTAX[name](case.setting)
  if name == 'optax-galore':
    full = peers.OPTAX['optax-adamw'](case.setting)
    parts = {'low': tx, 'full': full}
    tx = _unstacked(optax.partition(parts, _low_or_full))
  return _Ours(case, tx)


_NAMES = (
  *('gradnormlorp', 'galore-torch', 'adamw', 'torch-adamw', 'galore'),
  *('gradnormlorp-8bit', 'apollo', 'fira', 'torch-adamw-fused'),
  *('bitsandbytes-adamw8bit', 'galore-torch-8bit', 'apollo-torch'),
)

METHODS: dict[str, Callable[[Case], turns.Method]] = {
  **{
    name: partial(_Theirs if name in peers.TORCH else _ours, name=name)
    for name in _NAMES
  },
  **{name: partial(_optax, name=name) for name in peers.OPTAX},
  'peft-lora': partial(_Theirs, name='torch-adamw', use_dora=False),
  'peft-dora': partial(_Theirs, name='torch-adamw', use_dora=True),
}
"""What makes a method of a case, in the order of their worth."""
