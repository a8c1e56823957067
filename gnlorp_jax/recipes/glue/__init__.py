"""Fine-tuning on GLUE, or a task like it, by every method, side by side."""
