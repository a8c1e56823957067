"""Which optimizers the tests of this folder take."""

from gnlorp_jax.optim import methods

# Whose states have nothing that those of others have not: tuples of the same
# arrays as `fira`'s, `projfactor`'s and `scale`'s.
ALIKE = ('frugal', 'muon', 'sinkgd', 'subtrack')
NAMES = tuple(name for name in methods.names() if name not in ALIKE)
