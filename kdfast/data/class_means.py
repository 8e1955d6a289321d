"""Means of rows by class over a data set, accumulated batch by batch in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._checks import check_choice, check_float_tensor, check_int, check_labels


class ClassMeans:
    """mean over the rows of class c, for every class: of features, or of predicted probabilities.

    >>> means = ClassMeans(3)
    >>> for features, labels in ((torch.eye(3), torch.tensor([0, 1, 2])), (torch.zeros(1, 3), torch.tensor([0]))):
    ...     means.update(features, labels)
    >>> means.compute()[0].tolist()
    [0.5, 0.0, 0.0]
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = check_int("num_classes", num_classes, low=1)
        self.sums: Tensor | None = None
        self.counts: Tensor = torch.zeros(num_classes, dtype=torch.int64)

    def update(self, rows: Tensor, labels: Tensor, *, ignore_index: int = -100) -> None:
        """rows [B, D], labels [B] integers in [0, C) or `ignore_index`, whose rows are left out."""
        check_float_tensor("rows", rows)
        if rows.dim() != 2:
            raise ValueError(f"rows: expected [B, D], got {tuple(rows.shape)}")
        check_labels(labels, rows.shape[:1], rows.device)
        labels = labels.long()
        keep = labels != ignore_index
        rows, labels = rows.detach()[keep].double(), labels[keep]
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels: expected integers in [0, {self.num_classes}), got {int(labels.min())} to {int(labels.max())}"
            )
        if self.sums is None:
            self.sums = rows.new_zeros(self.num_classes, rows.shape[1])
            self.counts = self.counts.to(rows.device)
        self.sums.index_add_(0, labels, rows)
        self.counts += labels.bincount(minlength=self.num_classes)

    def compute(self, *, missing: str = "raise") -> Tensor:
        """[C, D] float64. A class without a row: missing="raise" says which, "nan" makes its mean NaN."""
        check_choice("missing", missing, ("raise", "nan"))
        if self.sums is None:
            raise ValueError("update: expected at least one batch before the means, got none")
        absent = (self.counts == 0).nonzero().flatten().tolist()
        if absent and missing == "raise":
            raise ValueError(f"labels: no row of class {', '.join(map(str, absent))}, so it has no mean")
        return self.sums / torch.where(self.counts > 0, self.counts, float("nan")).unsqueeze(1)
