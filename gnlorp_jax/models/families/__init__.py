"""A module for each family of models, named as its `model_type`."""
