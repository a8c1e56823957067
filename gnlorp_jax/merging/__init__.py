"""Merging of models that were tuned from one base, tensor by tensor.

Nothing here knows a model or a file: `methods.survey` and `methods.update` see
the task vectors of one tensor at a time.
"""
