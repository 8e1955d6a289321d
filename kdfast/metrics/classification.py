"""Scores of predicted classes."""

from __future__ import annotations

from torch import Tensor


def accuracy(predictions: Tensor, labels: Tensor, *, ignore_index: int = -100) -> float:
    """Fraction of the labels other than `ignore_index` that are predicted; 0.0 when there are none.

    Args: predictions, labels: integers of one shape: [N], or maps [N, H, W].

    >>> accuracy(logits.argmax(-1), labels)
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"labels: expected shape {tuple(predictions.shape)}, got {tuple(labels.shape)}")
    keep = labels.long() != ignore_index
    return int(((predictions == labels) & keep).sum()) / max(1, int(keep.sum()))
