"""Peaks of GPUs, against what their tensor cores do per clock."""

import pytest

from gnlorp_jax.training import hardware

# Streaming multiprocessors, boost clock of the tensor cores in GHz, and dense
# bfloat16 multiply-adds of one of them per clock, added up in float32 (NVIDIA's
# architecture papers of A100, H100, Ada and GA102).
A100 = 108, 1.41, 1024
H100 = 132, 1.83, 2048
RTX4090 = 128, 2.52, 256
RTX4060TI = 34, 2.535, 256
RTX3060 = 28, 1.777, 256
GPUS = {
  'NVIDIA H100 80GB HBM3': H100,
  'NVIDIA H200': H100,
  'NVIDIA A100-SXM4-80GB': A100,
  'NVIDIA A100-SXM4-40GB': A100,
  'NVIDIA GeForce RTX 4090': RTX4090,
  'NVIDIA GeForce RTX 4060 Ti': RTX4060TI,
  'NVIDIA GeForce RTX 3060': RTX3060,
}


def test_every_gpu_has_an_oracle():
  assert set(hardware.PEAK_FLOPS) == set(GPUS)


@pytest.mark.parametrize('name', GPUS)
def test_peak_is_two_flops_per_multiply_add(name):
  cores, clock, multiply_adds = GPUS[name]
  peak = 2 * cores * clock * 1e9 * multiply_adds
  assert hardware.PEAK_FLOPS[name] == pytest.approx(peak, rel=2e-3)
