"""`kdfast.ops.sinkhorn_cost` between two point sets, C_ij = |x_i - y_j|^2, with no table of pairs at any time.

The half-steps (2), (3) of `kdfast.ops.sinkhorn` are soft minima over points (`kdfast.ops.softmin`), each of which makes the cost anew;
autograd unrolls them. With s_i the log-sum of row i at the last g and c_i the mean cost behind it,

    <P, C> = sum_i P_i c_i,    P_i = exp(f_i / epsilon + s_i) the mass of the plan's row i                         (1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast._library import compute_dtype
from kdfast.ops.pairwise import _check_points, _choose, pairwise_cost_reference
from kdfast.ops.sinkhorn import (
    HalfStep,
    _check,
    _check_detached,
    _damping,
    _log_weights,
    _rho_pair,
    _schedule,
    iterate,
    sinkhorn_cost_reference,
)
from kdfast.ops.softmin import flat, softmin


def sinkhorn_cost_points_reference(
    x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, **options
) -> Tensor:
    """The transport cost of the whole table, [...]; options as in `sinkhorn_reference`."""
    return sinkhorn_cost_reference(pairwise_cost_reference(x, y, p=2), a, b, **options)


# ---------------------------------------------------------------- the iterations
def point_potentials(
    x: Tensor, y: Tensor, log_a: Tensor, log_b: Tensor, schedule: Sequence[float], *, order: str, update: str, rho, tol: float | None,
    kl: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """f [batch, N], g [batch, M] of x [batch, N, D], y [batch, M, D] and the logs of their weights; float64, -inf where masked."""
    live_a, live_b = _live(log_a, log_b), _live(log_b, log_a)

    def half_step(own, other, log_own, log_other, live_own, live_other, rho) -> HalfStep:
        log_own = log_own.masked_fill(~live_own, 0.0)

        def step(potential: Tensor, eps: float) -> Tensor:
            s, _ = softmin(own, other, exponents(potential, log_other, live_other, kl, eps), 1.0 / eps, False)
            return torch.where(live_own, _damping(rho, eps) * eps * ((0.0 if kl else log_own) - s), 0.0)

        return step

    rho_a, rho_b = _rho_pair(rho)
    rows = half_step(x, y, log_a, log_b, live_a, live_b, rho_a)
    columns = half_step(y, x, log_b, log_a, live_b, live_a, rho_b)
    start = torch.zeros_like(log_a), torch.zeros_like(log_b)
    f, g, _ = iterate(rows, columns, *start, schedule, order=order, update=update, tol=tol)
    return f.masked_fill(~live_a, -math.inf), g.masked_fill(~live_b, -math.inf)


def exponents(potential: Tensor, log_weight: Tensor, live: Tensor, kl: bool, eps: float) -> Tensor:
    """What a side's potential and weight are in the sums of the other side's half-step."""
    return (potential / eps + (log_weight if kl else 0.0)).masked_fill(~live, -math.inf)


def _live(log_own: Tensor, log_other: Tensor) -> Tensor:
    """Points that can have mass."""
    return (log_own != -math.inf) & (log_other != -math.inf).any(-1, keepdim=True)


# ---------------------------------------------------------------- public
def sinkhorn_cost_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Sequence[float] = 0.1,
    n_iters: int = 20,
    order: str = "rows_first",
    update: str = "alternate",
    rho: float | tuple[float | None, float | None] | None = None,
    tol: float | None = None,
    reg_type: str = "entropy",
    grad: str = "unrolled",
    backend: str | None = None,
) -> Tensor:
    """`sinkhorn_cost(pairwise_cost(x, y, p=2), a, b, ...)`, the cost made from the points again in every half-step.

    It takes O((N + M) D) memory instead of O(N M), and makes the cost 2 n_iters times instead of once. On a CPU, and on a GPU
    with hundreds of coordinates, the composition has less to do as long as its table fits the memory.

    Args:
        x: [..., N, D]. y: [..., M, D], the same leading shape; float16, bfloat16, float32 or float64. A point of weight 0 may
            hold anything.
        a, b, epsilon, n_iters, order, update, rho, reg_type: as in `sinkhorn`; all of them run in every backend.
        tol: as in `sinkhorn`, but the work of a converged problem is done and thrown away.
        grad: "unrolled" is the exact derivative, through every iteration: it keeps 2 n_iters (N + M) float64 numbers, and its
            reverse has four products of points where the forward has one. "envelope": as if the plan did not depend on the
            points, which keeps O(N + M); a and b get no gradient then, and asking for one raises.
        backend: "cpu" (blocks of rows), "triton", "reference" or None for the best that can run. `pairwise_softmin` says how
            exact Triton's distances are.
    Returns:
        [...] float32 (float64 for float64 input), the leading shape of x. NaN in gives NaN out.
    Differentiable in x, y, a and b, once; `backend="reference"` gives every derivative.
    Raises:
        ValueError: unequal D or leading shapes, an empty side, and what `sinkhorn_cost` refuses in its options.
    Source: Feydy et al., AISTATS 2019, and KeOps for the cost that is never stored; the value and its derivatives are `sinkhorn_cost`'s.

    >>> loss = sinkhorn_cost_points(torch.randn(300, 3), torch.randn(200, 3), epsilon=0.05, grad="envelope")
    """
    _check_points(x, y)
    if 0 in (x.shape[-2], y.shape[-2]):
        raise ValueError(f"x: expected at least one point on each side, got {tuple(x.shape)} and {tuple(y.shape)}")
    table = x.new_zeros(()).expand(*x.shape[:-1], y.shape[-2])  # the cost's shape and device, without its memory
    _check(table, a, b, epsilon, n_iters, order, update, rho, tol, reg_type, grad)
    if grad == "envelope":
        _check_detached(a, b)
    if _choose("sinkhorn_cost_points", x, y, backend) == "reference":
        return sinkhorn_cost_points_reference(
            x, y, a, b, epsilon=epsilon, n_iters=n_iters, order=order, update=update, rho=rho, tol=tol, reg_type=reg_type, grad=grad
        )  # fmt: skip
    dtype = compute_dtype(x, y, *(w for w in (a, b) if w is not None))
    log_a, log_b = (flat(_log_weights(w, table, side, torch.float64), 1) for w, side in ((a, -1), (b, -2)))
    lead, x, y = x.shape[:-2], _unmasked(flat(x), a, log_a), _unmasked(flat(y), b, log_b)
    schedule, kl, envelope = _schedule(epsilon, n_iters), reg_type == "kl", grad == "envelope"
    if envelope:
        moving = x.detach(), y.detach()
    else:  # the gradients of all half-steps are added: not in 16 bits
        moving = x, y = x.to(compute_dtype(x)), y.to(compute_dtype(y))
    f, g = point_potentials(*moving, log_a, log_b, schedule, order=order, update=update, rho=rho, tol=tol, kl=kl)
    eps, live_a = schedule[-1], f != -math.inf
    s, c = softmin(x, y, exponents(g, log_b, g != -math.inf, kl, eps), 1.0 / eps, True)
    mass = exponents(f, log_a, live_a, kl, eps) + s
    mass = torch.where(live_a, mass, -math.inf).exp()  # equation (1)
    if envelope:  # the derivative of -epsilon s_i in C_ij is w_ij, and P_i w_ij is the plan
        mass, c = mass.detach(), c.detach() - eps * (s - s.detach())
    return torch.where(live_a, mass * c, 0.0).sum(-1).to(dtype).reshape(lead)


def _unmasked(points: Tensor, weights: Tensor | None, log_weight: Tensor) -> Tensor:
    """Points of weight 0 as zeros, whatever they hold."""
    return points if weights is None else torch.where((log_weight != -math.inf).unsqueeze(-1), points, 0.0)
