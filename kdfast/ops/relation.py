"""Relations inside a set of tokens: how the N tokens of one model see each other, compared with the other model.

    s_ij = scale <x_i, x_j>  or  scale cos(x_i, x_j)            the scores of one model, [N, N], from its own tokens

    relation_mse   rows_i = sum_j (R_ij - R'_ij)^2              R = s ("gram") or softmax_j(s_i) ("softmax")
    relation_kl    rows_i = D(softmax_j(s_i / T), softmax_j(s'_i / T))      D: a kind of `kdfast.ops.divergence`

Masked tokens are left out as rows (0) and as columns; diagonal=False leaves out j = i; a row without columns is 0.
With G = dL/ds the gradient is scale (G + G^T) x, for both ends of a pair move:

    gram      G = 2 w_i (R - R')        softmax     G = 2 w_i (R E - R <R, E>), E = R - R'        w_i: the row's weight

Fused, a block of both score tables is made by torch.mm or bmm, compared while it is in cache and turned into G in its place
(csrc/cpu/relation.cpp, kdfast/triton, or the divergence kernels); only tokens and rows are kept. The weighted sum (`row_weight`) stores its gradient in the forward pass, so it needs no more
products than eager does; rows with an upstream factor of their own make the scores again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import _core
from kdfast._checks import check_choice, check_number, check_pair, check_row_tensor
from kdfast._dispatch import choose, core_reason
from kdfast._library import (
    address,
    applied,
    compute_dtype,
    direct,
    first_derivative_only,
    lib,
    scale_gradient,
    transforms_active,
)  # fmt: skip
from kdfast.ops.divergence import KINDS, divergence_reference
from kdfast.ops.pairwise import BLOCK_BYTES, NORM_FLOOR, SIMILARITIES
from kdfast.ops.relation_blocks import MSE_RELATIONS, relation_by_blocks, token_gradient
from kdfast.triton import reason as triton_reason
from kdfast.triton import register

KL_KINDS = tuple(kind for kind in KINDS if kind not in ("dkd", "binary"))


# ---------------------------------------------------------------- references: the definitions, with every option
def relation_table(
    tokens: Tensor,
    *,
    relation: str = "softmax",
    similarity: str = "dot",
    scale: float | None = None,
    mask: Tensor | None = None,
    diagonal: bool = True,
) -> Tensor:
    """The relations R of one model's tokens as a table [..., N, N], in plain torch; 0 where a pair is left out.

    tokens: [..., N, D]. Options, defaults and source as in `relation_mse`, which compares two such tables without making them.

    >>> attention = relation_table(torch.randn(2, 49, 64))              # softmax_j(<x_i, x_j> / sqrt(64))
    """
    check_choice("relation", relation, MSE_RELATIONS)
    check_choice("similarity", similarity, SIMILARITIES)
    if scale is None and not (relation == "softmax" and similarity == "dot"):
        scale = 1.0
    keep = _kept_pairs(tokens, mask, diagonal)
    table = _scores(tokens, compute_dtype(tokens), similarity, scale, mask)
    if relation == "softmax":
        some = keep.any(-1, keepdim=True)  # a row without columns would be 0 / 0
        table = torch.where(keep, table, torch.where(some, -torch.inf, 0.0)).softmax(-1)
    return torch.where(keep, table, 0.0)


def relation_mse_reference(
    student: Tensor,
    teacher: Tensor,
    *,
    relation: str = "softmax",
    similarity: str = "dot",
    scale: float | None = None,
    mask: Tensor | None = None,
    diagonal: bool = True,
    row_weight: Tensor | None = None,
) -> Tensor:
    """`relation_mse` in plain torch, from both whole score tables."""
    dtype = compute_dtype(student, teacher)
    options: dict[str, Any] = dict(relation=relation, similarity=similarity, scale=scale, mask=mask, diagonal=diagonal)
    tables = [relation_table(tokens.to(dtype), **options) for tokens in (student, teacher)]
    rows = (tables[0] - tables[1]).square().sum(-1)
    return _weighted(rows, mask, row_weight)


def relation_kl_reference(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    similarity: str = "dot",
    scale: float | None = None,
    mask: Tensor | None = None,
    diagonal: bool = True,
    row_weight: Tensor | None = None,
) -> Tensor:
    """`relation_kl` in plain torch, from both whole score tables."""
    default = scale if scale is not None or similarity == "dot" else 1.0
    keep = _kept_pairs(student, mask, diagonal)
    tables = [
        torch.where(keep, _scores(tokens, compute_dtype(student, teacher), similarity, default, mask), -torch.inf)
        for tokens in (student, teacher)
    ]
    rows = divergence_reference(tables[0], tables[1], kind=kind, beta=beta, temperature=temperature)
    return _weighted(rows, mask, row_weight)


def _prepare(tokens: Tensor, dtype: torch.dtype, similarity: str, mask: Tensor | None) -> Tensor:
    """Tokens as the products take them: wide enough, zero where masked (NaN may stand there), of length 1 for cosines."""
    tokens = tokens.to(dtype)
    if mask is not None:
        tokens = torch.where(mask.unsqueeze(-1), tokens, 0.0)
    return F.normalize(tokens, dim=-1, eps=NORM_FLOOR) if similarity == "cosine" else tokens


def _scale_of(tokens: Tensor, scale: float | None) -> float:
    return tokens.shape[-1] ** -0.5 if scale is None else scale


def _scores(tokens: Tensor, dtype: torch.dtype, similarity: str, scale: float | None, mask: Tensor | None) -> Tensor:
    x = _prepare(tokens, dtype, similarity, mask)
    return x @ x.mT * _scale_of(tokens, scale)  # [..., N, N]


def _kept_pairs(tokens: Tensor, mask: Tensor | None, diagonal: bool) -> Tensor:
    n = tokens.shape[-2]
    keep = torch.ones(n, n, dtype=torch.bool, device=tokens.device)
    if not diagonal:
        keep = keep.logical_xor(torch.eye(n, dtype=torch.bool, device=tokens.device))
    return keep if mask is None else keep & mask.unsqueeze(-2)


def _weighted(rows: Tensor, mask: Tensor | None, row_weight: Tensor | None) -> Tensor:
    if mask is not None:
        rows = torch.where(mask, rows, 0.0)
    return rows if row_weight is None else (rows * row_weight.to(rows.dtype)).sum()


# ---------------------------------------------------------------- registration
# compare: "gram", "softmax" or a divergence kind. One op serves all: rows without weights, and with weights w also the
# gradient of sum_i w_i rows_i for the sides asked for.
lib.define(
    "relation(Tensor student, Tensor teacher, Tensor? mask, Tensor? row_weight, str compare, float beta, float temperature, "
    "float student_scale, float teacher_scale, bool diagonal, bool need_student, bool need_teacher) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("kdfast::relation")
def _(student, teacher, mask, row_weight, compare, beta, temperature, student_scale, teacher_scale, diagonal,
      need_student, need_teacher):  # fmt: skip
    rows = student.new_empty(student.shape[:2])
    return rows, token_gradient(student, need_student), token_gradient(teacher, need_teacher)


def _compare_rows_cpu(compare, tables, scales, mask, diagonal, first_row, weight, needs, out):
    n = out.stride(0)  # of the whole set's rows, and of their weights
    _core.core.relation_rows(
        out.dtype == torch.float64, compare, *(address(table) for table in tables), *tables[0].shape, first_row, *scales,
        address(mask), diagonal, address(weight), n, *needs, address(out), n,
    )  # fmt: skip


@torch.library.impl(lib, "relation", "CPU")
def _relation_cpu(*arguments):
    return relation_by_blocks(_compare_rows_cpu, BLOCK_BYTES, *arguments)


register("relation", "relation", "relation")


_relation_op = direct(torch.ops.kdfast.relation.default, _relation_cpu)


class _Rows(torch.autograd.Function):
    """Rows: the backward calls the same op with the upstream gradient as weights."""

    @staticmethod
    def forward(student, teacher, mask, options):
        return _relation_op(student, teacher, mask, None, *options, False, False)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        student, teacher, mask, ctx.options = inputs
        ctx.save_for_backward(student, teacher, mask)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_rows):
        student, teacher, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if mask is not None:
            grad_rows = grad_rows.masked_fill(~mask, 0.0)
        _, *grads = _relation_op(student, teacher, mask, grad_rows.contiguous(), *ctx.options, *needs)
        return grads[0] if needs[0] else None, grads[1] if needs[1] else None, None, None


_rows = applied(_Rows)


class _Sum(torch.autograd.Function):
    """The weighted sum: the forward already stores the final gradient."""

    @staticmethod
    def forward(ctx, student, teacher, mask, row_weight, options):
        needs = ctx.needs_input_grad[:2]
        rows, *grads = _relation_op(student, teacher, mask, row_weight, *options, *needs)
        ctx.save_for_backward(*grads)
        return (rows * row_weight).sum()

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_loss):
        sides = zip(ctx.saved_tensors, ctx.needs_input_grad[:2])
        return *(scale_gradient(grad, grad_loss) if need else None for grad, need in sides), None, None, None


def _fused(student, teacher, mask, row_weight, similarity, scale, compare, beta, temperature, diagonal) -> Tensor:
    dtype = compute_dtype(student, teacher)
    shape = student.shape[:-1]
    x, z = (
        _prepare(tokens, dtype, similarity, mask).reshape(-1, *tokens.shape[-2:]).contiguous()
        for tokens in (student, teacher)
    )
    mask = None if mask is None else mask.reshape(-1, shape[-1])
    options = (compare, beta, temperature, _scale_of(student, scale), _scale_of(teacher, scale), diagonal)
    if row_weight is None or transforms_active():
        rows = _rows(x, z, mask, options).reshape(shape)
        return rows if row_weight is None else (rows * row_weight).sum()
    weight = row_weight.to(dtype).reshape(-1, shape[-1])
    if mask is not None:
        weight = torch.where(mask, weight, 0.0)
    return _Sum.apply(x, z, mask, weight.contiguous(), options)


# ---------------------------------------------------------------- public
def relation_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    relation: str = "softmax",
    similarity: str = "dot",
    scale: float | None = None,
    mask: Tensor | None = None,
    diagonal: bool = True,
    row_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Squared difference of the two models' token relations, one row per token; equations at the top of this module.

    Args:
        student: [..., N, Ds], teacher: [..., N, Dt]: the same tokens in the same order; widths may differ.
        relation: "softmax" compares softmax_j(s_i), "gram" the scores themselves.
        similarity: "dot" or "cosine" (norms floored at 1e-12).
        scale: factor of the scores; None means 1/sqrt(D) of each model for softmax of dot products, 1 otherwise.
        mask: [..., N] bool, True = keep the token (as row and as column). diagonal: compare a token with itself too.
        row_weight: [..., N]; the result is then the scalar sum of weight * row.
        backend: "cpu", "triton", "reference" or None for the best that can run.
    Returns:
        float32 rows [..., N] (float64 for float64 input): sums over j, 0 for masked tokens; or their weighted sum.
    Differentiable in student and teacher, once; `backend="reference"` gives every derivative, also for row_weight.
    Source: TRG's contextual term (arXiv 2306.12442), MGD's region term (2208.10169), OADP's block relations (2303.05892).

    >>> loss = relation_mse(student, teacher).mean() / student.shape[1]         # TRG's mean over B N N pairs
    """
    check_choice("relation", relation, MSE_RELATIONS)
    _check(student, teacher, similarity, scale, mask, row_weight)
    if _choose("relation_mse", student, teacher, row_weight, backend) == "reference":
        return relation_mse_reference(
            student, teacher, relation=relation, similarity=similarity, scale=scale, mask=mask, diagonal=diagonal,
            row_weight=row_weight,
        )  # fmt: skip
    if scale is None and not (relation == "softmax" and similarity == "dot"):
        scale = 1.0
    return _fused(student, teacher, mask, row_weight, similarity, scale, relation, 0.0, 1.0, diagonal)


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    similarity: str = "dot",
    scale: float | None = None,
    mask: Tensor | None = None,
    diagonal: bool = True,
    row_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence of the two models' softmax relations, one row per token; equations at the top of this module.

    Args:
        kind, beta, temperature: as in `kdfast.ops.divergence`, except "dkd" and "binary"; forward_kl is KL(teacher || student).
        scale: factor of the scores; None means 1/sqrt(D) of each model for dot products, 1 for cosines.
        Others, shapes and derivatives: as in `relation_mse`.
    Returns:
        float32 rows [..., N] (float64 for float64 input), 0 for masked tokens; or their weighted sum.
    Source: attention-relation distillation in the manner of MiniLMv2 (Wang et al. 2021, eq. 4), with dot products over sqrt(D).

    >>> rows = relation_kl(student, teacher, similarity="cosine", temperature=0.1, diagonal=False)
    """
    check_choice("kind", kind, KL_KINDS)
    check_number("beta", beta)
    check_number("temperature", temperature, low=0.0, open_low=True)
    _check(student, teacher, similarity, scale, mask, row_weight)
    if _choose("relation_kl", student, teacher, row_weight, backend) == "reference":
        return relation_kl_reference(
            student, teacher, kind=kind, beta=beta, temperature=temperature, similarity=similarity, scale=scale, mask=mask,
            diagonal=diagonal, row_weight=row_weight,
        )  # fmt: skip
    scale = 1.0 if scale is None and similarity == "cosine" else scale
    return _fused(
        student, teacher, mask, row_weight, similarity, scale, kind, float(beta), float(temperature), diagonal
    )


def _check(student, teacher, similarity, scale, mask, row_weight) -> None:
    check_pair(student, teacher)
    if student.dim() < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: expected the [..., N] of student (at least 2 dimensions), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.shape[-1] == 0 or teacher.shape[-1] == 0:
        raise ValueError(f"student, teacher: expected width >= 1, got {student.shape[-1]} and {teacher.shape[-1]}")
    check_choice("similarity", similarity, SIMILARITIES)
    if scale is not None:
        check_number("scale", scale)
    if mask is not None:
        check_row_tensor("mask", mask, student.shape[:-1], student.device)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool (True = keep), got {mask.dtype}")
    if row_weight is not None:
        check_row_tensor("row_weight", row_weight, student.shape[:-1], student.device)


def _choose(op: str, student: Tensor, teacher: Tensor, row_weight: Tensor | None, backend: str | None) -> str:
    def learned_weight() -> str | None:
        learned = row_weight is not None and row_weight.requires_grad
        return "a gradient for row_weight comes from the reference only" if learned else None

    def cpu() -> str | None:
        if (why := core_reason()) is not None:
            return why
        on_cpu = student.device.type in ("cpu", "meta")
        return learned_weight() if on_cpu else f"the tensors are on {student.device}"

    def triton() -> str | None:
        return triton_reason(op, student, teacher) or learned_weight()

    return choose(op, backend, {"cpu": cpu, "triton": triton}, (student, teacher))
