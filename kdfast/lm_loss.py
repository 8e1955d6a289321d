"""Causal language models of transformers in a `Distiller`: hidden states and output layers in place of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdfast.integrations.causal_lm import IGNORE, CausalLMLoss, States, model_inputs, next_labels
from kdfast.losses import LossOutput
from kdfast.methods import Context
from kdfast.metrics.language import LOGIT_BYTES
from kdfast.ops.linear_divergence import head_logits
from kdfast.ops.sparse_divergence import TopKTeacher


class LanguageLoss:
    """`CausalLMLoss` as a Distiller's method, with `student_forward` and `teacher_forward` as its forwards.

    kind: None for cross-entropy alone. listed: batch -> the teacher's list, from a cache; None: the live teacher.
    options: of `CausalLMLoss`.
    """

    def __init__(
        self, kind: str | None = "forward_kl", listed: Callable[[Any], TopKTeacher] | None = None, **options: Any
    ) -> None:
        self.kind, self.listed = kind, listed
        self.criterion = CausalLMLoss(kind=kind or "forward_kl", **options)

    def student_forward(self, model: nn.Module, batch: Any) -> States:
        return self.criterion.readers["student"](model, model_inputs(batch))

    def teacher_forward(self, model: nn.Module, batch: Any) -> States:
        return self.criterion.readers["teacher"](model, model_inputs(batch))

    def __call__(self, context: Context) -> LossOutput:
        labels = next_labels(context.batch)
        if self.kind is None:
            ce = head_cross_entropy(context.student, labels)
            return LossOutput(ce, {"ce": ce.detach()})
        teacher = context.teacher if self.listed is None else self.listed(context.batch)
        return self.criterion.compare(context.student, teacher, labels)


def logits_of(side: States) -> Tensor:
    """[..., V], all of them."""
    rows, head = side.rows, side.head
    if head is None:
        return rows
    return head_logits(rows, head.weight, head.bias, head.scale, head.softcap or 0.0, len(head.weight))


def head_cross_entropy(side: States, labels: Tensor) -> Tensor:
    """Mean cross-entropy in plain torch; beyond `LOGIT_BYTES` chunks of logits are made again in the backward. labels: `next_labels`."""
    keep = labels != IGNORE
    rows, labels = side.rows[keep], labels[keep]

    def total(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(side._replace(rows=rows)).float(), labels, reduction="sum")

    width = rows.shape[-1] if side.head is None else len(side.head.weight)
    step = max(LOGIT_BYTES // (4 * width), 1)
    if side.head is None or len(rows) <= step:
        return total(rows, labels) / max(len(labels), 1)
    parts = [checkpoint(total, x, y, use_reentrant=False) for x, y in zip(rows.split(step), labels.split(step))]
    return sum(parts, start=rows.new_zeros((), dtype=parts[0].dtype)) / len(labels)


def plain_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Half cross-entropy, half forward KL as one writes them in torch, from the logits of both models: the form to compare with."""
    keep = labels != IGNORE
    x, z, labels = student[keep].float(), teacher[keep].float(), labels[keep]
    kd = F.kl_div(F.log_softmax(x, -1), F.log_softmax(z, -1), log_target=True, reduction="batchmean")
    return 0.5 * F.cross_entropy(x, labels) + 0.5 * kd
