"""Kernels of `kdfast.triton.sinkhorn_kd`: softened rows, and the way back through them. A program owns R rows and walks their
classes twice; in the second walk what fits the caches is still there.
"""

import triton
import triton.language as tl

from kdfast.triton.tiles import load_tile, row_offsets, store_tile


@triton.jit
def place(tiles, inner, R: tl.constexpr):
    """(outer index, rows i, which of them exist, their number): what this program owns."""
    program = tl.program_id(0)
    i = program % tiles * R + tl.arange(0, R)
    outer = program // tiles
    return outer, i, i < inner, outer.to(tl.int64) * inner + i


@triton.jit(do_not_specialize=["tiles"])
def soften_kernel(
    logits, mask, probs, kept, tiles, n1, n2, inner, classes, x0, x1, x2, x3, x4, temperature: tl.float64,
    DTYPE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """probs [rows, classes] = softmax(logits / T), kept [rows] = 1; zeros in a row that is masked or only -inf."""
    outer, i, inside, row = place(tiles, inner, R)
    live = inside
    if mask is not None:
        live = inside & (tl.load(mask + row, mask=inside, other=0) != 0)
    inverse_t = (1.0 / tl.full([], temperature, tl.float64)).to(DTYPE)
    xs = logits + row_offsets(outer, i, n1, n2, x0, x1, x2, x3)
    top = tl.full([R], -float("inf"), DTYPE)
    total = tl.zeros([R], DTYPE)
    for start in range(0, classes, B):
        x = load_tile(xs, start + tl.arange(0, B), x4, live, classes, DTYPE, WIDE)
        higher = tl.maximum(top, tl.max(x, 1))
        above = tl.where(higher == -float("inf"), 0.0, higher)
        e = tl.exp((x - above[:, None]) * inverse_t)  # a NaN or +inf shows in the sum
        total = total * tl.exp((top - above) * inverse_t) + tl.sum(e, 1)
        top = higher
    live = live & ~(total == 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    safe = tl.where(live, total, 1.0)
    for start in range(0, classes, B):
        columns = start + tl.arange(0, B)
        x = load_tile(xs, columns, x4, live, classes, DTYPE, WIDE)
        p = tl.where(live[:, None], tl.exp((x - top[:, None]) * inverse_t) / safe[:, None], 0.0)
        store_tile(probs + row * classes, columns, 1, inside, classes, classes, p, False)
    tl.store(kept + row, tl.where(live, 1.0, 0.0).to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["tiles"])
def soften_backward_kernel(
    grad, probs, kept, factor, grad_logits, tiles, n1, n2, inner, classes, x0, x1, x2, x3, x4, temperature: tl.float64,
    DTYPE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_logits = factor / T p (grad - <grad, p>), 0 in the rows that were not kept."""
    outer, i, inside, row = place(tiles, inner, R)
    live = inside & (tl.load(kept + row, mask=inside, other=0.0) != 0)
    slope = (tl.load(factor).to(tl.float64) / tl.full([], temperature, tl.float64)).to(DTYPE)
    mean = tl.zeros([R], tl.float64)
    for start in range(0, classes, B):
        columns = start + tl.arange(0, B)
        here = live[:, None] & (columns < classes)[None, :]
        at = (row * classes)[:, None] + columns[None, :]
        p = tl.load(probs + at, mask=here, other=0.0)
        mean += tl.sum(p * tl.load(grad + at, mask=here, other=0.0), 1).to(tl.float64)
    mean = mean.to(DTYPE)
    gs = grad_logits + row_offsets(outer, i, n1, n2, x0, x1, x2, x3)
    for start in range(0, classes, B):
        columns = start + tl.arange(0, B)
        here = live[:, None] & (columns < classes)[None, :]
        at = (row * classes)[:, None] + columns[None, :]
        p = tl.load(probs + at, mask=here, other=0.0)
        g = slope * p * (tl.load(grad + at, mask=here, other=0.0) - mean[:, None])
        store_tile(gs, columns, x4, inside, classes, classes, tl.where(here, g, 0.0), WIDE)
