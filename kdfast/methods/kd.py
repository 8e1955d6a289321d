"""Knowledge distillation: the student learns the labels and the teacher's softened distribution.

Paper: Distilling the Knowledge in a Neural Network. Hinton, Vinyals, Dean; 2015; https://arxiv.org/abs/1503.02531
Based on: section 2 of the paper. The weights are those of the usual CIFAR-100 recipes (0.1 and 0.9), not the paper's, which
gives none but advises a considerably lower one for the labels.
"""

from __future__ import annotations

from torch import Tensor

from kdfast.losses import LossOutput, distillation_loss
from kdfast.methods._protocol import LogitMethod


def kd_total(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    ignore_index: int = -100,
    dim: int = -1,
) -> LossOutput:
    """ce_weight CE(student, labels) + kd_weight T^2 KL(softmax(teacher/T) || softmax(student/T)), in one pass.

    Args:
        student, teacher: logits [..., C], or with the classes on axis `dim`. labels: [...] integers or `ignore_index`.
    Returns:
        LossOutput(loss, {"ce", "kd"}), both means over the kept rows.

    >>> loss, parts = kd_total(student, teacher, labels, temperature=2.0)
    """
    return distillation_loss(
        student, teacher, labels, kind="forward_kl", temperature=temperature, scale_t2=True, ce_weight=ce_weight,
        kd_weight=kd_weight, ignore_index=ignore_index, dim=dim,
    )  # fmt: skip


class Method(LogitMethod, function=kd_total): ...
