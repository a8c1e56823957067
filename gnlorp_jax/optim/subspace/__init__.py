"""Optimizers inside a low-rank subspace of the gradients.

The words of this folder, in the order of a step:

  kernel       an array ``[*, in, out]``: a stack of matrices, each with a
               subspace of its own; the stack is all axes before the last two
  axis         ``in`` or ``out``, the last two axes of a kernel; those that a
               basis makes shorter are compressed, see `sides`
  basis        what a projection needs to go into the subspace and back: columns
               that span it, their numbers, or a seed
  refresh      a new basis for one matrix, which is due once per gap; the first
               waits for the first gradient that is not zero, see `refresh`
  refit        what a projection does to a basis at a refresh
  projected    a gradient's coordinates in the basis, also called `low`
  moments      what the inner optimizer remembers of the coordinates; a refresh
               may move them to the new basis, see `moments`
  direction    what the inner optimizer makes of the coordinates
  expand       go back from coordinates to a full-size array
  recovery     a full-size update made of gradient, coordinates and direction,
               where expanding the direction is not all
  error        what projecting lost of a gradient, added to the next one, see
               `error_feedback`
"""
