"""Channel-wise distillation: each channel of a map is one distribution over the positions."""

from __future__ import annotations

from torch import Tensor

from kdfast._checks import check_pair
from kdfast.losses.divergence import kd_loss
from kdfast.losses.module import LossModule


def channel_wise_kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    scale_t2: bool = True,
    teacher_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """KL between the softmax over positions of teacher and student, a mean over samples and channels (Shu et al., ICCV 2021).

        q, p = softmax over h w of student/T, teacher/T;   loss = T^2 / (B C) sum_{b,c} sum_hw p log(p / q)      (T^2 only with scale_t2)

    Args:
        student, teacher: [B, C, ...] of one shape: logits, or feature maps (with T = 1, say). The teacher is detached unless
            `teacher_grad`. Every position counts; there is no mask. backend: as in `kdfast.ops.divergence`.
    Raises:
        ValueError: shapes that differ, or without positions; T <= 0.

    >>> loss = channel_wise_kd_loss(torch.randn(2, 5, 8, 8), torch.randn(2, 5, 8, 8), temperature=4.0)
    """
    check_pair(student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher: expected maps of shape {tuple(student.shape)} as the student's, got {tuple(teacher.shape)}"
        )
    if student.dim() < 3:
        raise ValueError(f"student: expected maps [B, C, ...], got {tuple(student.shape)}")
    return kd_loss(
        student.flatten(2), teacher.flatten(2), temperature=temperature, scale_t2=scale_t2, teacher_grad=teacher_grad,
        backend=backend,
    )  # fmt: skip


class ChannelWiseKDLoss(LossModule, function=channel_wise_kd_loss): ...
