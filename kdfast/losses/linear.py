"""Distillation of a language model from its hidden states: the logits of neither model are ever held."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kdfast._checks import check_choice, check_float_tensor, check_labels, check_number, check_row_tensor
from kdfast.losses.divergence import REDUCTIONS, check_mask, reduce_rows, row_weights, teaching
from kdfast.losses.module import LossModule, LossOutput
from kdfast.ops.linear_divergence import PerModel, check_linear, linear_divergence_total
from kdfast.ops.sparse_divergence import SampledTeacher, TopKTeacher


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TopKTeacher | SampledTeacher,
    labels: Tensor | None = None,
    *,
    teacher_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kind: str = "forward_kl",
    beta: float | tuple[float, float] = 0.5,
    temperature: float = 1.0,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
    ignore_index: int = -100,
    shift: int = 0,
    softcap: PerModel = None,
    logit_scale: PerModel = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    chunk_rows: int | None = None,
    reduction: str = "mean",
    scale_t2: bool = True,
    teacher_grad: bool = False,
    backend: str | None = None,
    process_group: ProcessGroup | None = None,
) -> LossOutput:
    """`distillation_loss` from hidden states and output layers, the logits made and used a few rows at a time.

        x = softcap(logit_scale (student_hidden W^T + b)),  z likewise from the teacher, or whatever is known of it
        loss = ce_weight CE(x, labels) + kd_weight T^2 D(x / T, z / T)       (T^2 only with scale_t2)

    Both terms are means over the same kept rows. The gradients are made along with the loss, the weight's summed in float32;
    memory is that of two chunks of logits and of the gradients (docs/language-models.md).

    Args:
        student_hidden: [..., D], the input of the model's head. student_weight: [V, D], `lm_head.weight`. student_bias: [V].
        teacher: one of
            hidden states [..., D'] with teacher_weight [V', D'], and teacher_bias [V'] if it has one;
            logits or log-probabilities [..., V'];
            TopKTeacher: a cache of its most probable classes with the mass of the rest (`sparse_kd_loss`);
            SampledTeacher: tokens drawn from it.
        labels: [...] integers or `ignore_index`. Needed unless ce_weight is 0; then they only say which rows are kept.
        kind, beta: as in `kdfast.ops.divergence`; all but "dkd" and "binary" for a TopKTeacher, forward KL for a SampledTeacher.
        temperature: a number; a TopKTeacher's or SampledTeacher's own, or an error.
        shift: 1 for the labels of a causal model as a batch has them: row t is compared with label t + 1, and the last row of
            each sequence is dropped. `labels`, `mask` and `weight` belong to tokens and are shifted together; the teacher's
            rows stand beside the student's and are not. With 0 nothing is shifted.
        softcap: c tanh(logits / c) (Gemma). logit_scale: a factor on the logits (Cohere; 1 / logits_scaling for Granite). One value
            for both models or a pair (student, teacher); a teacher's logits are taken as they are.
        vocab_size: compare the first so many classes of both models, needed when V and V' differ (151936 beside 152064) and for
            a head padded with rows that are no tokens. Exact: softmax and cross-entropy see no others.
        mask: [...] bool, True = keep. weight: [...] a factor for each row (token).
        chunk_rows: rows held at a time; None lets `kdfast.ops.linear_divergence` choose.
        reduction: "mean" over kept rows, "sum" (divide by the `num_items_in_batch` of gradient accumulation yourself) or "none":
            rows [...], zero where dropped; with shift=1 one fewer per sequence.
        scale_t2: multiply D by T^2. teacher_grad: let gradients flow to the teacher's side, else it is detached.
        backend: "cpu", "reference" or None for the best that can run.
        process_group: both heads are split over its ranks by classes (tensor parallelism); the logits are never gathered, and
            every rank gets the whole loss. See `kdfast.ops.linear_divergence`. Not for kind="dkd".
    Returns:
        LossOutput(loss, {"ce", "kd"}); the parts carry T^2 but not the weights. With ce_weight = 0 the part "ce" is 0.
    Raises:
        ValueError: vocabularies of two sizes without vocab_size (both are named), labels or ids out of range on the CPU,
            shapes that do not fit.

    >>> hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    >>> tokens = torch.randint(50, (2, 5))
    >>> loss, parts = linear_distillation_loss(
    ...     hidden, head, torch.randn(2, 5, 16), tokens, teacher_weight=torch.randn(50, 16), kind="js", shift=1
    ... )
    >>> loss.backward()
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_number("ce_weight", ce_weight)
    check_number("kd_weight", kd_weight)
    check_number("temperature", temperature, low=0.0, open_low=True)  # before it is squared
    check_float_tensor("student_hidden", student_hidden)
    rows = student_hidden.shape[:-1]
    labels, mask, weight = _rows_of_tokens(student_hidden, labels, mask, weight, shift, ignore_index)
    t2 = temperature**2 if scale_t2 else 1.0
    divisor, row_weight = 1.0, None
    if reduction != "none":
        row_weight, divisor = row_weights(student_hidden, mask, weight, -1, reduction)
    elif mask is not None:
        row_weight = mask.to(torch.float32)
    if isinstance(teacher, TopKTeacher):
        tail = None if teacher.tail is None else teaching(teacher.tail, False)
        teacher = teacher._replace(log_probs=teaching(teacher.log_probs, False), tail=tail)
    elif isinstance(teacher, Tensor):
        teacher = teaching(teacher, teacher_grad)
    inputs, options, shard = check_linear(
        student_hidden, student_weight, teacher, teacher_weight=_detached(teacher_weight, teacher_grad),
        student_bias=student_bias, teacher_bias=_detached(teacher_bias, teacher_grad), kind=kind, beta=beta,
        temperature=temperature, labels=labels, kd_weight=kd_weight * t2 / divisor, ce_weight=ce_weight / divisor,
        vocab_size=vocab_size, softcap=softcap, logit_scale=logit_scale, row_weight=row_weight, chunk_rows=chunk_rows,
        process_group=process_group,
    )  # fmt: skip
    loss, kd, ce = linear_divergence_total(inputs, options, backend, rows=reduction == "none", shard=shard)
    if reduction == "none":
        loss, kd, ce = (reduce_rows(value.reshape(rows), mask, weight, "none") for value in (loss, kd, ce))
        if shift:
            loss, kd, ce = (value[..., :-1] for value in (loss, kd, ce))
    return LossOutput(loss, {"ce": ce.detach() / divisor, "kd": kd.detach() * (t2 / divisor)})


def _detached(tensor: Tensor | None, keep: bool) -> Tensor | None:
    return None if tensor is None else teaching(tensor, keep)


def _rows_of_tokens(
    hidden: Tensor, labels: Tensor | None, mask: Tensor | None, weight: Tensor | None, shift: int, ignore_index: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(labels, rows to keep or None for all, weight) of each row of hidden states, from those of the tokens."""
    rows, device = hidden.shape[:-1], hidden.device
    if isinstance(shift, bool) or shift not in (0, 1):
        raise ValueError(f"shift: expected 0 or 1, got {shift!r}")
    if shift and not rows:
        raise ValueError("shift: expected hidden states [..., L, D] for shift=1, got one row without an axis of tokens")
    keep = None
    if labels is not None:
        labels = _next(check_labels(labels, rows, device).long(), shift, ignore_index)
        keep = labels != ignore_index
    if mask is not None:
        check_mask(mask, rows, device)
        mask = _next(mask, shift, False)
        keep = mask if keep is None else keep & mask
    if weight is not None:
        weight = _next(check_row_tensor("weight", weight, rows, device), shift, 0)
    if shift and keep is None:
        keep = _next(torch.ones(rows, dtype=torch.bool, device=device), shift, False)
    return labels, keep, weight


def _next(tokens: Tensor, shift: int, last: int | bool) -> Tensor:
    """Of the next token beside each one; `last` where there is none. Nothing of the size of the hidden states is copied."""
    if shift == 0:
        return tokens
    return torch.cat((tokens[..., 1:], torch.full_like(tokens[..., :1], last)), -1)


class LinearDistillationLoss(LossModule, function=linear_distillation_loss): ...
