"""Cross-entropy with labels, exactly 0 without a kept row, and the entropy of predictions, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._checks import check_choice, check_dim, check_labels, check_number, check_values
from kdfast._library import compute_dtype, readable
from kdfast.losses.divergence import REDUCTIONS, check_mask, reduce_rows, row_shape
from kdfast.losses.module import LossModule
from kdfast.ops.divergence import cross_entropy_rows


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dim: int = -1,
) -> Tensor:
    """-log softmax(z)_y, the mean over kept rows: F.cross_entropy, but float32 inside, and no kept row is exact 0, not NaN.

    Args:
        logits: [..., C], or with the classes on axis `dim`. labels: [...] integers in [0, C) or `ignore_index` (None: every
            row has a label, and -100 is refused like any other outside [0, C)).
        mask: [...] bool, True = keep. weight: [...] a factor for each row; the mean still divides by the number of kept rows.
        reduction: "mean", "sum" or "none" (zeros where not kept). label_smoothing: as in F.cross_entropy.
    Raises:
        ValueError: a label outside [0, C), where labels can be read (on the CPU).

    >>> loss = cross_entropy_loss(student, labels)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    shape = row_shape(logits, dim)
    check_labels(labels, shape, logits.device)
    # long(): a narrow label type would wrap the index
    keep = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels.long() != ignore_index
    if mask is not None:
        check_mask(mask, shape, logits.device)
        keep = keep & mask
    index, classes = torch.where(keep, labels.long(), 0), logits.shape[dim]
    if readable(index):
        check_values({}, index, classes)
    rows = cross_entropy_rows(logits, index, keep, classes, check_dim(logits, dim), label_smoothing)
    return reduce_rows(rows, keep, weight, reduction)


def entropy_rows(logits: Tensor, *, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """H(softmax(z / T)) = -sum_c p_c log p_c in nats, [...]; a class of logit -inf adds 0, value and gradient. Float32 or wider.

    >>> round(entropy_rows(torch.zeros(1, 8)).exp().item(), 4)
    8.0
    """
    check_number("temperature", temperature, low=0.0, open_low=True)
    z = logits.to(compute_dtype(logits)) / temperature
    log_p = torch.log_softmax(z, check_dim(logits, dim))
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim)


class CrossEntropyLoss(LossModule, function=cross_entropy_loss): ...
