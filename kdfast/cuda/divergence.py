"""`kdfast.ops.divergence` by csrc/cuda/divergence.cu: the three ops as functions on tensors. Each row of logits is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._library import address, contiguous, final_gradient_like, gradient_like, operand
from kdfast.cuda import call, core
from kdfast.ops.divergence import N_STATS, _row_shape


def rows(
    student: Tensor, teacher: Tensor, labels: Tensor | None, row_temperature: Tensor | None, kind: str, a: float, b: float,
    temperature: float, classes: int, dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kdfast::divergence_rows: rows and their stats, in the form of the Triton kernels."""
    shape = _row_shape(student, dim)
    out = student.new_empty(shape, dtype=torch.float32)
    stats = student.new_empty([N_STATS, *shape], dtype=torch.float32)
    row_temperature = contiguous(row_temperature, torch.float32)
    call(
        core().cuda_divergence_rows, student, student.device.index or 0, *operand(student), *operand(teacher), student.shape,
        teacher.shape[dim], dim, classes, kind, a, b, temperature, address(row_temperature), address(out), address(stats),
    )  # fmt: skip
    return out, stats


def rows_backward(
    grad_rows: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, labels: Tensor | None, row_temperature: Tensor | None,
    kind: str, a: float, b: float, temperature: float, classes: int, dim: int, need_student: bool, need_teacher: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kdfast::divergence_rows_backward."""
    grads = gradient_like(student, need_student), gradient_like(teacher, need_teacher)
    row_temperature, grad_rows = contiguous(row_temperature, torch.float32), grad_rows.contiguous()
    if need_student or need_teacher:
        call(
            core().cuda_divergence_rows_backward, student, *operand(student), *operand(teacher), student.shape,
            teacher.shape[dim], dim, classes, kind, a, b, temperature, address(row_temperature), address(grad_rows),
            address(stats), *operand(grads[0]), *operand(grads[1]),
        )  # fmt: skip
    return grads


def weighted_sum(
    student: Tensor, teacher: Tensor, labels: Tensor | None, row_temperature: Tensor | None, row_weight: Tensor | None,
    kind: str, a: float, b: float, temperature: float, classes: int, dim: int, kd_factor: float, ce_factor: float,
    label_smoothing: float, need_student: bool, need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """kdfast::divergence_sum: loss, (KD, CE) and the final gradients in one read of the logits."""
    grads = final_gradient_like(student, need_student), final_gradient_like(teacher, need_teacher)
    labels = contiguous(labels, torch.int64)
    row_temperature, row_weight = contiguous(row_temperature, torch.float32), contiguous(row_weight, torch.float32)
    shape = _row_shape(student, dim)
    terms = student.new_empty([2 if ce_factor != 0 else 1, *shape], dtype=torch.float32)  # of each row: KD, CE
    loss, parts = student.new_empty((), dtype=torch.float32), student.new_empty(2, dtype=torch.float32)
    call(
        core().cuda_divergence_sum, student, student.device.index or 0, *operand(student), *operand(teacher), student.shape,
        teacher.shape[dim], dim, classes, kind, a, b, temperature, address(labels), address(row_temperature),
        address(row_weight), kd_factor, ce_factor, label_smoothing, *operand(grads[0]), *operand(grads[1]), address(terms[0]),
        address(terms[1]) if ce_factor != 0 else 0, address(loss), address(parts),
    )  # fmt: skip
    return loss, parts, *grads
