"""Talking to a language model of a Hugging Face folder."""
