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
import time
from collections.abc import Callable
from typing import Any

# PyTorch and jax share a GPU: jax must not take most of it beforehand.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks.common import harness, methods, peers
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
  def batches(self) -> list[np.ndarray]:
    """Token ids ``[batch, seq_len + 1]``, int32."""
    random = np.random.default_rng(0)
    shape = (self.batch_size, self.seq_len + 1)
    vocab = self.config.vocab_size
    return [random.integers(0, vocab, shape, np.int32) for _ in range(BATCHES)]


class Ours:
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

    self._batches = [_as_jax(batch) for batch in case.batches]
    params = model.init(jax.random.key(0))
    opt_state = jax.jit(tx.init)(params)
    self.state_bytes = inspect.tree_bytes(opt_state)
    zero = jnp.zeros((), jnp.int32)
    self._state = TrainState(zero, jnp.copy(zero), params, opt_state)
    train_step = step.make_train_step(loss_fn, tx)
    started = time.perf_counter()
    self._step = (
      jax.jit(train_step, donate_argnums=0)
      .lower(self._state, self._batches[0])
      .compile()
    )
    self.compile_s: float | None = time.perf_counter() - started
    memory = self._step.memory_analysis()
    self.peak_bytes: int | None = (
      memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )
    self.loss: float | None = None  # Of the first step.

  def step(self, index: int) -> None:
    """One step on batch `index`, finished when it returns."""
    self._state, values = self._step(self._state, self._batches[index])
    loss = float(jax.block_until_ready(values)['loss'])
    self.loss = loss if self.loss is None else self.loss

  def refreshes(self, steps: int) -> float:
    """Not counted here: the mean step has them in it."""
    del steps
    return 0.0


class Theirs:
  """Steps of transformers' PyTorch LLaMA with an optimizer for PyTorch."""

  compile_s: float | None = None

  def __init__(
    self,
    case: Case,
    make: Callable[[list[Any], list[Any], peers.Setting], Any],
    adapters: dict[str, Any] | None = None,
  ):
    self._torch = torch = peers.module('torch')
    self._device = 'cuda' if case.device == 'gpu' else 'cpu'
    if case.device == 'gpu' and not torch.cuda.is_available():
      raise methods.AbsentError('PyTorch was built without CUDA, or finds none')
    torch.set_num_threads(harness.cores())
    # As JAX does on these GPUs.
    torch.set_float32_matmul_precision('high')
    self._before = self._allocated()
    self._model = _torch_model(case).to(self._device)
    if adapters is not None:
      peft = peers.module('peft')
      targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
      config = peft.LoraConfig(
        r=case.setting.rank,
        target_modules=[*targets, 'gate_proj', 'up_proj', 'down_proj'],
        **adapters,
      )
      self._model = peft.get_peft_model(self._model, config)
    if case.config.remat:
      self._model.gradient_checkpointing_enable()
    self._model.train()
    low, full = [], []
    for name, weight in self._model.named_parameters():
      if weight.requires_grad:
        is_low = weight.ndim == 2 and ('self_attn' in name or 'mlp' in name)
        (low if is_low else full).append(weight)
    self._optimizer = make(low, full, case.setting)
    self._batches = [
      torch.from_numpy(batch).long().to(self._device) for batch in case.batches
    ]
    self.loss: float | None = None
    self.peak_bytes: int | None = None

  def _allocated(self) -> int:
    return self._torch.cuda.memory_allocated() if self._device == 'cuda' else 0

  @property
  def state_bytes(self) -> int:
    """Bytes of the optimizer's state; there is none before the first step."""
    return peers.torch_state_bytes(self._optimizer)

  def step(self, index: int) -> None:
    """One step on batch `index`, finished when it returns."""
    torch, batch = self._torch, self._batches[index]
    if self._device == 'cuda':
      torch.cuda.reset_peak_memory_stats()
    logits = self._model(input_ids=batch[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
      logits.float().flatten(0, 1), batch[:, 1:].flatten()
    )
    loss.backward()
    self._optimizer.step()
    self._optimizer.zero_grad()
    value = float(loss.detach())  # Waits for the device.
    if self.loss is None:
      self.loss = value
    elif self._device == 'cuda' and self.peak_bytes is None:
      torch.cuda.synchronize()
      # Before any other method of PyTorch was built.
      self.peak_bytes = torch.cuda.max_memory_allocated() - self._before

  def refreshes(self, steps: int) -> float:
    """As `Ours.refreshes`."""
    del steps
    return 0.0


def _as_jax(tokens: np.ndarray) -> dict[str, jax.Array]:
  return {
    'inputs': jnp.asarray(tokens[:, :-1]),
    'targets': jnp.asarray(tokens[:, 1:]),
    'weights': jnp.ones(tokens[:, 1:].shape, jnp.float32),
  }


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


def _ours(alias: str, **variant: Any) -> Callable[[Case], Ours]:
  def make(case: Case) -> Ours:
    tx = methods.build(
      *(alias, variant),
      learning_rate=case.setting.learning_rate,
      rank=case.setting.rank,
      update_proj_gap=case.setting.gap,
      skip_nonfinite=False,  # The training step has a guard of its own.
    )
    return Ours(case, tx)

  return make


def _optax(
  make: Callable[[peers.Setting], optax.GradientTransformation],
) -> Callable[[Case], Ours]:
  return lambda case: Ours(case, make(case.setting))


def _theirs(name: str) -> Callable[[Case], Theirs]:
  return lambda case: Theirs(case, peers.TORCH[name])


def _peft(**adapters: Any) -> Callable[[Case], Theirs]:
  adamw = peers.TORCH['torch-adamw']
  return lambda case: Theirs(case, adamw, adapters)


METHODS: dict[str, Callable[[Case], Ours | Theirs]] = {
  'gradnormlorp': _ours('gradnormlorp'),
  'galore-torch': _theirs('galore-torch'),
  'adamw': _ours('adamw'),
  'torch-adamw': _theirs('torch-adamw'),
  'galore': _ours('galore'),
  'gradnormlorp-8bit': _ours('gradnormlorp', moment_bits=8),
  'apollo': _ours('apollo'),
  'fira': _ours('fira'),
  'torch-adamw-fused': _theirs('torch-adamw-fused'),
  'bitsandbytes-adamw8bit': _theirs('bitsandbytes-adamw8bit'),
  'galore-torch-8bit': _theirs('galore-torch-8bit'),
  'apollo-torch': _theirs('apollo-torch'),
  'optax-adamw': _optax(
    lambda setting: optax.adamw(setting.learning_rate, weight_decay=0)
  ),
  'optax-galore': _optax(_optax_galore),
  'optax-adafactor': _optax(
    lambda setting: optax.adafactor(setting.learning_rate)
  ),
  'peft-lora': _peft(),
  'peft-dora': _peft(use_dora=True),
}
"""Of a size, in the order of their worth."""
