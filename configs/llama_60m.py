"""LLaMA-60m with the GaLore protocol on C4: one GPU, bfloat16.

Command:
  python train_lm.py --config configs/llama_60m.py \
    --data.source 'C4/*.json.gz' \
    --data.validation-source C4_VALIDATION.json.gz \
    --data.tokenizer T5_FOLDER

1.3 billion tokens (padding counted), 10,000 steps of 512 x 256. Published
perplexities on C4 with this protocol: AdamW 34.06, GaLore 34.88
(arXiv:2403.03507, table 2); ours has not been run to the end yet. There the
loss is a mean over micro-batches, here over tokens.
"""

import dataclasses

from gnlorp_jax.config import DataConfig, OptimConfig, TrainConfig
from gnlorp_jax.models import llama

config = TrainConfig(
  run_dir='runs/llama_60m',
  steps=10_000,
  batch_size=512,
  micro_batches=2,
  eval_every=1000,
  eval_batches=80,  # 10 million tokens, padding counted.
  checkpoint_every=1000,
  loss_chunk_tokens=16_384,
  model=dataclasses.replace(
    llama.PRESETS['60m'], param_dtype='bfloat16', compute_dtype='bfloat16'
  ),
  data=DataConfig(mode='padded', seq_len=256),
  optim=OptimConfig(rank=128, clip_global_norm=None),
)
