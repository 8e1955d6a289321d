"""Sinkhorn problems that fit registers: a program owns P of them from the cost to the plan, and from the upstream gradient to
the cost's. The cost is read once more at the end (and by an iteration done with exponentials), K lives in registers.

Rows are the side that moves first: for columns_first the caller turns the problem round.
"""

import triton
import triton.language as tl

from kdfast.triton.sinkhorn_steps import (
    dense_offsets,
    finite,
    half_step,
    is_live,
    kernel_tile,
    largest_change,
    load_cost,
    load_potential,
    log_half_step,
    moved_potential,
    per_side,
    renew,
    softmax_weights,
    split,
    spread,
)
from kdfast.triton.tiles import class_offsets, row_offsets


@triton.jit
def place(batch, n, m, P: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """(problems, rows i, columns j, which problems, rows and columns exist)."""
    problem = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    i, j = tl.arange(0, N), tl.arange(0, M)
    here = problem < batch
    return problem, i, j, here, here[:, None] & (i < n)[None, :], here[:, None] & (j < m)[None, :]


@triton.jit(do_not_specialize=["batch", "iters"])
def solve_kernel(
    cost, a, b, plan, value, f_out, g_out, iterations, saved,
    batch, n, m, iters, n1, n2, c0, c1, c2, ci, cj, pi, pj,
    epsilon: tl.float64, lam_a: tl.float64, lam_b: tl.float64, tol: tl.float64,
    DTYPE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Plan and potentials, or the value where there is no plan; potentials after every iteration to `saved`, if given."""
    problem, i, j, here, inside_a, inside_b = place(batch, n, m, P, N, M)
    scale = (-1.0 / tl.full([], epsilon, tl.float64)).to(DTYPE)
    lam_a = tl.full([], lam_a, tl.float64)
    lam_b = tl.full([], lam_b, tl.float64)
    rows = row_offsets(problem[:, None], i[None, :], n1, n2, c0, c1, c2, ci)
    columns = class_offsets(j, cj, WIDE)
    a = per_side(a, problem, i, n, inside_a, 1.0, DTYPE)
    b = per_side(b, problem, j, m, inside_b, 1.0, DTYPE)
    open_ = spread(a != 0, 2) & spread(b != 0, 1)  # what a weight of 0 masks is not read

    # ---- dead are also those without a partner
    tile = load_cost(cost, rows, columns, open_).to(DTYPE)
    reaches = (tile != float("inf")).to(tl.int32)
    a = tl.where(tl.max(reaches, 2) == 0, 0.0, a)
    b = tl.where(tl.max(reaches, 1) == 0, 0.0, b)
    log_a = tl.log(tl.where(a == 0, 1.0, a))
    log_b = tl.log(tl.where(b == 0, 1.0, b))

    # ---- f = g = 0, K = exp(-C / epsilon) if that neither under- nor overflows; else K = 0, which is far
    F = tl.where(a == 0, -float("inf"), 0.0).to(tl.float64)
    G = tl.where(b == 0, -float("inf"), 0.0).to(tl.float64)
    row_ref, u = split(F, DTYPE)
    column_ref, v = split(G, DTYPE)
    largest = tl.max(tl.max(tl.abs(finite(tile) * scale), 2), 1)
    plain = largest <= (300.0 if tl.float64 == DTYPE else 40.0)
    K = tl.where(plain[:, None, None], kernel_tile(tile, scale, row_ref, column_ref), 0.0)

    active = here
    done = tl.zeros([P], tl.int64)
    k = 0
    going = 1
    while going != 0:
        new_F, new_u, far_a = half_step(tl.sum(K * spread(v, 1), 2), row_ref, a, log_a, lam_a, DTYPE)
        new_G, new_v, far_b = half_step(tl.sum(K * spread(new_u, 2), 1), column_ref, b, log_b, lam_b, DTYPE)
        far = active & (far_a | far_b)
        if tl.max(far.to(tl.int32), 0) != 0:
            tile = load_cost(cost, rows, columns, open_).to(DTYPE)
            far_F = log_half_step(tile, scale, G, a, log_a, lam_a, 2, DTYPE)
            far_G = log_half_step(tile, scale, far_F, b, log_b, lam_b, 1, DTYPE)
            new_F = tl.where(far[:, None], far_F, new_F)
            new_G = tl.where(far[:, None], far_G, new_G)
            near_F, rest_u = split(new_F, DTYPE)
            near_G, rest_v = split(new_G, DTYPE)
            row_ref = tl.where(far[:, None], near_F, row_ref)
            column_ref = tl.where(far[:, None], near_G, column_ref)
            new_u = tl.where(far[:, None], rest_u, new_u)
            new_v = tl.where(far[:, None], rest_v, new_v)
            K = renew(far, kernel_tile(tile, scale, row_ref, column_ref), K)
        change = largest_change(new_F, F)
        F = tl.where(active[:, None], new_F, F)
        G = tl.where(active[:, None], new_G, G)
        u = tl.where(active[:, None], new_u, u)
        v = tl.where(active[:, None], new_v, v)
        if saved is not None:
            at = ((problem * iters + k) * (n + m))[:, None]
            tl.store(saved + at + i[None, :], F, mask=inside_a & active[:, None])
            tl.store(saved + at + n + j[None, :], G, mask=inside_b & active[:, None])
        done += active.to(tl.int64)
        k += 1
        active = active & ~(change <= tol)
        going = ((k < iters) & (tl.max(active.to(tl.int32), 0) != 0)).to(tl.int32)
    tl.store(iterations + problem, done, mask=here)

    mass = K * spread(u, 2) * spread(v, 1)
    if plan is not None:
        at = dense_offsets(problem, i, j, n, m, pi, pj)
        tl.store(plan + at, mass, mask=spread(inside_a, 2) & spread(inside_b, 1))
        epsilon = tl.full([], epsilon, tl.float64)
        tl.store(f_out + problem[:, None] * n + i[None, :], (F * epsilon).to(DTYPE), mask=inside_a)
        tl.store(g_out + problem[:, None] * m + j[None, :], (G * epsilon).to(DTYPE), mask=inside_b)
    else:
        tile = load_cost(cost, rows, columns, open_).to(DTYPE)
        tl.store(value + problem, tl.sum(tl.sum(mass * finite(tile), 2), 1), mask=here)


@triton.jit(do_not_specialize=["batch", "iters"])
def reverse_kernel(
    cost, a, b, iterations, saved, grad_value, grad_plan, grad_f, grad_g, grad_cost, grad_a, grad_b,
    batch, n, m, iters, n1, n2, c0, c1, c2, ci, cj, pi, pj, g0, g1, g2, gi, gj,
    epsilon: tl.float64, lam_a: tl.float64, lam_b: tl.float64,
    ENVELOPE: tl.constexpr, DTYPE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Equations (4) to (6) from the saved potentials: the gradients of the cost and of the weights."""
    problem, i, j, here, inside_a, inside_b = place(batch, n, m, P, N, M)
    scale = (-1.0 / tl.full([], epsilon, tl.float64)).to(DTYPE)
    lam_a = tl.full([], lam_a, tl.float64)
    lam_b = tl.full([], lam_b, tl.float64)
    rows = row_offsets(problem[:, None], i[None, :], n1, n2, c0, c1, c2, ci)
    columns = class_offsets(j, cj, WIDE)
    done = tl.load(iterations + problem, mask=here, other=1)
    size = n + m
    F = load_potential(saved, problem, done, i, iters, size, inside_a)
    G = load_potential(saved + n, problem, done, j, iters, size, inside_b)
    live_a = is_live(F)
    live_b = is_live(G)
    a = tl.where(live_a, per_side(a, problem, i, n, inside_a, 1.0, DTYPE), 1.0)
    b = tl.where(live_b, per_side(b, problem, j, m, inside_b, 1.0, DTYPE), 1.0)
    log_a = tl.log(a)
    log_b = tl.log(b)
    open_ = spread(live_a, 2) & spread(live_b, 1)

    # ---- the plan, and A = dP P
    tile = load_cost(cost, rows, columns, open_).to(DTYPE)
    row_ref, u = split(F, DTYPE)
    column_ref, v = split(G, DTYPE)
    K = kernel_tile(tile, scale, row_ref, column_ref)
    D = K * spread(u, 2) * spread(v, 1)
    upstream = tl.zeros([P, N, M], DTYPE)
    if grad_plan is not None:
        at = dense_offsets(problem, i, j, n, m, pi, pj)
        upstream += tl.load(grad_plan + at, mask=open_, other=0.0)
    direct = tl.zeros([P], DTYPE)
    if grad_value is not None:
        direct += tl.load(grad_value + problem, mask=here, other=0.0)
        upstream += direct[:, None, None] * finite(tile)
    if ENVELOPE:
        D = D * direct[:, None, None]
    else:
        upstream = D * upstream * (-scale)
        D = D * direct[:, None, None] - upstream
        df = tl.sum(upstream, 2)
        dg = tl.sum(upstream, 1)
        if grad_f is not None:
            df += tl.load(grad_f + problem[:, None] * n + i[None, :], mask=inside_a & live_a, other=0.0)
        if grad_g is not None:
            dg += tl.load(grad_g + problem[:, None] * m + j[None, :], mask=inside_b & live_b, other=0.0)
        sum_f = tl.zeros([P, N], tl.float64)
        sum_g = tl.zeros([P, M], tl.float64)
        k = tl.max(done, 0)
        while k > 0:
            # a problem that froze before waits, with potentials that are there
            now = tl.minimum(k, done)
            turn = (k <= done)[:, None]
            F = load_potential(saved, problem, now, i, iters, size, inside_a)
            G = load_potential(saved + n, problem, now, j, iters, size, inside_b)
            G = moved_potential(G, lam_b, log_b)
            weights, K, row_ref, column_ref = softmax_weights(
                K, row_ref, column_ref, F, G, cost, rows, columns, open_, scale, DTYPE
            )
            weights *= spread(tl.where(turn, dg * lam_b.to(DTYPE), 0.0), 1)
            D += weights
            df -= tl.sum(weights, 2)
            sum_g += tl.where(turn, dg, 0.0).to(tl.float64)
            # the columns' potentials that the rows read: of the iteration before, zero before the first
            before = load_potential(saved + n, problem, tl.maximum(now - 1, 1), j, iters, size, inside_b)
            before = tl.where((now > 1)[:, None] | ~live_b, before, 0.0)
            F = moved_potential(F, lam_a, log_a)
            weights, K, row_ref, column_ref = softmax_weights(
                K, row_ref, column_ref, F, before, cost, rows, columns, open_, scale, DTYPE
            )
            weights *= spread(tl.where(turn, df * lam_a.to(DTYPE), 0.0), 2)
            D += weights
            dg = tl.where(turn, 0.0, dg) - tl.sum(weights, 1)
            sum_f += tl.where(turn, df, 0.0).to(tl.float64)
            df = tl.where(turn, 0.0, df)
            k -= 1
        epsilon = tl.full([], epsilon, tl.float64)
        if grad_a is not None:
            found = tl.where(live_a, lam_a * epsilon * sum_f / a.to(tl.float64), 0.0)
            tl.store(grad_a + problem[:, None] * n + i[None, :], found.to(grad_a.dtype.element_ty), mask=inside_a)
        if grad_b is not None:
            found = tl.where(live_b, lam_b * epsilon * sum_g / b.to(tl.float64), 0.0)
            tl.store(grad_b + problem[:, None] * m + j[None, :], found.to(grad_b.dtype.element_ty), mask=inside_b)
    at = spread(row_offsets(problem[:, None], i[None, :], n1, n2, g0, g1, g2, gi), 2)
    at += class_offsets(j, gj, WIDE)[None, None, :]
    D = tl.where(open_, D, 0.0)
    tl.store(grad_cost + at, D.to(grad_cost.dtype.element_ty), mask=spread(inside_a, 2) & spread(inside_b, 1))
