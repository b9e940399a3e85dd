"""Evaluation: how good samples are, and how likely images are. Not part of the container image.

Imports `model.training.data` for real images; its `plots` draw the trainer's pictures too. Nothing else in
model/ or service/ imports it.
"""
