"""What segmentation methods share: the epoch with the highest mIoU on the validation data is the one that is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_choice, check_int
from kdfast.methods._protocol import Context, Method, Setup
from kdfast.metrics import mean_iou
from kdfast.weights import BestWeights

KEEPS = ("best", "last")


class SegmentationMethod(Method):
    """keep="best": `deploy` gives the student of the best epoch, if `fit` had validation data; "last": as it is at the end."""

    def __init__(self, *, num_classes: int, ignore_index: int = 255, keep: str = "best") -> None:
        super().__init__()
        self.num_classes, self.ignore_index = check_int("num_classes", num_classes, low=1), ignore_index
        self.keep = check_choice("keep", keep, KEEPS)
        self.best: BestWeights | None = None

    def adapt(self, student: nn.Module) -> nn.Module:
        self.best = BestWeights(student) if self.keep == "best" else None
        return student

    def after_epoch(self, setup: Setup) -> None:
        if self.best is not None and setup.has_val:
            self.best.offer(setup.student, self._validation_score(setup))

    def deploy(self, setup: Setup) -> nn.Module:
        kept = self.best is not None and bool(self.best.score > -torch.inf)
        return self.best.model if kept and self.best is not None else setup.student

    def validation_logits(self, setup: Setup, context: Context) -> Tensor:
        """The logits [B, K, h, w] of a validation batch by which the epoch is judged."""
        return context.student

    @torch.no_grad()
    def _validation_score(self, setup: Setup) -> float:
        found: list[tuple[Tensor, Tensor]] = []
        for context in setup.sweep("val"):
            assert context.labels is not None
            logits, size = self.validation_logits(setup, context), context.labels.shape[1:]
            if logits.shape[2:] != size:
                logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)
            found.append((logits.argmax(1), context.labels))
        predictions, labels = (torch.cat(column) for column in zip(*found))
        return mean_iou(predictions, labels, num_classes=self.num_classes, ignore_index=self.ignore_index)
