"""BD-KD: forward and reverse KL weighted sample by sample, by which of two networks learning together is more certain.

Paper: BD-KD: Balancing the Divergences for Online Knowledge Distillation. Amara, Sepahvand, Meyer, Gross, Clark; 2022 (v2 2024);
https://arxiv.org/abs/2212.12965
Based on: the abstracts of both versions and a published summary; no public code was found. Certain: both networks train together, the
    student on cross-entropy and a sample-wise weighted sum of KL(p_t || p_s) and KL(p_s || p_t) driven by the gap of the two
    entropies, the teacher on cross-entropy and KL(p_s || p_t); the aim is accuracy and calibration of the student.
Reconstructed, and therefore arguments: which side of the gap favours which KL (`emphasise`), the size of the weights (`delta`, not
    known), their smooth form (`weighting="soft"`), `temperature` and its square, several students. v1 balances the student's
    loss alone (teacher_loss="none").
Symbols: z_s, z_t logits, p = softmax(z / T), H(p) = -sum_c p_c log p_c, sg() = stop-gradient.

    gap_i = sg( H(p_t,i) - H(p_s,i) )                             above 0: the student is the more certain one
    hard:  gap > 0: w_f = delta, w_r = 1;  else w_f = 1, w_r = delta            soft:  w_f = 2 sigmoid(gap / delta), w_r = 2 - w_f
    L_s = CE(z_s, y) + T^2 mean_i ( w_f KL(sg(p_t) || p_s) + w_r KL(p_s || sg(p_t)) )
    L_t = CE(z_t, y) + T^2 mean_i KL(sg(p_s) || p_t)              loss = L_s + L_t

A certain student is spread (forward KL), an uncertain one sharpened (reverse KL). Weights 1 and 1 are the symmetric sum, w_f = 1 and
w_r = 0 plain KD. One backward of the sum is exact for both networks: they share no gradient. The student is used alone later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast._checks import check_choice, check_number, check_pair
from kdfast.losses import LossOutput, cross_entropy_loss, distillation_loss, divergence_loss, entropy_rows
from kdfast.losses.divergence import reduce_rows
from kdfast.methods._protocol import LogitMethod
from kdfast.ops import divergence

WEIGHTINGS = ("hard", "soft", "fixed")
EMPHASES = ("forward_when_overconfident", "reverse_when_overconfident")
TEACHER_LOSSES = ("reverse_kl", "forward_kl", "none")


class Balance(NamedTuple):
    """Of each sample: both divergences (no T^2), their weights and both entropies, all [...]."""

    forward_kl: Tensor
    reverse_kl: Tensor
    weight_forward: Tensor
    weight_reverse: Tensor
    entropy_student: Tensor
    entropy_teacher: Tensor


def balance_weights(
    entropy_student: Tensor,
    entropy_teacher: Tensor,
    *,
    delta: float = 2.0,
    weighting: str = "hard",
    emphasise: str = "forward_when_overconfident",
    weights: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """(w_f, w_r) of the module docstring, without gradient; a gap of 0 takes the else branch.

    Args:
        entropy_student, entropy_teacher: [...], computed alike, so that equal predictions have a gap of exactly 0.
        delta: hard: >= 1, the emphasis; soft: > 0, the width of the change. weights: the pair of weighting="fixed".
        emphasise: "reverse_when_overconfident" exchanges the two weights.

    >>> balance_weights(torch.tensor([0.5, 0.9]), torch.tensor([0.7, 0.7]))
    (tensor([2., 1.]), tensor([1., 2.]))
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    check_choice("emphasise", emphasise, EMPHASES)
    gap = torch.nan_to_num((entropy_teacher - entropy_student).detach(), nan=0.0)  # an ignored row has no entropy
    if weighting == "fixed":
        return torch.full_like(gap, weights[0]), torch.full_like(gap, weights[1])
    if weighting == "soft":
        check_number("delta", delta, low=0.0, open_low=True)
        forward = 2 * torch.sigmoid(gap / delta)
        reverse = 2 - forward
    else:
        check_number("delta", delta, low=1.0)
        forward, reverse = (
            torch.where(gap > 0, delta, 1.0).to(gap.dtype),
            torch.where(gap > 0, 1.0, delta).to(gap.dtype),
        )
    return (forward, reverse) if emphasise == EMPHASES[0] else (reverse, forward)


def balance(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, dim: int = -1, **options: Any) -> Balance:
    """Both divergences of each sample with their weights: what the student's loss is the mean of. Options: `balance_weights`.

    >>> rows = balance(student, teacher)
    """
    teacher = teacher.detach()
    entropy_s, entropy_t = (entropy_rows(z.detach(), temperature=temperature, dim=dim) for z in (student, teacher))
    forward, reverse = (
        divergence(student, teacher, kind=kind, temperature=temperature, dim=dim)
        for kind in ("forward_kl", "reverse_kl")
    )
    return Balance(forward, reverse, *balance_weights(entropy_s, entropy_t, **options), entropy_s, entropy_t)


def bd_kd_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    delta: float = 2.0,
    weighting: str = "hard",
    emphasise: str = "forward_when_overconfident",
    weights: tuple[float, float] = (1.0, 1.0),
    teacher_loss: str = "reverse_kl",
    online: bool = True,
    ignore_index: int = -100,
    dim: int = -1,
) -> LossOutput:
    """L_s + L_t of the module docstring.

    Args:
        student, teacher: logits [..., C], or with the classes on axis `dim`; several students as a sequence: each learns from the
            teacher alone, and the teacher's second term is the mean over them.
        labels: [...] integers or `ignore_index`, whose rows are in no term.
        teacher_loss: "reverse_kl", KL(sg(p_s) || p_t); "forward_kl", KL(p_t || sg(p_s)); "none", cross-entropy alone.
        online: False for a frozen teacher: L_s alone. Others: `balance_weights`.
    Returns:
        LossOutput(loss, {"student", "teacher", "ce_student", "ce_teacher", "kd_student", "kd_teacher", "weight_forward"}): the two
        losses (the first summed over students), their terms (kd with T^2), the mean weight of the forward KL.
    Raises:
        ValueError: an empty batch, shapes that differ, T <= 0, delta below 1 (hard) or not above 0 (soft).

    >>> loss, parts = bd_kd_loss(student, teacher, labels)
    """
    check_choice("teacher_loss", teacher_loss, TEACHER_LOSSES)
    students = [student] if isinstance(student, Tensor) else list(student)
    for one in students:
        check_pair(one, teacher)
        if one.shape != teacher.shape or one.numel() == 0:
            raise ValueError(
                f"teacher: expected logits of the student's shape {tuple(one.shape)}, not empty, got {tuple(teacher.shape)}"
            )
    keep = labels.long() != ignore_index
    fixed: dict[str, Any] = {"temperature": temperature, "scale_t2": True, "dim": dim}
    ce, kd, forward_weight = [], [], []
    entropy_t = entropy_rows(teacher.detach(), temperature=temperature, dim=dim)
    for one in students:
        entropy_s = entropy_rows(one.detach(), temperature=temperature, dim=dim)
        w_f, w_r = balance_weights(
            entropy_s, entropy_t, delta=delta, weighting=weighting, emphasise=emphasise, weights=weights
        )
        ce.append(cross_entropy_loss(one, labels, ignore_index=ignore_index, dim=dim))
        kd.append(
            divergence_loss(one, teacher, kind="forward_kl", weight=w_f, mask=keep, **fixed)
            + divergence_loss(one, teacher, kind="reverse_kl", weight=w_r, mask=keep, **fixed)
        )
        forward_weight.append(reduce_rows(w_f, keep, None, "mean"))
    loss_s = torch.stack(ce).sum() + torch.stack(kd).sum()
    parts = {
        "student": loss_s, "ce_student": torch.stack(ce).mean(), "kd_student": torch.stack(kd).mean(),
        "weight_forward": torch.stack(forward_weight).mean(),
    }  # fmt: skip
    if not online:
        return LossOutput(loss_s, {name: part.detach() for name, part in parts.items()})
    # seen from the teacher, which learns here, KL(sg(p_s) || p_t) is the forward one
    kind = "reverse_kl" if teacher_loss == "forward_kl" else "forward_kl"
    share = 0.0 if teacher_loss == "none" else 1.0 / len(students)
    terms = [
        distillation_loss(
            teacher, one, labels, kind=kind, ce_weight=1.0 / len(students), kd_weight=share, ignore_index=ignore_index, **fixed
        )
        for one in students
    ]  # fmt: skip
    loss_t = torch.stack([term.loss for term in terms]).sum()
    parts |= {
        "teacher": loss_t, "ce_teacher": terms[0].parts["ce"],
        "kd_teacher": torch.stack([term.parts["kd"] for term in terms]).mean(),
    }  # fmt: skip
    return LossOutput(loss_s + loss_t, {name: part.detach() for name, part in parts.items()})


class Method(LogitMethod, function=bd_kd_loss):
    """Both networks in one step, the student and the second one, its teacher; online=False with a trained, frozen teacher."""

    trains_teacher = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.trains_teacher = bool(options.get("online", True))
