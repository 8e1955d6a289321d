"""Divergences as one writes them in torch. Mean over the rows; the teacher needs no gradient."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def js(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    teacher_side = F.kl_div(log_m, log_p, log_target=True, reduction="batchmean")
    student_side = F.kl_div(log_m, log_q, log_target=True, reduction="batchmean")
    return beta * teacher_side + (1 - beta) * student_side


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1).mean()


def alpha(student: Tensor, teacher: Tensor, order: float = 0.5) -> Tensor:
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    total = (order * log_p + (1 - order) * log_q).exp().sum(-1)
    return ((total - 1) / (order * (order - 1))).mean()


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """Zhao et al. 2022, eq. 7, with the usual additive mask of -1000 on the target class."""
    one_hot = F.one_hot(labels, student.shape[-1]).to(student.dtype)
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    q_target, p_target = (q * one_hot).sum(-1), (p * one_hot).sum(-1)
    q_pair, p_pair = torch.stack((q_target, 1 - q_target), -1), torch.stack((p_target, 1 - p_target), -1)
    target_part = F.kl_div(q_pair.log(), p_pair, reduction="batchmean")
    log_rest_q = F.log_softmax(student / temperature - 1000.0 * one_hot, -1)
    log_rest_p = F.log_softmax(teacher / temperature - 1000.0 * one_hot, -1)
    rest_part = F.kl_div(log_rest_q, log_rest_p, log_target=True, reduction="batchmean")
    return (alpha * target_part + beta * rest_part) * temperature**2


def ce_and_forward_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * forward_kl(student, teacher)


def forward_kl_nchw(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over pixels of a [B, C, H, W] map."""
    log_q, log_p = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1).mean()


def head_forward_kl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor
) -> Tensor:
    """Both output layers and the KL of the rows whose label is not -100."""
    log_q = F.log_softmax(hidden @ weight.T, -1)
    log_p = F.log_softmax(teacher_hidden @ teacher_weight.T, -1)
    rows = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    keep = labels != -100
    return torch.where(keep, rows, 0.0).sum() / keep.sum()
