"""Compiled programs, and steps of the library without their training loop."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.common import turns
from gnlorp_jax.compose import optimizer
from gnlorp_jax.recipes.pretrain.recipe import Planned
from gnlorp_jax.training.state import TrainState


def lower(planned: Planned) -> jax.stages.Lowered:
  """The training step on the shapes of its arguments."""
  program = planned.program
  return program.train_step.lower(
    program.abstract_state, planned.abstract_batch, program.parameters.frozen
  )


def start(planned: Planned) -> tuple[TrainState, Any]:
  """The state at step 0 and the frozen weights."""
  config = planned.config
  return planned.program.start(
    jax.random.key(config.seed), optimizer.numbers(config.optim, config.steps)
  )


def compiled(
  lower: Callable[[], jax.stages.Lowered], options: dict[str, Any] | None = None
) -> tuple[jax.stages.Compiled, float]:
  """A compiled program, and the seconds that tracing and compiling took."""
  begin = time.perf_counter()
  program = lower().compile(compiler_options=options)
  return program, time.perf_counter() - begin


class Repeated(turns.Method):
  """A program that takes part in a race.

  Attributes:
    repeats: How often it runs in a step, so that this can be timed.

  Args:
    lowered: The program, not yet compiled.
    take: Calls it once and returns what is to be waited for.
  """

  def __init__(
    self,
    lowered: jax.stages.Lowered,
    take: Callable[[jax.stages.Compiled], Any],
  ):
    self._program, self.compile_s = compiled(lambda: lowered)
    self._take, self.repeats = take, 1

  def step(self, index: int) -> None:
    """Runs it; all steps have the same input."""
    del index
    for _ in range(self.repeats):
      found = self._take(self._program)
    jax.block_until_ready(found)


def memory(program: jax.stages.Compiled) -> dict[str, int]:
  """Bytes of a compiled program's buffers, and of all that it holds at most."""
  found = program.memory_analysis()
  parts = {
    'arguments': found.argument_size_in_bytes,
    'outputs': found.output_size_in_bytes,
    'temporaries': found.temp_size_in_bytes,
    'aliases': found.alias_size_in_bytes,
  }
  return parts | {'total': sum(parts.values()) - 2 * parts['aliases']}


def random_batch(
  vocab_size: int, batch_size: int, seq_len: int, seed: int = 0
) -> dict[str, np.ndarray]:
  """Sequences of random tokens that all count: ``[batch_size, seq_len]``."""
  shape = batch_size, seq_len + 1
  tokens = np.random.default_rng(seed).integers(0, vocab_size, shape, np.int32)
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': np.ones((batch_size, seq_len), np.float32),
  }


class Steps(turns.Method):
  """Training steps on batches that are used in turn; keeps their losses.

  Args:
    step: Maps state, batch and frozen weights to a state and metrics.
    start: The state and the frozen weights.
    batches: What they are trained on.
  """

  def __init__(
    self,
    step: Callable[..., tuple[Any, Any]],
    start: tuple[Any, Any],
    batches: Sequence[Any],
  ):
    self._step, self._batches = step, batches
    self._state, self._frozen = start
    self.losses: list[float] = []

  def step(self, index: int) -> None:
    """As `turns.Method`."""
    self._state, metrics = jax.block_until_ready(
      self._step(self._state, self._batches[index], self._frozen)
    )
    self.losses.append(float(metrics['loss']))
    self.loss = self.losses[0]
