"""Kernels of `kdfast.triton.divergence`. A program owns R rows and walks their classes in tiles of R x B (whole rows if they fit).

Passes over the logits, in bytes of one (student, teacher) pair of a bf16 model with a bf16 gradient:

    log sums         both LSEs online, with what else can be summed before they are known          4
    sums             loss, sum v, sum u                                                             4
    gradient         loss again where it was not summed, gradient in its final dtype                6

Two passes (10 bytes): kinds whose sums the first pass can take (ONLINE in divergence.py). Three (14): kinds with a mixture
inside a logarithm, which need both LSEs first. Rows that fit a tile are read once (6 bytes). Each pass walks the tiles the other
way round than the pass before it: the tiles read last are still in the caches.
Every per-row sum keeps one partial per thread position and adds them in a fixed tree, and partials of programs are added in
order by one program: no atomics, the same bits each time.
"""

import triton
import triton.language as tl

from kdfast.triton.divergence_sums import load_partials, log_sums, merge_partials, prepare, store_partials, tile_sums
from kdfast.triton.terms import element
from kdfast.triton.tiles import load_tile, row_offsets, store_tile, store_zeros


# ---------------------------------------------------------------- passes 2 and 3
@triton.jit
def elements(x, z, q, p, state, inverse_t, beta, KIND: tl.constexpr, KNOWN: tl.constexpr):
    max_x, log_x, max_z, log_z, from_x, from_z, gap = state
    scale = inverse_t[:, None]
    lq = (x - max_x[:, None]) * scale - log_x[:, None]
    lp = (z - max_z[:, None]) * scale - log_z[:, None]
    d = ((z - from_z[:, None]) - (x - from_x[:, None])) * scale - gap[:, None]
    return element(lq, lp, d, q, p, beta, KIND, KNOWN)


@triton.jit
def scaled(g, factor, ZERO: tl.constexpr):
    """A term of factor 0 is left out: 0 times the gradient of an infinite divergence is not 0."""
    return tl.zeros_like(g) if ZERO else g * factor


@triton.jit
def student_gradient(
    q, v, raw, columns, label, fate, factors, cross, KIND: tl.constexpr, CE: tl.constexpr, CE_IS_Q: tl.constexpr,
    ZERO: tl.constexpr,
):  # fmt: skip
    """(v - q sum v) times the row's factor; dkd's target class; cross-entropy (q1 - smooth - hot [i = label])."""
    factor, v_factor, sum_v = factors
    if KIND == "dkd":
        g = scaled(v * v_factor[:, None] - q * sum_v[:, None], factor[:, None], ZERO)
        hole = scaled(sum_v, factor, ZERO)[:, None]
        g += tl.where(columns[None, :] == label[:, None], hole, 0.0)
    else:
        g = scaled(v - q * sum_v[:, None], factor[:, None], ZERO)
    if CE:
        ce_factor, max_raw, log_raw, smooth, hot = cross
        q1 = q if CE_IS_Q else tl.exp((raw - max_raw[:, None]) - log_raw[:, None])
        target = tl.where(columns[None, :] == label[:, None], smooth + hot, smooth)
        g += (q1 - target) * ce_factor[:, None]
    return apply_fate(g, fate)


@triton.jit
def apply_fate(g, fate):
    """Zero for ignored rows, NaN for rows with NaN, +inf or a label out of range."""
    ignored, bad = fate
    return tl.where(bad[:, None], float("nan"), tl.where(ignored[:, None], 0.0, g))


@triton.jit
def without_target(x, columns, label, KIND: tl.constexpr):
    return tl.where(columns[None, :] == label[:, None], -float("inf"), x) if KIND == "dkd" else x


@triton.jit
def sweep(
    xs, zs, gxs, gzs, strides, begin, end, widths, live, inside, label, state, fate, factors, teacher_sum, cross,
    inverse_t, beta, DTYPE: tl.constexpr, KIND: tl.constexpr, SUMS: tl.constexpr, LOSS: tl.constexpr,
    GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, CE: tl.constexpr, CE_IS_Q: tl.constexpr, BACKWARDS: tl.constexpr,
    ZERO: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One pass over the classes [begin, end): loss, sum v and sum u per row, and the gradients."""
    x_stride, z_stride, gx_stride, gz_stride = strides
    student_width, teacher_width = widths
    zero = tl.zeros([R, B], DTYPE)
    loss = zero
    sum_v = zero
    sum_u = zero
    n = tl.cdiv(end - begin, B)
    for k in range(0, n):
        start = begin + (n - 1 - k if BACKWARDS else k) * B
        columns = start + tl.arange(0, B)
        raw = load_tile(xs, columns, x_stride, live, end, DTYPE, WIDE)
        z = load_tile(zs, columns, z_stride, live, end, DTYPE, WIDE)
        x = without_target(raw, columns, label, KIND)
        z = without_target(z, columns, label, KIND)
        q, p, term, v, u = elements(x, z, zero, zero, state, inverse_t, beta, KIND, False)
        if LOSS:
            loss += term
        if SUMS:
            sum_v += v
            sum_u += u
        if GRAD_S:
            g = student_gradient(q, v, raw, columns, label, fate, factors, cross, KIND, CE, CE_IS_Q, ZERO)
            store_tile(gxs, columns, gx_stride, inside, end, student_width, g, WIDE)
        if GRAD_T:
            g = apply_fate(scaled(u - p * teacher_sum[:, None], factors[0][:, None], ZERO), fate)
            store_tile(gzs, columns, gz_stride, inside, end, teacher_width, g, WIDE)
    return tl.sum(loss, 1), tl.sum(sum_v, 1), tl.sum(sum_u, 1)


@triton.jit
def closed_sums(sum_v, sum_u, KIND: tl.constexpr):
    """Sums that are 0 for every input (terms.py: v or u is q - p), and those of a kind without a softmax behind it."""
    if KIND == "forward_kl" or KIND == "binary":
        sum_v = tl.zeros_like(sum_v)
    if KIND == "reverse_kl" or KIND == "binary":
        sum_u = tl.zeros_like(sum_u)
    return sum_v, sum_u


# ---------------------------------------------------------------- kernels
@triton.jit
def place(n_splits, tiles, inner, R: tl.constexpr):
    """(split, block of rows, outer index, rows i, which of them exist, their number): what this program owns."""
    program = tl.program_id(0)
    block = program // n_splits
    i = (block % tiles) * R + tl.arange(0, R)
    outer = block // tiles
    return program % n_splits, block, outer, i, i < inner, outer.to(tl.int64) * inner + i


@triton.jit
def per_row(values, row, inside, otherwise, R: tl.constexpr, DTYPE: tl.constexpr):
    """One value per row, `otherwise` where there is no such tensor."""
    if values is None:
        return tl.full([R], otherwise, DTYPE)
    else:
        return tl.load(values + row, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def row_temperature_inverse(values, row, inside, temperature, R: tl.constexpr, DTYPE: tl.constexpr):
    t = per_row(values, row, inside, temperature, R, DTYPE)
    return 1.0 / tl.where(inside, t, 1.0)


@triton.jit
def read_label(labels, row, live, classes):
    """(label, whether it is out of range): such a label is never an address."""
    label = tl.load(labels + row, mask=live, other=0)
    wrong = (label < 0) | (label >= classes)
    return tl.where(wrong, 0, label), wrong


@triton.jit
def class_zero(rows, live, DTYPE: tl.constexpr):
    value = tl.load(rows, mask=live, other=0.0).to(DTYPE)
    return tl.where(value > -float("inf"), value, 0.0)


@triton.jit(do_not_specialize=["count", "tiles"])  # they vary from batch to batch; 7 count may pass 2^31
def log_sums_kernel(
    student, teacher, labels, row_temperature, row_weight, partials,
    count: tl.int64, tiles, n_splits, per_split, n1, n2, inner, classes, x0, x1, x2, x3, x4, z0, z1, z2, z3, z4,
    temperature: tl.float64, beta: tl.float64,
    KIND: tl.constexpr, DTYPE: tl.constexpr, RAW: tl.constexpr, SMOOTH: tl.constexpr, ONLINE_V: tl.constexpr,
    ONLINE_U: tl.constexpr, ONLINE_R: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """First pass of split rows: program (rows, split) writes its part of `log_sums`."""
    split, _, outer, i, inside, row = place(n_splits, tiles, inner, R)
    live = inside & (per_row(row_weight, row, inside, 1.0, R, DTYPE) != 0)
    inverse_t = row_temperature_inverse(row_temperature, row, inside, temperature, R, DTYPE)
    label = tl.full([R], -1, tl.int64)
    if KIND == "dkd":
        label, _ = read_label(labels, row, live, classes)
    xs = student + row_offsets(outer, i, n1, n2, x0, x1, x2, x3)
    zs = teacher + row_offsets(outer, i, n1, n2, z0, z1, z2, z3)
    begin = split * per_split
    end = tl.minimum(begin + per_split, classes)
    sums = log_sums(
        xs, zs, x4, z4, begin, end, label, live, inverse_t, class_zero(xs, live, DTYPE), class_zero(zs, live, DTYPE),
        tl.full([], beta, DTYPE), DTYPE, KIND, RAW, SMOOTH, ONLINE_V, ONLINE_U, ONLINE_R, R, B, WIDE,
    )  # fmt: skip
    store_partials(partials, sums, row, inside, split, n_splits, count)


@triton.jit(do_not_specialize=["count", "tiles"])  # they vary from batch to batch; 7 count may pass 2^31
def divergence_kernel(
    student, teacher, grad_student, grad_teacher, labels, row_temperature, row_weight,
    partials, stats, sums_v, sums_u, loss, ce_loss,
    count: tl.int64, tiles, n_splits, per_split, n1, n2, inner, classes, student_width, teacher_width,
    x0, x1, x2, x3, x4, z0, z1, z2, z3, z4, gx0, gx1, gx2, gx3, gx4, gz0, gz1, gz2, gz3, gz4,
    temperature: tl.float64, beta: tl.float64, beta_2: tl.float64, scale: tl.float64, kd_factor: tl.float64, ce_factor: tl.float64, smoothing: tl.float64,
    KIND: tl.constexpr, DTYPE: tl.constexpr, SOURCE: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr, GIVEN: tl.constexpr,
    LOSS: tl.constexpr, GRAD_S: tl.constexpr, GRAD_T: tl.constexpr, CE: tl.constexpr, RAW: tl.constexpr, SMOOTH: tl.constexpr,
    ONLINE_V: tl.constexpr, ONLINE_U: tl.constexpr, ONLINE_R: tl.constexpr,
    SPLITS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, SINGLE: tl.constexpr, WIDE: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """The passes after the log-sum-exps, and those too where SOURCE is "logits"; else they come from "partials" of
    log_sums_kernel or, in the backward, as "stats". SUMS: a pass of its own for sum v, sum u and the loss; GIVEN: those sums
    come from a launch before. ZERO: the divergence has factor 0. ROWS: loss and stats per row; else the weighted sums of this
    program, to be added by total_kernel.
    """
    split, block, outer, i, inside, row = place(n_splits, tiles, inner, R)
    weight = per_row(row_weight, row, inside, 1.0, R, DTYPE)
    live = inside & (weight != 0)
    inverse_t = row_temperature_inverse(row_temperature, row, inside, temperature, R, DTYPE)
    beta = tl.full([], beta, DTYPE)
    xs = student + row_offsets(outer, i, n1, n2, x0, x1, x2, x3)
    zs = teacher + row_offsets(outer, i, n1, n2, z0, z1, z2, z3)
    gxs = grad_student + row_offsets(outer, i, n1, n2, gx0, gx1, gx2, gx3) if GRAD_S else xs
    gzs = grad_teacher + row_offsets(outer, i, n1, n2, gz0, gz1, gz2, gz3) if GRAD_T else zs
    begin = split * per_split
    end = tl.minimum(begin + per_split, classes)
    zero = tl.zeros([R], DTYPE)
    columns = tl.arange(0, B)
    label = tl.full([R], -1, tl.int64)
    wrong = label >= 0
    x_y = zero
    z_y = zero
    if KIND == "dkd" or CE:
        label, wrong = read_label(labels, row, live, classes)
        x_y = tl.load(xs + label * x4, mask=live, other=0.0).to(DTYPE)
        z_y = tl.load(zs + label * z4, mask=live, other=0.0).to(DTYPE)

    # ---- the row's scalars
    extra = zero
    v_factor = zero + 1.0
    ce = zero
    max_raw = zero
    log_raw = zero
    sum_x = zero
    sum_z = zero
    if SOURCE == "stats":
        stat = stats + row
        max_x = tl.load(stat, mask=inside, other=0.0)
        log_x = tl.load(stat + count, mask=inside, other=0.0)
        max_z = tl.load(stat + 2 * count, mask=inside, other=0.0)
        log_z = tl.load(stat + 3 * count, mask=inside, other=0.0)
        gap = tl.load(stat + 4 * count, mask=inside, other=0.0)
        sum_v = tl.load(stat + 5 * count, mask=inside, other=0.0)
        sum_u = tl.load(stat + 6 * count, mask=inside, other=0.0)
        ignored = (gap != gap) | ~live
        bad = gap == float("inf")
        far = tl.abs(max_z - max_x) > 32.0
        from_x = tl.where(far, max_x, 0.0)
        from_z = tl.where(far, max_z, 0.0)
        if KIND == "dkd":
            v_factor = sum_u
    else:
        first_x = zero
        first_z = zero
        if SMOOTH or ONLINE_V or ONLINE_U or ONLINE_R:
            first_x = class_zero(xs, live, DTYPE)
            first_z = class_zero(zs, live, DTYPE)
        if SINGLE:
            raw = load_tile(xs, columns, x4, live, classes, DTYPE, WIDE)
            x = without_target(raw, columns, label, KIND)
            z = without_target(load_tile(zs, columns, z4, live, classes, DTYPE, WIDE), columns, label, KIND)
            sums, ex, ez = tile_sums(x, z, raw, first_x, live, columns, classes, inverse_t, DTYPE, RAW, SMOOTH)
        elif SOURCE == "partials":
            sums = merge_partials(partials, row, inside, n_splits, count, inverse_t, DTYPE, SPLITS)
        else:
            sums = log_sums(
                xs, zs, x4, z4, 0, classes, label, live, inverse_t, first_x, first_z, beta, DTYPE, KIND, RAW, SMOOTH,
                ONLINE_V, ONLINE_U, ONLINE_R, R, B, WIDE,
            )  # fmt: skip
        (
            bad, ignored, max_x, log_x, max_z, log_z, from_x, from_z, gap, sum_v, sum_u, v_factor, extra, ce, max_raw, log_raw, sum_x, sum_z
        ) = prepare(sums, x_y, z_y, first_x, first_z, inverse_t, beta, tl.full([], beta_2, DTYPE), tl.full([], smoothing, DTYPE),
                    classes, KIND, CE, SMOOTH, ONLINE_V, ONLINE_U, ONLINE_R)  # fmt: skip
        bad = live & (bad | wrong)
    state = (max_x, log_x, max_z, log_z, from_x, from_z, gap)
    fate = (ignored, bad)
    scale = tl.full([], scale, DTYPE)
    factor = weight * inverse_t * (scale * tl.full([], kd_factor, DTYPE))
    smooth = tl.full([], smoothing, DTYPE) / classes
    cross = (weight * tl.full([], ce_factor, DTYPE), max_raw, log_raw, smooth, 1.0 - tl.full([], smoothing, DTYPE))
    CE_IS_Q: tl.constexpr = CE and not RAW and KIND != "binary"
    strides = (x4, z4, gx4, gz4)
    widths = (student_width, teacher_width)
    swept = zero

    # ---- the sums and the gradients
    if SINGLE:
        q = ex / sum_x[:, None]
        p = ez / sum_z[:, None]
        q, p, term, v, u = elements(x, z, q, p, state, inverse_t, beta, KIND, True)
        swept = tl.sum(term, 1)
        if KIND != "dkd":
            sum_v = tl.sum(v, 1)
            sum_u = tl.sum(u, 1)
            sum_v, sum_u = closed_sums(sum_v, sum_u, KIND)
        if GRAD_S:
            g = student_gradient(
                q, v, raw, columns, label, fate, (factor, v_factor, sum_v), cross, KIND, CE, CE_IS_Q, ZERO
            )
            store_tile(gxs, columns, gx4, inside, classes, student_width, g, WIDE)
        if GRAD_T:
            g = apply_fate(scaled(u - p * sum_u[:, None], factor[:, None], ZERO), fate)
            store_tile(gzs, columns, gz4, inside, classes, teacher_width, g, WIDE)
    else:
        if SUMS:
            swept, new_v, new_u = sweep(
                xs, zs, gxs, gzs, strides, begin, end, widths, live, inside, label, state, fate,
                (factor, v_factor, sum_v), sum_u, cross, inverse_t, beta,
                DTYPE, KIND, True, True, False, False, CE, CE_IS_Q, True, ZERO, R, B, WIDE,
            )  # fmt: skip
            if KIND == "dkd":
                sum_v = tl.where(split == 0, sum_v, 0.0)
                sum_u = tl.where(split == 0, sum_u, 0.0)
            else:
                sum_v, sum_u = closed_sums(new_v, new_u, KIND)
        if GIVEN:
            sum_v = tl.sum(load_partials(sums_v, 0, row, inside, n_splits, count, 0.0, SPLITS), 1)
            sum_u = tl.sum(load_partials(sums_u, 0, row, inside, n_splits, count, 0.0, SPLITS), 1)
        if GRAD_S or GRAD_T:
            found, _, _ = sweep(
                xs, zs, gxs, gzs, strides, begin, end, widths, live, inside, label, state, fate,
                (factor, v_factor, sum_v), sum_u, cross, inverse_t, beta,
                DTYPE, KIND, False, LOSS and not SUMS, GRAD_S, GRAD_T, CE, CE_IS_Q, not SUMS, ZERO, R, B, WIDE,
            )  # fmt: skip
            if LOSS and not SUMS:
                swept = found
    if split == n_splits - 1:  # the classes beyond those compared
        covered = begin + tl.cdiv(end - begin, B) * B
        if GRAD_S:
            store_zeros(gxs, gx4, inside, covered, student_width, R, B, WIDE)
        if GRAD_T:
            store_zeros(gzs, gz4, inside, covered, teacher_width, R, B, WIDE)

    # ---- the loss
    if LOSS:
        value = tl.where(v_factor == 0, 0.0, v_factor * swept) + tl.where(split == 0, extra, 0.0)
        value = tl.where(scale == 0, 0.0, scale * value)  # 0 times an infinite divergence is 0 here
        value = tl.where(bad, float("nan"), tl.where(ignored, 0.0, value))
        at = split.to(tl.int64) * count + row
        if ROWS:
            tl.store(loss + at, value, mask=inside)
        else:
            tl.store(loss + block * n_splits + split, tl.sum(tl.where(live, weight * value, 0.0), 0))
            if CE:
                ce = tl.where(bad, float("nan"), tl.where(ignored | (split != 0), 0.0, ce))
                tl.store(ce_loss + block * n_splits + split, tl.sum(tl.where(live, weight * ce, 0.0), 0))
        if sums_v is not None:
            tl.store(sums_v + at, sum_v, mask=inside)
            tl.store(sums_u + at, sum_u, mask=inside)
    if ROWS:  # noqa: SIM102  # this one is decided when the kernel is compiled
        if split == 0:
            # no gradient for an ignored row; one of NaN for a bad one
            gap = tl.where(bad, float("inf"), tl.where(ignored, float("nan"), gap))
            stat = stats + row
            tl.store(stat, max_x, mask=inside)
            tl.store(stat + count, log_x, mask=inside)
            tl.store(stat + 2 * count, max_z, mask=inside)
            tl.store(stat + 3 * count, log_z, mask=inside)
            tl.store(stat + 4 * count, gap, mask=inside)


@triton.jit
def rows_kernel(parts, stats, rows, count: tl.int64, n_splits, R: tl.constexpr, SPLITS: tl.constexpr):
    """Adds the splits of R rows: parts [3, splits, rows] are loss, sum v, sum u."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < count
    for k in tl.static_range(3):
        value = tl.sum(load_partials(parts, k, row, inside, n_splits, count, 0.0, SPLITS), 1)
        if k == 0:
            tl.store(rows + row, value, mask=inside)
        else:
            tl.store(stats + (4 + k) * count + row, value, mask=inside)


@triton.jit
def total_kernel(
    kd_parts, ce_parts, loss, parts, n, kd_factor: tl.float64, ce_factor: tl.float64, CE: tl.constexpr, B: tl.constexpr
):
    """Adds what the programs found, in one program: loss = kd_factor KD + ce_factor CE, and (KD, CE)."""
    kd = tl.zeros([B], tl.float64)
    ce = tl.zeros([B], tl.float64)
    for start in range(0, n, B):
        at = start + tl.arange(0, B)
        kd += tl.load(kd_parts + at, mask=at < n, other=0.0).to(tl.float64)
        if CE:
            ce += tl.load(ce_parts + at, mask=at < n, other=0.0).to(tl.float64)
    kd_total = tl.sum(kd, 0)
    ce_total = tl.sum(ce, 0)
    kd_factor = tl.full([], kd_factor, tl.float64)
    ce_factor = tl.full([], ce_factor, tl.float64)
    # a term of factor 0 is left out: 0 times an infinite divergence is not 0
    total = tl.where(kd_factor == 0, 0.0, kd_factor * kd_total) + tl.where(ce_factor == 0, 0.0, ce_factor * ce_total)
    tl.store(loss, total.to(loss.dtype.element_ty))
    tl.store(parts, kd_total.to(parts.dtype.element_ty))
    tl.store(parts + 1, ce_total.to(parts.dtype.element_ty))
