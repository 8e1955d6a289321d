"""SinKD: beside labels and plain KD, the cost of moving the batch of student outputs onto the batch of teacher outputs.

Paper: Sinkhorn Distance Minimization for Knowledge Distillation. Cui et al.; 2024;
https://arxiv.org/abs/2402.17110
Based on: the authors' code, github.com/2018cx/SinKD at 1ffac90; the sequence form on github.com/2018cx/Multi-Level-OT at 712cfb4.
Differs from the code:
    its temperature argument is ignored there (always 2); here it is `temperature`.
    its training loop adds the Sinkhorn term only under the flag of another method; here the intended sum.
    its generative files normalise [B, L, V] logits over the positions; here cloud="batch" takes all kept tokens as one cloud
    and cloud="sequence" one problem for each sequence.
Symbols: s, t logits of student and teacher, N samples, c `scale`, T_kd `kd_temperature`.

    loss = (1 - alpha) L_CE + alpha L_KD + beta c L_sink
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import check_choice, check_float_tensor, check_int, check_number
from kdfast._library import compute_dtype
from kdfast.losses import LossOutput, distillation_loss, entropy_rows, sinkhorn_kd_loss
from kdfast.losses.divergence import reduce_rows
from kdfast.methods._protocol import LogitMethod, epoch_at

CLOUDS = ("batch", "sequence")
TASKS = ("classification", "regression")


def annealed_temperature(temperature: float, epoch: int, epochs: int) -> float:
    """T_kd(e) = T_kd + (1 - T_kd) e / (E - 1): reaches 1 in the last epoch. With one epoch it stays T_kd.

    >>> [annealed_temperature(4.0, epoch, 3) for epoch in range(3)]
    [4.0, 2.5, 1.0]
    """
    check_int("epochs", epochs, low=1)
    if epochs == 1:
        return temperature
    return temperature + (1 - temperature) * min(max(epoch, 0), epochs - 1) / (epochs - 1)


def sinkd_total(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.9,
    beta: float = 0.8,
    kd_temperature: float = 2.0,
    anneal_epochs: int | None = None,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    n_iters: int = 20,
    scale: float = 1e-3,
    cloud: str = "batch",
    task: str = "classification",
    ignore_index: int = -100,
    dim: int = -1,
    step: int = 0,
    total_steps: int = 0,
) -> LossOutput:
    """(1 - alpha) L_CE + alpha L_KD + beta scale L_sink.

        L_KD   = -mean_i sum_c softmax(t/T_kd)_c log softmax(s/T_kd)_c          the cross-entropy form, no T^2
        L_sink = sum_ij P_ij W_ij                                                `kdfast.losses.sinkhorn_kd_loss`
        task="regression": L_KD = mean (s/T_kd - t/T_kd)^2 and mean squared error in place of L_CE

    alpha, T_kd per task in the released scripts: CoLA 0.9, 2 (flag 1); QNLI and MNLI 0.8, 3; RTE 0.9, 3.5; SST-2 0.9, 2; MRPC
    and QQP 1, 4; beta 0.8 throughout. L_sink is a sum: it grows with the batch, and a scale of 0.1 hurts.

    Args:
        student, teacher: logits [N, C], or [B, L, C] with the classes on axis `dim`. labels: [N] or [B, L] integers or
            `ignore_index`, whose rows leave all terms; regression: floats of the logits' shape, or without the last axis.
        anneal_epochs: E of `annealed_temperature` for T_kd; the epoch is step E / total_steps. None: T_kd stays.
        temperature, epsilon, n_iters: of L_sink.
        cloud: "batch", all kept rows are one cloud; "sequence", one problem for each entry of the first axis.
    Returns:
        LossOutput(loss, {"ce", "kd", "sinkhorn"}), unweighted (sinkhorn with `scale`).

    >>> loss, parts = sinkd_total(student, teacher, labels, alpha=0.8, kd_temperature=3.0)
    """
    check_choice("cloud", cloud, CLOUDS)
    check_choice("task", task, TASKS)
    check_number("alpha", alpha, low=0.0, high=1.0)
    check_number("beta", beta)
    check_number("kd_temperature", kd_temperature, low=0.0, open_low=True)
    if anneal_epochs is not None:
        check_int("anneal_epochs", anneal_epochs, low=1)
        epoch = epoch_at(step, total_steps, anneal_epochs)
        kd_temperature = annealed_temperature(kd_temperature, epoch, anneal_epochs)
    teacher = teacher.detach()
    if task == "regression":
        target = labels.reshape(student.shape) if labels.numel() == student.numel() else labels
        ce, kd = F.mse_loss(student, target), F.mse_loss(student / kd_temperature, teacher / kd_temperature)
        keep = None
        loss, parts = (1 - alpha) * ce + alpha * kd, {"ce": ce.detach(), "kd": kd.detach()}
    else:
        loss, parts = distillation_loss(
            student, teacher, labels, temperature=kd_temperature, scale_t2=False, ce_weight=1 - alpha, kd_weight=alpha,
            ignore_index=ignore_index, dim=dim,
        )  # fmt: skip
        keep = labels.long() != ignore_index
        entropy = reduce_rows(
            entropy_rows(teacher, temperature=kd_temperature, dim=dim), keep, None, "mean"
        )  # KL + H(teacher) is the cross-entropy form
        loss, parts = loss + alpha * entropy, parts | {"kd": parts["kd"] + entropy}
    s, t = student.movedim(dim, -1), teacher.movedim(dim, -1)  # [..., C]
    if cloud == "batch" and s.dim() > 2:
        s, t = s.flatten(0, -2), t.flatten(0, -2)
        keep = None if keep is None else keep.flatten()
    sink = sinkhorn_kd_loss(
        s, t, temperature=temperature, epsilon=epsilon, n_iters=n_iters, scale=scale, mask=keep
    )  # fmt: skip
    return LossOutput(loss + beta * sink, parts | {"sinkhorn": sink.detach()})


# ---------------------------------------------------------------- the sequence form for two vocabularies
def sorted_answers(
    logits: Tensor, mask: Tensor, length: int, top_k: int, *, temperature: float = 1.0, std_floor: float = 1e-4
) -> Tensor:
    """[B, length, top_k]: softmax(z / T) of the answer tokens, z = logits / (std over the vocabulary + 1e-4).

    Answer tokens (mask True) are moved to the front, zero rows follow; classes are sorted by their total mass in the batch,
    largest first, so that two vocabularies can be compared by rank; zero columns where the vocabulary is smaller.
    """
    # other tokens' logits may be anything, and their gradient is zero
    z = logits.to(compute_dtype(logits)).masked_fill(~mask.unsqueeze(-1), 0.0)
    z = z / (z.std(-1, keepdim=True) + std_floor)
    probs = torch.where(mask.unsqueeze(-1), torch.softmax(z / temperature, -1), 0.0)  # [B, L, V]
    front = torch.argsort(~mask, dim=1, stable=True)[:, :length]  # [B, <= length]
    probs = probs.gather(1, front.unsqueeze(-1).expand(-1, -1, probs.shape[-1]))
    probs = F.pad(probs, (0, 0, 0, length - probs.shape[1]))
    order = torch.argsort(probs.detach().sum((0, 1)), descending=True, stable=True)[:top_k]
    probs = probs[..., order]
    return F.pad(probs, (0, top_k - probs.shape[-1]))


def multi_level_ot_loss(
    student: Tensor,
    teacher: Tensor,
    student_mask: Tensor,
    teacher_mask: Tensor,
    *,
    top_k: int = 50,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    n_iters: int = 10,
    scale: float = 1e-3,
    logit_weight: float = 0.1,
    sinkhorn_weight: float = 0.1,
    weight: float = 1.5,
    length: int | None = None,
) -> LossOutput:
    """Multi-Level-OT's distillation loss (2018cx/Multi-Level-OT): tokens of two vocabularies, compared by rank.

        S, Q = sorted_answers(student), sorted_answers(teacher)                                        [B, L, k]
        loss = weight ( mean_b mean_{t < min(len_s, len_t)} sum_c |S_btc - Q_btc|
                        - logit_weight mean_{b, t < L} sum_c softmax(S_bt)_c log softmax(Q_bt)_c
                        + sinkhorn_weight scale sum_b <P_b, W_b> )                            add the cross-entropy

    P_b, W_b: SinKD's problem between the L rows of S_b and Q_b, softmaxed once more, the teacher's as rows.

    Args:
        student: logits [B, Ls, Vs]. teacher: [B, Lt, Vt], detached.
        Masks: [B, Ls] and [B, Lt] bool, True = row of the answer. As in the code these are the rows that predict an answer token,
            from the prompt's last one on: `kdfast.data.alignment.align_texts(...).masks`, or labels != -100 moved one to the left.
        top_k: k >= 1. student_temperature, teacher_temperature: T_m > 0. temperature, epsilon, n_iters, scale: of SinKD's problem.
        length: L >= 1; answers are cut there. None takes the longest of either model in the batch (a device synchronisation).
    Returns:
        LossOutput(loss, {"absolute", "logit", "sinkhorn"}), the parts without their weights.
    Raises:
        ValueError: an empty batch, fewer than two classes, shapes or devices that do not fit, bad options. NaN and infinite
            logits of the answers give NaN where no compiled core reads them.

    >>> loss, parts = multi_level_ot_loss(student, teacher, *aligned.masks)
    """
    for name, logits, mask in (("student", student, student_mask), ("teacher", teacher, teacher_mask)):
        check_float_tensor(name, logits)
        if logits.dim() != 3 or 0 in logits.shape[:2] or logits.shape[2] < 2:
            raise ValueError(
                f"{name}: expected logits [B, L, V] of a sequence and two classes at least, got shape {tuple(logits.shape)}"
            )
        if mask.device != student.device or logits.device != student.device:
            raise ValueError(
                f"{name}, {name}_mask: expected them on {student.device}, got {logits.device} and {mask.device}"
            )
        if mask.shape != logits.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"{name}_mask: expected bool {tuple(logits.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"teacher: expected the batch of student ({student.shape[0]}), got {teacher.shape[0]}")
    check_int("top_k", top_k, low=1)
    for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
        check_number(name, value, low=0.0, open_low=True)
    for name, value in (("logit_weight", logit_weight), ("sinkhorn_weight", sinkhorn_weight), ("weight", weight)):
        check_number(name, value)
    if length is not None:
        check_int("length", length, low=1)
    length_s, length_t = student_mask.sum(1), teacher_mask.sum(1)  # [B]
    if length is None:
        length = max(1, int(torch.maximum(length_s, length_t).max()))
    s = sorted_answers(student, student_mask, length, top_k, temperature=student_temperature)
    q = sorted_answers(teacher.detach(), teacher_mask, length, top_k, temperature=teacher_temperature)
    common = torch.minimum(length_s, length_t).clamp_max(length)  # [B]
    inside = torch.arange(length, device=s.device) < common.unsqueeze(1)  # [B, L]
    distance = torch.where(inside, (s - q).abs().sum(-1), 0.0)
    absolute = (distance.sum(1) / common.clamp_min(1)).mean()
    logit = -(torch.softmax(s, -1) * torch.log_softmax(q, -1)).sum(-1).mean()
    sink = sinkhorn_kd_loss(
        s, q, temperature=temperature, epsilon=epsilon, n_iters=n_iters, scale=scale, order="columns_first"
    )  # fmt: skip
    loss = weight * (absolute + logit_weight * logit + sinkhorn_weight * sink)
    return LossOutput(loss, {"absolute": absolute.detach(), "logit": logit.detach(), "sinkhorn": sink.detach()})


class Method(LogitMethod, function=sinkd_total): ...
