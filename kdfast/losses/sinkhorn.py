"""Losses on optimal transport: the batch-wise Sinkhorn distance of two models, and the Sinkhorn divergence of two point clouds."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from kdfast._checks import check_choice, check_float_tensor, check_int, check_number, check_pair
from kdfast._library import compute_dtype
from kdfast.losses.divergence import REDUCTIONS, check_mask
from kdfast.losses.module import LossModule
from kdfast.ops.pairwise import _choose, pairwise_cost
from kdfast.ops.sinkhorn import ORDERS, sinkhorn
from kdfast.ops.sinkhorn_kd import sinkhorn_kd
from kdfast.ops.sinkhorn_points import point_potentials
from kdfast.ops.softmin import softmin


# ---------------------------------------------------------------- two models' outputs over one batch
def sinkhorn_kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    n_iters: int = 20,
    p: int = 1,
    scale: float = 1e-3,
    order: str = "rows_first",
    mask: Tensor | None = None,
    teacher_grad: bool = False,
    reduction: str = "sum",
    backend: str | None = None,
) -> Tensor:
    """SinKD's batch-wise Sinkhorn distance (Cui et al., arXiv 2402.17110): how far the batch's outputs are to be moved.

        P_S, P_T = softmax(student / T), softmax(teacher / T)             rows = samples
        W_ij = ||P_S,i - P_T,j||_p                                        p = 1: the total variation distance, twice
        X = exp(-W / epsilon);  n_iters times:  X /= its row sums;  X /= its column sums
        loss = scale sum_ij X_ij W_ij

    differentiated through W and every iteration. The mass is M, not 1, so the sum grows with the batch: `reduction="mean"`
    divides by M. No T^2 and no entropy term.

    Args:
        student: logits [..., N, C]. teacher: logits [..., M, C]; leading axes are separate problems (sequences). The
            teacher is detached unless `teacher_grad`.
        temperature, epsilon, n_iters: > 0, > 0, >= 1. p: 1 or 2 (Euclidean).
        scale: the code's 0.001 for encoder models; 0.0008 in its generative files.
        order: which sums come first. "columns_first" with a batch of sequences is the sequence-level form of
            Multi-Level-OT, whose rows are the teacher's.
        mask: [..., N] bool, True = keep; drops sample i of both models (needs N = M). No kept row: 0, zero gradient.
        reduction: "sum" (over problems, as the code), "mean" (over all kept teacher rows) or "none" (one per problem).
    A row of only -inf is left out of its side. One single sample moves nowhere: the loss is the plain distance, and a
    warning says so once.
    Raises:
        ValueError: empty batch, unequal class counts, bad options; +inf or NaN logits where the compiled core runs.

    >>> loss = F.cross_entropy(student, labels) + 0.8 * sinkhorn_kd_loss(student, teacher)
    """
    _check_kd(student, teacher, temperature, epsilon, n_iters, p, scale, order, mask, reduction)
    if not teacher_grad:
        teacher = teacher.detach()
    return sinkhorn_kd(
        student, teacher, temperature=temperature, epsilon=epsilon, n_iters=n_iters, p=p, scale=scale, order=order, mask=mask,
        reduction=reduction, backend=backend,
    )  # fmt: skip


_warned_single = False


def _check_kd(student, teacher, temperature, epsilon, n_iters, p, scale, order, mask, reduction) -> None:
    global _warned_single
    check_pair(student, teacher)
    if student.dim() < 2 or teacher.dim() != student.dim():
        raise ValueError(
            f"teacher: expected [..., samples, classes] with the rank of student, at least 2, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"teacher: expected the {student.shape[-1]} classes of the student, got {teacher.shape[-1]}")
    if student.shape[:-2] != teacher.shape[:-2]:
        raise ValueError(
            f"teacher: expected the leading shape of student {tuple(student.shape[:-2])}, got {tuple(teacher.shape[:-2])}"
        )
    if 0 in (student.shape[-1], student.shape[-2], teacher.shape[-2]):
        raise ValueError(
            f"student: expected at least one sample and one class, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    check_number("temperature", temperature, low=0.0, open_low=True)
    check_number("epsilon", epsilon, low=0.0, open_low=True)
    check_int("n_iters", n_iters, low=1)
    check_choice("order", order, ORDERS)
    check_number("scale", scale)
    if p not in (1, 2) or isinstance(p, bool):
        raise ValueError(f"p: expected 1 or 2, got {p!r}")
    check_choice("reduction", reduction, REDUCTIONS)
    if mask is not None:
        if student.shape != teacher.shape:
            raise ValueError(
                f"mask: drops a sample of both models, so it needs as many teacher as student samples, "
                f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        check_mask(mask, student.shape[:-1], student.device)
    if student.shape[-2] == 1 == teacher.shape[-2] and not _warned_single and not torch.compiler.is_compiling():
        _warned_single = True
        warnings.warn(
            "sinkhorn_kd_loss: one sample on each side, so nothing is transported and the loss is the plain distance; "
            "pass the whole batch (or one problem per sequence, [B, L, C])",
            stacklevel=3,
        )


# ---------------------------------------------------------------- two point clouds
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: int = 2,
    blur: float = 0.05,
    reach: float | None = None,
    debias: bool = True,
    scaling: float = 0.5,
    diameter: float | None = None,
    exact_unbalanced_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Sinkhorn divergence of two weighted point clouds, with geomloss's meaning of every option (Feydy et al. 2019).

        C_ij = |x_i - y_j| (p = 1) or |x_i - y_j|^2 / 2 (p = 2);   eps = blur^p, rho = reach^p
        f_i = -lam eps log sum_j b_j exp((g_j - C_ij) / eps)        lam = 1 / (1 + eps / rho), 1 without reach
        S = <a, f_ba - f_aa> + <b, g_ab - g_bb>                                     f_aa: the potential of a against a
        with reach: S = (rho + eps/2) (<a, exp(-f_aa / rho) - exp(-f_ba / rho)> + the same for b)
        debias=False leaves f_aa and g_bb out (0).

    The potentials come from averaged updates while eps falls from diameter^p by the factor scaling^p to blur^p; one
    half-step more at the end carries the gradient, of x and y through C alone, of a and b through the products above
    (Danskin's theorem: not unrolled). On a GPU with p = 2 and D <= 128 no [N, M] table is kept: the half-steps make the cost from
    the points (`kdfast.ops.sinkhorn_cost_points`). Elsewhere the tables of the two clouds and of each with itself are.

    Args:
        x: [N, D] or [B, N, D] points. y: [M, D] or [B, M, D]. a: [N] or [B, N] weights, None: 1/N. b likewise.
        blur, reach: lengths. reach=None is balanced: then a and b need the same total.
        scaling: in (0, 1); nearer 1 is slower and more exact.
        diameter: of both clouds together, > 0; None reads it from the bounding box (a device synchronisation).
        exact_unbalanced_grad: geomloss's unbalanced gradients carry the factor rho + eps/2 where the derivative has
            rho + eps; False gives what geomloss gives, True the derivative.
    Returns:
        A scalar, or [B]; float32 (float64 for float64 input).

    >>> loss = sinkhorn_divergence(torch.randn(100, 3), torch.randn(80, 3), p=2, blur=0.05)
    """
    _check_clouds(x, y, p, blur, reach, scaling, diameter)
    batched = x.dim() == 3
    if not batched:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    dtype = compute_dtype(x, y)
    x, y = x.to(dtype), y.to(dtype)
    a, b = _cloud_weights("a", a, x, batched), _cloud_weights("b", b, y, batched)  # [B, N], [B, M]
    eps, rho = blur**p, None if reach is None else reach**p
    if diameter is None:
        diameter = _diameter(x.detach(), y.detach())
    schedule = _schedule(diameter, p, blur, scaling)

    damping = 1.0 if rho is None else rho / (rho + eps)
    streamed = _streams(x, y, p, backend)

    def potentials(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """f on x and g on y: the loop without gradient, then the one half-step that carries it."""
        if streamed:
            return _point_potentials(x, y, a.detach(), b.detach(), schedule, rho, eps * damping)
        cost, cost_t = _point_cost(x, y.detach(), p, backend), _point_cost(y, x.detach(), p, backend)
        a, b = a.detach(), b.detach()
        out = sinkhorn(
            cost.detach(), a, b, epsilon=schedule, update="average", rho=rho, reg_type="kl", grad="envelope", backend=backend
        )  # fmt: skip
        return _softmin(cost, b, out.g, eps) * damping, _softmin(cost_t, a, out.f, eps) * damping

    f_ba, g_ab = potentials(x, y, a, b)
    f_aa, g_bb = torch.zeros_like(f_ba), torch.zeros_like(g_ab)
    if debias:
        f_aa, g_bb = potentials(x, x, a, a)[0], potentials(y, y, b, b)[0]
    if rho is None:
        value = (a * (f_ba - f_aa)).sum(-1) + (b * (g_ab - g_bb)).sum(-1)
    else:
        value = (a * ((-f_aa / rho).exp() - (-f_ba / rho).exp())).sum(-1)
        value = value + (b * ((-g_bb / rho).exp() - (-g_ab / rho).exp())).sum(-1)
        value = (rho + eps / 2) * value
        if exact_unbalanced_grad:
            value = value + (value - value.detach()) * (eps / 2 / (rho + eps / 2))
            if not debias:  # the derivative in a weight has no f_aa to cancel this constant
                mass = a.sum(-1) + b.sum(-1)
                value = value - (mass - mass.detach()) * (eps / 2)
    return value if batched else value.squeeze(0)


def _point_cost(x: Tensor, y: Tensor, p: int, backend: str | None) -> Tensor:
    squared = pairwise_cost(x, y, p=2, backend=backend)
    return squared / 2 if p == 2 else squared.clamp_min(1e-8).sqrt()


def _softmin(cost: Tensor, weights: Tensor, potential: Tensor, eps: float) -> Tensor:
    """-eps log sum_j w_j exp((potential_j - C_ij) / eps); points of weight 0, whose potential is -inf, add nothing."""
    return -eps * torch.logsumexp((weights.log() + potential / eps).unsqueeze(-2) - cost / eps, -1)


def _streams(x: Tensor, y: Tensor, p: int, backend: str | None) -> bool:
    """Whether the cost is made from the points in every half-step: on a GPU, while its products are not most of the work."""
    return p == 2 and x.shape[-1] <= 128 and _choose("sinkhorn_cost_points", x, y, backend) == "triton"


def _point_potentials(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, schedule: list[float], rho: float | None, factor: float
) -> tuple[Tensor, Tensor]:
    """The potentials for p = 2 without a table of costs; factor = lam eps."""
    x, y = x * math.sqrt(0.5), y * math.sqrt(0.5)  # |x - y|^2 is the cost |x - y|^2 / 2 of the points that came
    log_a, log_b, eps = a.double().log(), b.double().log(), schedule[-1]
    f, g = point_potentials(
        x.detach(), y.detach(), log_a, log_b, schedule, order="rows_first", update="average", rho=rho, tol=None, kl=True
    )
    on_x, _ = softmin(x, y.detach(), log_b + g / eps, 1.0 / eps, False)
    on_y, _ = softmin(y, x.detach(), log_a + f / eps, 1.0 / eps, False)
    return (-factor * on_x).to(x.dtype), (-factor * on_y).to(x.dtype)


def _diameter(x: Tensor, y: Tensor) -> float:
    points = torch.cat((x.flatten(0, 1), y.flatten(0, 1)))
    return float((points.amax(0) - points.amin(0)).norm())


def _schedule(diameter: float, p: int, blur: float, scaling: float) -> list[float]:
    """Every eps of the loop. The first is there three times: for the start from zero potentials, and as geomloss has it."""
    if diameter <= 0:  # all points in one place
        return [blur**p]
    high, low, step = p * math.log(diameter), p * math.log(blur), p * math.log(scaling)
    falling = [math.exp(high + k * step) for k in range(max(0, math.ceil((low - high) / step)))]
    return [diameter**p, diameter**p, *falling, blur**p]


def _cloud_weights(name: str, weights: Tensor | None, points: Tensor, batched: bool) -> Tensor:
    shape = points.shape[:-1]
    if weights is None:
        return torch.full(shape, 1.0 / shape[-1], dtype=points.dtype, device=points.device)
    check_float_tensor(name, weights)
    want = shape if batched else shape[1:]
    if weights.shape != want:
        raise ValueError(f"{name}: expected one weight per point {tuple(want)}, got {tuple(weights.shape)}")
    return weights.to(points.dtype).reshape(shape)


def _check_clouds(x, y, p, blur, reach, scaling, diameter) -> None:
    check_pair(x, y, ("x", "y"))
    if x.dim() not in (2, 3) or y.dim() != x.dim():
        raise ValueError(
            f"y: expected points [M, D] or [B, M, D] as x has them, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        raise ValueError(f"y: expected the batch and the width of x {tuple(x.shape)}, got {tuple(y.shape)}")
    if x.numel() == 0 or y.numel() == 0:
        raise ValueError(f"x: expected at least one point on each side, got {tuple(x.shape)} and {tuple(y.shape)}")
    if p not in (1, 2) or isinstance(p, bool):
        raise ValueError(f"p: expected 1 or 2, got {p!r}")
    check_number("blur", blur, low=0.0, open_low=True)
    check_number("scaling", scaling, low=0.0, high=1.0, open_low=True)
    if scaling == 1.0:
        raise ValueError("scaling: expected a number below 1, got 1.0")
    for name, value in (("reach", reach), ("diameter", diameter)):
        if value is not None:
            check_number(name, value, low=0.0, open_low=True)


class SinkhornKDLoss(LossModule, function=sinkhorn_kd_loss): ...


class SinkhornDivergence(LossModule, function=sinkhorn_divergence): ...
