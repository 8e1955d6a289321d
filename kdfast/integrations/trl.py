"""TRL's generalized JSD loss by kdfast's kernels: the same arguments, value and gradient, one pass over the logits.

    class FusedGKDTrainer(GKDTrainer):
        generalized_jsd_loss = staticmethod(kdfast.integrations.trl.generalized_jsd_loss)

`KDTrainer(..., on_policy=lmbda, kind="js", ce_weight=0.0, kd_weight=1.0)` trains the same objective without making logits at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._checks import check_choice
from kdfast.losses import divergence_loss

REDUCTIONS = ("batchmean", "sum", "mean")


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; beta 0 and 1: forward and reverse KL. No T^2.

    Args:
        student_logits, teacher_logits: [B, L, V], already shifted. The teacher gets no gradient.
        labels: [B, L], -100 where a token does not count.
        reduction: "batchmean" divides the sum by the tokens that count, or by B without labels; "mean" by those tokens times V;
            "sum". (TRL's "none", one number for each class, is not there: the classes of a row are summed as they are read.)
        num_items_in_batch: divides the sum instead, as gradient accumulation needs it; 0 of them give 0, in TRL NaN.

    >>> loss = generalized_jsd_loss(student_logits, teacher_logits, labels, beta=0.5)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    keep = None if labels is None else labels != -100
    total = divergence_loss(
        student_logits, teacher_logits, kind="js", beta=beta, temperature=temperature, mask=keep, reduction="sum"
    )
    if num_items_in_batch is not None:
        return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp_min(1)
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / (max(student_logits.shape[0], 1) if keep is None else keep.sum().clamp_min(1))
    rows = student_logits[..., 0].numel() if keep is None else keep.sum()
    return total / (rows * student_logits.shape[-1])
