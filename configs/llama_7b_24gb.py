"""LLaMA-7b with the GaLore protocol on C4, on one GPU of 24 GB: bfloat16.

Command:
  python train_lm.py --config configs/llama_7b_24gb.py \
    --data.source 'C4/*.json.gz' \
    --data.validation-source C4_VALIDATION.json.gz \
    --data.tokenizer T5_FOLDER

Steps and rank of arXiv:2403.03507, section 5.2 and appendix, where a batch has
512 sequences; 16 are what an update sees here. Trains layer by layer, with
8-bit moments and bases. Has not been run yet; benchmarks/gpu_layerwise.sh
measures its memory and its first steps.
"""

import dataclasses

from configs import llama_60m
from gnlorp_jax.config import StepConfig
from gnlorp_jax.models import llama

config = dataclasses.replace(
  llama_60m.config,
  run_dir='runs/llama_7b_24gb',
  steps=150_000,
  batch_size=16,
  micro_batches=1,
  loss_chunk_tokens=2048,
  model=dataclasses.replace(
    llama.PRESETS['7b'], param_dtype='bfloat16', compute_dtype='bfloat16'
  ),
  optim=dataclasses.replace(
    llama_60m.config.optim,
    rank=1024,
    moment_bits=8,
    basis_bits=8,
    stochastic_rounding=True,
  ),
  step=StepConfig(mode='layerwise'),
)
