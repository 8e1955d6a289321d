"""Sinkhorn problems larger than a program's registers: every half-step is a launch that reads the cost once.

A pass belongs to a side, its own points i with the sums over the other side's points j; the caller names strides, weights and
potentials accordingly, so that one kernel moves rows and columns. Tiles [R, B] of R own points, B others at a time. All sums
run in one program, in order. Up to some 20 MB the cost stays in the GPU's L2 from pass to pass.

The gradient of the cost is not added up pass by pass, which would read and write it 2 n_iters times: what arrives at each
half-step is kept, n_iters (N + M) numbers, and one launch adds all of them to a tile in registers.
"""

import triton
import triton.language as tl

from kdfast.triton.sinkhorn_steps import (
    dense_offsets,
    exponent,
    finite,
    is_live,
    kernel_tile,
    load_cost,
    load_potential,
    moved_potential,
    online_exponentials,
    per_side,
    softmax_weights,
    split,
    spread,
)
from kdfast.triton.tiles import class_offsets, row_offsets


@triton.jit
def own_block(blocks, n, R: tl.constexpr):
    """(problem, block, own points i, which of them exist): what this program owns."""
    program = tl.program_id(0)
    block = program % blocks
    i = block * R + tl.arange(0, R)
    return (program // blocks).to(tl.int64), block, i, i < n


@triton.jit
def is_active(changes, problem, blocks, slot, tol, S: tl.constexpr):
    """Whether some potential of the side that moves first changed by more than tol in the iteration before."""
    largest = tl.zeros([S], tl.float64)
    for start in range(0, blocks, S):
        at = start + tl.arange(0, S)
        found = tl.load(changes + (problem * 2 + slot) * blocks + at, mask=at < blocks, other=0.0)
        largest = tl.maximum(largest, found)
    return ~(tl.max(largest, 0) <= tol)


@triton.jit(do_not_specialize=["k", "iters", "blocks", "first_blocks"])
def half_step_kernel(
    cost, weight, own_potential, other_potential, saved, changes, iterations,
    k, iters, n, m, offset, blocks, first_blocks, n1, n2, c0, c1, c2, ci, cj, epsilon: tl.float64, lam: tl.float64, tol: tl.float64,
    FIRST: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Iteration k (from 0) of a side: own potentials [batch, n] from the other side's [batch, m]. `changes` [batch, 2, blocks of the first side] are
    read of the iteration before and written, by turns; a frozen problem keeps its potentials and reads no cost.
    """
    problem, block, i, inside = own_block(blocks, n, R)
    active = k >= 0
    if changes is not None:
        active = is_active(changes, problem, first_blocks, (k + 1) % 2, tol, 64)
    change = tl.full([], 0.0, tl.float64)
    if active:
        scale = (-1.0 / tl.full([], epsilon, tl.float64)).to(DTYPE)
        lam = tl.full([], lam, tl.float64)
        w = tl.where(inside, 1.0, 0.0).to(DTYPE)
        if weight is not None:
            w = tl.load(weight + problem * n + i, mask=inside, other=0.0)
        rows = row_offsets(problem, i, n1, n2, c0, c1, c2, ci)
        top = tl.full([R], -float("inf"), DTYPE)
        sums = tl.zeros([R], DTYPE)
        for start in range(0, m, B):
            j = start + tl.arange(0, B)
            potential = tl.load(other_potential + problem * m + j, mask=j < m, other=-float("inf"))
            reference, rest = split(potential, DTYPE)
            open_ = (w != 0)[:, None] & is_live(potential)[None, :]
            at = rows[:, None] + class_offsets(j, cj, WIDE)[None, :]
            tile = tl.load(cost + at, mask=open_, other=float("inf")).to(DTYPE)
            top, shrink, e = online_exponentials(tile, scale, reference, rest, top)
            sums = sums * shrink + tl.sum(e, 1)
        dead = (w == 0) | (sums == 0)  # a maximum of NaN alone may be -inf, its sum is not 0
        top = tl.where(top == -float("inf"), 0.0, top)
        safe = tl.where(dead, 1.0, sums)
        log_w = tl.log(tl.where(dead, 1.0, w))
        potential = lam * ((log_w - tl.log(safe)).to(tl.float64) - top.to(tl.float64))
        potential = tl.where(dead, -float("inf"), potential)
        at = own_potential + problem * n + i
        if FIRST:
            moved = tl.abs(potential - tl.load(at, mask=inside, other=0.0))
            moved = tl.where(dead, 0.0, tl.where(moved == moved, moved, float("inf")))
            change = tl.max(tl.where(inside, moved, 0.0), 0)
            if block == 0:
                tl.store(iterations + problem, (k + 1).to(tl.int64))
        tl.store(at, potential, mask=inside)
        if saved is not None:
            tl.store(saved + (problem * iters + k) * (n + m) + offset + i, potential, mask=inside)
    if FIRST:  # noqa: SIM102  # decided when the kernel is compiled
        if changes is not None:
            tl.store(changes + (problem * 2 + k % 2) * blocks + block, change)


@triton.jit
def place_tile(tiles_i, tiles_j, n, m, R: tl.constexpr, B: tl.constexpr):
    """(problem, rows i, columns j, those inside) of one tile [1, R, B]."""
    program = tl.program_id(0)
    i = program // tiles_j % tiles_i * R + tl.arange(0, R)
    j = program % tiles_j * B + tl.arange(0, B)
    problem = (program // tiles_j // tiles_i).to(tl.int64) + tl.zeros([1], tl.int64)
    return problem, i, j, (i < n)[None, :], (j < m)[None, :]


@triton.jit
def plan_kernel(
    cost, own_potential, other_potential, plan, partial,
    n, m, blocks, n1, n2, c0, c1, c2, ci, cj, pi, pj, epsilon: tl.float64,
    DTYPE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """R rows of the plan, or their share of the value to `partial` [batch, blocks]."""
    problem, block, i, inside = own_block(blocks, n, R)
    scale = (-1.0 / tl.full([], epsilon, tl.float64)).to(DTYPE)
    F = tl.load(own_potential + problem * n + i, mask=inside, other=-float("inf"))
    row_ref, u = split(F, DTYPE)
    rows = row_offsets(problem, i, n1, n2, c0, c1, c2, ci)
    value = tl.zeros([R], tl.float64)
    for start in range(0, m, B):
        j = start + tl.arange(0, B)
        G = tl.load(other_potential + problem * m + j, mask=j < m, other=-float("inf"))
        column_ref, v = split(G, DTYPE)
        open_ = is_live(F)[:, None] & is_live(G)[None, :]
        at = rows[:, None] + class_offsets(j, cj, WIDE)[None, :]
        tile = tl.load(cost + at, mask=open_, other=float("inf")).to(DTYPE)
        mass = tl.exp(exponent(tile, scale, row_ref[:, None], column_ref[None, :])) * u[:, None] * v[None, :]
        if plan is not None:
            at = (problem * n * m + i.to(tl.int64) * pi)[:, None] + (j.to(tl.int64) * pj)[None, :]
            tl.store(plan + at, mass, mask=inside[:, None] & (j < m)[None, :])
        else:
            value += tl.sum(mass * finite(tile), 1).to(tl.float64)
    if partial is not None:
        tl.store(partial + problem * blocks + block, tl.sum(value, 0))


@triton.jit(do_not_specialize=["blocks"])
def value_kernel(partial, value, blocks, S: tl.constexpr):
    """Adds the blocks of a problem, in order."""
    problem = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([S], tl.float64)
    for start in range(0, blocks, S):
        at = start + tl.arange(0, S)
        sums += tl.load(partial + problem * blocks + at, mask=at < blocks, other=0.0)
    tl.store(value + problem, tl.sum(sums, 0).to(value.dtype.element_ty))


# ---------------------------------------------------------------- reverse
@triton.jit
def side_potential(saved, problem, k, i, iters, size, inside):
    return tl.load(saved + (problem * iters + (k - 1)) * size + i, mask=inside, other=-float("inf"))


@triton.jit(do_not_specialize=["iters", "blocks"])
def start_kernel(
    cost, iterations, saved, grad_value, grad_plan, grad_own, arriving,
    iters, n, m, own_offset, other_offset, blocks, n1, n2, c0, c1, c2, ci, cj, pi, pj, epsilon: tl.float64,
    DTYPE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """arriving[problem, done - 1, i] = sum_j A_ij / epsilon and the potential's own gradient, A = dP P."""
    problem, _, i, inside = own_block(blocks, n, R)
    scale = (-1.0 / tl.full([], epsilon, tl.float64)).to(DTYPE)
    done = tl.load(iterations + problem)
    size = n + m
    F = side_potential(saved + own_offset, problem, done, i, iters, size, inside)
    row_ref, u = split(F, DTYPE)
    rows = row_offsets(problem, i, n1, n2, c0, c1, c2, ci)
    sums = tl.zeros([R], DTYPE)
    for start in range(0, m, B):
        j = start + tl.arange(0, B)
        G = side_potential(saved + other_offset, problem, done, j, iters, size, j < m)
        column_ref, v = split(G, DTYPE)
        open_ = is_live(F)[:, None] & is_live(G)[None, :]
        at = rows[:, None] + class_offsets(j, cj, WIDE)[None, :]
        tile = tl.load(cost + at, mask=open_, other=float("inf")).to(DTYPE)
        upstream = tl.zeros([R, B], DTYPE)
        if grad_plan is not None:
            at = (problem * n * m + i.to(tl.int64) * pi)[:, None] + (j.to(tl.int64) * pj)[None, :]
            upstream += tl.load(grad_plan + at, mask=open_, other=0.0)
        if grad_value is not None:
            upstream += tl.load(grad_value + problem) * finite(tile)
        mass = tl.exp(exponent(tile, scale, row_ref[:, None], column_ref[None, :])) * v[None, :]
        sums += tl.sum(mass * upstream, 1)
    sums = sums * u * (-scale)
    if grad_own is not None:
        sums += tl.load(grad_own + problem * n + i, mask=inside & is_live(F), other=0.0)
    tl.store(arriving + (problem * iters + (done - 1)) * n + i, sums, mask=inside)


@triton.jit(do_not_specialize=["k", "iters", "blocks"])
def reverse_step_kernel(
    cost, weight, iterations, saved, moved, arriving,
    k, own_k, iters, n, m, own_offset, other_offset, blocks, n1, n2, c0, c1, c2, ci, cj, epsilon: tl.float64, lam: tl.float64,
    DTYPE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Reverse of the other side's half-step of iteration k (from 1): `arriving` of the own side at own_k = k or k - 1 gets

        -lam sum_j exp(-C_ij / epsilon + X_i + Y_j) moved_j,    X the own potentials it read, Y its own

    on top of what start_kernel left there.
    """
    problem, _, i, inside = own_block(blocks, n, R)
    done = tl.load(iterations + problem)
    if k <= done:
        scale = (-1.0 / tl.full([], epsilon, tl.float64)).to(DTYPE)
        lam = tl.full([], lam, tl.float64)
        size = n + m
        X = side_potential(saved + own_offset, problem, own_k, i, iters, size, inside)
        row_ref, left = split(X, DTYPE)
        rows = row_offsets(problem, i, n1, n2, c0, c1, c2, ci)
        sums = tl.zeros([R], DTYPE)
        for start in range(0, m, B):
            j = start + tl.arange(0, B)
            G = side_potential(saved + other_offset, problem, k, j, iters, size, j < m)
            live = is_live(G)
            w = tl.full([B], 1.0, DTYPE)
            if weight is not None:
                w = tl.load(weight + problem * m + j, mask=live, other=1.0)
            column_ref, right = split(moved_potential(G, lam, tl.log(w)), DTYPE)
            right *= tl.load(moved + (problem * iters + (k - 1)) * m + j, mask=live, other=0.0)
            open_ = is_live(X)[:, None] & live[None, :]
            at = rows[:, None] + class_offsets(j, cj, WIDE)[None, :]
            tile = tl.load(cost + at, mask=open_, other=float("inf")).to(DTYPE)
            sums += tl.sum(tl.exp(exponent(tile, scale, row_ref[:, None], column_ref[None, :])) * right[None, :], 1)
        at = arriving + (problem * iters + (own_k - 1)) * n + i
        before = tl.where(own_k == done, tl.load(at, mask=inside, other=0.0), 0.0)
        tl.store(at, before - lam.to(DTYPE) * sums * left, mask=inside)


@triton.jit(do_not_specialize=["iters", "tiles_i", "tiles_j"])
def gradient_kernel(
    cost, a, b, iterations, saved, grad_value, grad_plan, at_rows, at_columns, grad_cost,
    iters, n, m, tiles_i, tiles_j, n1, n2, c0, c1, c2, ci, cj, pi, pj, g0, g1, g2, gi, gj,
    epsilon: tl.float64, lam_a: tl.float64, lam_b: tl.float64,
    ENVELOPE: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of the cost's gradient: the direct part, and lam w_ij d of every half-step."""
    problem, i, j, inside_a, inside_b = place_tile(tiles_i, tiles_j, n, m, R, B)
    scale = (-1.0 / tl.full([], epsilon, tl.float64)).to(DTYPE)
    lam_a = tl.full([], lam_a, tl.float64)
    lam_b = tl.full([], lam_b, tl.float64)
    rows = row_offsets(problem[:, None], i[None, :], n1, n2, c0, c1, c2, ci)
    columns = class_offsets(j, cj, WIDE)
    done = tl.load(iterations + problem)
    size = n + m
    F = load_potential(saved, problem, done, i, iters, size, inside_a)
    G = load_potential(saved + n, problem, done, j, iters, size, inside_b)
    live_a = is_live(F)
    live_b = is_live(G)
    log_a = tl.log(tl.where(live_a, per_side(a, problem, i, n, inside_a, 1.0, DTYPE), 1.0))
    log_b = tl.log(tl.where(live_b, per_side(b, problem, j, m, inside_b, 1.0, DTYPE), 1.0))
    open_ = spread(live_a, 2) & spread(live_b, 1)
    tile = load_cost(cost, rows, columns, open_).to(DTYPE)
    row_ref, u = split(F, DTYPE)
    column_ref, v = split(G, DTYPE)
    K = kernel_tile(tile, scale, row_ref, column_ref)
    D = K * spread(u, 2) * spread(v, 1)
    direct = tl.zeros([1], DTYPE)
    if grad_value is not None:
        direct += tl.load(grad_value + problem)
    if ENVELOPE:
        D = D * direct[:, None, None]
    else:
        upstream = direct[:, None, None] * finite(tile)
        if grad_plan is not None:
            upstream += tl.load(grad_plan + dense_offsets(problem, i, j, n, m, pi, pj), mask=open_, other=0.0)
        D = D * (direct[:, None, None] + upstream * scale)
        k = tl.max(done, 0)
        while k > 0:
            now = tl.zeros([1], tl.int64) + k
            F = load_potential(saved, problem, now, i, iters, size, inside_a)
            G = load_potential(saved + n, problem, now, j, iters, size, inside_b)
            G = moved_potential(G, lam_b, log_b)
            weights, K, row_ref, column_ref = softmax_weights(
                K, row_ref, column_ref, F, G, cost, rows, columns, open_, scale, DTYPE
            )
            at = (problem * iters + (k - 1)) * m
            d = tl.load(at_columns + at[:, None] + j[None, :], mask=inside_b, other=0.0) * lam_b.to(DTYPE)
            D += weights * spread(d, 1)
            before = load_potential(saved + n, problem, tl.maximum(now - 1, 1), j, iters, size, inside_b)
            before = tl.where((k > 1) | ~live_b, before, 0.0)
            F = moved_potential(F, lam_a, log_a)
            weights, K, row_ref, column_ref = softmax_weights(
                K, row_ref, column_ref, F, before, cost, rows, columns, open_, scale, DTYPE
            )
            at = (problem * iters + (k - 1)) * n
            d = tl.load(at_rows + at[:, None] + i[None, :], mask=inside_a, other=0.0) * lam_a.to(DTYPE)
            D += weights * spread(d, 2)
            k -= 1
    at = spread(row_offsets(problem[:, None], i[None, :], n1, n2, g0, g1, g2, gi), 2)
    at += class_offsets(j, gj, WIDE)[None, None, :]
    D = tl.where(open_, D, 0.0).to(grad_cost.dtype.element_ty)
    tl.store(grad_cost + at, D, mask=spread(inside_a, 2) & spread(inside_b, 1))


@triton.jit(do_not_specialize=["iters", "blocks"])
def weight_gradient_kernel(
    weight, iterations, saved, arriving, grad, iters, n, size, offset, blocks, factor: tl.float64, R: tl.constexpr
):
    """grad_i = factor sum_k arriving_ki / weight_i with factor = lam epsilon; 0 for the dead."""
    problem, _, i, inside = own_block(blocks, n, R)
    done = tl.load(iterations + problem)
    live = side_potential(saved + offset, problem, done, i, iters, size, inside) != -float("inf")
    sums = tl.zeros([R], tl.float64)
    k = done
    while k > 0:
        sums += tl.load(arriving + (problem * iters + (k - 1)) * n + i, mask=live, other=0.0).to(tl.float64)
        k -= 1
    w = tl.load(weight + problem * n + i, mask=live, other=1.0).to(tl.float64)
    found = tl.full([], factor, tl.float64) * sums / w
    tl.store(grad + problem * n + i, found.to(grad.dtype.element_ty), mask=inside)
