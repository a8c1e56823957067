"""Llama 3.1 8B learns instructions by LoRA on one GPU of 24 GB.

Command:
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.97 \
  python train_sft.py --config configs/sft_llama3_8b_24gb.py --data CHATS.jsonl

What it takes:
  python -m gnlorp_jax.plan sft --config configs/sft_llama3_8b_24gb.py \
    --model llama-3.1-8b --device rtx4090

The kernels of the blocks stay as they are, in 8 bits; adapters stand beside all
of them, and the step goes layer by layer. It has not been run yet.

As planned for 16 rows of 2048 tokens: 19.7 GiB of the 22.9 that XLA gets of a
card of 24 GB (at 06bed13, jax 0.10, 2026-11-29).
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
  init_from='hf:meta-llama/Llama-3.1-8B-Instruct',
  run_dir='runs/sft_llama3_8b',
  method='lora',
  export='adapter',
  batch_size=16,
  micro_batches=8,
  model=dataclasses.replace(
    models.presets()['llama-3.1-8b'],
    param_dtype='bfloat16',
    compute_dtype='bfloat16',
  ),
  data=ChatDataConfig(max_length=2048),
  adapter=AdapterOptions(rank=16, alpha=32.0),
  step=StepConfig(mode='layerwise', weight_bits=8),
)
