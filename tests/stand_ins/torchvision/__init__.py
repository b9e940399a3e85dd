"""Stands in where the real one cannot be imported; what modules import of it is not used by any test."""

transforms = utils = None
