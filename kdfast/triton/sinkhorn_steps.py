"""What the Sinkhorn kernels share: the formulas of kdfast/ops/sinkhorn.py on tiles [P, N, M], P problems side by side.

Potentials are F = f / epsilon in float64, since at epsilon = 1e-3 they reach 1000, where a float32 is good to 6e-5. They enter
an exponential as the nearest number of the compute type (the reference) and a factor exp(F - reference) for what is left.
Dead rows and columns (weight 0, or no partner) have F = -inf, and their cost is read as +inf.

A tile K_ij = exp(-C_ij / epsilon + row_ref_i + column_ref_j) makes a half-step a product without exponentials, and a softmax
weight a product of three, as long as the potentials stay within DRIFT of the references: what K loses by underflow is then
below exp(2 DRIFT) times the smallest number. Beyond, problems are far: exponentials with a maximum, and K around new
references. Whether a problem is far concerns only its own numbers, so its result does not depend on its neighbours.
"""

import triton
import triton.language as tl


@triton.jit
def drift(DTYPE: tl.constexpr):
    return 150.0 if tl.float64 == DTYPE else 30.0


@triton.jit
def exponent(cost, scale, a, b):
    """cost * scale + (a + b), accurate where large terms cancel: the rounding of a + b is added back."""
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)
    return (cost * scale + total) + lost


@triton.jit
def spread(values, AXIS: tl.constexpr):
    """[P, K] values over axis AXIS of a tile [P, N, M]."""
    return values[:, :, None] if AXIS == 2 else values[:, None, :]


@triton.jit
def is_live(potential):
    return potential != -float("inf")


@triton.jit
def split(potential, DTYPE: tl.constexpr):
    """(reference, factor) of float64 potentials; (0, 0) where dead."""
    dead = potential == -float("inf")
    reference = tl.where(dead, 0.0, potential).to(DTYPE)
    return reference, factor(potential, reference, DTYPE)


@triton.jit
def distance(potential, reference, DTYPE: tl.constexpr):
    return tl.where(potential == -float("inf"), 0.0, potential - reference.to(tl.float64)).to(DTYPE)


@triton.jit
def factor(potential, reference, DTYPE: tl.constexpr):
    """exp(F - reference), 0 where dead."""
    return tl.where(potential == -float("inf"), 0.0, tl.exp(distance(potential, reference, DTYPE)))


@triton.jit
def kernel_tile(cost, scale, row_ref, column_ref):
    return tl.exp(exponent(cost, scale, spread(row_ref, 2), spread(column_ref, 1)))


@triton.jit
def renew(far, new, old):
    """The new tile for the problems that are far; a lone problem is, where this is asked, so its old tile is needed no more."""
    return new if far.shape[0] == 1 else tl.where(far[:, None, None], new, old)


@triton.jit
def finite(cost):
    """Forbidden pairs count nothing."""
    return tl.where(cost == float("inf"), 0.0, cost)


@triton.jit
def per_side(values, problem, i, size, inside, otherwise, DTYPE: tl.constexpr):
    """values[problem, i], [P, N]; `otherwise` where there is no such tensor."""
    if values is None:
        return tl.where(inside, otherwise, 0.0).to(DTYPE)
    else:
        return tl.load(values + problem[:, None] * size + i[None, :], mask=inside, other=0.0).to(DTYPE)


@triton.jit
def load_cost(cost, rows, columns, open_):
    """[P, N, M] costs from the offsets of rows [P, N] and columns [M], +inf where not open."""
    at = spread(rows, 2) + columns[None, None, :]
    return tl.load(cost + at, mask=open_, other=float("inf"))


@triton.jit
def dense_offsets(problem, i, j, n, m, i_stride, j_stride):
    """[P, N, M] offsets into a contiguous [batch, n, m], seen from either side; n m may pass 2^31."""
    rows = (problem * n * m)[:, None] + i.to(tl.int64)[None, :] * i_stride
    return spread(rows, 2) + (j.to(tl.int64) * j_stride)[None, None, :]


@triton.jit
def load_potential(saved, problem, k, i, iters, size, inside):
    """Potentials after iteration k of saved [batch, iters, size], dead where not inside."""
    at = (problem * iters + (k - 1)) * size
    return tl.load(saved + at[:, None] + i[None, :], mask=inside, other=-float("inf"))


# ---------------------------------------------------------------- half-steps
@triton.jit
def half_step(sums, reference, weight, log_weight, lam, DTYPE: tl.constexpr):
    """Equations (2), (3) from sums = K x: (F, factor exp(F - reference), which problems [P] have a factor out of range)."""
    safe = tl.where(weight == 0, 1.0, sums)
    reference = reference.to(tl.float64)
    potential = lam * ((log_weight - tl.log(safe)).to(tl.float64) + reference)
    moved = (potential - reference).to(DTYPE)
    near = (weight == 0) | ((safe > 0) & (tl.abs(moved) <= drift(DTYPE)))
    made = tl.where(lam == 1.0, weight / safe, tl.exp(moved))
    return (
        tl.where(weight == 0, -float("inf"), potential),
        tl.where(weight == 0, 0.0, made),
        tl.min(near.to(tl.int32), 1) == 0,
    )


@triton.jit
def log_half_step(cost, scale, other, weight, log_weight, lam, AXIS: tl.constexpr, DTYPE: tl.constexpr):
    """The same with a maximum for each sum over AXIS; `other`: the potentials along that axis."""
    reference, rest = split(other, DTYPE)
    reference = spread(reference, 3 - AXIS)
    top = tl.max(cost * scale + reference, AXIS)
    top = tl.where(top == -float("inf"), 0.0, top)
    e = tl.exp(exponent(cost, scale, reference, -spread(top, AXIS))) * spread(rest, 3 - AXIS)
    sums = tl.sum(e, AXIS)
    safe = tl.where(weight == 0, 1.0, sums)
    potential = lam * ((log_weight - tl.log(safe)).to(tl.float64) - top.to(tl.float64))
    return tl.where(weight == 0, -float("inf"), potential)


@triton.jit
def online_exponentials(cost, scale, reference, rest, top):
    """One more tile [R, B] of a sum over j: (new maximum, factor of what is summed so far, the tile's exponentials)."""
    higher = tl.maximum(top, tl.max(cost * scale + reference[None, :], 1))
    above = tl.where(higher == -float("inf"), 0.0, higher)
    e = tl.exp(exponent(cost, scale, reference[None, :], -above[:, None])) * rest[None, :]
    return higher, tl.exp(top - above), e


@triton.jit
def largest_change(new, old):
    """[P] of the live; NaN as inf, which is no convergence."""
    change = tl.abs(new - old)
    change = tl.where(new == -float("inf"), 0.0, tl.where(change == change, change, float("inf")))
    return tl.max(change, 1)


# ---------------------------------------------------------------- reverse
@triton.jit
def softmax_weights(K, row_ref, column_ref, X, Y, cost, rows, columns, open_, scale, DTYPE: tl.constexpr):
    """Equation (6): exp(-C_ij / epsilon + X_i + Y_j), and K with its references, anew where they are far from X and Y."""
    away_x = tl.abs(distance(X, row_ref, DTYPE))
    away_y = tl.abs(distance(Y, column_ref, DTYPE))
    far = ~((tl.max(away_x, 1) <= drift(DTYPE)) & (tl.max(away_y, 1) <= drift(DTYPE)))
    if tl.max(far.to(tl.int32), 0) != 0:
        tile = load_cost(cost, rows, columns, open_).to(DTYPE)
        near_x, _ = split(X, DTYPE)
        near_y, _ = split(Y, DTYPE)
        row_ref = tl.where(far[:, None], near_x, row_ref)
        column_ref = tl.where(far[:, None], near_y, column_ref)
        K = renew(far, kernel_tile(tile, scale, row_ref, column_ref), K)
    weights = K * spread(factor(X, row_ref, DTYPE), 2) * spread(factor(Y, column_ref, DTYPE), 1)
    return weights, K, row_ref, column_ref


@triton.jit
def moved_potential(potential, lam, log_weight):
    """F / lam - log a: what the softmax of F's own half-step is made with; dead stays dead."""
    dead = potential == -float("inf")
    return tl.where(dead, -float("inf"), potential / lam - log_weight.to(tl.float64))
