"""RoBERTa of 2 million parameters on English Wikipedia, for fine-tuning trials.

  python train_lm.py --config configs/roberta_tiny.py \
    --data.source 'wikipedia_en/*train*' \
    --data.validation-source 'wikipedia_en/*validation*'

Two CPU cores need half an hour for its thirteen million tokens, and the BPE
tokenizer is trained on the same text. `runs/roberta_tiny/hf` is then what
`train_glue.py --init-from` takes. That is far too little to learn a language
from: the loss stays near that of guessing frequent words. Fine-tuning from it
shows that the methods work, not how good they are. What came of it is in
docs/results/glue.md.
"""

from gnlorp_jax.config import DataConfig, OptimConfig, TrainConfig
from gnlorp_jax.models import roberta

config = TrainConfig(
  objective='masked',
  run_dir='runs/roberta_tiny',
  mask_rate=0.3,  # Twice as much to learn from as RoBERTa's 0.15.
  steps=12500,
  batch_size=8,
  eval_every=1000,
  eval_batches=60,
  checkpoint_every=1000,
  log_every=100,
  model=roberta.preset(
    'tiny',
    vocab_size=8192,
    num_heads=4,
    initializer_std=0.05,
    hidden_dropout=0.0,
    attention_dropout=0.0,
  ),
  data=DataConfig(source='wikipedia_en/*train*', seq_len=128),
  optim=OptimConfig(
    name='adamw',
    learning_rate=1e-3,
    warmup_fraction=0.03,
    b2=0.99,
    eps=1e-6,
    weight_decay=0.01,
  ),
)
