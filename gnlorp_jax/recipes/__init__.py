"""What there is to train: a folder for each, none of which imports another."""
