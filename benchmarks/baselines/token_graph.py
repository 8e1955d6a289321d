"""Neighbourhood graphs of two models' tokens as one writes them in torch: a distance table, topk, softmax, KL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_graph(tokens: Tensor, k: int, sigma: float) -> Tensor:
    """Log-softmax rows [n, n] of the Gaussian weights of the k nearest neighbours, 0 elsewhere."""
    squares = tokens.square().sum(1)
    d2 = (squares[:, None] + squares[None, :] - 2 * tokens @ tokens.T).clamp_min(0)  # [n, n]
    nearest = d2.detach().clone().fill_diagonal_(torch.inf).topk(k, largest=False).indices
    edges = torch.zeros_like(d2).scatter_(1, nearest, 1.0)
    return F.log_softmax(torch.exp(-d2 / (2 * sigma)) * edges, 1)


def token_graph(student: Tensor, teacher: Tensor, k: int = 8, sigma: float = 1.0) -> Tensor:
    """Mean KL(P_i || Q_i), student first, on normalised tokens."""
    log_p = log_graph(F.normalize(student, dim=1), k, sigma)
    with torch.no_grad():
        log_q = log_graph(F.normalize(teacher, dim=1), k, sigma)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1).mean()
