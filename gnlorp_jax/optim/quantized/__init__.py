"""Arrays in few bits: codes, moments, weights, stochastic rounding."""
