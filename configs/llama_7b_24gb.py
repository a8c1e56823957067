"""LLaMA-7b with the GaLore protocol on C4, on one GPU of 24 GB: bfloat16.

Command:
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.97 \
  python train_lm.py --config configs/llama_7b_24gb.py \
    --data.source 'C4/*.json.gz' \
    --data.validation-source C4_VALIDATION.json.gz \
    --data.tokenizer T5_FOLDER

What it takes:
  python -m gnlorp_jax.plan --config configs/llama_7b_24gb.py --device rtx4090

As llama_7b.py, layer by layer, with bases in 8 bits and weights rounded
stochastically. Gradients are not clipped, as in layer-wise runs of
arXiv:2403.03507; --optim.clip-global-norm 1.0 --step.clipping recompute clips
them in the same memory, with one more backward pass. It has not been run yet;
benchmarks/gpu_layerwise.sh measures its memory and its first steps.
"""

import dataclasses

from gnlorp_jax.config import StepConfig
from gnlorp_jax.configs import llama_7b

config = dataclasses.replace(
  llama_7b.config,
  run_dir='runs/llama_7b_24gb',
  loss_chunk_tokens=1024,
  optim=dataclasses.replace(
    llama_7b.config.optim,
    clip_global_norm=None,
    moment_bits=8,
    basis_bits=8,
    stochastic_rounding=True,
  ),
  step=StepConfig(mode='layerwise'),
)
