"""Scores of a finished model."""

from kdfast.metrics.classification import accuracy

__all__ = ["accuracy"]
