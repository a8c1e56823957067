"""Which examples of a pool a step trains on: coresets of mini-batches.

A pool of candidates is drawn, and a smaller batch is chosen from it. Examples
of small sources are kept whole, the rest of the batch is shared out among the
other sources (`quotas`), and within that frame one of three rules picks
(`picking`): at random, by facility location, or so that the mean gradient of
the pool is matched. The last two look at a feature of every example, its
gradient by one matrix of the model (`features`), which may be normalised and
cut (`normalising`). `selection` puts them together for the training loop.

Words of this package:

  source   where an example comes from, a number in [0, S)
  pool     the candidates of a step
  kept     of a small source: taken before anything is picked
  quota    how many examples of a source are picked

References:
  Nguyen et al., `Mini-batch Coresets for Memory-efficient Language Model
  Training on Data Mixtures`, 2024, arXiv:2407.19580 (CoLM).
"""
