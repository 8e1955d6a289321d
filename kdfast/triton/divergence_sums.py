"""Kernels of `kdfast.triton.divergence`, first pass: log-sum-exps per row, also of rows split over programs, and the per-row
scalars that follow from them. The other passes, and how they fit together: divergence_sweeps.py.
"""

import triton
import triton.language as tl

from kdfast.triton.terms import expm1_small, kl, log1p, log_ratio, log_sigmoid
from kdfast.triton.tiles import load_tile


@triton.constexpr_function
def lowest(dtype):
    """Where a running maximum starts: finite, since -inf - -inf has no value. Masks that use this number are maxima too."""
    return -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38


# ---------------------------------------------------------------- pass 1: log-sum-exps
@triton.jit
def log_sum_step(x, m, s, scale):
    """Takes x into (m, s), the largest so far and the sum of exp((x - m) scale), element by element: one exponential each."""
    e = tl.exp(-tl.abs((x - m) * scale))
    grew = x > m
    return tl.where(grew, x, m), tl.where(grew, s * e + 1.0, s + e), e, grew


@triton.jit
def moment_step(w, t, e, grew):
    """Takes t into the sum of exp((x - m) scale) t; what has no weight counts nothing, also where t is infinite."""
    return tl.where(grew, tl.where(e > 0, w * e, 0.0) + t, w + tl.where(e > 0, e * t, 0.0))


@triton.jit
def merge(m, s, w, scale):
    """(m, s, w) of several positions along axis 1 as those of the row."""
    top = tl.max(m, 1)
    factor = tl.exp((m - top[:, None]) * scale)
    return top, tl.sum(s * factor, 1), tl.sum(tl.where(factor > 0, w * factor, 0.0), 1)


@triton.jit
def log_sums(
    student, teacher, student_stride, teacher_stride, begin, end, hole, live, inverse_t, x0, z0, beta,
    DTYPE: tl.constexpr, KIND: tl.constexpr, RAW: tl.constexpr, SMOOTH: tl.constexpr,
    ONLINE_V: tl.constexpr, ONLINE_U: tl.constexpr, ONLINE_R: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Over the classes [begin, end), per row: largest and sum of student, teacher, student at T = 1, p^a q^(1-a); the sum of the
    student's logits above x0; the sums weighted by q and by p of (x - z) and (z - x), each above its value at class 0.
    """
    scale = inverse_t[:, None]
    # as in `pair`: differences of logits that lie together are exact, those that lie apart are taken of the offsets to class 0
    far = tl.abs(z0 - x0) > 32.0
    from_x = tl.where(far, x0, 0.0)[:, None]
    from_z = tl.where(far, z0, 0.0)[:, None]
    zero = tl.zeros([R, B], DTYPE)
    mx = zero + lowest(DTYPE)
    mz = mx
    m_raw = mx
    mr = mx
    sx = zero
    sz = zero
    s_raw = zero
    sr = zero
    wx = zero
    wz = zero
    total = zero
    for start in range(begin, end, B):
        columns = start + tl.arange(0, B)
        raw = load_tile(student, columns, student_stride, live, end, DTYPE, WIDE)
        z = load_tile(teacher, columns, teacher_stride, live, end, DTYPE, WIDE)
        x = raw
        if KIND == "dkd":
            target = columns[None, :] == hole[:, None]
            x = tl.where(target, -float("inf"), x)
            z = tl.where(target, -float("inf"), z)
        mx, sx, ex, grew_x = log_sum_step(x, mx, sx, scale)
        mz, sz, ez, grew_z = log_sum_step(z, mz, sz, scale)
        if RAW:
            m_raw, s_raw, _, _ = log_sum_step(raw, m_raw, s_raw, 1.0)
        if SMOOTH:
            total += tl.where((columns < end)[None, :] & live[:, None], raw - x0[:, None], 0.0)
        if ONLINE_V or ONLINE_U:
            t = (x - from_x) - (z - from_z)
            if ONLINE_V:
                wx = moment_step(wx, tl.where(x == -float("inf"), 0.0, t), ex, grew_x)
            if ONLINE_U:
                wz = moment_step(wz, tl.where(z == -float("inf"), 0.0, -t), ez, grew_z)
        if ONLINE_R:
            power = beta * (z - z0[:, None]) + (1.0 - beta) * (x - x0[:, None])
            power = tl.where(power == power, power, -float("inf"))  # both -inf
            mr, sr, _, _ = log_sum_step(power, mr, sr, scale)
    mx, sx, wx = merge(mx, sx, wx, scale)
    mz, sz, wz = merge(mz, sz, wz, scale)
    if RAW:
        m_raw, s_raw, _ = merge(m_raw, s_raw, zero, 1.0)
    else:
        m_raw = mx
        s_raw = sx
    if ONLINE_R:
        mr, sr, _ = merge(mr, sr, zero, scale)
    else:
        mr = mx
        sr = sx
    return mx, sx, mz, sz, m_raw, s_raw, mr, sr, tl.sum(total, 1), wx, wz


@triton.jit
def tile_sums(
    x, z, raw, x0, live, columns, classes, inverse_t, DTYPE: tl.constexpr, RAW: tl.constexpr, SMOOTH: tl.constexpr
):
    """`log_sums` of rows that lie in registers, and their exponentials."""
    scale = inverse_t[:, None]
    mx = tl.max(tl.where(x == x, x, lowest(DTYPE)), 1)  # a NaN shows in the sum
    mz = tl.max(tl.where(z == z, z, lowest(DTYPE)), 1)
    mx = tl.where(mx == -float("inf"), 0.0, mx)
    mz = tl.where(mz == -float("inf"), 0.0, mz)
    ex = tl.exp((x - mx[:, None]) * scale)
    ez = tl.exp((z - mz[:, None]) * scale)
    sx = tl.sum(ex, 1)
    sz = tl.sum(ez, 1)
    m_raw = mx
    s_raw = sx
    if RAW:
        m_raw = tl.max(tl.where(raw == raw, raw, lowest(DTYPE)), 1)
        m_raw = tl.where(m_raw == -float("inf"), 0.0, m_raw)
        s_raw = tl.sum(tl.exp(raw - m_raw[:, None]), 1)
    total = tl.zeros_like(mx)
    if SMOOTH:
        total = tl.sum(tl.where((columns < classes)[None, :] & live[:, None], raw - x0[:, None], 0.0), 1)
    return (mx, sx, mz, sz, m_raw, s_raw, mx, sx, total, total, total), ex, ez


# ---------------------------------------------------------------- partial results of split rows
@triton.jit
def store_partials(partials, sums, row, inside, split, n_splits, count):
    for k in tl.static_range(11):
        tl.store(partials + (k * n_splits + split).to(tl.int64) * count + row, sums[k], mask=inside)


@triton.jit
def load_partials(partials, k: tl.constexpr, row, inside, n_splits, count, otherwise, SPLITS: tl.constexpr):
    """[R, SPLITS]: what each split found for the k-th quantity."""
    s = tl.arange(0, SPLITS)
    at = (k * n_splits + s).to(tl.int64)[None, :] * count + row[:, None]
    return tl.load(partials + at, mask=inside[:, None] & (s < n_splits)[None, :], other=otherwise)


@triton.jit
def merge_partials(partials, row, inside, n_splits, count, inverse_t, DTYPE: tl.constexpr, SPLITS: tl.constexpr):
    """`log_sums` of whole rows. Every program of a row does the same sums in the same order."""
    scale = inverse_t[:, None]
    low = lowest(DTYPE)
    mx = load_partials(partials, 0, row, inside, n_splits, count, low, SPLITS)
    sx = load_partials(partials, 1, row, inside, n_splits, count, 0.0, SPLITS)
    mz = load_partials(partials, 2, row, inside, n_splits, count, low, SPLITS)
    sz = load_partials(partials, 3, row, inside, n_splits, count, 0.0, SPLITS)
    m_raw = load_partials(partials, 4, row, inside, n_splits, count, low, SPLITS)
    s_raw = load_partials(partials, 5, row, inside, n_splits, count, 0.0, SPLITS)
    mr = load_partials(partials, 6, row, inside, n_splits, count, low, SPLITS)
    sr = load_partials(partials, 7, row, inside, n_splits, count, 0.0, SPLITS)
    total = tl.sum(load_partials(partials, 8, row, inside, n_splits, count, 0.0, SPLITS), 1)
    wx = load_partials(partials, 9, row, inside, n_splits, count, 0.0, SPLITS)
    wz = load_partials(partials, 10, row, inside, n_splits, count, 0.0, SPLITS)
    mx, sx, wx = merge(mx, sx, wx, scale)
    mz, sz, wz = merge(mz, sz, wz, scale)
    m_raw, s_raw, _ = merge(m_raw, s_raw, s_raw, 1.0)
    mr, sr, _ = merge(mr, sr, sr, scale)
    return mx, sx, mz, sz, m_raw, s_raw, mr, sr, total, wx, wz


# ---------------------------------------------------------------- between the passes: per-row scalars
@triton.jit
def dkd_scalars(x, z, max_x, log_x, rest_x, max_z, log_z, rest_z, gap, from_x, from_z, inverse_t):
    """The coin (target, rest) of both models: its KL, and q_y - p_y, from logits x, z of the target. Nothing cancels."""
    inf = float("inf")
    ox = tl.where(rest_x, (x - max_x) * inverse_t - log_x, inf)  # log-odds of the target
    oz = tl.where(rest_z, (z - max_z) * inverse_t - log_z, inf)
    delta = tl.where(rest_x & rest_z, gap - ((z - from_z) - (x - from_x)) * inverse_t, ox - oz)  # ox - oz
    delta = tl.where(ox == oz, 0.0, delta)
    q1 = tl.exp(log_sigmoid(ox))
    q0 = tl.exp(log_sigmoid(-ox))
    p1 = tl.exp(log_sigmoid(oz))
    p0 = tl.exp(log_sigmoid(-oz))
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)) for a > b
    size = tl.abs(delta)
    rise = tl.where(size < 0.5, -expm1_small(-size), 1.0 - tl.exp(-size))
    g = tl.where(delta > 0, q1 * p0 * rise, -(p1 * q0 * rise))
    near = size < 1.0
    d1 = tl.where(near & (q1 > 0), log1p(tl.where(near & (q1 > 0), -g / q1, 0.0)), log_sigmoid(oz) - log_sigmoid(ox))
    d0 = tl.where(near & (q0 > 0), log1p(tl.where(near & (q0 > 0), g / q0, 0.0)), log_sigmoid(-oz) - log_sigmoid(-ox))
    one, _ = kl(p1, q1, d1)
    rest, _ = kl(p0, q0, d0)
    return one + rest, g


@triton.jit
def pair(max_x, max_z, ratio, inverse_t):
    """(from_x, from_z, gap) such that d = ((z - from_z) - (x - from_x)) / T - gap; ratio = log_z - log_x.

    Where the models' logits lie together z - x is exact; where they lie apart that difference itself would be rounded at the
    size of the distance, so each side is first taken relative to its largest logit.
    """
    far = tl.abs(max_z - max_x) > 32.0
    from_x = tl.where(far, max_x, 0.0)
    from_z = tl.where(far, max_z, 0.0)
    return from_x, from_z, tl.where(far, 0.0, (max_z - max_x) * inverse_t) + ratio


@triton.jit
def prepare(
    sums, x, z, x0, z0, inverse_t, beta, beta_2, smoothing, classes,
    KIND: tl.constexpr, CE: tl.constexpr, SMOOTH: tl.constexpr,
    ONLINE_V: tl.constexpr, ONLINE_U: tl.constexpr, ONLINE_R: tl.constexpr,
):  # fmt: skip
    """From `log_sums` and the label's logits x, z to what the sweeps need."""
    mx, sx, mz, sz, m_raw, s_raw, mr, sr, total, wx, wz = sums
    inf = float("inf")
    rest_x = sx != 0
    rest_z = sz != 0
    bad = (sx != sx) | (sz != sz) | (mx == inf) | (mz == inf)
    ignored = ~rest_x | ~rest_z
    max_x = tl.where(rest_x, mx, 0.0)
    max_z = tl.where(rest_z, mz, 0.0)
    sx = tl.where(rest_x, sx, 1.0)
    sz = tl.where(rest_z, sz, 1.0)
    log_x = tl.log(sx)
    log_z = tl.log(sz)
    ratio = log_ratio(sx, sz)
    from_x, from_z, gap = pair(max_x, max_z, ratio, inverse_t)
    zero = tl.zeros_like(max_x)
    sum_v = zero
    sum_u = zero
    v_factor = zero + 1.0
    extra = zero
    if KIND == "dkd":
        ignored = (~rest_x & (x == -inf)) | (~rest_z & (z == -inf))
        bad = bad | ~(x < inf) | ~(z < inf)
        coin, g = dkd_scalars(x, z, max_x, log_x, rest_x, max_z, log_z, rest_z, gap, from_x, from_z, inverse_t)
        extra = beta * coin
        v_factor = tl.where(rest_z, zero + beta_2, 0.0)  # no rest in the teacher: nothing to compare
        sum_v = beta * g  # dL/dx_i = B (q^_i - p^_i) - A g q^_i
        sum_u = v_factor  # kept for the backward
    elif KIND == "binary":
        max_x = zero
        log_x = zero
        max_z = zero
        log_z = zero
        from_x = zero
        from_z = zero
        gap = zero
    else:
        # what the first pass summed above class 0: back to E_q[log q - log p] and E_p[log p - log q]
        far = tl.abs(z0 - x0) > 32.0
        shift = ((max_z - tl.where(far, z0, 0.0)) - (max_x - tl.where(far, x0, 0.0))) * inverse_t + ratio
        if ONLINE_V:
            sum_v = wx / sx * inverse_t + shift
        if ONLINE_U:
            sum_u = wz / sz * inverse_t - shift
        if KIND == "jeffreys":
            sum_v = 2.0 * beta * sum_v
            sum_u = 2.0 * (1.0 - beta) * sum_u
        if ONLINE_R:
            b = beta - 1.0
            log_r = (mr - beta * (max_z - z0) + b * (max_x - x0)) * inverse_t + tl.log(sr) - beta * log_z + b * log_x
            fall = -tl.where(tl.abs(log_r) < 0.5, expm1_small(log_r), tl.exp(log_r) - 1.0)  # 1 - sum r
            sum_v = fall / beta
            sum_u = -fall / b
    ce = zero
    max_raw = m_raw
    log_raw = tl.log(tl.where(s_raw == 0, 1.0, s_raw))
    if CE:
        ce = (max_raw - x) + log_raw
        if SMOOTH:
            ce = (1.0 - smoothing) * ce + smoothing * ((max_raw - x0) + log_raw - total / classes)
    return (
        bad, ignored, max_x, log_x, max_z, log_z, from_x, from_z, gap, sum_v, sum_u, v_factor, extra, ce, max_raw, log_raw, sx, sz
    )  # fmt: skip
