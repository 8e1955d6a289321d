"""Scores of a finished model."""

from kdfast.metrics.classification import accuracy
from kdfast.metrics.ranking import filtered_rank, hits_at, mean_reciprocal_rank

__all__ = ["accuracy", "filtered_rank", "hits_at", "mean_reciprocal_rank"]
