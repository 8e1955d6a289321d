"""Distillation from a list of the teacher's most probable classes and the mass of the rest, or from sampled tokens."""

from __future__ import annotations

from torch import Tensor

from kdfast._checks import check_choice
from kdfast.losses.divergence import REDUCTIONS, reduce_rows, row_weights
from kdfast.losses.module import LossModule
from kdfast.ops.sparse_divergence import SampledTeacher, TopKTeacher, sparse_divergence


def sparse_kd_loss(
    student: Tensor,
    teacher: TopKTeacher | SampledTeacher,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_t2: bool = False,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Divergence of K + 1 buckets: each listed class, and everything else as one class with the teacher's tail mass t.

        q = softmax(student / T)      q_tail = sum of q_i over the classes not listed
        forward_kl    KL = sum_k p_k log(p_k / q_k) + t log(t / q_tail)
        reverse_kl    KL = sum_k q_k log(q_k / p_k) + q_tail log(q_tail / t)
        loss = sum_i mask_i weight_i T^2 KL_i / sum_i mask_i        (reduction="mean"; T^2 only with scale_t2)

    Never negative, and 0 only where the student has the teacher's mass on every listed class and t outside. A class in the tail
    shares its gradient in proportion to q_i, so the student's own order of those classes is kept:

        listed k         dKL/dx_k = (q_k - p_k) / T             reverse: q_k (log(q_k / p_k) - KL) / T
        tail i           dKL/dx_i = q_i (1 - t / q_tail) / T    reverse: q_i (log(q_tail / t) - KL) / T

    It pushes the whole tail down where the student has more than t there (1 - t / q_tail > 0), and up where it has less. A list
    that is renormalised instead leaves it alone: its loss is 0 for a student with almost all its mass outside the list. t = 0
    is exact in the forward KL; in the kinds that would be infinite (reverse_kl, jeffreys, ...) it counts as 2^-25.

    Args:
        student: logits [..., C]. teacher: TopKTeacher(ids [..., K], log_probs [..., K], tail [...]), its log-probabilities over
            all classes at `temperature`; or SampledTeacher(ids [..., S]), tokens drawn from the teacher, for forward_kl.
        kind, beta: as in `kdfast.ops.divergence`, without "dkd" and "binary".
        temperature: the one the teacher's list was taken at, or an error. vocab_size: the student's classes from here on are no classes.
        mask, weight, reduction: as in `divergence_loss`. backend: for the divergence of the buckets.
    Raises:
        ValueError: another temperature than the teacher's, ids out of range (on the CPU), shapes that do not fit.

    >>> log_probs, ids = torch.log_softmax(teacher, -1).topk(4)
    >>> loss = sparse_kd_loss(student, TopKTeacher(ids, log_probs), kind="reverse_kl")
    """
    check_choice("reduction", reduction, REDUCTIONS)
    options = {"kind": kind, "beta": beta, "temperature": temperature, "vocab_size": vocab_size, "backend": backend}
    if reduction == "none":
        rows = sparse_divergence(student, teacher, **options)  # type: ignore[arg-type]
        return reduce_rows(rows * (temperature**2 if scale_t2 else 1.0), mask, weight, reduction)
    row_weight, divisor = row_weights(student, mask, weight, -1, reduction)
    loss = sparse_divergence(student, teacher, row_weight=row_weight, **options)  # type: ignore[arg-type]
    if row_weight is None:
        loss = loss.sum()
    return loss * ((temperature**2 if scale_t2 else 1.0) / divisor)


class SparseKDLoss(LossModule, function=sparse_kd_loss): ...
