"""MaKD: a classifier also learns to answer yes/no questions about the image, with a multimodal model's probabilities as targets.

Paper: Multi-aspect Knowledge Distillation with Large Language Model. Lee, Bang, Kwon, Kim; CVPR Workshops 2025;
https://arxiv.org/abs/2501.13341
Based on: the authors' code, github.com/taegyeong-lee/MaKD-Multi-aspect-knowledge-distillation-with-Large-Language-Model at 582f837.
Differs from the code: it scores the greatest of ALL outputs in validation, so that an aspect can win; here, as the paper means, the
    classes alone. Outputs beyond C + Q are ignored there and refused here. README and paper call the targets logits: used are, there
    and here, probabilities (`kdfast.data.aspects.yes_no_to_probability` makes them).
Symbols: x [B, C + Q] student outputs, classes first; q [B, Q] in [0, 1] stored answers; y [B]; x_a = x[:, C:].

    L = w_ce CE(x[:, :C], y) + alpha mean_{B Q} [ softplus(x_a) - q x_a ]

The minimum of the second term is the entropy of the answers, not 0; the part "aspect_kl" is what is left above it. No teacher while
training and nothing more at inference; a KD loss may be added. Answers: `kdfast.data.aspects` (a file, a model, small models).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_float_tensor, check_int, check_number
from kdfast._library import compute_dtype, readable
from kdfast.losses import LossOutput, cross_entropy_loss
from kdfast.methods._protocol import Context
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import replace_head


def multi_aspect_loss(
    logits: Tensor, labels: Tensor, aspects: Tensor, *, num_classes: int, alpha: float = 4.0, ce_weight: float = 1.0
) -> LossOutput:
    """w_ce CE over the classes + alpha times the mean sigmoid cross-entropy over all B Q answers.

    Args:
        logits: x [B, C + Q]. labels: [B] integers in [0, C). aspects: q [B, Q] probabilities (integers are converted).
    Returns:
        LossOutput(loss, {"ce", "aspect", "aspect_kl"}), without weights; aspect_kl is aspect less the answers' entropy.
    Raises:
        ValueError: a width other than C + Q (both are named), Q = 0, rows that differ, answers outside [0, 1] or NaN, a label outside
            [0, C), also where it would be an aspect's column, negative weights.

    >>> loss, parts = multi_aspect_loss(student(x), y, table.lookup(index), num_classes=100)
    """
    check_float_tensor("logits", logits)
    check_int("num_classes", num_classes, low=1)
    check_number("alpha", alpha, low=0.0)
    check_number("ce_weight", ce_weight, low=0.0)
    if logits.dim() != 2 or aspects.dim() != 2 or len(aspects) != len(logits):
        raise ValueError(
            f"aspects: expected [B, Q] for logits [B, C + Q], got {tuple(aspects.shape)} and {tuple(logits.shape)}"
        )
    if aspects.shape[1] == 0:
        raise ValueError("aspects: expected at least one question, got none")
    if logits.shape[1] != num_classes + aspects.shape[1]:
        raise ValueError(
            f"logits: expected {num_classes} classes + {aspects.shape[1]} aspects = {num_classes + aspects.shape[1]} outputs, got {logits.shape[1]}"
        )
    if readable(aspects) and not bool(((aspects >= 0) & (aspects <= 1)).all()):
        raise ValueError(
            "aspects: expected probabilities in [0, 1]; raw logits of an answer go through yes_no_to_probability first"
        )
    x = logits.to(compute_dtype(logits))
    q = aspects.detach().to(x)
    ce = cross_entropy_loss(x[:, :num_classes], labels, ignore_index=None)
    aspect = F.binary_cross_entropy_with_logits(x[:, num_classes:], q)
    entropy = (torch.special.entr(q) + torch.special.entr(1 - q)).mean()
    parts = {"ce": ce.detach(), "aspect": aspect.detach(), "aspect_kl": aspect.detach() - entropy}
    return LossOutput(ce_weight * ce + alpha * aspect, parts)


def predict_classes(logits: Tensor, num_classes: int) -> Tensor:
    """argmax over the first C outputs: an aspect never wins."""
    return logits[..., :num_classes].argmax(-1)


def widen_classifier(linear: nn.Linear, extra: int) -> nn.Linear:
    """A copy of Linear(D, C) with `extra` freshly drawn outputs after the old ones."""
    check_int("extra", extra, low=1)
    wide = nn.Linear(linear.in_features, linear.out_features + extra, bias=linear.bias is not None).to(linear.weight)
    with torch.no_grad():
        wide.weight[: linear.out_features] = linear.weight
        if linear.bias is not None:
            wide.bias[: linear.out_features] = linear.bias
    return wide


# ---------------------------------------------------------------- by name
class AspectHead(nn.Module):
    """A widened classifier: all C + Q outputs while training, the C classes in evaluation."""

    def __init__(self, linear: nn.Linear, aspects: int) -> None:
        super().__init__()
        self.num_classes, self.linear = linear.out_features, widen_classifier(linear, aspects)

    def forward(self, features: Tensor) -> Tensor:
        logits = self.linear(features)
        return logits if self.training else logits[..., : self.num_classes]


class Method(MethodBase):
    """Widens the student's last linear layer and reads the answers [B, Q] from the batch, (inputs, labels, answers); no teacher.

    Args: aspects: Q. alpha, ce_weight: `multi_aspect_loss`. column: where in the batch the answers are. head: path of the layer.
    """

    uses_teacher = False
    columns = ("answers",)

    def __init__(
        self, *, aspects: int = 50, alpha: float = 4.0, ce_weight: float = 1.0, column: int = 2, head: str | None = None
    ) -> None:
        super().__init__()
        self.aspects, self.column, self.head = check_int("aspects", aspects, low=1), check_int("column", column), head
        self.weights = {
            "alpha": check_number("alpha", alpha, low=0.0),
            "ce_weight": check_number("ce_weight", ce_weight, low=0.0),
        }
        self.num_classes = 0

    def adapt(self, student: nn.Module) -> nn.Module:
        def make(head: nn.Linear) -> nn.Module:
            self.num_classes = head.out_features
            return AspectHead(head, self.aspects)

        return replace_head(student, make, self.head)

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        batch: Any = context.batch
        if len(batch) <= self.column:
            raise ValueError(f"batch: expected the answers at place {self.column}, got {len(batch)} entries")
        return multi_aspect_loss(
            context.student, context.labels, batch[self.column], num_classes=self.num_classes, **self.weights
        )
