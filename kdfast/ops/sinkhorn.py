"""Entropic optimal transport by Sinkhorn's iterations, differentiated through every iteration.

Plan and potentials of one problem with cost C [N, M], weights a [N], b [M] and entropy epsilon:

    P_ij = exp((f_i + g_j - C_ij) / epsilon)                                                                       (1)

The iterations start at f = g = 0 and repeat two half-steps, the rows' and the columns':

    f_i = lam_a epsilon (log a_i - log sum_j exp((g_j - C_ij) / epsilon))         lam_a = rho_a / (rho_a + epsilon)  (2)
    g_j = lam_b epsilon (log b_j - log sum_i exp((f_i - C_ij) / epsilon))         lam_b = rho_b / (rho_b + epsilon)  (3)

rho = None is lam = 1: the balanced problem, whose half-step makes the sums of its side exact (the last half-step's side
is exact at the end). A finite rho relaxes the marginals by rho KL(. || weights) (Chizat et al. 2018).

    update="alternate"  (2) then (3), or (3) then (2) with order="columns_first"; the second reads the first's result
    update="average"    both from the old values, then the mean of old and new (Feydy et al. 2019); the first iteration
                        takes the new values as they are, since f = g = 0 is no estimate to average with
    reg_type="kl"       the entropy is relative to a (x) b: P_ij = a_i b_j exp(...), (2) has log b_j inside its sum
                        instead of log a_i outside, (3) likewise. Balanced, the plan is the same.

With df, dg, dC the gradients and w_ij, c_ij the softmax weights inside (2) and (3), the reverse of the half-steps is

    (2):  dlog a_i += lam_a epsilon df_i;   dC_ij += lam_a w_ij df_i;   dg_j -= lam_a sum_i w_ij df_i;   df = 0      (4)
    (3):  dlog b_j += lam_b epsilon dg_j;   dC_ij += lam_b c_ij dg_j;   df_i -= lam_b sum_j c_ij dg_j;   dg = 0      (5)

from A = dP P: df = A 1 / epsilon, dg = A^T 1 / epsilon, dC = -A / epsilon. The weights follow from the saved potentials,

    w_ij = exp((f_i / lam_a + g_j - C_ij) / epsilon) / a_i                                                         (6)

so n_iters (N + M) numbers are kept and no plan of an earlier iteration. A weight of zero masks its row or column: no
mass, potential -inf, zero gradient. A cost of +inf forbids its pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import _core
from kdfast._checks import check_choice, check_float_tensor, check_int, check_number
from kdfast._dispatch import choose, core_reason, debugging
from kdfast._library import (
    address,
    compute_dtype,
    contiguous,
    direct,
    first_derivative_only,
    lib,
    operand,
    transforms_active,
)
from kdfast.cuda import reason as cuda_reason
from kdfast.triton import reason as triton_reason
from kdfast.triton import register

ORDERS = ("rows_first", "columns_first")
UPDATES = ("alternate", "average")
REG_TYPES = ("entropy", "kl")
GRADS = ("unrolled", "envelope")
HalfStep = Callable[[Tensor, float], Tensor]  # (the other side's potential, epsilon) -> this side's


class SinkhornOutput(NamedTuple):
    """plan [..., N, M], potentials f [..., N] and g [..., M] in units of the cost, iterations done [...] (int64)."""

    plan: Tensor
    f: Tensor
    g: Tensor
    iterations: Tensor


# ---------------------------------------------------------------- reference: the definition, with every option
def sinkhorn_reference(
    cost: Tensor,
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
) -> SinkhornOutput:
    """Equations (1) to (3) in plain torch, in the log domain. Autograd unrolls them; any order of derivative."""
    dtype = compute_dtype(cost, *(t for t in (a, b) if t is not None))
    log_a, log_b = _log_weights(a, cost, -1, dtype), _log_weights(b, cost, -2, dtype)  # [..., N], [..., M]
    cost = cost.to(dtype)
    allowed = (cost < math.inf) & (log_a > -math.inf).unsqueeze(-1) & (log_b > -math.inf).unsqueeze(-2)
    allowed = allowed | cost.isnan()  # NaN in, NaN out
    live_a, live_b = allowed.any(-1), allowed.any(-2)  # rows and columns that can have mass
    # -inf and +inf never enter the arithmetic: autograd would make NaN of them.
    log_a, log_b, cost = (
        log_a.masked_fill(~live_a, 0.0),
        log_b.masked_fill(~live_b, 0.0),
        cost.masked_fill(~allowed, 0.0),
    )
    kl = reg_type == "kl"
    rho_a, rho_b = _rho_pair(rho)

    def rows(g: Tensor, eps: float) -> Tensor:  # equation (2)
        z = (g.unsqueeze(-2) - cost) / eps + (log_b.unsqueeze(-2) if kl else 0.0)
        sums = torch.where(live_a.unsqueeze(-1), z.masked_fill(~allowed, -math.inf), 0.0).logsumexp(-1)
        return torch.where(live_a, _damping(rho_a, eps) * eps * ((0.0 if kl else log_a) - sums), 0.0)

    def columns(f: Tensor, eps: float) -> Tensor:  # equation (3)
        z = (f.unsqueeze(-1) - cost) / eps + (log_a.unsqueeze(-1) if kl else 0.0)
        sums = torch.where(live_b.unsqueeze(-2), z.masked_fill(~allowed, -math.inf), 0.0).logsumexp(-2)
        return torch.where(live_b, _damping(rho_b, eps) * eps * ((0.0 if kl else log_b) - sums), 0.0)

    schedule = _schedule(epsilon, n_iters)
    start = torch.zeros_like(log_a), torch.zeros_like(log_b)
    f, g, iterations = iterate(rows, columns, *start, schedule, order=order, update=update, tol=tol)
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / schedule[-1]
    if kl:
        exponent = exponent + log_a.unsqueeze(-1) + log_b.unsqueeze(-2)
    plan = torch.where(allowed, exponent, -math.inf).exp()
    f, g = f.masked_fill(~live_a, -math.inf), g.masked_fill(~live_b, -math.inf)
    if grad == "envelope":
        plan, f, g = plan.detach(), f.detach(), g.detach()
    return SinkhornOutput(plan, f, g, iterations)


def iterate(
    rows: HalfStep, columns: HalfStep, f: Tensor, g: Tensor, schedule: Sequence[float], *, order: str, update: str, tol: float | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Potentials f [..., N] and g [..., M] after the half-steps rows(g, eps) and columns(f, eps) for every eps of the schedule,
    and the iterations done.
    """
    active = torch.ones(f.shape[:-1], dtype=torch.bool, device=f.device)
    iterations = torch.zeros(f.shape[:-1], dtype=torch.int64, device=f.device)
    for k, eps in enumerate(schedule):
        if update == "average":
            new_f, new_g = rows(g, eps), columns(f, eps)
            if k > 0:
                new_f, new_g = 0.5 * (f + new_f), 0.5 * (g + new_g)
        elif order == "rows_first":
            new_f = rows(g, eps)
            new_g = columns(new_f, eps)
        else:
            new_g = columns(f, eps)
            new_f = rows(new_g, eps)
        change = _largest_change(f, new_f, g, new_g, order, update) / eps
        if tol is None:
            f, g = new_f, new_g
            iterations = iterations + 1
        else:
            f = torch.where(active.unsqueeze(-1), new_f, f)
            g = torch.where(active.unsqueeze(-1), new_g, g)
            iterations = iterations + active
            active = active & ~(change <= tol)
    return f, g, iterations


def sinkhorn_cost_reference(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, **options) -> Tensor:
    """<plan, cost> of every problem, [...]; options as in `sinkhorn_reference`. Forbidden pairs add nothing."""
    plan = sinkhorn_reference(cost, a, b, **options).plan
    return (plan * cost.to(plan.dtype).masked_fill(cost == math.inf, 0.0)).sum((-1, -2))


def _log_weights(weights: Tensor | None, cost: Tensor, without: int, dtype: torch.dtype) -> Tensor:
    """log of the weights expanded over the batch; no weights means 1 for every point. A zero gets no gradient."""
    shape = cost.shape[:-2] + ((cost.shape[-2],) if without == -1 else (cost.shape[-1],))
    if weights is None:
        return torch.zeros(shape, dtype=dtype, device=cost.device)
    weights = weights.to(dtype).expand(shape)
    zero = weights == 0
    return weights.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)


def _damping(rho: float, eps: float) -> float:
    return 1.0 if rho == math.inf else rho / (rho + eps)


def _rho_pair(rho) -> tuple[float, float]:
    """(rho_a, rho_b), +inf where that side is balanced."""
    first, second = rho if isinstance(rho, Sequence) else (rho, rho)
    return (math.inf if first is None else float(first)), (math.inf if second is None else float(second))


def _schedule(epsilon: float | Sequence[float], n_iters: int) -> list[float]:
    return [float(e) for e in epsilon] if isinstance(epsilon, Sequence) else [float(epsilon)] * n_iters


def _largest_change(f: Tensor, new_f: Tensor, g: Tensor, new_g: Tensor, order: str, update: str) -> Tensor:
    """How far the potentials of the side that moves first (averaged: of both sides) went in this iteration, per problem."""
    change_f, change_g = (new_f - f).detach().abs().amax(-1), (new_g - g).detach().abs().amax(-1)
    if update == "average":
        return torch.maximum(change_f, change_g)
    return change_f if order == "rows_first" else change_g


# ---------------------------------------------------------------- registration
# Shared tail of both schemas: epsilon, n_iters, the order, lam of equations (2) and (3).
_TAIL = "float epsilon, int n_iters, bool rows_first, float lam_a, float lam_b"

# plan, f, g are empty unless `need_plan`, value unless not; saved [batch, n_iters, N + M]: f / epsilon and g / epsilon after
# every iteration, for the backward, in float64 (csrc/cpu/sinkhorn.h). Last, whether a GPU runs the CUDA kernels instead of
# Triton's: a default, which torch never hands to a kernel.
lib.define(
    f"sinkhorn(Tensor cost, Tensor? a, Tensor? b, {_TAIL}, float tol, bool need_plan, bool need_saved, bool cuda=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
lib.define(
    "sinkhorn_backward(Tensor cost, Tensor? a, Tensor? b, Tensor iterations, Tensor saved, Tensor? grad_value, "
    f"Tensor? grad_plan, Tensor? grad_f, Tensor? grad_g, {_TAIL}, bool envelope, bool cuda=False) -> (Tensor, Tensor, Tensor)"
)


def _outputs(cost: Tensor, a, b, n_iters: int, need_plan: bool, need_saved: bool) -> tuple[Tensor, ...]:
    """value, plan, f, g, iterations, saved"""
    dtype = compute_dtype(cost, *(w for w in (a, b) if w is not None))
    batch, (n, m) = cost.shape[:-2], cost.shape[-2:]
    new = cost.new_empty
    return (
        new(0 if need_plan else batch, dtype=dtype),
        new([*batch, n, m] if need_plan else 0, dtype=dtype),
        new([*batch, n] if need_plan else 0, dtype=dtype),
        new([*batch, m] if need_plan else 0, dtype=dtype),
        new(batch, dtype=torch.int64),
        new([*batch, n_iters, n + m] if need_saved else 0, dtype=torch.float64),
    )


@torch.library.register_fake("kdfast::sinkhorn")
def _(cost, a, b, epsilon, n_iters, rows_first, lam_a, lam_b, tol, need_plan, need_saved, cuda=False):
    return _outputs(cost, a, b, n_iters, need_plan, need_saved)


def _gradients(cost: Tensor, a, b) -> tuple[Tensor, Tensor, Tensor]:
    grad_a, grad_b = (cost.new_empty(0) if w is None else w.new_empty(w.shape) for w in (a, b))
    return torch.empty_like(cost), grad_a, grad_b


@torch.library.register_fake("kdfast::sinkhorn_backward")
def _(cost, a, b, iterations, saved, grad_value, grad_plan, grad_f, grad_g, epsilon, n_iters, rows_first, lam_a, lam_b, envelope, cuda=False):  # fmt: skip
    return _gradients(cost, a, b)


@torch.library.impl(lib, "sinkhorn", "CPU")
def _sinkhorn_cpu(cost, a, b, epsilon, n_iters, rows_first, lam_a, lam_b, tol, need_plan, need_saved):
    out = _outputs(cost, a, b, n_iters, need_plan, need_saved)
    value, plan, f, g, iterations, saved = out
    a, b = contiguous(a, f.dtype), contiguous(b, f.dtype)
    _core.core.sinkhorn_forward(
        *operand(cost), cost.shape, f.dtype == torch.float64, address(a), address(b), epsilon, n_iters, rows_first, lam_a, lam_b,
        tol, address(plan), address(value), address(f), address(g), address(saved), address(iterations),
    )  # fmt: skip
    return out


@torch.library.impl(lib, "sinkhorn_backward", "CPU")
def _sinkhorn_backward_cpu(cost, a, b, iterations, saved, grad_value, grad_plan, grad_f, grad_g, epsilon, n_iters, rows_first,
                           lam_a, lam_b, envelope):  # fmt: skip
    dtype = compute_dtype(cost, *(w for w in (a, b) if w is not None))
    grad_cost, grad_a, grad_b = _gradients(cost, a, b)
    a, b = contiguous(a, dtype), contiguous(b, dtype)
    grads = [contiguous(t, dtype) for t in (grad_plan, grad_value, grad_f, grad_g)]
    _core.core.sinkhorn_backward(
        *operand(cost), cost.shape, dtype == torch.float64, address(a), address(b), epsilon, n_iters, rows_first, lam_a, lam_b,
        address(saved), address(iterations), *(address(t) for t in grads), envelope, *operand(grad_cost), address(grad_a),
        address(grad_b),
    )  # fmt: skip
    return grad_cost, grad_a, grad_b


register("sinkhorn", "sinkhorn", "solve")
register("sinkhorn_backward", "sinkhorn", "backward")

# ---------------------------------------------------------------- autograd
_op = direct(torch.ops.kdfast.sinkhorn.default, _sinkhorn_cpu)
_backward_op = direct(torch.ops.kdfast.sinkhorn_backward.default, _sinkhorn_backward_cpu)


class _Sinkhorn(torch.autograd.Function):
    """Saves the cost and n_iters (N + M) potentials per problem; the backward makes the kernel matrix again."""

    @staticmethod
    def forward(ctx, cost, a, b, options, tol, need_plan, envelope, cuda):
        outputs = _op(cost, a, b, *options, tol, need_plan, True, *cuda)
        _Sinkhorn._save(ctx, cost, a, b, (*options, envelope, *cuda), outputs)
        return outputs

    @staticmethod
    def _save(ctx, cost, a, b, options, outputs):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[4:])
        ctx.save_for_backward(cost, a, b, *outputs[4:])
        ctx.options = options
        ctx.empty = [t.numel() == 0 for t in outputs[:4]]

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_value, grad_plan, grad_f, grad_g, *_):
        cost, a, b, iterations, saved = ctx.saved_tensors
        grads = [None if empty else g for g, empty in zip((grad_value, grad_plan, grad_f, grad_g), ctx.empty)]
        grad_cost, grad_a, grad_b = _backward_op(cost, a, b, iterations, saved, *grads, *ctx.options)
        needs = ctx.needs_input_grad
        return (
            grad_cost if needs[0] else None,
            grad_a if needs[1] else None,
            grad_b if needs[2] else None,
            None, None, None, None, None,
        )  # fmt: skip


class _SinkhornTransform(torch.autograd.Function):
    """`_Sinkhorn` in the form torch.func transforms ask for."""

    @staticmethod
    def forward(cost, a, b, options, tol, need_plan, envelope, cuda):
        return _op(cost, a, b, *options, tol, need_plan, True, *cuda)

    @staticmethod
    def setup_context(ctx, inputs, output):
        cost, a, b, options, _, _, envelope, cuda = inputs
        _Sinkhorn._save(ctx, cost, a, b, (*options, envelope, *cuda), output)

    @staticmethod
    def backward(ctx, *grads):
        return _Sinkhorn.backward(ctx, *grads)


def _solve(chosen, cost, a, b, epsilon, n_iters, order, rho, tol, need_plan, envelope) -> tuple[Tensor, ...]:
    """value, plan, f, g, iterations from the fused op."""
    dtype = compute_dtype(cost, *(w for w in (a, b) if w is not None))
    if a is not None:
        a = a.to(dtype).expand(cost.shape[:-1])
    if b is not None:
        b = b.to(dtype).expand(*cost.shape[:-2], cost.shape[-1])
    lam_a, lam_b = (_damping(r, epsilon) for r in _rho_pair(rho))
    options = (float(epsilon), n_iters, order == "rows_first", lam_a, lam_b)
    tol = -1.0 if tol is None else float(tol)
    cuda = (True,) if chosen == "cuda" else ()
    if transforms_active():
        return _SinkhornTransform.apply(cost, a, b, options, tol, need_plan, envelope, cuda)[:5]
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (cost, a, b))
    if not wanted:
        return _op(cost, a, b, *options, tol, need_plan, False, *cuda)[:5]
    return _Sinkhorn.apply(cost, a, b, options, tol, need_plan, envelope, cuda)[:5]


# ---------------------------------------------------------------- public
def sinkhorn(
    cost: Tensor,
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
) -> SinkhornOutput:
    """Transport plans of a batch of problems; equations (1) to (3) at the top of this module.

    Args:
        cost: [..., N, M], any strides, every leading axis a batch axis; float16, bfloat16, float32 or float64. One cost
            for many pairs of marginals: `cost.expand(H, N, M)`. +inf forbids a pair.
        a, b: [..., N] and [..., M] weights >= 0, broadcast over the batch; None is 1 for every point, as in SinKD
            (for uniform marginals of mass 1 pass 1/N and 1/M). A weight of 0 masks its row or column.
        epsilon: entropy > 0, in units of the cost; or one value per iteration (then n_iters is their number), with
            the potentials kept in units of the cost from one to the next and the plan made with the last.
        n_iters: iterations, a bound if `tol` is given.
        order: which half-step comes first; its partner's marginals are exact at the end. SinKD: rows_first; POT's
            `ot.sinkhorn`: columns_first. Ignored by update="average".
        update: "alternate" or "average".
        rho: None (balanced), a number > 0, or a pair (rows, columns) in which None is balanced.
        tol: a problem stops after the iteration in which no f_i / epsilon (columns_first: g_j / epsilon; average: both)
            changed by more than tol: for a balanced problem, the relative error of the marginals of that side.
        reg_type: "entropy" or "kl", POT's names for what P is compared with.
        grad: "unrolled" differentiates every iteration, exactly. "envelope" returns everything detached, so that
            (plan * cost).sum() has the gradient P: that of the converged entropic cost, by Danskin's theorem.
        backend: "cpu", "cuda", "triton", "reference" or None for the best that can run. update="average", reg_type="kl" and an
            epsilon per iteration run in the reference.
    Returns:
        SinkhornOutput(plan [..., N, M], f [..., N], g [..., M], iterations [...]), float32 (float64 for float64 input).
    Differentiable in cost, a and b, through plan, f and g.
    Raises:
        ValueError: an empty side, epsilon <= 0, n_iters < 1, shapes that do not fit; on the CPU NaN or -inf in a cost that
            counts, negative weights (elsewhere NaN in gives NaN out; negative weights raise under `kdfast.debug()`).
    Source: Cuturi, NeurIPS 2013; the reverse pass was checked against autograd of the SinKD code.

    >>> plan, f, g, _ = sinkhorn(torch.rand(8, 5, 7), epsilon=0.1, n_iters=50)
    """
    _check(cost, a, b, epsilon, n_iters, order, update, rho, tol, reg_type, grad)
    chosen = _choose("sinkhorn", cost, a, b, epsilon, update, reg_type, backend)
    if chosen != "reference":
        if grad == "envelope":
            cost = cost.detach()
            a, b = (None if t is None else t.detach() for t in (a, b))
        _, *out = _solve(chosen, cost, a, b, epsilon, n_iters, order, rho, tol, True, False)
        return SinkhornOutput(*out)
    return sinkhorn_reference(
        cost, a, b, epsilon=epsilon, n_iters=n_iters, order=order, update=update, rho=rho, tol=tol, reg_type=reg_type,
        grad=grad,
    )  # fmt: skip


def sinkhorn_cost(
    cost: Tensor,
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
    """Transport cost of every problem, sum_ij P_ij C_ij, without storing plans.

    The entropy is not part of the value. grad="unrolled": the exact derivative of this number. grad="envelope": P, the
    derivative of the entropic cost <P, C> + epsilon KL instead, cheaper and different (cosine 0.94 on a small batch).
    With it a and b get no gradient, and asking for one raises.

    Arguments and errors: `sinkhorn`.
    Returns:
        [...] float32 (float64 for float64 input), the batch shape of `cost`.

    >>> loss = sinkhorn_cost(pairwise_cost(x, y, p=1), epsilon=0.1).sum()
    """
    _check(cost, a, b, epsilon, n_iters, order, update, rho, tol, reg_type, grad)
    if grad == "envelope":
        _check_detached(a, b)
    chosen = _choose("sinkhorn_cost", cost, a, b, epsilon, update, reg_type, backend)
    if chosen != "reference":
        return _solve(chosen, cost, a, b, epsilon, n_iters, order, rho, tol, False, grad == "envelope")[0]
    return sinkhorn_cost_reference(
        cost, a, b, epsilon=epsilon, n_iters=n_iters, order=order, update=update, rho=rho, tol=tol, reg_type=reg_type,
        grad=grad,
    )  # fmt: skip


# ---------------------------------------------------------------- checks and choice
def _check(cost, a, b, epsilon, n_iters, order, update, rho, tol, reg_type, grad) -> None:
    check_float_tensor("cost", cost)
    if cost.dim() < 2:
        raise ValueError(f"cost: expected [..., N, M], at least 2 dimensions, got shape {tuple(cost.shape)}")
    if cost.shape[-1] == 0 or cost.shape[-2] == 0:
        raise ValueError(f"cost: expected at least one row and one column, got shape {tuple(cost.shape)}")
    _check_weights("a", a, cost, cost.shape[-2])
    _check_weights("b", b, cost, cost.shape[-1])
    if isinstance(epsilon, Sequence) and not isinstance(epsilon, str):
        if len(epsilon) == 0:
            raise ValueError("epsilon: expected a number or at least one value per iteration, got an empty sequence")
        for k, value in enumerate(epsilon):
            check_number(f"epsilon[{k}]", value, low=0.0, open_low=True)
        if tol is not None:
            raise ValueError(
                "tol: expected None with an epsilon per iteration, where a small change does not mean converged"
            )
    else:
        check_number("epsilon", epsilon, low=0.0, open_low=True)
        check_int("n_iters", n_iters, low=1)
    check_choice("order", order, ORDERS)
    check_choice("update", update, UPDATES)
    check_choice("reg_type", reg_type, REG_TYPES)
    check_choice("grad", grad, GRADS)
    if isinstance(rho, Sequence) and len(rho) != 2:
        raise ValueError(f"rho: expected None, a number or a pair (rows, columns), got {rho!r}")
    for value in rho if isinstance(rho, Sequence) else (rho,):
        if value is not None:
            check_number("rho", value, low=0.0, open_low=True)
    if tol is not None:
        check_number("tol", tol, low=0.0)


def _check_detached(a: Tensor | None, b: Tensor | None) -> None:
    for name, weights in (("a", a), ("b", b)):
        if weights is not None and weights.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: grad='envelope' gives no gradient for weights; detach {name} or use 'unrolled'")


def _check_weights(name: str, weights, cost: Tensor, size: int) -> None:
    if weights is None:
        return
    check_float_tensor(name, weights)
    shape = (*cost.shape[:-2], size)
    fits = 0 < weights.dim() <= len(shape) and weights.shape[-1] == size
    if not fits or any(w not in (1, s) for w, s in zip(weights.shape[::-1], shape[::-1])):
        raise ValueError(f"{name}: expected shape {shape} or one that broadcasts to it, got {tuple(weights.shape)}")
    if weights.device != cost.device:
        raise ValueError(f"{name}: expected the device of cost ({cost.device}), got {weights.device}")
    if debugging() and not bool((weights >= 0).all()):
        raise ValueError(f"{name}: expected weights >= 0, got one that is not")


def _reference_only(epsilon, update, reg_type) -> str | None:
    if update == "average":
        return "update='average' comes from the reference only"
    if reg_type == "kl":
        return "reg_type='kl' comes from the reference only"
    if isinstance(epsilon, Sequence):
        return "an epsilon per iteration comes from the reference only"
    return None


def _choose(op: str, cost, a, b, epsilon, update, reg_type, backend) -> str:
    def core_only() -> str | None:
        return f"cost has {cost.dim()} dimensions, the core takes 9" if cost.dim() > 9 else None

    def cpu() -> str | None:
        if (why := core_reason()) is not None:
            return why
        if cost.device.type not in ("cpu", "meta"):
            return f"the tensors are on {cost.device}"
        return core_only() or _reference_only(epsilon, update, reg_type)

    def cuda() -> str | None:
        if (why := cuda_reason("sinkhorn", cost)) is not None:
            return why
        if compute_dtype(cost, *(w for w in (a, b) if w is not None)) == torch.float64:
            return "float64 is not CUDA's"
        return core_only() or _reference_only(epsilon, update, reg_type)

    def triton() -> str | None:
        return triton_reason("sinkhorn", cost) or _reference_only(epsilon, update, reg_type)

    return choose(op, backend, {"cpu": cpu, "cuda": cuda, "triton": triton}, (cost, a, b))
