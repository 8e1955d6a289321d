"""Kernels of `kdfast.triton.pairwise`, costs: no buffer over pairs and columns at once. A tile of R x S pairs walks the columns
in steps of B with one sum per pair and lane, added at the end; a gradient's tile of R rows x B columns stays in registers while
the other set's rows go by in order. Few tiles are split, by columns and by the other rows; add_kernel adds the parts in order.
"""

import triton
import triton.language as tl

from kdfast.triton.tiles import class_offsets


@triton.jit
def load_points(rows, columns, stride, live, end, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """[R, B] coordinates, 0 beyond the last column and in rows that do not exist: 0 - 0 adds nothing to a distance."""
    mask = live[:, None] & (columns < end)[None, :]
    return tl.load(rows[:, None] + class_offsets(columns, stride, WIDE)[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=["n", "m", "row_tiles", "other_tiles"])  # they vary from batch to batch
def cost_kernel(
    x, y, cost, batches, n, m, width, row_tiles, other_tiles, n_splits, per_split, x0, x1, x2, y0, y1, y2,
    P: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, S: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """R x S pairs of one batch over the columns of one split: cost [splits, batches, n, m]."""
    program = tl.program_id(0)
    split = program % n_splits
    tile = program // n_splits
    i = tile // other_tiles % row_tiles * R + tl.arange(0, R)
    j = tile % other_tiles * S + tl.arange(0, S)
    batch = (tile // other_tiles // row_tiles).to(tl.int64)
    xs = x + batch * x0 + i.to(tl.int64) * x1
    ys = y + batch * y0 + j.to(tl.int64) * y1
    begin = split * per_split
    end = tl.minimum(begin + per_split, width)
    total = tl.zeros([R, S, B], DTYPE)
    for start in range(begin, end, B):
        columns = start + tl.arange(0, B)
        a = load_points(xs, columns, x2, i < n, end, DTYPE, WIDE)
        b = load_points(ys, columns, y2, j < m, end, DTYPE, WIDE)
        d = a[:, None, :] - b[None, :, :]
        total += tl.abs(d) if P == 1 else d * d
    row = (split * batches + batch) * n + i
    tl.store(cost + row[:, None] * m + j[None, :], tl.sum(total, 2), mask=(i < n)[:, None] & (j < m)[None, :])


@triton.jit(do_not_specialize=["n", "m", "row_tiles"])  # they vary from batch to batch
def cost_gradient_kernel(
    grad, x, y, grad_x, batches, n, m, width, row_tiles, column_tiles, n_splits, per_split, g0, g1, g2, x0, x1, x2, y0, y1, y2,
    P: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """R rows x B columns of dx, from the other rows of one split: grad_x [splits, batches, n, width]."""
    program = tl.program_id(0)
    split = program % n_splits
    tile = program // n_splits
    columns = tile % column_tiles * B + tl.arange(0, B)
    i = tile // column_tiles % row_tiles * R + tl.arange(0, R)
    batch = (tile // column_tiles // row_tiles).to(tl.int64)
    inside = i < n
    here = columns < width
    a = load_points(x + batch * x0 + i.to(tl.int64) * x1, columns, x2, inside, width, DTYPE, WIDE)
    gs = grad + batch * g0 + i.to(tl.int64) * g1
    ys = y + batch * y0 + class_offsets(columns, y2, WIDE)
    total = tl.zeros([R, B], DTYPE)
    begin = split * per_split
    at = begin + tl.zeros([], tl.int64)
    for _ in tl.range(begin, tl.minimum(begin + per_split, m), loop_unroll_factor=4):
        b = tl.load(ys + at * y1, mask=here, other=0.0).to(DTYPE)[None, :]
        g = tl.load(gs + at * g2, mask=inside, other=0.0).to(DTYPE)[:, None]
        at += 1
        if P == 1:
            total += tl.where(a > b, g, tl.where(a < b, -g, 0.0))
        else:
            total += (a - b) * (2.0 * g)
    row = (split * batches + batch) * n + i
    tl.store(
        grad_x + row[:, None] * width + columns[None, :],
        total.to(grad_x.dtype.element_ty),
        mask=inside[:, None] & here[None, :],
    )


@triton.jit(do_not_specialize=["size"])
def add_kernel(parts, out, size, n_splits, B: tl.constexpr):
    """out = the sum of parts [splits, size], in order."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    total = tl.zeros([B], parts.dtype.element_ty)
    for split in range(0, n_splits):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)
