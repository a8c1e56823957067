"""Fine-tunes a RoBERTa on GLUE or your own task: `gnlorp_jax.train_glue`."""

from gnlorp_jax.train_glue import main

if __name__ == '__main__':
  main()
