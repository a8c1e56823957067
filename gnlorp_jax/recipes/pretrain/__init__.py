"""Pre-training of a language model on text, causal or masked."""
