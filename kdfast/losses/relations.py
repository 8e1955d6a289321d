"""Losses over relations between tokens: neighbourhood graphs, identity across two models, similarity patterns inside a set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast._checks import check_choice, check_pair
from kdfast._library import compute_dtype
from kdfast.losses.divergence import REDUCTIONS, check_mask, reduce_rows
from kdfast.losses.module import LossModule
from kdfast.ops.pairwise import pairwise_infonce
from kdfast.ops.relation import relation_mse
from kdfast.ops.token_graph import token_graph_kl


def token_graph_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    k: int | None = 8,
    sigma: float = 1.0,
    orientation: str = "row",
    direction: str = "student_teacher",
    normalize: bool = True,
    edges: Tensor | None = None,
    weight: Tensor | None = None,
    teacher_grad: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """How far the student's neighbourhood graph over tokens is from the teacher's (TRG's local term, arXiv 2306.12442).

        A_ij = exp(-|x_i - x_j|^2 / (2 sigma)) for the k nearest j of i, else 0;   P_i, Q_i = softmax_j of student's, teacher's A
        loss = mean_i KL(P_i || Q_i)                                 (direction="student_teacher", as printed)

    Args:
        student: [n, Ds] or [..., Ds], teacher: [n, Dt] or [..., Dt]: the same tokens in the same order; all leading axes are
            nodes of ONE graph, so a token of one image may be near a token of another. The teacher is detached unless
            `teacher_grad`.
        k, sigma, orientation, direction, edges, backend: as in `kdfast.ops.token_graph_kl`; with edges, pass k=None.
        normalize: L2-normalise the tokens first, the default here: distances of raw features are often above 100, where
            every weight, the loss and its gradient underflow to 0.
        weight: one factor per token. There is no mask: leaving tokens out changes the graph, so index the tokens instead.
        reduction: "mean" over tokens (the weight of the loss then does not depend on the batch), "sum" (as printed) or
            "none" (the tokens' leading shape).
    Raises:
        ValueError: different leading shapes, k outside 1 .. n - 1; others as in the op.

    >>> loss = token_graph_loss(student_tokens, teacher_tokens, k=8)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    shape = _same_tokens(student, teacher)
    rows = token_graph_kl(
        _nodes(student), _nodes(teacher if teacher_grad else teacher.detach()), k=k, sigma=sigma, orientation=orientation,
        direction=direction, normalize=normalize, edges=edges, backend=backend,
    )  # fmt: skip
    return reduce_rows(rows.reshape(shape), None, weight, reduction)


def token_contrast_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    tau: float = 0.1,
    similarity: str = "cosine",
    weight: Tensor | None = None,
    teacher_grad: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """InfoNCE across two models: a student token must resemble its own teacher token most (TRG's global term).

        loss = -mean_i log( exp(s_ii / tau) / sum_j exp(s_ij / tau) ),   s_ij = cos(student_i, teacher_j)

    Args:
        student, teacher: [n, D] or [..., D], of one width (project the student first); leading axes are flattened. The
            teacher is detached unless `teacher_grad`.
        tau: > 0. similarity: "cosine" or "dot". backend: as in `kdfast.ops.pairwise_infonce`.
        weight: one factor per token. reduction: "mean" over tokens, "sum" or "none". One token gives exactly 0.

    >>> loss = token_contrast_loss(projection(student_tokens), teacher_tokens, tau=0.1)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    shape = _same_tokens(student, teacher)
    teacher = teacher if teacher_grad else teacher.detach()
    rows = pairwise_infonce(_nodes(student), _nodes(teacher), tau=tau, similarity=similarity, backend=backend)
    return reduce_rows(rows.reshape(shape), None, weight, reduction)


def token_context_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    relation: str = "softmax",
    similarity: str = "dot",
    scale: float | None = None,
    diagonal: bool = True,
    mask: Tensor | None = None,
    teacher_grad: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Squared difference of how the tokens of one image see each other in both models (TRG's contextual term).

        R = softmax_j(<x_i, x_j> / sqrt(D));   loss = mean over images and pairs (i, j) of (R^S_ij - R^T_ij)^2

    Args:
        student: [..., M, Ds], teacher: [..., M, Dt]: sets (images) of M tokens, widths may differ. The teacher is detached
            unless `teacher_grad`.
        relation, similarity, scale, diagonal, backend: as in `kdfast.ops.relation_mse`. relation="gram" with
            similarity="cosine" compares cosines: the region term of MGD, the block relations of OADP.
        mask: [..., M] bool, True = keep the token, as row and as column.
        reduction: "mean" over all kept pairs, "sum" over them, or "none": rows [..., M], each a mean over its kept columns.
    No kept token: exact 0 with zero gradient.

    >>> loss = token_context_loss(student_tokens, teacher_tokens)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    shape = _same_tokens(student, teacher)
    teacher = teacher if teacher_grad else teacher.detach()
    options: dict[str, Any] = dict(
        relation=relation, similarity=similarity, scale=scale, mask=mask, diagonal=diagonal, backend=backend
    )
    dtype = compute_dtype(student, teacher)
    lone = 0 if diagonal else 1
    if mask is None:
        columns = torch.full(shape, max(shape[-1] - lone, 0), dtype=dtype, device=student.device)
    else:
        check_mask(mask, shape, student.device)
        columns = torch.where(mask, mask.sum(-1, keepdim=True).to(dtype) - lone, 0.0)
    if reduction == "none":
        return relation_mse(student, teacher, **options) / columns.clamp_min(1)
    pairs = columns.sum().clamp_min(1) if reduction == "mean" else columns.new_ones(())
    return relation_mse(student, teacher, row_weight=(1 / pairs).expand(shape), **options)


def _same_tokens(student: Tensor, teacher: Tensor) -> torch.Size:
    check_pair(student, teacher)
    if student.dim() < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: expected the tokens of student, equal shapes but for the last axis, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return student.shape[:-1]


def _nodes(tokens: Tensor) -> Tensor:
    return tokens.reshape(-1, tokens.shape[-1])


class TokenGraphLoss(LossModule, function=token_graph_loss): ...


class TokenContrastLoss(LossModule, function=token_contrast_loss): ...


class TokenContextLoss(LossModule, function=token_context_loss): ...
