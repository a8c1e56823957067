"""What there is to train: one folder for each, none of which imports another."""
