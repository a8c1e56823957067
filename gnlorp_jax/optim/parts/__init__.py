"""Parts that need no subspace: directions, labels, wrappers, checks."""
