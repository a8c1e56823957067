"""Qwen 2.5 7B learns instructions by LoRA on one GPU of 16 GB.

Command:
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.96 \
  python train_sft.py --config configs/sft_qwen2.5_7b_16gb.py --data CHATS.jsonl

What it takes:
  python -m gnlorp_jax.plan sft --config configs/sft_qwen2.5_7b_16gb.py \
    --model qwen2.5-7b --device rtx4060ti

As sft_llama3_8b_24gb.py, with shorter rows. It has not been run yet.

As planned for 16 rows of 1024 tokens: 13.1 GiB of the 15.0 that XLA gets of a
card of 16 GB (at 06bed13, jax 0.10, 2026-11-29).
"""

import dataclasses

from gnlorp_jax import models
from gnlorp_jax.config import (
  AdapterOptions,
  ChatDataConfig,
  SftConfig,
  StepConfig,
)

config = SftConfig(
  init_from='hf:Qwen/Qwen2.5-7B-Instruct',
  run_dir='runs/sft_qwen2.5_7b',
  method='lora',
  export='adapter',
  batch_size=16,
  micro_batches=16,
  model=dataclasses.replace(
    models.presets()['qwen2.5-7b'],
    param_dtype='bfloat16',
    compute_dtype='bfloat16',
  ),
  data=ChatDataConfig(max_length=1024),
  adapter=AdapterOptions(rank=16, alpha=32.0),
  step=StepConfig(mode='layerwise', weight_bits=8),
)
