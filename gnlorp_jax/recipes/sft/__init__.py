"""Fine-tuning of a language model on instructions and conversations."""
