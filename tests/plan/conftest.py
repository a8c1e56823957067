"""The tiny run that is planned, and a machine for it.

Its model has V = 64, D = 128, F = 256 and L = 2; its kernels are four
[L, D, D], two [L, D, F] and one [L, F, D].
"""

import importlib.util

import pytest

from gnlorp_jax import plan
from gnlorp_jax.config import DataConfig, OptimConfig
from gnlorp_jax.models import llama
from gnlorp_jax.plan import accelerators, report

MODEL = llama.LlamaConfig(
  vocab_size=64,
  hidden_size=128,
  intermediate_size=256,
  num_layers=2,
  num_heads=4,
  max_seq_len=16,
)


@pytest.fixture
def settings():
  """Makes the tiny run: GaLore of rank 64, 8 sequences of 16 tokens."""

  def make(**changes):
    fields = {
      'batch_size': 8,
      'model': MODEL,
      'data': DataConfig(seq_len=16),
      'optim': OptimConfig(name='galore', rank=64),
    }
    return plan.PlanConfig(**{**fields, **changes})

  return make


@pytest.fixture
def no_wheels(monkeypatch):
  monkeypatch.setattr(report, 'compiler_is_installed', lambda: False)


@pytest.fixture
def wheels():
  """Skips where XLA's compiler for GPUs is absent, which needs no GPU."""
  if importlib.util.find_spec('jax_cuda12_plugin') is None:
    pytest.skip('the CUDA wheels (the extra cuda) are not installed')


@pytest.fixture
def limited_gpu(monkeypatch):
  """Makes an h100 a card of so many bytes, all of them usable."""

  def limit(size):
    gpu = accelerators.ACCELERATORS['h100']._replace(memory=size)
    monkeypatch.setattr(accelerators, 'RESERVED', 0)
    monkeypatch.setitem(accelerators.ACCELERATORS, 'h100', gpu)

  return limit
