"""RoBERTa of 2 million parameters on English Wikipedia, for fine-tuning trials.

  python train_lm.py --config configs/roberta_tiny.py \
    --data.source 'wikipedia_en/*train*' \
    --data.validation-source 'wikipedia_en/*validation*'

Two CPU cores need about half an hour for its ten million tokens, and the BPE
tokenizer is trained on the same text. `runs/roberta_tiny/hf` is then what
`train_glue.py --model` takes. What came of it is in docs/results.md.
"""

from gnlorp_jax.config import DataConfig, OptimConfig, TrainConfig
from gnlorp_jax.models import roberta

config = TrainConfig(
  objective='masked',
  run_dir='runs/roberta_tiny',
  steps=2500,
  batch_size=32,
  eval_every=250,
  eval_batches=20,
  checkpoint_every=250,
  log_every=25,
  model=roberta.preset(
    'tiny', vocab_size=8192, hidden_dropout=0.0, attention_dropout=0.0
  ),
  data=DataConfig(source='wikipedia_en/*train*', seq_len=128),
  optim=OptimConfig(
    name='adamw', learning_rate=2e-3, b2=0.98, eps=1e-6, weight_decay=0.01
  ),
)
