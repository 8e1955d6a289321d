"""Relations by blocks of both score tables: the loop that the fused backends of `kdfast.ops.relation` share. A backend brings the
function that compares a block while it is in cache; products and token gradients are torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdfast.ops.pairwise import BLOCK_BYTES, row_blocks

MSE_RELATIONS = ("softmax", "gram")


def token_gradient(tokens: Tensor, needed: bool) -> Tensor:
    return tokens.new_empty(tokens.shape if needed else (0,))


# compare_rows(compare, tables, scales, mask, diagonal, first_row, weight, needs, out): a block of both tables of products to rows,
# and the tables, in their place, to the gradients of the products that `needs` asks for.
def relation_by_blocks(
    compare_rows: Callable[..., None], block_bytes: int, student: Tensor, teacher: Tensor, mask: Tensor | None, row_weight: Tensor | None,
    compare: str, beta: float, temperature: float, student_scale: float, teacher_scale: float, diagonal: bool, need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op, on the fused backends."""
    sets, n = student.shape[:2]
    mask = None if mask is None else mask.contiguous()  # the kernels read it flat
    rows = student.new_empty(sets, n)
    sides = (student, student_scale, need_student), (teacher, teacher_scale, need_teacher)
    grads = tuple(token_gradient(x, need).zero_() for x, _, need in sides)
    blocks = _blocks(sets, n, student.element_size(), block_bytes)
    size = max(((b1 - b0) * (r1 - r0) * n for b0, b1, r0, r1 in blocks), default=0)
    buffers = student.new_empty(size), student.new_empty(size)
    for b0, b1, r0, r1 in blocks:
        shape = (b1 - b0, r1 - r0, n)
        tables = [buffer[: shape[0] * shape[1] * n].view(shape) for buffer in buffers]
        for table, (x, _, _) in zip(tables, sides):
            _product(x[b0:b1, r0:r1], x[b0:b1].mT, table)
        weight = None if row_weight is None else row_weight[b0:b1, r0:r1]
        if compare in MSE_RELATIONS:
            kept = None if mask is None else mask[b0:b1]
            needs = (need_student, need_teacher)
            compare_rows(
                compare, tables, (student_scale, teacher_scale), kept, diagonal, r0, weight, needs, rows[b0:b1, r0:r1]
            )
        else:
            outputs = _divergence_block(
                tables, sides, mask, diagonal, (b0, b1, r0), weight, (compare, beta, 0.0, temperature)
            )
            rows[b0:b1, r0:r1], *tables = outputs
        for (x, _, need), grad, table in zip(sides, grads, tables):
            if need:
                _add_token_gradient(grad[b0:b1], table, x[b0:b1], r0, r1)
    if mask is not None:
        rows.masked_fill_(~mask, 0.0)
    return rows, grads[0], grads[1]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, [sets, ., .]; one set is a plain product, which runs faster than a batch of one."""
    torch.mm(a[0], b[0], out=out[0]) if len(a) == 1 else torch.bmm(a, b, out=out)


def _blocks(sets: int, n: int, itemsize: int, size: int = BLOCK_BYTES) -> list[tuple[int, int, int, int]]:
    """(first set, last set, first row, last row): several small sets in one block, or one large set in several."""
    per_block = size // max(n * n * itemsize, 1)
    if per_block >= 1:
        return [(b, min(b + per_block, sets), 0, n) for b in range(0, sets, per_block)]
    return [(b, b + 1, r0, r1) for b in range(sets) for r0, r1 in row_blocks(n, n, itemsize, size)]


def _add_token_gradient(grad: Tensor, g: Tensor, x: Tensor, r0: int, r1: int) -> None:
    """grad += (G + G^T) x for the rows r0..r1 of G."""
    if len(g) > 1 or r1 - r0 == x.shape[1]:  # whole sets: one product
        grad.baddbmm_(g + g.mT, x)
        return
    grad[0, r0:r1].addmm_(g[0], x[0])
    grad[0].addmm_(g[0].T, x[0, r0:r1])


def _divergence_block(tables, sides, mask, diagonal, block, weight, kind):
    """(rows, gradients of the products) by the divergence kernels; left-out columns are -inf logits."""
    b0, b1, r0 = block
    for table, (_, scale, _) in zip(tables, sides):
        table.mul_(scale)
        if mask is not None:
            table.masked_fill_(~mask[b0:b1].unsqueeze(1), -torch.inf)
        if not diagonal:
            table[:, :, r0:].diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    options = (*kind, tables[0].shape[-1], tables[0].dim() - 1)
    rows, stats = torch.ops.kdfast.divergence_rows(*tables, None, None, *options)
    needs = tuple(need for _, _, need in sides)
    if not any(needs):
        return rows, None, None
    grads = torch.ops.kdfast.divergence_rows_backward(weight.contiguous(), *tables, stats, None, None, *options, *needs)
    return rows, *(g.mul_(scale) if need else None for g, (_, scale, need) in zip(grads, sides))
