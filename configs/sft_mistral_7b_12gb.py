"""Mistral 7B learns instructions by LoRA on one GPU of 12 GB.

Command:
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.94 \
  python train_sft.py --config configs/sft_mistral_7b_12gb.py --data CHATS.jsonl

What it takes:
  python -m gnlorp_jax.plan sft --config configs/sft_mistral_7b_12gb.py \
    --model mistral-7b --device rtx3060

The kernels of the blocks stay as they are, in 8 bits; adapters stand beside all
of them. Steps are whole: layer by layer the inputs of the blocks are kept for
all 16 rows, 4 GiB; with remat, for the one of a micro-batch. With
--step.weight-bits 4 it takes 2.9 GiB less. It has not been run yet.

As planned for 16 rows of 1024 tokens: 8.7 GiB of the 10.9 that XLA gets of a
card of 12 GB (at 55c4d9c, jax 0.10, 2026-11-30). An evaluation is not planned
and needs what is left: 8 answers to prompts of 1024 tokens have keys and values
of 1.1 GiB.
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
  init_from='hf:mistralai/Mistral-7B-Instruct-v0.3',
  run_dir='runs/sft_mistral_7b',
  method='lora',
  export='adapter',
  batch_size=16,
  micro_batches=16,
  model=dataclasses.replace(
    models.presets()['mistral-7b'],
    param_dtype='bfloat16',
    compute_dtype='bfloat16',
    remat=True,
  ),
  data=ChatDataConfig(max_length=1024),
  adapter=AdapterOptions(rank=16, alpha=32.0),
  step=StepConfig(weight_bits=8),
)
