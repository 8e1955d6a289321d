"""Losses over one row of logits each: any divergence, KD, decoupled KD, and cross-entropy plus divergence in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._checks import check_choice, check_dim, check_float_tensor, check_labels, check_number, check_row_tensor
from kdfast.losses.module import LossModule, LossOutput
from kdfast.ops.divergence import cross_entropy_rows, divergence, divergence_total

REDUCTIONS = ("mean", "sum", "none")


def divergence_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | tuple[float, float] = 0.5,
    temperature: float | Tensor = 1.0,
    scale_t2: bool = False,
    labels: Tensor | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    teacher_grad: bool = False,
    reduction: str = "mean",
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Divergence between the softened distributions of student and teacher.

        loss = sum_i mask_i weight_i T^2 D_i / sum_i mask_i          (reduction="mean"; T^2 only with scale_t2)

    D_i is `kdfast.ops.divergence` of row i, where the kinds are defined. The denominator counts kept rows: all rows of a
    [B, T, V] or [B, C, H, W] tensor, not the batch (docs/traps.md, 10). No kept row: exact 0 with zero gradient.

    Args:
        student, teacher: logits, [..., C], or with the classes on axis `dim`. The teacher is detached unless `teacher_grad`.
        kind, beta, temperature, labels, vocab_size, backend: as in `kdfast.ops.divergence`.
        scale_t2: multiply by T^2 so that the gradient's size does not depend on T (Hinton et al. 2015, section 2).
        mask: [...] bool, True = keep. weight: [...] a factor for each row.
        reduction: "mean", "sum" or "none" (rows [...], zero where masked).

    >>> divergence_loss(student, teacher, kind="js", beta=0.5, mask=labels != -100)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, low=0.0, open_low=True)  # before it is squared
    teacher = teaching(teacher, teacher_grad)
    if reduction == "none" or isinstance(temperature, Tensor):
        if kind == "dkd" and mask is not None and isinstance(labels, Tensor):
            check_mask(mask, labels.shape, labels.device)
            labels = torch.where(mask, labels, 0)  # a masked row's label may be anything
        rows = divergence(
            student, teacher, kind=kind, beta=beta, temperature=temperature, labels=labels, vocab_size=vocab_size, dim=dim,
            backend=backend,
        )  # fmt: skip
        if scale_t2:
            t = temperature.to(rows.dtype) if isinstance(temperature, Tensor) else temperature
            rows = rows * t**2
        return reduce_rows(rows, mask, weight, reduction)
    row_weight, divisor = row_weights(student, mask, weight, dim, reduction)
    loss, _ = divergence_total(
        student, teacher, kind=kind, beta=beta, temperature=temperature, labels=labels, vocab_size=vocab_size,
        row_weight=row_weight, kd_factor=(temperature**2 if scale_t2 else 1.0) / divisor, dim=dim, backend=backend,
    )  # fmt: skip
    return loss


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    scale_t2: bool = True,
    kind: str = "forward_kl",
    beta: float | tuple[float, float] = 0.5,
    labels: Tensor | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    teacher_grad: bool = False,
    reduction: str = "mean",
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Knowledge distillation (Hinton, Vinyals, Dean 2015): `divergence_loss` with T = 4 and the T^2 factor.

        kd_loss(s, t) = T^2 F.kl_div(log_softmax(s/T), softmax(t/T), reduction="batchmean")        for s, t [B, C]

    Arguments, shapes and errors: `divergence_loss`.

    >>> loss = 0.5 * F.cross_entropy(student, labels) + 0.5 * kd_loss(student, teacher)
    """
    return divergence_loss(
        student, teacher, kind=kind, beta=beta, temperature=temperature, scale_t2=scale_t2, labels=labels, vocab_size=vocab_size,
        mask=mask, weight=weight, teacher_grad=teacher_grad, reduction=reduction, dim=dim, backend=backend,
    )  # fmt: skip


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
    scale_t2: bool = True,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    teacher_grad: bool = False,
    reduction: str = "mean",
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022, eq. 7): alpha TCKD + beta NCKD, times T^2.

    TCKD is the KL of (target, rest) as two classes, NCKD the KL of the other classes renormalised; alpha = 1 and
    beta = 1 - p_target per row would be plain KD. With two classes NCKD is 0. Defaults: the authors' CIFAR-100 setting.

    Args:
        labels: [...] integers in [0, C), the target class. Others as in `divergence_loss`.
        teacher_grad: this kind has no fused teacher gradient, so with it the plain-torch reference runs, in its precision.
    """
    return divergence_loss(
        student, teacher, kind="dkd", beta=(alpha, beta), temperature=temperature, scale_t2=scale_t2, labels=labels,
        vocab_size=vocab_size, mask=mask, weight=weight, teacher_grad=teacher_grad, reduction=reduction, dim=dim, backend=backend,
    )  # fmt: skip


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float | tuple[float, float] = 0.5,
    temperature: float | Tensor = 1.0,
    scale_t2: bool = True,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    teacher_grad: bool = False,
    reduction: str = "mean",
    dim: int = -1,
    backend: str | None = None,
) -> LossOutput:
    """Cross-entropy and divergence in ONE pass over the logits.

        loss = ce_weight CE(student, labels) + kd_weight T^2 D(student/T, teacher/T)       (T^2 only with scale_t2)

    Rows whose label is `ignore_index` are dropped from both terms, and so are rows outside `mask`; both terms are means
    over the same kept rows. Labels are used as they are: shift them for a causal model first.

    Args:
        labels: [...] integers in [0, C) or `ignore_index`. label_smoothing: as in F.cross_entropy.
        Others as in `divergence_loss`.
    Returns:
        LossOutput(loss, {"ce": ..., "kd": ...}); the parts carry T^2 but not the weights, and reduction as asked
        (the rows of reduction="none" take two passes). With ce_weight = 0 the cross-entropy is not computed: its part is 0.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_number("ce_weight", ce_weight)
    check_number("kd_weight", kd_weight)
    check_number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, low=0.0, open_low=True)  # before it is squared
    check_labels(labels, row_shape(student, dim), student.device)
    teacher = teaching(teacher, teacher_grad)
    keep = labels.long() != ignore_index  # a narrow label type would wrap it: uint8 156 == -100
    if mask is not None:
        check_mask(mask, labels.shape, labels.device)
        keep = keep & mask
    if reduction == "none" or isinstance(temperature, Tensor):
        classes = vocab_size or student.shape[dim]
        kd = divergence_loss(
            student, teacher, kind=kind, beta=beta, temperature=temperature, scale_t2=scale_t2,
            labels=torch.where(keep, labels, 0) if kind == "dkd" else None, vocab_size=vocab_size, mask=keep, weight=weight,
            teacher_grad=teacher_grad, reduction=reduction, dim=dim, backend=backend,
        )  # fmt: skip
        if ce_weight == 0:
            return LossOutput(kd_weight * kd, {"ce": torch.zeros_like(kd), "kd": kd.detach()})
        ce = reduce_rows(
            cross_entropy_rows(student, labels, keep, classes, dim, label_smoothing), keep, weight, reduction
        )
        # a term of weight 0 is left out: 0 times an infinite divergence is not 0
        total = sum((w * term for w, term in ((ce_weight, ce), (kd_weight, kd)) if w != 0), start=torch.zeros_like(ce))
        return LossOutput(total, {"ce": ce.detach(), "kd": kd.detach()})
    t2 = temperature**2 if scale_t2 else 1.0
    row_weight, divisor = row_weights(student, keep, weight, dim, reduction)
    loss, parts = divergence_total(
        student, teacher, kind=kind, beta=beta, temperature=temperature,
        labels=labels if ce_weight != 0 or kind == "dkd" else None, vocab_size=vocab_size, row_weight=row_weight,
        kd_factor=kd_weight * t2 / divisor, ce_factor=ce_weight / divisor,
        label_smoothing=label_smoothing, dim=dim, backend=backend,
    )  # fmt: skip
    return LossOutput(loss, {"ce": parts[1] / divisor, "kd": parts[0] * (t2 / divisor)})


# ---------------------------------------------------------------- reduction: one rule for every row loss
def teaching(teacher: Tensor, teacher_grad: bool) -> Tensor:
    """The teaching side, without a graph unless asked. What is no tensor passes: the op's error names the argument."""
    return teacher if teacher_grad or not isinstance(teacher, Tensor) else teacher.detach()


def row_shape(student: Tensor, dim: int) -> torch.Size:
    """The shape of the rows: of the logits without the class axis."""
    check_float_tensor("student", student)
    dim = check_dim(student, dim)
    return student.shape[:dim] + student.shape[dim + 1 :]


def row_weights(
    student: Tensor, mask: Tensor | None, weight: Tensor | None, dim: int, reduction: str
) -> tuple[Tensor | None, float]:
    """(row weights or None for all 1, divisor): the reduction as weights, made on the device before the kernel runs."""
    shape = row_shape(student, dim)
    rows = max(shape.numel(), 1)
    if mask is None:
        if weight is not None:
            check_row_tensor("weight", weight, shape, student.device)
        return weight, float(rows) if reduction == "mean" else 1.0
    check_mask(mask, shape, student.device)
    # 1 / count in float32 would cost a float64 loss half its digits, in a weight's own half or integer type everything
    kept = mask.to(torch.float32 if mask.device.type == "mps" else torch.float64)
    if weight is not None:
        check_row_tensor("weight", weight, shape, student.device)
        kept = torch.where(mask, weight.to(kept.dtype), 0.0)  # a masked row's weight may be anything
    if reduction == "mean":
        kept = kept / mask.sum().clamp_min(1)
    return kept, 1.0


def reduce_rows(rows: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: str) -> Tensor:
    """mean over kept rows, sum, or none (zeros where masked) of rows that exist as a tensor."""
    if mask is not None:
        check_mask(mask, rows.shape, rows.device)
        rows = torch.where(mask, rows, 0.0)
    if weight is not None:
        check_row_tensor("weight", weight, rows.shape, rows.device)
        weighted = rows * weight
        rows = weighted if mask is None else torch.where(mask, weighted, 0.0)
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    return total / (max(rows.numel(), 1) if mask is None else mask.sum().clamp_min(1))


def check_mask(mask: Tensor, shape: torch.Size, device: torch.device) -> None:
    check_row_tensor("mask", mask, shape, device)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool (True = keep), got {mask.dtype}")


class DivergenceLoss(LossModule, function=divergence_loss): ...


class KDLoss(LossModule, function=kd_loss): ...


class DKDLoss(LossModule, function=dkd_loss): ...


class DistillationLoss(LossModule, function=distillation_loss): ...
