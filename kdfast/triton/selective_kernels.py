"""Kernels of `kdfast.triton.selective`. A program owns R pixels and reads each map once while their classes fit a tile (C <= 256;
any C up to 8192 with the classes last); beyond, it walks the classes three times: log-sum-exps and reliabilities, the KL of the
direction, the gradients together with that KL.

Bytes of one logit of both maps in float32: 8 read, 4 written for each gradient wanted; a label of 8 and 10 bytes of maps a pixel.
Pixels outside V are not read. Sums of programs are added in order by one program: no atomics.
"""

import triton
import triton.language as tl

from kdfast.triton.divergence_sums import log_sum_step, lowest, merge, moment_step, pair
from kdfast.triton.terms import kl, log_ratio
from kdfast.triton.tiles import load_tile, row_offsets, store_tile


@triton.jit
def side_of_tile(x, hot, inverse_t, DTYPE: tl.constexpr, UNIT: tl.constexpr, ENTROPY: tl.constexpr):
    """(largest logit, sum of exponentials at T, exponentials, reliability) of pixels that lie in registers."""
    top = tl.max(tl.where(x == x, x, lowest(DTYPE)), 1)  # a NaN shows in the sum
    top = tl.where(top == -float("inf"), 0.0, top)
    above = x - top[:, None]
    e = tl.exp(above * inverse_t)
    s = tl.sum(e, 1)
    raw = e if UNIT else tl.exp(above)
    raw_sum = s if UNIT else tl.sum(raw, 1)
    moment = tl.sum(tl.where(raw > 0, raw * above, 0.0), 1) if ENTROPY else s  # 0 log 0 = 0
    return top, s, e, reliability(top, raw_sum, moment, hot, ENTROPY)


@triton.jit
def reliability(top, raw_sum, moment, hot, ENTROPY: tl.constexpr):
    """At temperature 1; moment is the sum of exp(x - top) (x - top)."""
    safe = tl.where(raw_sum == 0, 1.0, raw_sum)
    return tl.log(safe) - moment / safe if ENTROPY else (top - hot) + tl.log(safe)


@triton.jit
def side_of_tiles(
    rows, stride, classes, live, hot, inverse_t, DTYPE: tl.constexpr, UNIT: tl.constexpr, ENTROPY: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(largest logit, sum of exponentials at T, reliability) of pixels whose classes take several tiles."""
    zero = tl.zeros([R, B], DTYPE)
    m = zero + lowest(DTYPE)
    s = zero
    m_raw = m
    s_raw = zero
    w = zero
    first = tl.load(rows, mask=live, other=0.0).to(DTYPE)
    first = tl.where(first > -float("inf"), first, 0.0)  # what the moment is taken above
    for start in range(0, classes, B):
        x = load_tile(rows, start + tl.arange(0, B), stride, live, classes, DTYPE, WIDE)
        m, s, _, _ = log_sum_step(x, m, s, inverse_t)
        if ENTROPY or not UNIT:
            m_raw, s_raw, e, grew = log_sum_step(x, m_raw, s_raw, 1.0)
            if ENTROPY:
                w = moment_step(w, tl.where(x == -float("inf"), 0.0, x - first[:, None]), e, grew)
    top, total, _ = merge(m, s, zero, inverse_t)
    if ENTROPY or not UNIT:
        m_raw, s_raw, w = merge(m_raw, s_raw, w, 1.0)
    else:
        s_raw = total
        w = total
    top = tl.where(total == 0, 0.0, top)
    return top, total, reliability(top, s_raw, w + s_raw * (first - top), hot, ENTROPY)


@triton.jit
def learned(x, y, ex, ey, to_a, inverse_t, from_x, from_y, gap, sign):
    """KL terms of the direction and p_student - p_teacher: one formula for both, since only d changes its sign."""
    d = (((y - from_y[:, None]) - (x - from_x[:, None])) * inverse_t - gap[:, None]) * sign[:, None]
    return kl(tl.where(to_a[:, None], ey, ex), tl.where(to_a[:, None], ex, ey), d)


@triton.jit
def chosen_gradient(difference, chosen, broken, scale):
    return tl.where(broken[:, None], float("nan"), tl.where(chosen[:, None], difference * scale, 0.0))


@triton.jit
def guessed_normalizers(guess, pixels, NORMALIZER: tl.constexpr, GUESSES: tl.constexpr, DTYPE: tl.constexpr):
    """Z of both directions before the pixels have been looked at: exact but for valid pixels that hold only -inf."""
    if NORMALIZER == "all":
        z_a = pixels + tl.zeros([], tl.int64)
        z_b = z_a
    elif NORMALIZER == "valid":
        z_a = tl.sum(tl.load(guess + tl.arange(0, GUESSES)), 0)
        z_b = z_a
    else:
        z_a = tl.load(guess + 1)
        z_b = tl.load(guess + 2)
    return tl.maximum(z_a, 1).to(DTYPE), tl.maximum(z_b, 1).to(DTYPE)


@triton.jit(do_not_specialize=["pixels", "tiles"])  # they vary from batch to batch
def selective_kernel(
    logits_a, logits_b, labels, grad_a, grad_b, guess, direction, valid, reliability_a, reliability_b, losses, counts,
    ignore_index, pixels, tiles, n1, n2, inner, classes, a0, a1, a2, a3, a4, b0, b1, b2, b3, b4,
    ga0, ga1, ga2, ga3, ga4, gb0, gb1, gb2, gb3, gb4, temperature: tl.float64, factor: tl.float64,
    DTYPE: tl.constexpr, NORMALIZER: tl.constexpr, GUESSES: tl.constexpr, ENTROPY: tl.constexpr, UNIT: tl.constexpr,
    GRAD_A: tl.constexpr, GRAD_B: tl.constexpr, SCALED_A: tl.constexpr, SCALED_B: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, SINGLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Maps, losses [2] and counts [3] of this program's pixels, and their gradients: final ones where SCALED, for float16
    p_student - p_teacher, which times 1/Z would be lost before a loss scaler's factor arrives.
    """
    program = tl.program_id(0)
    i = (program % tiles) * R + tl.arange(0, R)
    outer = program // tiles
    inside = i < inner
    row = outer.to(tl.int64) * inner + i
    label = tl.load(labels + row, mask=inside, other=0)
    in_v = inside & (label != ignore_index)
    wrong = in_v & ((label < 0) | (label >= classes))
    label = tl.where(in_v & ~wrong, label, 0)
    xs = logits_a + row_offsets(outer, i, n1, n2, a0, a1, a2, a3)
    ys = logits_b + row_offsets(outer, i, n1, n2, b0, b1, b2, b3)
    inverse_t = 1.0 / tl.full([], temperature, DTYPE)
    columns = tl.arange(0, B)

    # ---- both models at every pixel, and which of them teaches
    if SINGLE:
        x = load_tile(xs, columns, a4, in_v, classes, DTYPE, WIDE)
        y = load_tile(ys, columns, b4, in_v, classes, DTYPE, WIDE)
        hot = columns[None, :] == label[:, None]
        hot_x = tl.sum(tl.where(hot, x, 0.0), 1)
        hot_y = tl.sum(tl.where(hot, y, 0.0), 1)
        max_x, sum_x, ex, l_a = side_of_tile(x, hot_x, inverse_t, DTYPE, UNIT, ENTROPY)
        max_y, sum_y, ey, l_b = side_of_tile(y, hot_y, inverse_t, DTYPE, UNIT, ENTROPY)
    else:
        hot_x = tl.load(xs + label * a4, mask=in_v, other=0.0).to(DTYPE)
        hot_y = tl.load(ys + label * b4, mask=in_v, other=0.0).to(DTYPE)
        max_x, sum_x, l_a = side_of_tiles(xs, a4, classes, in_v, hot_x, inverse_t, DTYPE, UNIT, ENTROPY, R, B, WIDE)
        max_y, sum_y, l_b = side_of_tiles(ys, b4, classes, in_v, hot_y, inverse_t, DTYPE, UNIT, ENTROPY, R, B, WIDE)
    in_v = in_v & (sum_x != 0) & (sum_y != 0)  # only -inf in one model: not in V
    infinite = float("inf")
    broken = in_v & (wrong | (sum_x != sum_x) | (sum_y != sum_y) | (max_x == infinite) | (max_y == infinite))
    l_a = tl.where(broken, float("nan"), l_a)
    l_b = tl.where(broken, float("nan"), l_b)
    to_a = in_v & (l_b < l_a)
    to_b = in_v & (l_a < l_b)
    tl.store(direction + row, to_a.to(tl.int8) - to_b.to(tl.int8), mask=inside)
    tl.store(valid + row, in_v.to(tl.int8), mask=inside)
    tl.store(reliability_a + row, tl.where(in_v, l_a, 0.0), mask=inside)
    tl.store(reliability_b + row, tl.where(in_v, l_b, 0.0), mask=inside)

    # ---- the KL of that direction, and the gradients
    safe_x = tl.where(sum_x == 0, 1.0, sum_x)
    safe_y = tl.where(sum_y == 0, 1.0, sum_y)
    from_x, from_y, gap = pair(max_x, max_y, log_ratio(safe_x, safe_y), inverse_t)
    sign = tl.where(to_a, 1.0, -1.0)
    scale_a = tl.full([], 1.0, DTYPE)
    scale_b = scale_a
    if SCALED_A or SCALED_B:
        z_a, z_b = guessed_normalizers(guess, pixels, NORMALIZER, GUESSES, DTYPE)
        part = tl.full([], factor, DTYPE) * inverse_t
        if SCALED_A:
            scale_a = part / z_a
        if SCALED_B:
            scale_b = part / z_b
    gas = grad_a + row_offsets(outer, i, n1, n2, ga0, ga1, ga2, ga3) if GRAD_A else xs
    gbs = grad_b + row_offsets(outer, i, n1, n2, gb0, gb1, gb2, gb3) if GRAD_B else ys
    if SINGLE:
        p = ex / safe_x[:, None]
        q = ey / safe_y[:, None]
        term, difference = learned(x, y, p, q, to_a, inverse_t, from_x, from_y, gap, sign)
        loss = tl.sum(term, 1)
        if GRAD_A:
            g = chosen_gradient(difference, to_a, broken, scale_a)
            store_tile(gas, columns, ga4, inside, classes, classes, g, WIDE)
        if GRAD_B:
            g = chosen_gradient(difference, to_b, broken, scale_b)
            store_tile(gbs, columns, gb4, inside, classes, classes, g, WIDE)
    else:
        total = tl.zeros([R, B], DTYPE)
        log_x = tl.log(safe_x)[:, None]
        log_y = tl.log(safe_y)[:, None]
        n = tl.cdiv(classes, B)
        for k in range(0, n):
            columns = (n - 1 - k) * B + tl.arange(0, B)  # backwards: the end of a pixel is the warmest part
            x = load_tile(xs, columns, a4, in_v, classes, DTYPE, WIDE)
            y = load_tile(ys, columns, b4, in_v, classes, DTYPE, WIDE)
            p = tl.exp((x - max_x[:, None]) * inverse_t - log_x)
            q = tl.exp((y - max_y[:, None]) * inverse_t - log_y)
            term, difference = learned(x, y, p, q, to_a, inverse_t, from_x, from_y, gap, sign)
            total += term
            if GRAD_A:
                g = chosen_gradient(difference, to_a, broken, scale_a)
                store_tile(gas, columns, ga4, inside, classes, classes, g, WIDE)
            if GRAD_B:
                g = chosen_gradient(difference, to_b, broken, scale_b)
                store_tile(gbs, columns, gb4, inside, classes, classes, g, WIDE)
        loss = tl.sum(total, 1)
    poison = tl.where(broken, float("nan"), 0.0)
    tl.store(losses + 2 * program, tl.sum(tl.where(to_a, loss, 0.0) + poison, 0))
    tl.store(losses + 2 * program + 1, tl.sum(tl.where(to_b, loss, 0.0) + poison, 0))
    tl.store(counts + 3 * program, tl.sum(in_v.to(tl.int32), 0))
    tl.store(counts + 3 * program + 1, tl.sum(to_a.to(tl.int32), 0))
    tl.store(counts + 3 * program + 2, tl.sum(to_b.to(tl.int32), 0))


# ---------------------------------------------------------------- counts and totals
@triton.jit
def count_kernel(labels, found, ignore_index, pixels, per_program, B: tl.constexpr):
    """Labels other than ignore_index among this program's `per_program`."""
    program = tl.program_id(0)
    begin = program.to(tl.int64) * per_program
    kept = tl.zeros([B], tl.int64)
    for start in range(0, per_program, B):
        at = start + tl.arange(0, B)
        label = tl.load(labels + begin + at, mask=(at < per_program) & (begin + at < pixels), other=ignore_index)
        kept += (label != ignore_index).to(tl.int64)
    tl.store(found + program, tl.sum(kept, 0))


@triton.jit
def totals_kernel(
    losses, block_counts, guess, to_a, to_b, counts, scale, repair, n, pixels, temperature: tl.float64, factor: tl.float64,
    NORMALIZER: tl.constexpr, GUESSES: tl.constexpr, SCALED_A: tl.constexpr, SCALED_B: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Adds what the programs found, in one program: losses, counts, the scales of float16 gradients, and by what a gradient
    has to be multiplied where Z was guessed wrongly.
    """
    loss_a = tl.zeros([B], tl.float64)
    loss_b = tl.zeros([B], tl.float64)
    n_valid = tl.zeros([B], tl.int64)
    n_a = tl.zeros([B], tl.int64)
    n_b = tl.zeros([B], tl.int64)
    for start in range(0, n, B):
        at = start + tl.arange(0, B)
        here = at < n
        loss_a += tl.load(losses + 2 * at, mask=here, other=0.0).to(tl.float64)
        loss_b += tl.load(losses + 2 * at + 1, mask=here, other=0.0).to(tl.float64)
        n_valid += tl.load(block_counts + 3 * at, mask=here, other=0).to(tl.int64)
        n_a += tl.load(block_counts + 3 * at + 1, mask=here, other=0).to(tl.int64)
        n_b += tl.load(block_counts + 3 * at + 2, mask=here, other=0).to(tl.int64)
    count = tl.sum(n_valid, 0)
    count_a = tl.sum(n_a, 0)
    count_b = tl.sum(n_b, 0)
    tl.store(counts, count)
    tl.store(counts + 1, count_a)
    tl.store(counts + 2, count_b)
    if NORMALIZER == "valid":
        z_a = count
        z_b = count
    elif NORMALIZER == "selected":
        z_a = count_a
        z_b = count_b
    else:
        z_a = pixels + tl.zeros([], tl.int64)
        z_b = z_a
    z_a = tl.maximum(z_a, 1).to(tl.float64)
    z_b = tl.maximum(z_b, 1).to(tl.float64)
    factor = tl.full([], factor, tl.float64)
    part = factor / tl.full([], temperature, tl.float64)
    kind = to_a.dtype.element_ty
    tl.store(to_a, (factor * tl.sum(loss_a, 0) / z_a).to(kind))
    tl.store(to_b, (factor * tl.sum(loss_b, 0) / z_b).to(kind))
    one = tl.full([], 1.0, tl.float64)
    tl.store(scale, (one if SCALED_A else part / z_a).to(kind))
    tl.store(scale + 1, (one if SCALED_B else part / z_b).to(kind))
    if repair is not None:
        guess_a, guess_b = guessed_normalizers(guess, pixels, NORMALIZER, GUESSES, tl.float64)
        tl.store(repair, guess_a / z_a)
        tl.store(repair + 1, guess_b / z_b)


@triton.jit
def repair_kernel(gradient, repair, side, n, per_program, DTYPE: tl.constexpr, B: tl.constexpr):
    """Multiplies a stored gradient where Z was guessed wrongly, which only pixels of nothing but -inf can do; else nothing."""
    ratio = tl.load(repair + side)
    if ratio != 1.0:
        begin = tl.program_id(0).to(tl.int64) * per_program
        for start in range(0, per_program, B):
            at = start + tl.arange(0, B)
            mask = (at < per_program) & (begin + at < n)
            value = tl.load(gradient + begin + at, mask=mask, other=0.0).to(DTYPE) * ratio.to(DTYPE)
            tl.store(gradient + begin + at, value.to(gradient.dtype.element_ty), mask=mask)
