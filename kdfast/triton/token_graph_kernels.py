"""Kernels of `kdfast.triton.token_graph`: the candidates of a graph, its exact neighbours, weights of edges and their gradient, and
the KL of two graphs (equations: csrc/sparse_kl.cpp). No n x n matrix and no atomics: an edge stands in the lists of both its ends.
"""

import triton
import triton.language as tl

from kdfast.triton.pairwise_kernels import load_points
from kdfast.triton.terms import expm1_small, kl, log1p

NOBODY = tl.constexpr(2147483647)  # the token of an empty place: behind every other at the same distance


# ---------------------------------------------------------------- lists of the nearest so far
@triton.jit
def take(best, ids, keys, columns):
    """Takes a tile of (key, token) [R, S] into the lists [R, C] of the smallest, in no order: while some row of the tile has one
    that comes before its list's last, the first of the tile takes the place of the last. Late tiles seldom have one.
    """
    coming = tl.full([], 1, tl.int32)
    while coming > 0:
        last = tl.max(best, 1)
        last_id = tl.max(tl.where(best == last[:, None], ids, -1), 1)
        first = tl.min(keys, 1)
        first_id = tl.min(tl.where(keys == first[:, None], columns, NOBODY), 1)
        enters = (first < last) | ((first == last) & (first_id < last_id))
        leaves = enters[:, None] & (best == last[:, None]) & (ids == last_id[:, None])
        # empty places are all alike: one of them is taken
        place = tl.min(tl.where(leaves, tl.arange(0, best.shape[1])[None, :], NOBODY), 1)
        here = tl.arange(0, best.shape[1])[None, :] == place[:, None]
        best = tl.where(here, first[:, None], best)
        ids = tl.where(here, first_id[:, None], ids)
        taken = enters[:, None] & (columns == first_id[:, None])
        keys = tl.where(taken, float("inf"), keys)
        columns = tl.where(taken, NOBODY, columns)
        coming = tl.max(enters.to(tl.int32), 0)
    return best, ids


@triton.jit(do_not_specialize=["n"])  # it varies from batch to batch
def candidates_kernel(
    centred, norms, ids_out, bounds, n, width, n_splits, per_split, DTYPE: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """For R tokens, C tokens of one split with the smallest keys N_j - 2 <x_i, x_j>: ids [n, splits, C]; and a key that no other
    token of the split is below: bounds [n, splits]. N_j is the squared norm less the error bound of the product, so key + N_i
    is never above the true distance. The bound supposes products of DTYPE: with TF32 few rows would be proved.
    """
    split = tl.program_id(0) % n_splits
    i = tl.program_id(0) // n_splits * R + tl.arange(0, R)
    rows = centred + i.to(tl.int64)[:, None] * width
    slots = tl.arange(0, C)
    best = tl.full([R, C], float("inf"), DTYPE)
    ids = tl.full([R, C], NOBODY, tl.int32)
    begin = split * per_split
    end = tl.minimum(begin + per_split, n)
    for start in range(begin, end, S):
        j = start + tl.arange(0, S)
        others = centred + j.to(tl.int64)[None, :] * width
        products = tl.zeros([R, S], DTYPE)
        for c in range(0, width, B):
            columns = c + tl.arange(0, B)
            a = tl.load(rows + columns[None, :], mask=(i < n)[:, None] & (columns < width)[None, :], other=0.0)
            b = tl.load(others + columns[:, None], mask=(columns < width)[:, None] & (j < end)[None, :], other=0.0)
            products = tl.dot(a, b, products, input_precision="ieee", out_dtype=DTYPE)
        keys = tl.load(norms + j, mask=j < end, other=0.0)[None, :] - 2.0 * products
        keys = tl.where(keys == keys, keys, -float("inf"))  # nothing is known of it: a candidate
        usable = (j < end)[None, :] & (i[:, None] != j[None, :])
        keys = tl.where(usable, keys, float("inf"))
        best, ids = take(best, ids, keys, tl.where(usable, j[None, :], NOBODY))
    row = i.to(tl.int64) * n_splits + split
    tl.store(ids_out + row[:, None] * C + slots[None, :], ids, mask=(i < n)[:, None])
    # a place left empty: nobody is missing
    bound = tl.where(tl.max(ids, 1) == NOBODY, float("inf"), tl.max(best, 1))
    tl.store(bounds + row, bound, mask=i < n)


# ---------------------------------------------------------------- exact distances
@triton.jit
def points(
    tokens, inverse, token, here, columns, width, row_stride, column_stride, DTYPE: tl.constexpr, WIDE: tl.constexpr
):
    """[T, B] coordinates of tokens [T], scaled; 0 where there is none."""
    rows = tokens + token.to(tl.int64) * row_stride
    x = load_points(rows, columns, column_stride, here, width, DTYPE, WIDE)
    if inverse is not None:
        x *= tl.load(inverse + token, mask=here, other=0.0)[:, None]
    return x


@triton.jit
def squared_distances(
    tokens, inverse, a, b, here, width, row_stride, column_stride, DTYPE: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """[T]: |x_a - x_b|^2 by subtraction, of tokens a [T or 1] and b [T]."""
    total = tl.zeros([T, B], DTYPE)
    for start in range(0, width, B):
        columns = start + tl.arange(0, B)
        x = points(tokens, inverse, a, a >= 0, columns, width, row_stride, column_stride, DTYPE, WIDE)
        d = x - points(tokens, inverse, b, here, columns, width, row_stride, column_stride, DTYPE, WIDE)
        total += d * d
    return tl.sum(total, 1)


@triton.jit
def ranked(distances, token, here):
    """(keys, tokens) [1, L] as `take` wants them: NaN ranks with infinity."""
    keys = tl.where(here & (distances == distances), distances, float("inf"))
    return keys[None, :], tl.where(here, token, NOBODY)[None, :]


@triton.jit(do_not_specialize=["n"])  # it varies from batch to batch
def rank_kernel(
    tokens, inverse, norms, candidates, bounds, neighbours, weights, n, width, k, row_stride, column_stride,
    slack: tl.float64, sigma: tl.float64, DTYPE: tl.constexpr, SPLITS: tl.constexpr, L: tl.constexpr, B: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Token i's neighbours, nearest first, by exact distances to its L candidates. Where the k-th of them is not proved to be nearer than
    every other token, and where there are no candidates, by those to all tokens.
    """
    i = tl.program_id(0) + tl.zeros([1], tl.int32)
    lanes = tl.arange(0, L)
    proved = 0
    best = tl.full([1, L], float("inf"), DTYPE)
    ids = tl.full([1, L], NOBODY, tl.int32)
    if candidates is not None:
        j = tl.load(candidates + i.to(tl.int64) * L + lanes)
        here = j < n
        d2 = squared_distances(tokens, inverse, i, j, here, width, row_stride, column_stride, DTYPE, L, B, WIDE)
        best, ids = ranked(d2, j, here)
        bound = tl.min(tl.load(bounds + i.to(tl.int64) * SPLITS + tl.arange(0, SPLITS)), 0)
        bound += tl.sum(tl.load(norms + i), 0)
        nearer = best * (1.0 + tl.full([], slack, DTYPE)) < bound
        proved = (tl.sum(tl.sum(nearer.to(tl.int32), 1), 0) >= k).to(tl.int32)
    if proved == 0:
        here = (lanes < n) & (lanes != i)
        d2 = squared_distances(tokens, inverse, i, lanes, here, width, row_stride, column_stride, DTYPE, L, B, WIDE)
        best, ids = ranked(d2, lanes, here)
        for start in range(L, n, L):
            j = start + lanes
            here = (j < n) & (j != i)
            d2 = squared_distances(tokens, inverse, i, j, here, width, row_stride, column_stride, DTYPE, L, B, WIDE)
            keys, columns = ranked(d2, j, here)
            best, ids = take(best, ids, keys, columns)
    for rank in range(0, k):
        nearest = tl.min(best, 1)
        token = tl.min(tl.where(best == nearest[:, None], ids, NOBODY), 1)
        taken = ids == token[:, None]
        best = tl.where(taken, float("inf"), best)
        ids = tl.where(taken, NOBODY, ids)
        place = i.to(tl.int64) * k + rank
        tl.store(neighbours + place, token)
        if tl.max(nearest, 0) == float("inf"):  # infinite or NaN: the weight says which
            nearest = squared_distances(
                tokens, inverse, i, token, token < n, width, row_stride, column_stride, DTYPE, 1, B, WIDE
            )
        tl.store(weights + place, tl.exp(-nearest / (2.0 * tl.full([], sigma, DTYPE))))


@triton.jit(do_not_specialize=["edges", "n"])  # they vary from batch to batch
def weights_kernel(
    tokens, inverse, sources, targets, weights, edges, n, width, row_stride, column_stride, sigma: tl.float64,
    DTYPE: tl.constexpr, T: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Weights of T edges; NaN for one whose tokens do not exist."""
    edge = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    inside = edge < edges
    a = tl.load(sources + edge, mask=inside, other=-1)
    b = tl.load(targets + edge, mask=inside, other=-1)
    here = (a >= 0) & (a < n) & (b >= 0) & (b < n)
    a = tl.where(here, a, -1)
    d2 = squared_distances(tokens, inverse, a, b, here, width, row_stride, column_stride, DTYPE, T, B, WIDE)
    value = tl.exp(-d2 / (2.0 * tl.full([], sigma, DTYPE)))
    tl.store(weights + edge, tl.where(here, value, float("nan")), mask=inside)


@triton.jit(do_not_specialize=["edges", "n"])  # they vary from batch to batch
def edge_gradient_kernel(
    grad_weights, weights, tokens, inverse, ends, order, starts, grad, edges, n, width, tiles, row_stride, column_stride,
    sigma: tl.float64, DTYPE: tl.constexpr, T: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """B columns of a token's gradient with respect to x, its scaled self: the sum of -dL/dA A / sigma (x - other) over its edges, T
    at a time in order. ends [2 edges]: entry e is edge e seen from its source, entry edges + e the same from its target.
    """
    token = tl.program_id(0) // tiles + tl.zeros([1], tl.int32)
    columns = tl.program_id(0) % tiles * B + tl.arange(0, B)
    x = points(tokens, inverse, token, token >= 0, columns, width, row_stride, column_stride, DTYPE, WIDE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    end = tl.load(starts + row + 1)
    total = tl.zeros([T, B], DTYPE)
    for start in range(tl.load(starts + row), end, T):
        at = start + tl.arange(0, T)
        entry = tl.load(order + at, mask=at < end, other=0)
        source = entry < edges
        edge = tl.where(source, entry, entry - edges)
        other = tl.load(ends + tl.where(source, entry + edges, entry - edges), mask=at < end, other=-1)
        here = (other >= 0) & (other < n)
        slope = tl.load(grad_weights + edge, mask=here, other=0.0) * tl.load(weights + edge, mask=here, other=0.0)
        slope *= -1.0 / tl.full([], sigma, DTYPE)
        d = x - points(tokens, inverse, other, here, columns, width, row_stride, column_stride, DTYPE, WIDE)
        total += tl.where(here[:, None], slope[:, None] * d, 0.0)
    at = grad + row * width + columns
    tl.store(at, tl.sum(total, 0).to(grad.dtype.element_ty), mask=columns < width)


# ---------------------------------------------------------------- KL of two graphs
@triton.jit
def expm1(x):
    """For |x| <= 1, the weights' range and their differences'."""
    return tl.where(tl.abs(x) < 0.5, expm1_small(x), tl.exp(x) - 1.0)


@triton.jit
def entries(keys, order, weights, at, end):
    """Entries of R rows, T of each: (key, edge, weight in float64, which exist)."""
    here = at < end
    edge = tl.load(order + at, mask=here, other=0)
    return (
        tl.load(keys + at, mask=here, other=-1),
        edge,
        tl.load(weights + edge, mask=here, other=0.0).to(tl.float64),
        here,
    )


@triton.jit
def weight_at(keys, order, weights, wanted, here, begin, end):
    """(weights of the entries with the wanted keys, 0 where there is none; whether there is one), by bisection of [begin, end)."""
    low = tl.where(here, begin, end)
    high = tl.where(here, end, end)
    while tl.max(tl.max(high - low, 1), 0) > 0:
        middle = (low + high) // 2
        active = low < high
        less = active & (tl.load(keys + middle, mask=active, other=0) < wanted)
        high = tl.where(active & ~less, middle, high)
        low = tl.where(less, middle + 1, low)
    found = here & (low < end)
    found = found & (tl.load(keys + low, mask=found, other=-1) == wanted)
    edge = tl.load(order + low, mask=found, other=0)
    return tl.load(weights + edge, mask=found, other=0.0).to(tl.float64), found


@triton.jit
def divided(a, b, one, c):
    """(P phi(d), Q - P) of entries with weights a and b; one = 1/Z."""
    p = tl.exp(a) * one
    d = a - b + c
    return kl(p, p * tl.exp(-d), d)


@triton.jit(do_not_specialize=["nodes"])  # it varies from batch to batch
def sparse_kl_kernel(
    keys_a, order_a, starts_a, weights_a, keys_b, order_b, starts_b, weights_b, rows, grad_rows, grad_a, grad_b, nodes,
    R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """R rows of KL(softmax A || softmax B), absent entries being 0: the sums of csrc/sparse_kl.cpp, in float64 as there. An entry
    of B that A lacks is one with a = 0.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < nodes
    begin_a = tl.load(starts_a + row, mask=inside, other=0)
    begin_b = tl.load(starts_b + row, mask=inside, other=0)
    end_a = tl.load(starts_a + row + 1, mask=inside, other=0)
    end_b = tl.load(starts_b + row + 1, mask=inside, other=0)
    count = end_a - begin_a
    longest_a = tl.max(count, 0)
    longest_b = tl.max(end_b - begin_b, 0)
    begin_a = begin_a[:, None]
    begin_b = begin_b[:, None]
    end_a = end_a[:, None]
    end_b = end_b[:, None]
    first_a = begin_a + tl.arange(0, T)[None, :]
    first_b = begin_b + tl.arange(0, T)[None, :]
    zero = tl.zeros([R, T], tl.float64)
    mass = zero
    moved = zero
    extra = zero
    for start in range(0, longest_a, T):
        key, _, a, here = entries(keys_a, order_a, weights_a, first_a + start, end_a)
        b, _ = weight_at(keys_b, order_b, weights_b, key, here, begin_b, end_b)
        mass += expm1(a)
        moved += tl.exp(a) * expm1(b - a)
    for start in range(0, longest_b, T):
        key, _, b, here = entries(keys_b, order_b, weights_b, first_b + start, end_b)
        _, found = weight_at(keys_a, order_a, weights_a, key, here, begin_a, end_a)
        moved += tl.where(found, 0.0, expm1(b))
        extra += tl.where(here & ~found, 1.0, 0.0)
    one = 1.0 / (nodes + tl.sum(mass, 1))
    c = log1p(tl.sum(moved, 1) * one)
    off, _rest = divided(one * 0.0, one * 0.0, one, c)
    off *= nodes - count - tl.sum(extra, 1)
    one = one[:, None]
    c = c[:, None]
    total = zero
    for start in range(0, longest_a, T):
        key, _, a, here = entries(keys_a, order_a, weights_a, first_a + start, end_a)
        b, _ = weight_at(keys_b, order_b, weights_b, key, here, begin_b, end_b)
        term, _ = divided(a, b, one, c)
        total += tl.where(here, term, 0.0)
    for start in range(0, longest_b, T):
        key, _, b, here = entries(keys_b, order_b, weights_b, first_b + start, end_b)
        _, found = weight_at(keys_a, order_a, weights_a, key, here, begin_a, end_a)
        term, _ = divided(zero, b, one, c)
        total += tl.where(here & ~found, term, 0.0)
    value = tl.sum(total, 1) + off
    if rows is not None:
        tl.store(rows + row, value.to(rows.dtype.element_ty), mask=inside)
    if grad_rows is not None:
        up = tl.load(grad_rows + row, mask=inside, other=0.0).to(tl.float64)[:, None]
        if grad_a is not None:
            for start in range(0, longest_a, T):
                key, edge, a, here = entries(keys_a, order_a, weights_a, first_a + start, end_a)
                b, _ = weight_at(keys_b, order_b, weights_b, key, here, begin_b, end_b)
                g = up * (tl.exp(a) * one) * (a - b + c - value[:, None])
                tl.store(grad_a + edge, g.to(grad_a.dtype.element_ty), mask=here)
        if grad_b is not None:
            for start in range(0, longest_b, T):
                key, edge, b, here = entries(keys_b, order_b, weights_b, first_b + start, end_b)
                a, _ = weight_at(keys_a, order_a, weights_a, key, here, begin_a, end_a)
                _, difference = divided(a, b, one, c)
                tl.store(grad_b + edge, (up * difference).to(grad_b.dtype.element_ty), mask=here)
