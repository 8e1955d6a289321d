"""Sinkhorn iterations as one writes them in torch: the kernel matrix, divided by its row sums and its column sums in turn."""

from __future__ import annotations

import torch
from torch import Tensor


def transport_cost(cost: Tensor, epsilon: float = 0.1, n_iters: int = 20) -> Tensor:
    """Sum of <plan, cost> over the problems; autograd keeps every division."""
    plan = torch.exp(-cost / epsilon)
    for _ in range(n_iters):
        plan = plan / plan.sum(-1, keepdim=True)
        plan = plan / plan.sum(-2, keepdim=True)
    return (plan * cost).sum()


def transport_of_points(x: Tensor, y: Tensor) -> Tensor:
    """The same over the table of squared distances, as the three terms of (x - y)^2."""
    cost = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT
    return transport_cost(cost)


def sinkhorn_kd(student: Tensor, teacher: Tensor, temperature: float = 2.0, scale: float = 1e-3) -> Tensor:
    p, q = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    return scale * transport_cost(torch.cdist(p, q, p=1.0))
