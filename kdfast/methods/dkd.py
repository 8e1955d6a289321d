"""Decoupled knowledge distillation: the teacher's word on the target class and on the others, weighted apart.

Paper: Decoupled Knowledge Distillation. Zhao, Cui, Song, Qiu, Liang; CVPR 2022; https://arxiv.org/abs/2203.08679
Based on: equation 7 of the paper. The linear warm-up of the distillation term is that of the authors' training code, where
it lasts 20 epochs; here it is counted in steps.
"""

from __future__ import annotations

from torch import Tensor

from kdfast._checks import check_int
from kdfast.losses import LossOutput, distillation_loss
from kdfast.methods._protocol import LogitMethod


def dkd_total(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    warmup_steps: int = 0,
    step: int = 0,
    ignore_index: int = -100,
    dim: int = -1,
) -> LossOutput:
    """ce_weight CE + min(1, step / warmup_steps) kd_weight T^2 (alpha TCKD + beta NCKD), in one pass.

    TCKD and NCKD: `kdfast.losses.dkd_loss`. Shapes, labels and parts as in `kdfast.methods.kd.kd_total`.

    Args:
        warmup_steps: steps in which the distillation term grows from 0; 0 means none. step: steps done.

    >>> loss, parts = dkd_total(student, teacher, labels, beta=2.0)
    """
    check_int("warmup_steps", warmup_steps)
    ramp = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return distillation_loss(
        student, teacher, labels, kind="dkd", beta=(alpha, beta), temperature=temperature, scale_t2=True, ce_weight=ce_weight,
        kd_weight=ramp * kd_weight, ignore_index=ignore_index, dim=dim,
    )  # fmt: skip


class Method(LogitMethod, function=dkd_total): ...
