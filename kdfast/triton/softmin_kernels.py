"""Kernels of `kdfast.triton.softmin`: sums over pairs whose cost is made from the points, tile by tile (equations: kdfast/ops/softmin.py).

A program owns R points of one side and walks the other side in tiles of B; |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y> comes from
tl.dot over K coordinates at a time. The tile of costs lives in registers only. Float32 and float64 points are taken less y_0, so
what cancels is of the size of the cloud and not of its distance from zero, and their products are no TF32: the rounding of a cost
is divided by epsilon. 16-bit points are multiplied as they are, exactly; what cancels is then small beside their own grain.
"""

import triton
import triton.language as tl

from kdfast.triton.pairwise_kernels import load_points
from kdfast.triton.sinkhorn_passes import own_block
from kdfast.triton.sinkhorn_steps import exponent, finite, is_live, online_exponentials, split


@triton.jit
def coordinates(points, i, inside, columns, width, origin, CENTRED: tl.constexpr):
    """[R, K] of points i of one batch [., width], less the origin; 0 beyond the last coordinate."""
    x = load_points(points + i.to(tl.int64) * width, columns, 1, inside, width, points.dtype.element_ty, False)
    if CENTRED:
        x -= tl.load(origin + columns, mask=columns < width, other=0.0)[None, :]
    return x


@triton.jit
def add_products(own, other, i, j, inside, there, start, width, origin, products, own_norms, other_norms, CENTRED: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """K coordinates more of <x_i, y_j> [R, B], |x_i|^2 [R] and |y_j|^2 [B]."""
    columns = start + tl.arange(0, K)
    x = coordinates(own, i, inside, columns, width, origin, CENTRED)
    y = coordinates(other, j, there, columns, width, origin, CENTRED)
    products = tl.dot(x, tl.trans(y), products, input_precision="ieee", out_dtype=products.dtype)
    x, y = x.to(products.dtype), y.to(products.dtype)
    return products, own_norms + tl.sum(x * x, 1), other_norms + tl.sum(y * y, 1)


@triton.jit
def squared_distances(
    own, other, i, j, inside, there, width, origin, DTYPE: tl.constexpr, CENTRED: tl.constexpr, ONE: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """[R, B]; ONE where all coordinates are in K."""
    products = tl.zeros([R, B], DTYPE)
    own_norms = tl.zeros([R], DTYPE)
    other_norms = tl.zeros([B], DTYPE)
    if ONE:
        products, own_norms, other_norms = add_products(
            own, other, i, j, inside, there, 0, width, origin, products, own_norms, other_norms, CENTRED, K
        )
    else:
        for start in range(0, width, K):
            products, own_norms, other_norms = add_products(
                own, other, i, j, inside, there, start, width, origin, products, own_norms, other_norms, CENTRED, K
            )
    squared = own_norms[:, None] + other_norms[None, :] - 2.0 * products
    return tl.where(squared < 0, 0.0, squared)  # not a maximum, which may drop NaN


@triton.jit(do_not_specialize=["n", "m", "blocks"])  # they vary from batch to batch
def softmin_kernel(
    x, y, h, s, c, n, m, width, blocks, scale: tl.float64,
    DTYPE: tl.constexpr, CENTRED: tl.constexpr, ONE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Equations (1), (2) for R rows: s [batch, n] and c [batch, n]; -inf and 0 where every h_j is -inf."""
    problem, _, i, inside = own_block(blocks, n, R)
    x += problem * n * width
    y += problem * m * width
    minus = (-tl.full([], scale, tl.float64)).to(DTYPE)
    top = tl.full([R], -float("inf"), DTYPE)
    sums = tl.zeros([R], DTYPE)
    costs = tl.zeros([R], DTYPE)
    for start in range(0, m, B):
        j = start + tl.arange(0, B)
        other = tl.load(h + problem * m + j, mask=j < m, other=-float("inf"))
        tile = squared_distances(x, y, i, j, inside, j < m, width, y, DTYPE, CENTRED, ONE, R, B, K)
        tile = tl.where(is_live(other)[None, :], tile, float("inf"))
        reference, rest = split(other, DTYPE)
        top, shrink, e = online_exponentials(tile, minus, reference, rest, top)
        sums = sums * shrink + tl.sum(e, 1)
        if c is not None:
            costs = costs * shrink + tl.sum(e * finite(tile), 1)
    nothing = sums == 0  # a maximum of NaN alone may be -inf, its sum is not 0
    safe = tl.where(nothing, 1.0, sums)
    top = tl.where(nothing | (top == -float("inf")), 0.0, top)
    found = tl.log(safe).to(tl.float64) + top.to(tl.float64)
    tl.store(s + problem * n + i, tl.where(nothing, -float("inf"), found), mask=inside)
    if c is not None:
        tl.store(c + problem * n + i, (costs / safe).to(tl.float64), mask=inside)


@triton.jit(do_not_specialize=["n", "m", "blocks"])  # they vary from batch to batch
def softmin_gradient_kernel(
    own, other, origin, own_potential, other_potential, p, q, grad, grad_potential, n, m, width, blocks, scale: tl.float64,
    ROWS: tl.constexpr, DTYPE: tl.constexpr, CENTRED: tl.constexpr, ONE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Equation (4) for R points and W coordinates of one side, w_ij = exp(X_i + Y_j - C_ij / epsilon) with X = -s, Y = h.

    ROWS: the own side is x, with p and q of its own; else it is y, and they are the others'.
    """
    program = tl.program_id(0)
    chunks = 1 if grad is None else tl.maximum(tl.cdiv(width, W), 1)
    chunk = program % chunks
    block = program // chunks
    problem = (block // blocks).to(tl.int64)
    i = block % blocks * R + tl.arange(0, R)
    inside = i < n
    own += problem * n * width
    other += problem * m * width
    origin += problem * (m if ROWS else n) * width
    minus = (-tl.full([], scale, tl.float64)).to(DTYPE)
    X = tl.load(own_potential + problem * n + i, mask=inside, other=-float("inf"))
    own_ref, left = split(X, DTYPE)
    of_rows = tl.zeros([R], DTYPE)
    factors = of_rows
    if ROWS:
        of_rows += tl.load(p + problem * n + i, mask=inside, other=0.0).to(DTYPE)
        if q is not None:
            factors += tl.load(q + problem * n + i, mask=inside, other=0.0).to(DTYPE)
    columns = chunk * W + tl.arange(0, W)
    total = tl.zeros([R], DTYPE)
    moved = tl.zeros([R, W], DTYPE)
    sums = tl.zeros([R], DTYPE)
    for start in range(0, m, B):
        j = start + tl.arange(0, B)
        Y = tl.load(other_potential + problem * m + j, mask=j < m, other=-float("inf"))
        other_ref, right = split(Y, DTYPE)
        tile = squared_distances(own, other, i, j, inside, j < m, width, origin, DTYPE, CENTRED, ONE, R, B, K)
        tile = tl.where(is_live(X)[:, None] & is_live(Y)[None, :], tile, float("inf"))
        weights = tl.exp(exponent(tile, minus, own_ref[:, None], other_ref[None, :])) * right[None, :]
        p_tile = of_rows[:, None]
        if not ROWS:
            p_tile = tl.load(p + problem * m + j, mask=j < m, other=0.0).to(DTYPE)[None, :]
        if q is not None:
            q_tile = factors[:, None]
            if not ROWS:
                q_tile = tl.load(q + problem * m + j, mask=j < m, other=0.0).to(DTYPE)[None, :]
            t = weights * (p_tile + q_tile * finite(tile))
            grad_cost = weights * q_tile + t * minus
        else:
            t = weights * p_tile
            grad_cost = t * minus
        sums += tl.sum(t, 1)
        if grad is not None:
            y = coordinates(other, j, j < m, columns, width, origin, CENTRED).to(DTYPE)
            total += tl.sum(grad_cost, 1)
            moved = tl.dot(grad_cost, y, moved, input_precision="ieee", out_dtype=DTYPE)
    if grad is not None:
        x = coordinates(own, i, inside, columns, width, origin, CENTRED).to(DTYPE)
        found = 2.0 * (total[:, None] * x - moved) * left[:, None]
        at = grad + (problem * n + i)[:, None] * width + columns[None, :]
        tl.store(at, found.to(grad.dtype.element_ty), mask=inside[:, None] & (columns < width)[None, :])
    if grad_potential is not None:  # noqa: SIM102  # decided when the kernel is compiled
        if chunk == 0:
            tl.store(grad_potential + problem * n + i, (sums * left).to(tl.float64), mask=inside)
