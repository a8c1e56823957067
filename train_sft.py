"""Fine-tunes a language model on conversations: `gnlorp_jax.train_sft`."""

from gnlorp_jax.train_sft import main

if __name__ == '__main__':
  main()
