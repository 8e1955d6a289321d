"""The formulas of `kdfast.ops.divergence` for Triton kernels: what csrc/divergence_terms.h is for the compiled core.

For one class, lq, lp = log q, log p and d = lp - lq. Every kind is an f-divergence sum q f(p/q), given by

    term >= 0    its share of the loss, written so that nothing cancels when p and q are close
    v            q dL/dq up to a multiple of q:   dL/dx_i = v_i - q_i sum v
    u            p dL/dp up to a multiple of p:   dL/dz_i = u_i - p_i sum u

The forms are those of the header but for two near-zero series, which there have coefficients made on the host: js is the sum of
two `kl` terms, each non-negative, and alpha's coefficients come from a recurrence over its order.
"""

import math

import triton
import triton.language as tl


@triton.constexpr_function
def inverse_factorial(n):
    return 1.0 / math.factorial(n)


@triton.jit
def factorial_series(x, FIRST: tl.constexpr, DEGREE: tl.constexpr):
    """sum x^k / (k + FIRST)! for k = 0 ... DEGREE."""
    total = tl.zeros_like(x) + inverse_factorial(FIRST + DEGREE)
    for k in tl.static_range(1, DEGREE + 1):
        total = total * x + inverse_factorial(FIRST + DEGREE - k)
    return total


@triton.jit
def expm1_small(x):
    """exp(x) - 1 for |x| <= 1/2, to full relative precision."""
    if x.dtype == tl.float64:
        return x * factorial_series(x, 1, 14)
    else:
        return x * factorial_series(x, 1, 7)


@triton.jit
def phi_series(x):
    """(exp(x) - 1 - x) / x^2 for |x| <= 1/4."""
    if x.dtype == tl.float64:
        return factorial_series(x, 2, 11)
    else:
        return factorial_series(x, 2, 5)


@triton.jit
def log1p(y):
    """log(1 + y) for y > -1: near 0 as 2 artanh(y / (2 + y)), where log of the rounded sum would have no digits."""
    s = y / (2.0 + y)
    square = s * s
    if y.dtype == tl.float64:
        series = tl.zeros_like(y) + 1.0 / 21
        for k in tl.static_range(1, 11):
            series = series * square + 1.0 / (21 - 2 * k)
    else:
        series = tl.zeros_like(y) + 1.0 / 11
        for k in tl.static_range(1, 6):
            series = series * square + 1.0 / (11 - 2 * k)
    return tl.where(tl.abs(y) < 0.3, 2.0 * s * series, tl.log(1.0 + y))


@triton.jit
def log_ratio(a, b):
    """log(b / a) of positive sums: 0 for equal ones, the negative for swapped ones, and no digits of a difference of logs lost."""
    rises = b > a
    size = tl.log(tl.where(rises, b, a) / tl.where(rises, a, b))
    return tl.where(rises, size, -size)


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def kl(p, q, d):
    """p d + q - p and q - p, where d = log(p / q), to full relative precision also where the plain forms cancel.

    p = 0 contributes q (the limit), also for d = -inf.
    """
    small = tl.abs(d) < 0.25
    pd = tl.where(p > 0, p * d, 0.0)
    near = p * (d * d) * phi_series(-d)
    far = q - p
    return tl.where(small, near, pd + far), tl.where(small, near - pd, far)


@triton.jit
def _binary(x, z, d):
    """Two coins per class: x, z are the logits themselves and d = z - x."""
    eq = tl.exp(-tl.abs(x))
    ep = tl.exp(-tl.abs(z))
    tq = log1p(eq)
    tp = log1p(ep)
    q1 = tl.where(x > 0, 1.0, eq) / (1.0 + eq)
    p1 = tl.where(z > 0, 1.0, ep) / (1.0 + ep)
    q0 = tl.where(x > 0, eq, 1.0) / (1.0 + eq)
    p0 = tl.where(z > 0, ep, 1.0) / (1.0 + ep)
    # log of the ratios of both sides; a side where both are certain of 0 counts nothing
    d1 = tl.where(z == x, 0.0, (tl.minimum(z, 0.0) - tp) - (tl.minimum(x, 0.0) - tq))
    d0 = tl.where(z == x, 0.0, (tl.minimum(-z, 0.0) - tp) - (tl.minimum(-x, 0.0) - tq))
    term1, _ = kl(p1, q1, d1)
    term0, _ = kl(p0, q0, d0)
    u = tl.where(p1 * p0 > 0, p1 * p0 * d, 0.0)
    return q1, p1, term1 + term0, q1 - p1, u


@triton.jit
def _mixture(lq, lp, d, q, p, beta, KIND: tl.constexpr, KNOWN: tl.constexpr):
    """m = b first + (1 - b) second; first is the teacher, for skew_reverse_kl the student. log m = larger log + shift."""
    b = beta
    c = 1.0 - beta
    gap = tl.where(d == d, d, 0.0)  # NaN where both are -inf: both are 0 then
    if KIND == "skew_reverse_kl":
        gap = -gap
    gap = tl.maximum(tl.minimum(gap, 1e4), -1e4)  # beyond, one side is 0 anyway; 0 * 1e4 = 0 where 0 * inf would be NaN
    ratio = tl.exp(-tl.abs(gap))
    minus = tl.where(tl.abs(gap) < 0.5, expm1_small(-tl.abs(gap)), ratio - 1.0)
    shift = log1p(tl.where(gap > 0, c, b) * minus)
    if not KNOWN:
        big = tl.exp(tl.maximum(lq, lp))  # one exponential for both
        small = big * ratio
        if KIND == "skew_reverse_kl":
            q = tl.where(gap > 0, big, small)
            p = tl.where(gap > 0, small, big)
        else:
            q = tl.where(gap > 0, small, big)
            p = tl.where(gap > 0, big, small)
        q = tl.where(lq == lq, q, lq)  # maximum dropped a NaN
        p = tl.where(lp == lp, p, lp)
    if KIND == "skew_reverse_kl":
        first = q
        second = p
    else:
        first = p
        second = q
    log_first = tl.minimum(gap, 0.0) - shift  # log(first / m)
    log_second = -tl.maximum(gap, 0.0) - shift
    m = b * first + c * second
    term, difference = kl(first, m, log_first)
    if KIND == "js":
        other, _ = kl(second, m, log_second)
        term = b * term + c * other
        v = c * second * log_second
        u = b * first * log_first
    else:
        # first/m is near 1: its difference from 1 is taken, which moves v and u by a multiple of q and p
        off = tl.where(m > 0, difference / m, 0.0)  # 1 - first/m
        of_first = first * (log_first + b * off)
        of_second = c * second * off
        if KIND == "skew_reverse_kl":
            v = of_first
            u = of_second
        else:
            v = of_second
            u = of_first
    return q, p, term, v, u


@triton.jit
def _alpha(lq, lp, d, q, p, a):
    b = a - 1.0
    ad = a * d
    bd = b * d
    power = a * lp - b * lq
    power = tl.where(power == power, power, -1e4)  # both -inf: p^a q^(1-a) = 0
    r = tl.exp(power)
    v = tl.where(tl.abs(ad) < 0.5, -q * expm1_small(ad), q - r) / a
    u = tl.where(tl.abs(bd) < 0.5, p * expm1_small(bd), r - p) / b
    # (r - a p - (1-a) q) / (a (a-1)) from whichever of u and v does not divide by a number near 0
    far = tl.where(a > 0.5, (u + (q - p)) / a, (v + (p - q)) / -b)
    # near: sum over n >= 2 of (1 + a + ... + a^(n-2)) d^n / n!
    geometric = tl.zeros_like(a) + 1.0
    power = tl.zeros_like(d) + 1.0
    series = tl.zeros_like(d)
    if d.dtype == tl.float64:
        for n in tl.static_range(2, 18):
            series += power * (geometric * inverse_factorial(n))
            power *= d
            geometric = geometric * a + 1.0
    else:
        for n in tl.static_range(2, 10):
            series += power * (geometric * inverse_factorial(n))
            power *= d
            geometric = geometric * a + 1.0
    near = q * (d * d) * series
    small = tl.abs(d) < 0.25 / tl.maximum(1.0, tl.abs(a))
    return q, p, tl.where(small, near, tl.where(far < 0, 0.0, far)), v, u


@triton.jit
def element(lq, lp, d, q, p, beta, KIND: tl.constexpr, KNOWN: tl.constexpr):
    """(q, p, term, v, u) of one class. KNOWN: q and p come in, else they are made from lq and lp. dkd: forward_kl."""
    if KIND == "binary":
        return _binary(lq, lp, d)
    elif KIND == "js" or KIND == "skew_forward_kl" or KIND == "skew_reverse_kl":
        return _mixture(lq, lp, d, q, p, beta, KIND, KNOWN)
    else:
        if not KNOWN:
            q = tl.exp(lq)
            p = tl.exp(lp)
        if KIND == "alpha":
            return _alpha(lq, lp, d, q, p, beta)
        elif KIND == "tvd":
            difference = tl.where(tl.abs(d) < 0.5, q * expm1_small(d), p - q)
            sign = tl.where(d > 0, -0.5, tl.where(d < 0, 0.5, 0.0))  # of q - p, halved
            return q, p, 0.5 * tl.abs(difference), q * sign, -p * sign
        elif KIND == "reverse_kl":
            term, difference = kl(q, p, -d)
            return q, p, term, tl.where(q > 0, -q * d, 0.0), difference
        elif KIND == "jeffreys":
            forward = 2.0 * (1.0 - beta)
            reverse = 2.0 * beta
            term, difference = kl(p, q, d)
            term_r, difference_r = kl(q, p, -d)
            v = forward * difference + reverse * tl.where(q > 0, -q * d, 0.0)
            u = forward * tl.where(p > 0, p * d, 0.0) + reverse * difference_r
            return q, p, forward * term + reverse * term_r, v, u
        else:
            term, difference = kl(p, q, d)
            return q, p, term, difference, tl.where(p > 0, p * d, 0.0)
