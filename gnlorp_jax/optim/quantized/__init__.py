"""Arrays in few bits: codes, moments, weights, stochastic rounding.

And `pruning`, which sets moments to zero in whatever bits they are kept.
"""
