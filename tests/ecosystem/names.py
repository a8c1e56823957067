"""Which optimizers the tests of this folder take."""

from gnlorp_jax.optim import methods

# Whose states have nothing that those of others have not: tuples of the same
# arrays as those of `alice`, `fira`, `projfactor` and `scale`.
ALIKE = ('alice0', 'frugal', 'muon', 'sinkgd', 'subtrack')
NAMES = tuple(name for name in methods.names() if name not in ALIKE)
