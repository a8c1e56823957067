"""Scoring a language model of a Hugging Face folder in tasks."""
