"""Tiles of logits in memory, for the kernels of every op: rows by 64-bit offsets, classes by 32-bit ones within a row."""

import triton
import triton.language as tl


@triton.jit
def row_offsets(outer, i, n1, n2, s0, s1, s2, s3):
    """Elements to the start of rows i of outer index `outer`: 64-bit, since rows x classes passes 2^31 in real use."""
    o0 = (outer // n2 // n1).to(tl.int64)
    o1 = (outer // n2 % n1).to(tl.int64)
    o2 = (outer % n2).to(tl.int64)
    return o0 * s0 + o1 * s1 + o2 * s2 + i.to(tl.int64) * s3


@triton.jit
def class_offsets(columns, stride, WIDE: tl.constexpr):
    """32-bit within a row, unless the last class lies beyond 2^31 elements (WIDE)."""
    if WIDE:
        return columns.to(tl.int64) * stride
    else:
        return columns * stride


@triton.jit
def load_tile(rows, columns, stride, live, classes, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """[R, B] logits; -inf beyond the classes and in rows that are not live, which are not read."""
    mask = live[:, None] & (columns < classes)[None, :]
    tile = tl.load(rows[:, None] + class_offsets(columns, stride, WIDE)[None, :], mask=mask, other=-float("inf"))
    return tile.to(DTYPE)


@triton.jit
def store_tile(rows, columns, stride, inside, classes, width, tile, WIDE: tl.constexpr):
    """A tile of gradient; zeros for the classes beyond those compared (vocab_size)."""
    tile = tl.where((columns < classes)[None, :], tile, 0.0).to(rows.dtype.element_ty)
    mask = inside[:, None] & (columns < width)[None, :]
    tl.store(rows[:, None] + class_offsets(columns, stride, WIDE)[None, :], tile, mask=mask)


@triton.jit
def store_zeros(rows, stride, inside, start, width, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr):
    """The gradient's columns from `start` on."""
    zeros = tl.zeros([R, B], tl.float32)
    for begin in range(start, width, B):
        store_tile(rows, begin + tl.arange(0, B), stride, inside, 0, width, zeros, WIDE)
