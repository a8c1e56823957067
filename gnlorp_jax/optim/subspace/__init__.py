"""Optimizers inside a low-rank subspace of the gradients."""
