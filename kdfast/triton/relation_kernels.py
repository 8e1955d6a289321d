"""Kernels over a block of scores right behind the matrix product that made it: what csrc/cpu/relation.cpp is for the CPU. A
program owns R rows and walks their columns in tiles of R x B; the scores become gradients in their place. Every pass after the
first finds the block in the caches.
"""

import triton
import triton.language as tl

from kdfast.triton.divergence_sums import log_sum_step, lowest, merge
from kdfast.triton.tiles import load_tile


@triton.jit
def safe(top, mass):
    """A row of nothing but -inf: exponentials above 0, divided by 1."""
    return tl.where(mass == 0, 0.0, top), tl.where(mass == 0, 1.0, mass)


# ---------------------------------------------------------------- InfoNCE
@triton.jit(do_not_specialize=["count", "first_row"])  # they vary from batch to batch
def contrast_kernel(
    scores, positive, rows, lse, grad_rows, count, columns, first_row, row_stride, scale: tl.float64,
    EXCLUDE: tl.constexpr, UNIT: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rows of scores s: log-sum-exps and InfoNCE rows, and where UNIT the scores become dl_i/ds_i. With grad_rows, the upstream
    factors, they become grad_i dl_i/ds_i by the log-sum-exps given. A positive out of range makes its row NaN.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < count
    at = scores + row * row_stride
    scale = tl.full([], scale, DTYPE)
    hot = tl.load(positive + row, mask=inside, other=0)
    wrong = inside & ((hot < 0) | (hot >= columns))
    own = first_row + row if EXCLUDE else row - row - 1
    if grad_rows is None:
        m = tl.full([R, B], lowest(DTYPE), DTYPE)
        s = tl.zeros([R, B], DTYPE)
        hits = s
        for start in range(0, columns, B):
            column = start + tl.arange(0, B)
            v = load_tile(at, column, 1, inside, columns, DTYPE, False) * scale
            hits += tl.where(column[None, :] == hot[:, None], v, 0.0)
            v = tl.where(column[None, :] == own[:, None], -float("inf"), v)
            m, s, _, _ = log_sum_step(v, m, s, 1.0)
        top, mass, _ = merge(m, s, s, 1.0)
        total = tl.log(mass) + top
        tl.store(lse + row, total, mask=inside)
        tl.store(rows + row, tl.where(wrong, float("nan"), total - tl.sum(hits, 1)), mask=inside)
        top, mass = safe(top, mass)
        factor = scale / mass
        at_hot = tl.zeros_like(mass) + scale
    else:
        top = tl.load(lse + row, mask=inside, other=0.0)
        factor = tl.load(grad_rows + row, mask=inside, other=0.0) * scale
        at_hot = factor
    if UNIT:
        at_hot = tl.where(wrong, float("nan"), at_hot)
        tl.debug_barrier()  # the first pass has read the whole row
        for start in range(0, columns, B):
            column = start + tl.arange(0, B)
            v = load_tile(at, column, 1, inside, columns, DTYPE, False) * scale
            v = tl.where(column[None, :] == own[:, None], -float("inf"), v)
            g = tl.exp(v - top[:, None]) * factor[:, None]
            g -= tl.where((column[None, :] == hot[:, None]) | wrong[:, None], at_hot[:, None], 0.0)
            tl.store(at[:, None] + column[None, :], g, mask=inside[:, None] & (column < columns)[None, :])


# ---------------------------------------------------------------- relations
@triton.jit
def kept_columns(mask, base, column, own, inside, columns, DIAGONAL: tl.constexpr):
    kept = inside[:, None] & (column < columns)[None, :]
    if mask is not None:
        kept = kept & (tl.load(mask + base[:, None] + column[None, :], mask=kept, other=0) != 0)
    if not DIAGONAL:
        kept = kept & (column[None, :] != own[:, None])
    return kept


@triton.jit
def scores_of(at, column, kept, scale, SOFTMAX: tl.constexpr):
    v = tl.load(at[:, None] + column[None, :], mask=kept, other=0.0) * scale
    return tl.where(kept, v, -float("inf") if SOFTMAX else 0.0)


@triton.jit
def relations(v, top, mass, SOFTMAX: tl.constexpr):
    return tl.exp(v - top[:, None]) / mass[:, None] if SOFTMAX else v


@triton.jit(do_not_specialize=["count", "rows", "first_row"])  # they vary from batch to batch
def relation_kernel(
    student, teacher, mask, weight, out, count, rows, columns, first_row, weight_stride, out_stride,
    student_scale: tl.float64, teacher_scale: tl.float64, SOFTMAX: tl.constexpr, DIAGONAL: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Row r of a set's block: the products of both models in, sum of the squared differences out; gradients in their place."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < count
    r = row % rows
    own = first_row + r
    ss = student + row * columns
    ts = teacher + row * columns
    base = row // rows * columns  # of the set's mask
    s_scale = tl.full([], student_scale, DTYPE)
    t_scale = tl.full([], teacher_scale, DTYPE)
    zero = tl.zeros([R, B], DTYPE)
    top_s = tl.zeros([R], DTYPE)
    top_t = top_s
    mass_s = top_s + 1.0
    mass_t = mass_s
    if SOFTMAX:
        m_s = zero + lowest(DTYPE)
        m_t = m_s
        sum_s = zero
        sum_t = zero
        for start in range(0, columns, B):
            column = start + tl.arange(0, B)
            kept = kept_columns(mask, base, column, own, inside, columns, DIAGONAL)
            m_s, sum_s, _, _ = log_sum_step(scores_of(ss, column, kept, s_scale, True), m_s, sum_s, 1.0)
            m_t, sum_t, _, _ = log_sum_step(scores_of(ts, column, kept, t_scale, True), m_t, sum_t, 1.0)
        top_s, mass_s, _ = merge(m_s, sum_s, zero, 1.0)
        top_t, mass_t, _ = merge(m_t, sum_t, zero, 1.0)
        top_s, mass_s = safe(top_s, mass_s)
        top_t, mass_t = safe(top_t, mass_t)
    squares = zero
    with_p = zero
    with_q = zero
    for start in range(0, columns, B):
        column = start + tl.arange(0, B)
        kept = kept_columns(mask, base, column, own, inside, columns, DIAGONAL)
        p = relations(scores_of(ss, column, kept, s_scale, SOFTMAX), top_s, mass_s, SOFTMAX)
        q = relations(scores_of(ts, column, kept, t_scale, SOFTMAX), top_t, mass_t, SOFTMAX)
        e = p - q
        squares += e * e
        with_p += p * e
        with_q += q * e
    set_ = row // rows
    tl.store(out + set_ * out_stride + r, tl.sum(squares, 1), mask=inside)
    if GRAD_S or GRAD_T:
        w = 2.0 * tl.load(weight + set_ * weight_stride + r, mask=inside, other=0.0)
        p_mean = tl.sum(with_p, 1)[:, None] if SOFTMAX else 0.0
        q_mean = tl.sum(with_q, 1)[:, None] if SOFTMAX else 0.0
        tl.debug_barrier()  # the pass before has read the whole row
        for start in range(0, columns, B):
            column = start + tl.arange(0, B)
            kept = kept_columns(mask, base, column, own, inside, columns, DIAGONAL)
            p = relations(scores_of(ss, column, kept, s_scale, SOFTMAX), top_s, mass_s, SOFTMAX)
            q = relations(scores_of(ts, column, kept, t_scale, SOFTMAX), top_t, mass_t, SOFTMAX)
            e = p - q
            here = inside[:, None] & (column < columns)[None, :]
            if GRAD_S:
                g = (p * (e - p_mean) if SOFTMAX else e) * (w * s_scale)[:, None]
                tl.store(ss[:, None] + column[None, :], g, mask=here)
            if GRAD_T:
                g = (q * (e - q_mean) if SOFTMAX else e) * (w * t_scale)[:, None]
                tl.store(ts[:, None] + column[None, :], -g, mask=here)
