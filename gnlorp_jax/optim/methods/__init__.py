"""Complete optimizers: one file each, whose name is its config name."""
