"""Scores of predicted classes."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._checks import check_int


def accuracy(predictions: Tensor, labels: Tensor, *, ignore_index: int = -100) -> float:
    """Fraction of the labels other than `ignore_index` that are predicted; 0.0 when there are none.

    Args: predictions, labels: integers of one shape: [N], or maps [N, H, W].

    >>> accuracy(logits.argmax(-1), labels)
    """
    keep = _kept(predictions, labels, ignore_index)
    return int(((predictions == labels) & keep).sum()) / max(1, int(keep.sum()))


def mean_iou(predictions: Tensor, labels: Tensor, *, num_classes: int, ignore_index: int = 255) -> float:
    """Mean over classes of intersection / union, counted over all pixels of all images whose label is not `ignore_index`.

    A class that is neither predicted nor a label is left out of the mean; 0.0 when no class is there.

    Args: predictions, labels: integers in [0, num_classes) of one shape, e.g. [N, H, W].

    >>> mean_iou(logits.argmax(1), labels, num_classes=19)
    """
    keep = _kept(predictions, labels, ignore_index)
    predicted, true = predictions[keep].long(), labels[keep].long()
    for name, values in (("predictions", predicted), ("labels", true)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(
                f"{name}: expected classes in [0, {num_classes}), got {int(values.min())} to {int(values.max())}"
            )
    table = (num_classes * true + predicted).bincount(minlength=num_classes**2).view(num_classes, num_classes).double()
    both = table.diagonal()
    union = table.sum(0) + table.sum(1) - both
    there = union > 0
    return float((both[there] / union[there]).mean()) if bool(there.any()) else 0.0


def expected_calibration_error(logits: Tensor, labels: Tensor, *, n_bins: int = 15, ignore_index: int = -100) -> float:
    """sum over bins of (share of rows) |accuracy - mean confidence|; the confidence is the greatest softmax probability.

    Bins are (b/n, (b+1)/n]; empty ones add nothing. 0.0 when every label is ignored.

    Args: logits: [N, C], finite. labels: [N] integers or `ignore_index`.

    >>> expected_calibration_error(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))  # half sure and right
    0.5
    """
    check_int("n_bins", n_bins, low=1)
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"labels: expected [N] for logits [N, C], got {tuple(labels.shape)} and {tuple(logits.shape)}")
    keep = labels.long() != ignore_index
    confidence, predicted = torch.softmax(logits[keep].double(), -1).max(-1)  # the first class wins a tie
    right = (predicted == labels[keep]).double()
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=logits.device) / n_bins
    gaps = confidence.new_zeros(n_bins).index_add(0, torch.bucketize(confidence, edges), right - confidence)
    return float(gaps.abs().sum() / max(1, len(confidence)))


def _kept(predictions: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    if predictions.shape != labels.shape:
        raise ValueError(f"labels: expected shape {tuple(predictions.shape)}, got {tuple(labels.shape)}")
    return labels.long() != ignore_index
