"""All pairs as one writes them in torch: the whole table, then softmax, cross-entropy or a squared difference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_contrast(student: Tensor, teacher: Tensor, tau: float = 0.1) -> Tensor:
    scores = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T / tau
    return F.cross_entropy(scores, torch.arange(len(student)))


def token_context(student: Tensor, teacher: Tensor) -> Tensor:
    def attention(tokens: Tensor) -> Tensor:
        return (tokens @ tokens.mT * tokens.shape[-1] ** -0.5).softmax(-1)

    return F.mse_loss(attention(student), attention(teacher))


def l1_cost(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.cdist(student, teacher, p=1).mean()
