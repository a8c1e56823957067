"""LLaMA-130m with the GaLore protocol on C4: one GPU, bfloat16.

Command:
  python train_lm.py --config configs/llama_130m.py \
    --data.source 'C4/*.json.gz' \
    --data.validation-source C4_VALIDATION.json.gz \
    --data.tokenizer T5_FOLDER

The steps, batch, rank and learning rate of arXiv:2403.03507, table 2 and
appendix, where the published perplexities are. Ours has not been run yet.
"""

import dataclasses

from gnlorp_jax.configs import llama_60m
from gnlorp_jax.models import llama

config = dataclasses.replace(
  llama_60m.config,
  run_dir='runs/llama_130m',
  steps=20_000,
  micro_batches=2,
  model=dataclasses.replace(
    llama.PRESETS['130m'],
    param_dtype='bfloat16',
    compute_dtype='bfloat16',
    remat=True,
  ),
  optim=dataclasses.replace(llama_60m.config.optim, rank=256),
)
