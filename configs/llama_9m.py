"""LLaMA-9m for comparisons of optimizers on two CPU cores.

Command:
  python train_lm.py --config configs/llama_9m.py \
    --data.source 'TEXT/*.json.gz' \
    --data.validation-source VALIDATION.json.gz \
    --data.tokenizer T5_FOLDER

One run takes about four minutes on two CPU cores. What to expect, per optimizer
and learning rate, on English Wikipedia: docs/results/quality.md.
"""

from gnlorp_jax.config import DataConfig, OptimConfig, TrainConfig
from gnlorp_jax.models import llama

config = TrainConfig(
  run_dir='runs/llama_9m',
  steps=400,
  batch_size=8,
  eval_every=200,
  eval_batches=50,
  checkpoint_every=200,
  model=llama.preset('9m'),
  data=DataConfig(seq_len=128),
  optim=OptimConfig(rank=32, update_proj_gap=100, learning_rate=1e-2),
)
