"""A student's feature map brought to the teacher's, so that the teacher's own classifier can read it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_int
from kdfast.nn.blocks import conv_block
from kdfast.nn.capture import capture_outputs


class TransferModule(nn.Module):
    """1x1 to Ct / r, 3x3, 1x1 to Ct, each with batch norm and ReLU, no biases: [B, Cs, H, W] -> [B, Ct, H, W]. r = `factor`."""

    def __init__(self, student_channels: int, teacher_channels: int, factor: int = 2) -> None:
        super().__init__()
        check_int("factor", factor, low=1)
        if teacher_channels % factor:
            raise ValueError(f"factor: expected a divisor of the teacher's {teacher_channels} channels, got {factor}")
        middle = teacher_channels // factor
        sizes = ((student_channels, middle, 1), (middle, middle, 3), (middle, teacher_channels, 1))
        self.layers = nn.Sequential(*(conv_block(a, b, kernel=k) for a, b, k in sizes))

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers(maps)


def match_height(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The map of greater height is average-pooled to the square size of the other; height decides."""
    height, wanted = student.shape[2], teacher.shape[2]
    if height > wanted:
        return F.adaptive_avg_pool2d(student, wanted), teacher
    return student, teacher if height == wanted else F.adaptive_avg_pool2d(teacher, height)


class ReusedClassifier(nn.Module):
    """classifier(mean of transfer(the student's last map)): logits of a student that borrows the teacher's classifier.

    Args: student, path: the model and where its last map is. transfer: a `TransferModule`. classifier: the teacher's, frozen.
        height: of the teacher's map, to which a higher one is pooled as in `match_height`; None takes every map as it is.
    """

    def __init__(
        self, student: nn.Module, path: str, transfer: nn.Module, classifier: nn.Module, height: int | None = None
    ) -> None:
        super().__init__()
        self.height = height
        self.student, self.path, self.transfer, self.classifier = student, path, transfer, classifier

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        with capture_outputs(self.student, {"maps": self.path}) as found:
            self.student(*inputs, **named)
        maps = found["maps"]
        if self.height is not None and maps.shape[2] > self.height:
            maps = F.adaptive_avg_pool2d(maps, self.height)
        return self.classifier(self.transfer(maps).mean((2, 3)))
