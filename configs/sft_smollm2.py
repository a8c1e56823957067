"""SmolLM2-135M learns instructions by GradNormLoRP, all weights in float32.

Command:
  python train_sft.py --config configs/sft_smollm2.py --data CHATS.jsonl

What it takes, where the model is at hand:
  python -m gnlorp_jax.plan sft --config configs/sft_smollm2.py --device rtx4090

The search over learning rates for your data: --learning-rates 1e-4,3e-4,1e-3.
"""

from gnlorp_jax.config import ChatDataConfig, SftConfig

config = SftConfig(
  init_from='hf:HuggingFaceTB/SmolLM2-135M',
  run_dir='runs/sft_smollm2',
  method='gradnormlorp',
  batch_size=8,
  data=ChatDataConfig(max_length=1024),
)
