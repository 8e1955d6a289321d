"""Selective pixel distillation as one writes it in torch: two cross-entropy maps, two log-softmax, two KL maps, masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_kd(logits_a: Tensor, logits_b: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Each pixel learns from the model with the smaller cross-entropy there; mean over the labelled pixels of each direction."""
    ce_a = F.cross_entropy(logits_a.detach(), labels, ignore_index=ignore_index, reduction="none")  # [B, H, W]
    ce_b = F.cross_entropy(logits_b.detach(), labels, ignore_index=ignore_index, reduction="none")
    valid = labels != ignore_index
    log_a, log_b = F.log_softmax(logits_a, 1), F.log_softmax(logits_b, 1)  # [B, C, H, W]
    to_a = F.kl_div(log_a, log_b.detach(), log_target=True, reduction="none").sum(1)
    to_b = F.kl_div(log_b, log_a.detach(), log_target=True, reduction="none").sum(1)
    count = valid.sum()
    a_learns = valid & (ce_b < ce_a)
    b_learns = valid & (ce_a < ce_b)
    return torch.where(a_learns, to_a, 0.0).sum() / count + torch.where(b_learns, to_b, 0.0).sum() / count
