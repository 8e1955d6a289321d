"""Universal logit distillation: the transport distance of two models' sorted probabilities, whatever their vocabularies are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import check_choice, check_float_tensor, check_int, check_number
from kdfast._library import compute_dtype, first_derivative_only
from kdfast.losses.divergence import REDUCTIONS, reduce_rows
from kdfast.losses.module import LossModule
from kdfast.ops.linear_chunks import stored

CHUNK_BYTES = 64 << 20  # of one buffer of probabilities


def uld_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    top_k: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Universal logit distillation (Boizard et al., arXiv 2402.12030, eq. 5): distance of the sorted probabilities.

        p = sort(softmax(student / T)),  q = sort(softmax(teacher / T'))     both descending, the shorter one followed by zeros
        loss_i = sum_c |p_ic - q_ic|

    the Wasserstein distance of two distributions over unlike vocabularies when moving a class onto any other costs the same.
    With `top_k` the first so many places are compared and the rest as one: |sum_{c>k} p - sum_{c>k} q|, at most the exact loss and
    at least that minus twice the smaller rest; it needs no sort of a whole vocabulary. The rows are worked on in blocks, and the
    gradient is made along with the loss: dloss/dp_c = sign(p_c - q_c) through the softmax, 0 where both are equal.

    Args:
        student: logits [..., V]. teacher: logits [..., V'], detached: rows beside each other predict from the same text, as
            `kdfast.data.alignment.aligned_rows` pairs them.
        temperature: T > 0. teacher_temperature: T' > 0, None: T. top_k: >= 1. mask, weight, reduction: as in `divergence_loss`.
    Returns:
        float32 (float64 for float64 logits). Differentiable once, in the student. A row of only -inf on either side is 0 with zero
        gradient; NaN and +inf give NaN.
    Raises:
        ValueError: bad options, no class, rows or devices that do not fit. TypeError: logits that are no floats.

    >>> loss = uld_loss(torch.randn(4, 10, requires_grad=True), torch.randn(4, 7))
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_number("temperature", temperature, low=0.0, open_low=True)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    check_number("teacher_temperature", teacher_temperature, low=0.0, open_low=True)
    if top_k is not None:
        check_int("top_k", top_k, low=1)
    for name, logits in (("student", student), ("teacher", teacher)):
        check_float_tensor(name, logits)
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"{name}: expected logits [..., V], got shape {tuple(logits.shape)}")
    if student.shape[:-1] != teacher.shape[:-1] or student.device != teacher.device:
        raise ValueError(
            f"teacher: expected the rows of student, {tuple(student.shape[:-1])} on {student.device}, "
            f"got {tuple(teacher.shape[:-1])} on {teacher.device}"
        )
    rows = _Rows.apply(
        student.reshape(-1, student.shape[-1]), teacher.detach().reshape(-1, teacher.shape[-1]), float(temperature),
        float(teacher_temperature), top_k,
    )  # fmt: skip
    return reduce_rows(rows.reshape(student.shape[:-1]), mask, weight, reduction)


def uld_rows_reference(student: Tensor, teacher: Tensor, temperature: float, teacher_temperature: float) -> Tensor:
    """The definition, in plain torch, with all sorts: rows."""
    dtype = compute_dtype(student, teacher)
    p = (student.to(dtype) / temperature).softmax(-1).sort(-1, descending=True).values
    q = (teacher.to(dtype) / teacher_temperature).softmax(-1).sort(-1, descending=True).values
    width = max(p.shape[-1], q.shape[-1])
    rows = (F.pad(p, (0, width - p.shape[-1])) - F.pad(q, (0, width - q.shape[-1]))).abs().sum(-1)
    return rows.masked_fill(_empty(student) | _empty(teacher), 0.0)


def _empty(logits: Tensor) -> Tensor:
    """Rows without a distribution."""
    return logits.amax(-1) == -torch.inf


class _Rows(torch.autograd.Function):
    """Rows and, stored, their gradients."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, t: float, t_teacher: float, top_k: int | None) -> Tensor:
        dtype, (n, v), v_teacher = compute_dtype(student, teacher), student.shape, teacher.shape[1]
        rows = student.new_empty(n, dtype=dtype)
        grad = torch.empty_like(student, dtype=stored(student)) if ctx.needs_input_grad[0] else None
        step = max(1, CHUNK_BYTES // (max(v, v_teacher) * dtype.itemsize))
        for start in range(0, n, step):
            part = slice(start, start + step)
            p = (student[part].to(dtype) / t).softmax(-1)  # [n, V]
            q = (teacher[part].to(dtype) / t_teacher).softmax(-1)
            sorted_p, order = _largest(p, top_k)
            sorted_q, order_q = _largest(q, top_k)
            places = max(sorted_p.shape[-1], sorted_q.shape[-1])
            gap = F.pad(sorted_p, (0, places - sorted_p.shape[-1])) - F.pad(sorted_q, (0, places - sorted_q.shape[-1]))
            # All further classes as one, added up where they are: 1 - sum has no digits left when there is little of them.
            rest = p.scatter(-1, order, 0.0).sum(-1) - q.scatter(-1, order_q, 0.0).sum(-1)
            empty = _empty(student[part]) | _empty(teacher[part])
            rows[part] = (gap.abs().sum(-1) + rest.abs()).masked_fill(empty, 0.0)
            if grad is None:
                continue
            slope = rest.sign().unsqueeze(-1).expand_as(p).scatter(-1, order, gap[:, : order.shape[-1]].sign())
            row_grad = p * (slope - (p * slope).sum(-1, keepdim=True)) / t
            grad[part] = row_grad.masked_fill_(empty.unsqueeze(-1), 0.0).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.dtype = student.dtype
        return rows

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        factor = grad_rows.unsqueeze(-1)  # 0: a masked row, whose logits may be anything
        return (grad * factor).masked_fill_(factor == 0, 0.0).to(ctx.dtype), None, None, None, None


def _largest(probs: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    if top_k is None or top_k >= probs.shape[-1]:
        return probs.sort(-1, descending=True)
    return probs.topk(top_k, -1)


class ULDLoss(LossModule, function=uld_loss): ...
