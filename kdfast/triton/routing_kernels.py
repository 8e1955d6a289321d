"""Kernels of `kdfast.triton.routing`. Bytes: scores read the logits once and write 8 k + 8 a row, plans read and write a few
numbers a slot, the moves read and write each row of the model once (combine reads k rows for each it writes). Nothing is added
by atomics: programs leave partial sums, counts and histograms, which are added in order.
"""

import triton
import triton.language as tl

from kdfast.triton.divergence_sums import lowest
from kdfast.triton.terms import log1p, log_sigmoid
from kdfast.triton.tiles import load_tile


# ---------------------------------------------------------------- top-k by keys that order as the scores do
@triton.jit
def order_keys(values, columns, usable):
    """Integers in the order of the values, NaN behind -inf, the unusable behind all. float32: the complement of the column is
    packed below, so that one maximum decides value and tie; float64 fills the integer, and ties are looked up after.
    """
    values = values + 0.0  # -0 and 0 tie
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True)
        keys = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
        keys = tl.where(values == values, keys, -0x7FFFFFFFFFFFFFFF)
    else:
        bits = values.to(tl.int32, bitcast=True)
        high = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        high = tl.where(values == values, high, -0x7FFFFFFF)
        keys = high.to(tl.int64) * 4294967296 + (4294967295 - columns.to(tl.int64))[None, :]
    return tl.where(usable, keys, -0x7FFFFFFFFFFFFFFF - 1)


@triton.jit
def take_best(keys, columns, PACKED: tl.constexpr):
    """(which column of each row has the greatest key, the keys without it)."""
    best = tl.max(keys, 1)
    here = keys == best[:, None]
    if not PACKED:
        first = tl.min(tl.where(here, columns[None, :], 2147483647), 1)
        here = columns[None, :] == first[:, None]
    return here, tl.where(here, -0x7FFFFFFFFFFFFFFF - 1, keys)


@triton.jit
def limit_groups(chosen_by, columns, experts, groups, topk_groups, TWO: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """-inf for the experts of groups that are not among the best; NaN stays, it sorts behind."""
    size = experts // groups
    group = columns // size
    slots = tl.arange(0, G)
    low = -float("inf")
    clean = tl.where(chosen_by == chosen_by, chosen_by, low)
    scores = tl.full([R, G], low, chosen_by.dtype)
    for g in range(0, groups):
        mine = tl.where((group == g)[None, :], clean, low)
        first = tl.max(mine, 1)
        score = first
        if TWO:
            at = tl.min(tl.where(mine == first[:, None], columns[None, :], 2147483647), 1)
            score = first + tl.max(tl.where(columns[None, :] == at[:, None], low, mine), 1)
        scores = tl.where((slots == g)[None, :], score[:, None], scores)
    keys = order_keys(scores, slots, (slots < groups)[None, :])
    open_ = chosen_by != chosen_by
    for _ in range(0, topk_groups):
        here, keys = take_best(keys, slots, chosen_by.dtype != tl.float64)
        best = tl.sum(tl.where(here, slots[None, :], 0), 1)
        open_ = open_ | (group[None, :] == best[:, None])
    return tl.where(open_, chosen_by, low)


# ---------------------------------------------------------------- scores
@triton.jit
def softplus(z):
    return tl.maximum(z, 0.0) + log1p(tl.exp(-tl.abs(z)))


@triton.jit
def log_score(z, lse, SCORE: tl.constexpr):
    if SCORE == "sigmoid":
        return log_sigmoid(z)
    elif SCORE == "sqrt_softplus":
        # log log(1 + e^z) is z to the last bit below -37
        return 0.5 * tl.where(z < -37.0, z, tl.log(tl.where(z < -37.0, 1.0, softplus(z))))
    elif SCORE == "softmax":
        return z - lse[:, None]
    else:
        return z


@triton.jit
def weigh(logs, alive, norm, eps, scale, NORMED: tl.constexpr):
    """Weights of the chosen from their log scores; s^q / sum s^q; |s| / (|s| + eps)."""
    if NORMED:
        best = tl.max(tl.where(alive, logs, lowest(logs.dtype)), 1)
        best = tl.where(best > lowest(logs.dtype), best, 0.0)  # nobody, or every score underflowed
        above = tl.where(alive, logs - best[:, None], -float("inf"))
        powers = tl.exp(above * norm)
        total = tl.sum(powers, 1)
        safe = tl.where(total == 0, 1.0, total)
        size = tl.exp(tl.log(safe) / norm)  # |s|_q / exp(best)
        full = size * tl.exp(best)
        share = tl.where(eps == 0, 1.0, full / (full + eps))
        return tl.exp(above) * (scale * share / size)[:, None], powers / safe[:, None], share
    else:
        w = tl.where(alive, tl.exp(logs) * scale, 0.0)
        return w, w, tl.sum(w, 1) * 0.0


@triton.jit
def scores_kernel(
    logits, bias, mask, ids, weights, lse_out, alive_out, partial_counts, partial_probs,
    rows, experts, k, groups, topk_groups, row_stride, expert_stride, norm: tl.float64, eps: tl.float64, scale: tl.float64,
    DTYPE: tl.constexpr, SCORE: tl.constexpr, NORMED: tl.constexpr, GROUPED: tl.constexpr, TWO: tl.constexpr,
    R: tl.constexpr, E: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """R rows: ids, weights, log-sum-exps, how many of the k are alive (not closed by -inf); counts and sums of p."""
    program = tl.program_id(0).to(tl.int64)
    row = program * R + tl.arange(0, R)
    inside = row < rows
    kept = inside
    if mask is not None:
        kept = inside & (tl.load(mask + row, mask=inside, other=0) != 0)
    columns = tl.arange(0, E)
    z = load_tile(logits + row * row_stride, columns, expert_stride, kept, experts, DTYPE, WIDE)
    top = tl.max(tl.where(z == z, z, lowest(DTYPE)), 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    e = tl.exp(z - top[:, None])
    total = tl.sum(e, 1)
    # a NaN, +inf, or nothing but -inf
    bad = kept & ((total != total) | (total == 0) | (top == float("inf")))
    clean = kept & ~bad
    safe = tl.where(clean, total, 1.0)
    lse = top + tl.log(safe)
    p = e / safe[:, None]

    # ---- which
    if SCORE == "softmax":
        chosen_by = p
    elif SCORE == "sigmoid":
        t = tl.exp(-tl.abs(z))
        chosen_by = tl.where(z < 0, t, 1.0) / (1.0 + t)
    elif SCORE == "sqrt_softplus":
        chosen_by = tl.sqrt(softplus(z))
    else:
        chosen_by = z
    # a bad row goes by its logits, so that NaN stays behind the others
    chosen_by = tl.where(bad[:, None] | (z == -float("inf")), z, chosen_by)
    if bias is not None:
        chosen_by += tl.load(bias + columns, mask=columns < experts, other=0.0).to(DTYPE)[None, :]
    if GROUPED:
        chosen_by = limit_groups(chosen_by, columns, experts, groups, topk_groups, TWO, R, G)
    keys = order_keys(chosen_by, columns, (columns < experts)[None, :])
    rank = tl.full([R, E], -1, tl.int32)
    for j in range(0, k):
        here, keys = take_best(keys, columns, chosen_by.dtype != tl.float64)
        rank = tl.where(here, j, rank)
    chosen = rank >= 0
    alive = chosen & (chosen_by > -float("inf")) & clean[:, None]

    # ---- how much
    scale = tl.full([], scale, DTYPE)
    if SCORE == "mean":
        w = tl.where(alive, scale, 0.0)  # 1 / k
    elif SCORE == "logits":
        w = tl.where(alive, z * scale, 0.0)
    else:
        logs = tl.where(alive, log_score(z, lse, SCORE), -float("inf"))
        w, _, _ = weigh(logs, alive, tl.full([], norm, DTYPE), tl.full([], eps, DTYPE), scale, NORMED)
    w = tl.where(alive, w, 0.0)
    w = tl.where(bad[:, None], float("nan"), w)
    at = (row * k)[:, None] + rank
    write = chosen & inside[:, None]
    tl.store(ids + at, tl.where(kept[:, None], columns[None, :], -1), mask=write)
    tl.store(weights + at, w, mask=write)
    tl.store(lse_out + row, tl.where(bad, float("nan"), tl.where(kept, lse, 0.0)), mask=inside)
    tl.store(alive_out + row, tl.sum(alive.to(tl.int32), 1), mask=inside)
    counted = tl.sum((chosen & kept[:, None]).to(tl.int32), 0)
    probs = tl.sum(tl.where(bad[:, None], float("nan"), tl.where(kept[:, None], p, 0.0)), 0)
    tl.store(partial_counts + program * experts + columns, counted, mask=columns < experts)
    tl.store(partial_probs + program * experts + columns, probs, mask=columns < experts)


@triton.jit
def add_kernel(partial_counts, partial_probs, kept, counts, mean_probs, n, experts, P: tl.constexpr, E: tl.constexpr):
    """Adds the programs' counts and sums of p for E experts, P programs at a time."""
    columns = tl.program_id(0) * E + tl.arange(0, E)
    found = tl.zeros([P, E], tl.int32)
    probs = tl.zeros([P, E], mean_probs.dtype.element_ty)
    for start in range(0, n, P):
        program = start + tl.arange(0, P)
        at = program.to(tl.int64)[:, None] * experts + columns[None, :]
        here = (program < n)[:, None] & (columns < experts)[None, :]
        found += tl.load(partial_counts + at, mask=here, other=0)
        probs += tl.load(partial_probs + at, mask=here, other=0.0)
    rows = tl.maximum(tl.load(kept), 1).to(mean_probs.dtype.element_ty)
    tl.store(counts + columns, tl.sum(found, 0), mask=columns < experts)
    tl.store(mean_probs + columns, tl.sum(probs, 0) / rows, mask=columns < experts)


@triton.jit
def scores_backward_kernel(
    grad_weights, grad_mean, grad_lse, logits, ids, lse_in, alive_in, kept, grad_logits,
    rows, experts, k, row_stride, expert_stride, norm: tl.float64, eps: tl.float64, scale: tl.float64,
    DTYPE: tl.constexpr, SCORE: tl.constexpr, NORMED: tl.constexpr, ALL: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dz of R rows. ALL: the softmax of all experts takes part in the weights' gradient."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    lse = tl.load(lse_in + row, mask=inside, other=0.0)
    live = inside & (tl.load(ids + row * k, mask=inside, other=-1) >= 0) & (lse == lse)
    columns = tl.arange(0, E)
    z = load_tile(logits + row * row_stride, columns, expert_stride, live, experts, DTYPE, WIDE)
    zero = tl.zeros([R, E], DTYPE)
    d = zero
    shift = tl.zeros([R], DTYPE)
    if grad_weights is not None and SCORE != "mean":
        n_alive = tl.load(alive_in + row, mask=live, other=0)
        dw = zero
        alive = columns[None, :] < zero.to(tl.int32)
        for j in range(0, k):
            counts = live & (j < n_alive)
            id_ = tl.load(ids + row * k + j, mask=counts, other=-1)
            here = columns[None, :] == id_[:, None]
            alive = alive | here
            dw = tl.where(here, tl.load(grad_weights + row * k + j, mask=counts, other=0.0)[:, None], dw)
        scale = tl.full([], scale, DTYPE)
        if SCORE == "logits":
            d = scale * dw
        else:
            logs = tl.where(alive, log_score(z, lse, SCORE), -float("inf"))
            w, pi, share = weigh(logs, alive, tl.full([], norm, DTYPE), tl.full([], eps, DTYPE), scale, NORMED)
            d = tl.where(alive, w * dw, 0.0)
            if NORMED:
                d = d - tl.where(alive, pi * (share * tl.sum(d, 1))[:, None], 0.0)
            if ALL:
                shift = -tl.sum(d, 1)
            if SCORE == "sigmoid":
                d = tl.where(alive, d * tl.exp(log_sigmoid(-z)), 0.0)
            elif SCORE == "sqrt_softplus":
                # d log s / dz = sigmoid(z) / (2 softplus(z)): 1/2 far below zero
                slope = tl.where(z < -37.0, 0.5, 0.5 * tl.exp(log_sigmoid(z)) / softplus(tl.where(z < -37.0, 0.0, z)))
                d = tl.where(alive, d * slope, 0.0)
    if grad_lse is not None:
        shift += tl.load(grad_lse + row, mask=live, other=0.0)
    g = d
    if grad_lse is not None or grad_mean is not None or ALL:
        p = tl.exp(z - lse[:, None])
        h = zero
        if grad_mean is not None:
            n = tl.maximum(tl.load(kept), 1).to(DTYPE)
            h = (tl.load(grad_mean + columns, mask=columns < experts, other=0.0) / n)[None, :] + zero
            shift -= tl.sum(p * h, 1)
        g += p * (shift[:, None] + h)
    g = tl.where(live[:, None], g, 0.0)
    at = (row * experts)[:, None] + columns[None, :]
    tl.store(grad_logits + at, g.to(grad_logits.dtype.element_ty), mask=inside[:, None] & (columns < experts)[None, :])
