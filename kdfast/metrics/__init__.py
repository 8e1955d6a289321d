"""Scores of a finished model, and comparisons of scores over seeds."""

from kdfast.metrics.classification import accuracy, expected_calibration_error, mean_iou
from kdfast.metrics.comparison import compare, mean_and_error, sentence, summary
from kdfast.metrics.generation import frechet_distance
from kdfast.metrics.ranking import average_precision, filtered_rank, hits_at, mean_reciprocal_rank

__all__ = [
    "accuracy", "average_precision", "compare", "expected_calibration_error", "filtered_rank", "frechet_distance", "hits_at", "mean_and_error", "mean_iou", "mean_reciprocal_rank", "sentence", "summary",
]  # fmt: skip
