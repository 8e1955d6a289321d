"""SinKD's batch-wise Sinkhorn distance in one op, from logits to the gradient of the logits.

    p, q = softmax(student / T), softmax(teacher / T);   W_ij = ||p_i - q_j||_p;   value = <P, W>, P = sinkhorn(W)

    dW from equations (4) to (6) of `kdfast.ops.sinkhorn`;   dp_ic = sum_j dW_ij sign(p_ic - q_jc)   (p = 1)
    dstudent_i = p_i (dp_i - <dp_i, p_i>) / T

The compiled core runs the kernels of the pairwise cost and of the transport problem one after the other, and makes the
final gradient in the forward: for a batch of 16 the cost of a loss is that of calling it. On a GPU the same with Triton kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast import _core
from kdfast._dispatch import choose, core_reason
from kdfast._library import (
    address,
    compute_dtype,
    contiguous,
    direct,
    final_gradient_like,
    first_derivative_only,
    lib,
    operand,
    scale_gradient,
    transforms_active,
)
from kdfast.ops.pairwise import pairwise_cost
from kdfast.ops.sinkhorn import sinkhorn_cost
from kdfast.triton import reason as triton_reason
from kdfast.triton import register


# ---------------------------------------------------------------- reference: the definition, with every option
def sinkhorn_kd_reference(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    epsilon: float,
    n_iters: int,
    p: int,
    scale: float,
    order: str,
    mask: Tensor | None,
    reduction: str,
    backend: str | None = "reference",
) -> Tensor:
    """The equations of this module from `pairwise_cost` and `sinkhorn_cost`; with their reference, any order of derivative."""
    dtype = compute_dtype(student, teacher)
    kept_s, kept_t = _kept(student, mask), _kept(teacher, mask)  # [..., N], [..., M]

    def soften(logits: Tensor, kept: Tensor) -> Tensor:  # a dropped row may hold anything
        return torch.softmax(torch.where(kept.unsqueeze(-1), logits.to(dtype), 0.0) / temperature, -1)

    cost = pairwise_cost(soften(student, kept_s), soften(teacher, kept_t), p=p, backend=backend)  # [..., N, M]
    if p == 2:
        apart = cost > 0  # the root has no finite slope at 0; there the gradient is 0, as for p = 1
        cost = torch.where(apart, torch.where(apart, cost, 1.0).sqrt(), 0.0)
    rows = scale * sinkhorn_cost(
        cost, kept_s.to(dtype), kept_t.to(dtype), epsilon=epsilon, n_iters=n_iters, order=order, backend=backend
    )  # one value per problem
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / kept_t.sum().clamp_min(1)


def _kept(logits: Tensor, mask: Tensor | None) -> Tensor:
    kept = (logits > -math.inf).any(-1) | logits.isnan().any(-1)
    return kept if mask is None else kept & mask


# ---------------------------------------------------------------- registration
lib.define(
    "sinkhorn_kd(Tensor student, Tensor teacher, Tensor? mask, float temperature, float epsilon, int n_iters, int p, "
    "bool rows_first, float scale, bool mean, bool need_student, bool need_teacher) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("kdfast::sinkhorn_kd")
def _(student, teacher, mask, temperature, epsilon, n_iters, p, rows_first, scale, mean, need_student, need_teacher):
    """loss, one value per problem, the gradients of (each problem's value in) student and teacher"""
    dtype = compute_dtype(student, teacher)
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty(student.shape[:-2], dtype=dtype),
        final_gradient_like(student, need_student),
        final_gradient_like(teacher, need_teacher),
    )


@torch.library.impl(lib, "sinkhorn_kd", "CPU")
def _sinkhorn_kd_cpu(student, teacher, mask, temperature, epsilon, n_iters, p, rows_first, scale, mean, need_student, need_teacher):  # fmt: skip
    dtype = compute_dtype(student, teacher)
    loss, rows = torch.empty((), dtype=dtype), torch.empty(student.shape[:-2], dtype=dtype)
    grads = final_gradient_like(student, need_student), final_gradient_like(teacher, need_teacher)
    mask = contiguous(mask, torch.bool)
    batch = student.shape[0] if student.dim() == 3 else 1
    sizes = (batch, student.shape[-2], teacher.shape[-2], student.shape[-1])
    _core.core.sinkhorn_kd(
        *_problems(student), *_problems(teacher), sizes, dtype == torch.float64, address(mask), temperature, epsilon, n_iters, p,
        rows_first, scale, mean, address(loss), address(rows), *_problems(grads[0]), *_problems(grads[1]),
    )  # fmt: skip
    return loss, rows, *grads


def _problems(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """The core's operand, [N, C] taken as [1, N, C]."""
    where, dtype, strides = operand(tensor)
    return where, dtype, strides if len(strides) == 3 else (0, *strides)


register("sinkhorn_kd", "sinkhorn_kd", "sinkhorn_kd")

# ---------------------------------------------------------------- autograd
_op = direct(torch.ops.kdfast.sinkhorn_kd.default, _sinkhorn_kd_cpu)


class _SinkhornKD(torch.autograd.Function):
    """The forward stores the final gradient; problems do not mix, so an upstream factor per problem multiplies it."""

    @staticmethod
    def forward(ctx, student, teacher, mask, options, single):
        need_student, need_teacher = ctx.needs_input_grad[:2]
        loss, rows, grad_student, grad_teacher = _op(student, teacher, mask, *options, need_student, need_teacher)
        ctx.save_for_backward(grad_student, grad_teacher)
        ctx.single, ctx.dtypes = single, (student.dtype, teacher.dtype)
        return loss if single else rows

    @staticmethod
    @first_derivative_only
    def backward(ctx, upstream):
        def scaled(grad: Tensor, dtype: torch.dtype) -> Tensor:
            if ctx.single:
                return scale_gradient(grad, upstream, dtype)
            factor = upstream.unsqueeze(-1).unsqueeze(-1)
            return (grad * factor).to(dtype)

        grads = (
            scaled(g, d) if need else None
            for g, d, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        )
        return *grads, None, None, None


# ---------------------------------------------------------------- what the losses call
def sinkhorn_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    epsilon: float,
    n_iters: int,
    p: int,
    scale: float,
    order: str,
    mask: Tensor | None,
    reduction: str,
    backend: str | None,
) -> Tensor:
    """`sinkhorn_kd_reference` by the best backend. Arguments are those of `kdfast.losses.sinkhorn_kd_loss`, which checks them.

    Differentiable in student and teacher, once; `backend="reference"` gives every derivative.
    """

    def cpu() -> str | None:
        if (why := core_reason()) is not None:
            return why
        if student.device.type not in ("cpu", "meta"):
            return f"the tensors are on {student.device}"
        return None

    def triton() -> str | None:
        return triton_reason("sinkhorn_kd_loss", student, teacher)

    chosen = choose("sinkhorn_kd_loss", backend, {"cpu": cpu, "triton": triton}, (student, teacher))
    if chosen == "reference" or transforms_active():
        return sinkhorn_kd_reference(
            student, teacher, temperature=temperature, epsilon=epsilon, n_iters=n_iters, p=p, scale=scale, order=order,
            mask=mask, reduction=reduction, backend=chosen,
        )  # fmt: skip
    batch = student.shape[:-2]
    if len(batch) > 1:
        student, teacher = student.flatten(0, -3), teacher.flatten(0, -3)
        mask = None if mask is None else mask.flatten(0, -2)
    if (
        not torch.is_grad_enabled()
    ):  # inside a Function the need would still be reported, and a gradient made for nobody
        student, teacher = student.detach(), teacher.detach()
    options = (float(temperature), float(epsilon), n_iters, p, order == "rows_first", float(scale), reduction == "mean")
    out = _SinkhornKD.apply(student, teacher, mask, options, reduction != "none")
    return out.reshape(batch) if reduction == "none" and len(batch) > 1 else out
