"""Output layer and divergence as one writes them in torch, from hidden states. Mean over the rows whose label is not -100."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the kept rows, both models."""
    keep = labels != -100
    return hidden[keep] @ weight.T, teacher_hidden[keep] @ teacher_weight.T


def forward_kl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor
) -> Tensor:
    """As in a training script: logits in the model's dtype, softmax in float32."""
    student, teacher = logits(hidden, weight, teacher_hidden, teacher_weight, labels)
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def js(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    student, teacher = logits(hidden, weight, teacher_hidden, teacher_weight, labels)
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    sides = (F.kl_div(log_m, side, log_target=True, reduction="batchmean") for side in (log_p, log_q))
    return sum(sides, start=log_m.new_zeros(())) / 2


def torchtune_chunks(num_chunks: int = 8) -> Callable[..., Tensor]:
    """torchtune's chunked output: the head runs on chunks of tokens, the loss on one chunk of logits after the other, in float32.

    Autograd keeps every chunk. The teacher's entropy is added, which torchtune leaves out.
    """

    def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        keep = labels != -100
        student_chunks = [part @ weight.T for part in hidden[keep].tensor_split(num_chunks)]
        teacher_chunks = [part @ teacher_weight.T for part in teacher_hidden[keep].tensor_split(num_chunks)]
        total = weight.new_zeros((), dtype=torch.float32)
        for student, teacher in zip(student_chunks, teacher_chunks):
            log_q, log_p = (
                F.log_softmax(student, -1, dtype=torch.float32),
                F.log_softmax(teacher, -1, dtype=torch.float32),
            )
            total = total + (log_p.exp() * (log_p - log_q)).sum()
        return total / keep.sum()

    return loss
