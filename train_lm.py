"""Trains a language model on text: `gnlorp_jax.train_lm`."""

from gnlorp_jax.train_lm import main

if __name__ == '__main__':
  main()
