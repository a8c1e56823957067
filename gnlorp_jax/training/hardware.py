"""What GPUs can do at most: what a training run's speed is measured against."""

PEAK_FLOPS = {
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA GeForce RTX 4090': 165e12,
  'NVIDIA GeForce RTX 4060 Ti': 44.1e12,
  'NVIDIA GeForce RTX 3060': 25.5e12,
}
"""Dense bfloat16 peaks in FLOP/s, without sparsity, by what jax calls a GPU."""
