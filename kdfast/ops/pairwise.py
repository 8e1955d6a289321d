"""Costs and contrasts between all pairs of two point sets, without keeping the table of pairs where a row sum is enough.

    pairwise_cost      c_ij = sum_c |x_ic - y_jc|^p            p = 1 or 2 (2: the squared distance, no root)
                       dc_ij/dx_ic = sign(x_ic - y_jc), 0 at a tie, or 2 (x_ic - y_jc)
    pairwise_infonce   l_i = log sum_{j in A_i} exp(s_ij / tau) - s_{i,p_i} / tau,   s_ij = <x_i, y_j> or its cosine
                       dl_i/ds_ij = ([j in A_i] softmax_j - [j = p_i]) / tau
                       A_i = all columns, or all but j = i; p_i is the column of the positive
    pairwise_mmd       kernel mean discrepancy, k(a, b) = sum_r exp(-|a-b|^2 / bandwidth_r)   (in `kdfast.ops.mmd`)

The gradient of l_i with respect to x_i needs row i alone. So the fused InfoNCE makes it in the forward pass, while the
block of scores is still in cache: [N, D] numbers, which the backward multiplies by the upstream factor of the row. Only a
gradient for y computes the scores again. Matrix products are torch.mm on blocks of rows, csrc/cpu or kdfast/triton does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import _core
from kdfast._checks import check_choice, check_labels, check_number, check_pair
from kdfast._dispatch import choose, core_reason, debugging
from kdfast._library import (
    address,
    applied,
    compute_dtype,
    direct,
    first_derivative_only,
    lib,
    operand,
    readable,
    transforms_active,
)  # fmt: skip
from kdfast.triton import reason as triton_reason
from kdfast.triton import register

SIMILARITIES = ("cosine", "dot")
NORM_FLOOR = 1e-12  # the cosine with a zero vector is 0
BLOCK_BYTES = 8 << 20  # one block of scores: it stays in the last-level cache between the product and its use


# ---------------------------------------------------------------- references: the definitions, with every option
def pairwise_cost_reference(x: Tensor, y: Tensor, *, p: int) -> Tensor:
    """sum_c |x_ic - y_jc|^p in plain torch: [..., N, M]. Holds an [..., N, M, C] buffer; any order of derivative."""
    dtype = compute_dtype(x, y)
    difference = x.to(dtype).unsqueeze(-2) - y.to(dtype).unsqueeze(-3)  # [..., N, M, C]
    return (difference.abs() if p == 1 else difference.square()).sum(-1)


def pairwise_infonce_reference(
    x: Tensor,
    y: Tensor,
    *,
    tau: float,
    similarity: str = "cosine",
    positive: Tensor | None = None,
    exclude_self: bool = False,
) -> Tensor:
    """The InfoNCE rows of this module in plain torch, from the whole score table."""
    x, y = _operands(x, y, similarity)
    scores = x @ y.T / tau  # [N, M]
    own = torch.arange(len(x), device=x.device)
    denominator = scores
    if exclude_self:
        denominator = torch.where(own.unsqueeze(1) == torch.arange(len(y), device=y.device), -torch.inf, scores)
    index = own if positive is None else positive.long()
    return denominator.logsumexp(-1) - scores.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _operands(x: Tensor, y: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x, y)
    x, y = x.to(dtype), y.to(dtype)
    if similarity == "cosine":
        x, y = F.normalize(x, dim=-1, eps=NORM_FLOOR), F.normalize(y, dim=-1, eps=NORM_FLOOR)
    return x, y


# ---------------------------------------------------------------- cost: registration and autograd
lib.define("pairwise_cost(Tensor x, Tensor y, int p) -> Tensor")
# The gradient of the first operand; the second one's is that of (y, x) with the upstream gradient transposed.
lib.define("pairwise_cost_backward(Tensor grad, Tensor x, Tensor y, int p) -> Tensor")


@torch.library.register_fake("kdfast::pairwise_cost")
def _(x, y, p):
    return x.new_empty([x.shape[0], x.shape[1], y.shape[1]], dtype=compute_dtype(x, y))


@torch.library.register_fake("kdfast::pairwise_cost_backward")
def _(grad, x, y, p):
    return x.new_empty(x.shape)


def _sizes(x: Tensor, y: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[1], y.shape[1], x.shape[2]


@torch.library.impl(lib, "pairwise_cost", "CPU")
def _pairwise_cost_cpu(x, y, p):
    sizes = _sizes(x, y)
    if 0 in sizes:
        return x.new_zeros(sizes[:3], dtype=compute_dtype(x, y))
    cost = x.new_empty(sizes[:3], dtype=compute_dtype(x, y))
    _core.core.pairwise_cost(*operand(x), *operand(y), sizes, p, address(cost))
    return cost


@torch.library.impl(lib, "pairwise_cost_backward", "CPU")
def _pairwise_cost_backward_cpu(grad, x, y, p):
    sizes = _sizes(x, y)
    if 0 in sizes:
        return x.new_zeros(x.shape)
    grad_x = x.new_empty(x.shape)
    grad = grad.to(compute_dtype(x, y))
    _core.core.pairwise_cost_backward(address(grad), grad.stride(), *operand(x), *operand(y), sizes, p, address(grad_x))
    return grad_x


register("pairwise_cost", "pairwise", "cost")
register("pairwise_cost_backward", "pairwise", "cost_backward")
_cost_op = torch.ops.kdfast.pairwise_cost.default
_cost_backward_op = torch.ops.kdfast.pairwise_cost_backward.default


class _Cost(torch.autograd.Function):
    @staticmethod
    def forward(x, y, p):
        return _cost_op(x, y, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.p = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        grad_x = _cost_backward_op(grad, x, y, ctx.p) if ctx.needs_input_grad[0] else None
        grad_y = _cost_backward_op(grad.mT, y, x, ctx.p) if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, None


_cost = applied(_Cost)


# ---------------------------------------------------------------- InfoNCE: registration and autograd
lib.define(
    "infonce_rows(Tensor x, Tensor y, Tensor positive, float scale, bool exclude_self, bool need_x) -> (Tensor, Tensor, Tensor)"
)
lib.define(
    "infonce_rows_backward(Tensor grad_rows, Tensor x, Tensor y, Tensor positive, Tensor lse, float scale, "
    "bool exclude_self) -> Tensor"
)


@torch.library.register_fake("kdfast::infonce_rows")
def _(x, y, positive, scale, exclude_self, need_x):
    rows = x.new_empty(x.shape[:1])
    return rows, torch.empty_like(rows), x.new_empty(x.shape if need_x else (0,))


@torch.library.register_fake("kdfast::infonce_rows_backward")
def _(grad_rows, x, y, positive, lse, scale, exclude_self):
    return y.new_empty(y.shape)


def row_blocks(rows: int, columns: int, itemsize: int, size: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """Cuts rows so that a [block, columns] table fits `size` bytes. It depends on the shapes alone."""
    step = max(16, size // max(columns * itemsize, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


# contrast(scores, first_row, scale, positive, exclude_self, lse, rows, unit, grad_rows): turns a block of scores, in its place,
# into rows and log-sum-exps, with `unit` the scores into dl_i/ds_ij, or with `grad_rows` into grad_i dl_i/ds_ij.
def rows_by_blocks(
    contrast: Callable[..., None], block_bytes: int, x: Tensor, y: Tensor, positive: Tensor, scale: float, exclude_self: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows, log-sum-exps and, if asked for, dl_i/dx_i: forward of the fused backends."""
    positive = positive.contiguous()  # read flat
    lse, rows = x.new_empty(len(x)), x.new_empty(len(x))
    unit = x.new_empty(x.shape if need_x else (0,))
    for start, stop, scores in _score_blocks(x, y, block_bytes):
        here = slice(start, stop)
        contrast(scores, start, scale, positive[here], exclude_self, lse[here], rows[here], need_x, None)
        if need_x:
            torch.mm(scores, y, out=unit[here])
    return rows, lse, unit


def backward_by_blocks(
    contrast: Callable[..., None], block_bytes: int, grad_rows: Tensor, x: Tensor, y: Tensor, positive: Tensor, lse: Tensor,
    scale: float, exclude_self: bool,
) -> Tensor:  # fmt: skip
    """dl/dy from the scores, made again: backward of the fused backends."""
    grad_rows, positive = grad_rows.contiguous(), positive.contiguous()
    grad_y = torch.zeros_like(y, memory_format=torch.contiguous_format)
    for start, stop, scores in _score_blocks(x, y, block_bytes):
        here = slice(start, stop)
        contrast(scores, start, scale, positive[here], exclude_self, lse[here], None, False, grad_rows[here])
        grad_y.addmm_(scores.T, x[here])
    return grad_y


def _score_blocks(x: Tensor, y: Tensor, block_bytes: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, last row, x[rows] y^T): one buffer, written anew for each block of rows."""
    blocks = row_blocks(len(x), len(y), x.element_size(), block_bytes)
    buffer = x.new_empty(max((stop - start for start, stop in blocks), default=0), len(y))
    for start, stop in blocks:
        yield start, stop, torch.mm(x[start:stop], y.T, out=buffer[: stop - start])


def _contrast_cpu(scores, first_row, scale, positive, exclude_self, lse, rows, unit, grad_rows):
    _core.core.contrast_rows(
        scores.dtype == torch.float64, address(scores), *scores.shape, first_row, scale, address(positive), exclude_self,
        address(rows), address(lse), unit, address(grad_rows),
    )  # fmt: skip


@torch.library.impl(lib, "infonce_rows", "CPU")
def _infonce_rows_cpu(*arguments):
    return rows_by_blocks(_contrast_cpu, BLOCK_BYTES, *arguments)


@torch.library.impl(lib, "infonce_rows_backward", "CPU")
def _infonce_rows_backward_cpu(*arguments):
    return backward_by_blocks(_contrast_cpu, BLOCK_BYTES, *arguments)


register("infonce_rows", "pairwise", "infonce_rows")
register("infonce_rows_backward", "pairwise", "infonce_rows_backward")
_infonce_op = direct(torch.ops.kdfast.infonce_rows.default, _infonce_rows_cpu)
_infonce_backward_op = direct(torch.ops.kdfast.infonce_rows_backward.default, _infonce_rows_backward_cpu)


class _InfoNCE(torch.autograd.Function):
    """(rows, log-sum-exps, unit gradients); only the rows are for others."""

    @staticmethod
    def forward(x, y, positive, scale, exclude_self, need_x):
        return _infonce_op(x, y, positive, scale, exclude_self, need_x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, positive, *ctx.options = inputs[:5]
        _, lse, unit = output
        # without a gradient for y the unit gradients are all that the backward needs
        ctx.save_for_backward(unit, *((x, y, positive, lse) if ctx.needs_input_grad[1] else ()))
        ctx.mark_non_differentiable(lse, unit)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_rows, *_):
        if grad_rows is None:  # nobody used the rows
            return (None,) * 6
        unit, *rest = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        grad_y = _infonce_backward_op(grad_rows, *rest, *ctx.options) if need_y else None
        return grad_rows.unsqueeze(1) * unit if need_x else None, grad_y, None, None, None, None


_infonce = applied(_InfoNCE)


# ---------------------------------------------------------------- public
def pairwise_cost(x: Tensor, y: Tensor, *, p: int, backend: str | None = None) -> Tensor:
    """Cost between every row of x and every row of y: c_ij = sum_c |x_ic - y_jc|^p.

    Args:
        x: [..., N, C]. y: [..., M, C], the same leading shape; float16, bfloat16, float32 or float64.
        p: 1 (L1 distance, gradient sign(x - y) with 0 at ties) or 2 (SQUARED Euclidean distance).
        backend: "cpu", "triton", "reference" or None for the best that can run.
    Returns:
        [..., N, M], float32 (float64 for float64 input).
    Differentiable in x and y, once; `backend="reference"` gives every derivative.
    Raises:
        ValueError: unequal C or leading shapes, p other than 1 or 2.
    Source: the batch cost of SinKD (arXiv 2402.17110, p = 1).

    >>> cost = pairwise_cost(student.softmax(-1), teacher.softmax(-1), p=1)
    """
    _check_points(x, y)
    if p not in (1, 2) or isinstance(p, bool):
        raise ValueError(f"p: expected 1 or 2, got {p!r}")

    if _choose("pairwise_cost", x, y, backend) == "reference":
        return pairwise_cost_reference(x, y, p=p)
    batch, n, m, width = math.prod(x.shape[:-2]), x.shape[-2], y.shape[-2], x.shape[-1]
    cost = _cost(x.reshape(batch, n, width), y.reshape(batch, m, width), p)
    return cost.reshape(*x.shape[:-1], m)


def pairwise_infonce(
    x: Tensor,
    y: Tensor,
    *,
    tau: float,
    similarity: str = "cosine",
    positive: Tensor | None = None,
    exclude_self: bool = False,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of every row of x against all rows of y: -log of the softmax at the positive.

        l_i = log sum_j exp(s_ij / tau) - s_{i,p_i} / tau        s_ij = cos(x_i, y_j) or <x_i, y_j>

    Args:
        x: [N, D]. y: [M, D], of one device; float16, bfloat16, float32 or float64.
        tau: temperature > 0. similarity: "cosine" (norms floored at 1e-12) or "dot".
        positive: [N] integers in [0, M), the column of each row's positive; default p_i = i, which needs M >= N.
        exclude_self: leave column i out of row i's sum, for x against itself (NT-Xent); the positive must then be another.
        backend: "cpu", "triton", "reference" or None for the best that can run.
    Returns:
        [N], float32 (float64 for float64 input). With one column and without exclude_self exactly 0.
    Differentiable in x and y, once; `backend="reference"` gives every derivative. At no time is an [N, M] table kept.
    Raises:
        ValueError: unequal D, tau <= 0, M < N without positives, positives out of range (on the CPU; Triton makes such a row NaN).
    Source: the global term of TRG (arXiv 2306.12442); with exclude_self the contrastive term of KD^3 (arXiv 2307.11469).

    >>> rows = pairwise_infonce(projected_student, teacher.detach(), tau=0.1)
    """
    _check_points(x, y)
    if x.dim() != 2:
        raise ValueError(f"x: expected [N, D], got {tuple(x.shape)}")
    check_number("tau", tau, low=0.0, open_low=True)
    check_choice("similarity", similarity, SIMILARITIES)
    if positive is None:
        if len(y) < len(x):
            raise ValueError(f"y: expected at least the {len(x)} rows of x when no positive is given, got {len(y)}")
        if exclude_self:
            raise ValueError("positive: expected the column of each positive, got None with exclude_self=True")
    else:
        check_labels(positive, x.shape[:1], x.device, "positive")
        if positive.numel() and (readable(positive) or debugging()):
            _check_positive(positive, len(y), exclude_self)
    if _choose("pairwise_infonce", x, y, backend) == "reference":
        return pairwise_infonce_reference(
            x, y, tau=tau, similarity=similarity, positive=positive, exclude_self=exclude_self
        )
    x, y = _operands(x, y, similarity)
    positive = torch.arange(len(x), device=x.device) if positive is None else positive.long()
    need_x = torch.is_grad_enabled() and (x.requires_grad or transforms_active())
    return _infonce(x, y, positive, 1.0 / tau, exclude_self, need_x)[0]


def _check_positive(positive: Tensor, columns: int, exclude_self: bool) -> None:
    low, high = positive.aminmax()
    if low < 0 or high >= columns:
        raise ValueError(f"positive: expected integers in [0, {columns}), got {int(low)} to {int(high)}")
    if exclude_self and bool((positive == torch.arange(len(positive), device=positive.device)).any()):
        raise ValueError("positive: expected another column than the row's own with exclude_self=True")


def _choose(op: str, x: Tensor, y: Tensor, backend: str | None) -> str:
    def cpu() -> str | None:
        if (why := core_reason()) is not None:
            return why
        return None if x.device.type in ("cpu", "meta") else f"the tensors are on {x.device}"

    return choose(op, backend, {"cpu": cpu, "triton": lambda: triton_reason(op, x, y)}, (x, y))


def _check_points(x: Tensor, y: Tensor) -> None:
    check_pair(x, y, ("x", "y"))
    if x.dim() < 2 or y.dim() != x.dim():
        raise ValueError(
            f"y: expected [..., points, width] tensors of equal rank >= 2, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: expected the width of x ({x.shape[-1]}), got {y.shape[-1]}")
    if x.shape[:-2] != y.shape[:-2]:
        raise ValueError(f"y: expected the leading shape of x {tuple(x.shape[:-2])}, got {tuple(y.shape[:-2])}")
