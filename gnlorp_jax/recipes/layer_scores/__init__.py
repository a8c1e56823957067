"""Measuring how much each layer of a language model deserves training."""
