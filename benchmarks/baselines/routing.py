"""Mixture-of-experts routing as one writes it in torch: softmax, topk, argsort, bincount; index_add_; a loop over the experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def route(logits: Tensor, cotangent: Tensor) -> Tensor:
    """Weights of the k best of softmax(logits), divided by their sum, and the grouping of all slots by expert."""
    k, experts = cotangent.shape[1], logits.shape[1]
    weights, ids = logits.softmax(-1).topk(k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    order = ids.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    counts = torch.bincount(ids.flatten(), minlength=experts)
    offsets = counts.cumsum(0)
    return (weights * cotangent).sum() + 0.0 * (offsets[-1] + inverse[0])


def combine(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, cotangent: Tensor) -> Tensor:
    """Weighted rows added to their tokens; rows [M, H] grouped by expert."""
    tokens, k = inverse.shape
    weighted = rows * weights.flatten()[order].unsqueeze(1)
    y = torch.zeros(tokens, rows.shape[1], dtype=rows.dtype).index_add_(0, order // k, weighted)
    return (y * cotangent).sum()


def expert_loop(x: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, cotangent: Tensor, k: int) -> Tensor:
    """For each expert: its rows, two products, the weight, index_add_. Experts as separate tensors, as a ModuleList has them."""
    weights, ids = (x @ gate.t()).topk(k, -1)
    weights = weights.softmax(-1)
    y = torch.zeros_like(x)
    for e, (first, second) in enumerate(zip(w1.unbind(0), w2.unbind(0))):
        token, slot = torch.where(ids == e)
        if token.numel():
            hidden = F.relu(x[token] @ first.t())
            y.index_add_(0, token, (hidden @ second.t()) * weights[token, slot].unsqueeze(1))
    return (y * cotangent).sum()
