"""`kdfast.ops.sinkhorn_kd` on a GPU: softened rows, costs of all pairs, transport, and back, with the final gradients in the
forward. The kernels are those of `pairwise` and `sinkhorn`; here are the rows around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast._library import compute_dtype, contiguous, final_gradient_like
from kdfast.triton import pairwise, sinkhorn, sinkhorn_kd_kernels
from kdfast.triton.launch import DTYPES, MAX_32, launch, lay_out, tile_shape


def _rows(logits: Tensor, dtype: torch.dtype, temperature: float) -> tuple[int, int, dict[str, Any]]:
    """(programs, warps, arguments) of a kernel that owns rows of `logits`."""
    layout, classes = lay_out([logits], logits.dim() - 1), logits.shape[-1]
    R, B, num_warps = tile_shape(layout, classes, dtype)
    tiles = -(-layout.inner // R)
    return layout.outer * tiles, num_warps, {
        "tiles": tiles, "n1": layout.sizes[1], "n2": layout.sizes[2], "inner": layout.inner, "classes": classes,
        **{f"x{i}": stride for i, stride in enumerate(layout.strides[0])}, "temperature": float(temperature),
        "DTYPE": DTYPES[dtype], "R": R, "B": B, "WIDE": abs(layout.strides[0][4]) * (classes + B) > MAX_32,
    }  # fmt: skip


def _soften(logits: Tensor, mask: Tensor | None, dtype: torch.dtype, temperature: float) -> tuple[Tensor, Tensor]:
    """[batch, N, C] probabilities and [batch, N] ones where a row counts."""
    batch = logits.shape[0] if logits.dim() == 3 else 1
    probs = torch.empty((batch, *logits.shape[-2:]), dtype=dtype, device=logits.device)
    kept = torch.empty(probs.shape[:2], dtype=dtype, device=logits.device)
    programs, num_warps, arguments = _rows(logits, dtype, temperature)
    launch(
        sinkhorn_kd_kernels.soften_kernel, programs, num_warps, logits.device, logits=logits,
        mask=None if mask is None else mask.view(torch.int8), probs=probs, kept=kept, **arguments,
    )  # fmt: skip
    return probs, kept


def sinkhorn_kd(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float, epsilon: float, n_iters: int, p: int,
    rows_first: bool, scale: float, mean: bool, need_student: bool, need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """kdfast::sinkhorn_kd: the loss, one value per problem, and the gradients of those values."""
    dtype = compute_dtype(student, teacher)
    mask = contiguous(mask, torch.bool)
    q, kept_q = _soften(student, mask, dtype, temperature)
    t, kept_t = _soften(teacher, mask, dtype, temperature)
    cost = pairwise.cost(q, t, p)
    if p == 2:
        cost = cost.sqrt_()
    options = (epsilon, n_iters, rows_first, 1.0, 1.0)
    wanted = need_student or need_teacher
    value, _, _, _, iterations, saved = sinkhorn.solve(cost, kept_q, kept_t, *options, -1.0, False, wanted)
    factor = torch.full((), scale, dtype=dtype, device=student.device)
    if mean:
        factor = factor / kept_t.sum().clamp_min(1)
    rows = value * factor
    grads = final_gradient_like(student, need_student), final_gradient_like(teacher, need_teacher)
    if wanted:
        grad, _, _ = sinkhorn.backward(
            cost, kept_q, kept_t, iterations, saved, torch.ones_like(value), None, None, None, *options, False
        )
        if p == 2:  # the root's slope, 0 at 0
            grad = torch.where(cost > 0, grad / (2 * cost), 0.0)
        sides = ((q, t, grad, kept_q, grads[0], need_student), (t, q, grad.mT, kept_t, grads[1], need_teacher))
        for own, other, upstream, kept, out, need in sides:
            if need:
                programs, num_warps, arguments = _rows(out, dtype, temperature)
                launch(
                    sinkhorn_kd_kernels.soften_backward_kernel, programs, num_warps, student.device,
                    grad=pairwise.cost_backward(upstream, own, other, p), probs=own, kept=kept, factor=factor, grad_logits=out,
                    **arguments,
                )  # fmt: skip
    return rows.sum(), rows.reshape(student.shape[:-2]), *grads
