"""Merging Hugging Face folders that were tuned from one base."""
