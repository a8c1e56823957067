"""LLaMA-7b with the GaLore protocol on C4: one GPU, bfloat16, 8-bit moments.

Command:
  python train_lm.py --config configs/llama_7b.py \
    --data.source 'C4/*.json.gz' \
    --data.validation-source C4_VALIDATION.json.gz \
    --data.tokenizer T5_FOLDER

What it takes, and what would make it fit a smaller GPU:
  python -m gnlorp_jax.plan --config configs/llama_7b.py --device h100

Rank, refresh interval, learning rate, clipping and steps of arXiv:2403.03507
at 7B, with bases in bfloat16 as in its code. The batch there is 512 sequences
of 256 tokens; here it is 16, that of its memory figures. The whole protocol is
--batch-size 512 --micro-batches 32, which adds up gradients in float32, and
needs the memory for them. It has not been run yet.
"""

import dataclasses

from gnlorp_jax.configs import llama_1b
from gnlorp_jax.models import llama

config = dataclasses.replace(
  llama_1b.config,
  run_dir='runs/llama_7b',
  steps=150_000,
  batch_size=16,
  micro_batches=1,
  model=dataclasses.replace(
    llama.PRESETS['7b'],
    param_dtype='bfloat16',
    compute_dtype='bfloat16',
    remat=True,
  ),
  optim=dataclasses.replace(
    llama_1b.config.optim,
    rank=1024,
    update_proj_gap=500,
    learning_rate=0.005,
    clip_global_norm=1.0,
    moment_bits=8,
    basis_bits=16,
  ),
)
