"""`kdfast.ops.sinkhorn` by csrc/cuda/sinkhorn.cu and sinkhorn_grid.cu: forward and backward one launch each, whatever the sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._library import address, contiguous, operand
from kdfast.cuda import call, core
from kdfast.ops.sinkhorn import _gradients, _outputs


def _workspace(cost: Tensor, backward: bool) -> Tensor:
    size = call(core().cuda_sinkhorn_workspace, cost, *cost.shape[-2:], backward)
    return torch.empty(size, dtype=torch.uint8, device=cost.device)


def solve(
    cost: Tensor, a: Tensor | None, b: Tensor | None, epsilon: float, n_iters: int, rows_first: bool, lam_a: float, lam_b: float,
    tol: float, need_plan: bool, need_saved: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kdfast::sinkhorn: value, plan, f, g, iterations, saved."""
    out = _outputs(cost, a, b, n_iters, need_plan, need_saved)
    value, plan, f, g, iterations, saved = out
    a, b = contiguous(a, torch.float32), contiguous(b, torch.float32)
    workspace = _workspace(cost, False)
    call(
        core().cuda_sinkhorn_forward, cost, *operand(cost), cost.shape, False, address(a), address(b), epsilon, n_iters,
        rows_first, lam_a, lam_b, tol, address(plan), address(value), address(f), address(g), address(saved), address(iterations),
        address(workspace),
    )  # fmt: skip
    return out


def backward(
    cost: Tensor, a: Tensor | None, b: Tensor | None, iterations: Tensor, saved: Tensor, grad_value: Tensor | None,
    grad_plan: Tensor | None, grad_f: Tensor | None, grad_g: Tensor | None, epsilon: float, n_iters: int, rows_first: bool,
    lam_a: float, lam_b: float, envelope: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kdfast::sinkhorn_backward: the gradients of cost, a and b."""
    grad_cost, grad_a, grad_b = _gradients(cost, a, b)
    a, b = contiguous(a, torch.float32), contiguous(b, torch.float32)
    grads = [contiguous(t, torch.float32) for t in (grad_plan, grad_value, grad_f, grad_g)]
    workspace = _workspace(cost, True)
    call(
        core().cuda_sinkhorn_backward, cost, *operand(cost), cost.shape, False, address(a), address(b), epsilon, n_iters,
        rows_first, lam_a, lam_b, address(saved), address(iterations), *(address(t) for t in grads), envelope,
        *operand(grad_cost), address(grad_a), address(grad_b), address(workspace),
    )  # fmt: skip
    return grad_cost, grad_a, grad_b
