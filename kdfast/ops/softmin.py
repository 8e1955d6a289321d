"""Soft minima of the squared distances from each point to a set of others, without the table of pairs. With C_ij = |x_i - y_j|^2

    s_i = log sum_j exp(h_j - C_ij / epsilon)                      pairwise_softmin is -epsilon s_i                (1)
    w_ij = exp(h_j - C_ij / epsilon - s_i),   c_i = sum_j w_ij C_ij                                                (2)

A half-step of Sinkhorn's iterations is (1), the transport cost a sum over (2): `kdfast.ops.sinkhorn_points`. From ds and dc,

    t_ij = w_ij (ds_i + dc_i (C_ij - c_i)),   dC_ij = w_ij dc_i - t_ij / epsilon                                   (3)
    dh_j = sum_i t_ij,   dx_i = 2 sum_j dC_ij (x_i - y_j),   dy_j = 2 sum_i dC_ij (y_j - x_i)                      (4)

The backward makes C and w again, so N + M numbers are kept beside the points. h, s and c are float64 throughout: at
epsilon = 1e-3 potentials reach 1000, where a float32 is good to 6e-5. An h_j of -inf leaves y_j out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kdfast._checks import check_float_tensor, check_number
from kdfast._library import applied, compute_dtype, direct, first_derivative_only, lib
from kdfast.ops.pairwise import (
    _check_points,
    _choose,
    _pairwise_cost_backward_cpu,
    _pairwise_cost_cpu,
    pairwise_cost_reference,
    row_blocks,
)
from kdfast.triton import register


# ---------------------------------------------------------------- reference: the definition
def pairwise_softmin_reference(x: Tensor, y: Tensor, log_weight: Tensor | None = None, *, epsilon: float) -> Tensor:
    """-epsilon s_i of equation (1) in plain torch, [..., N]. Holds the pairs; any order of derivative."""
    exponent = pairwise_cost_reference(x, y, p=2) / -epsilon  # [..., N, M]
    if log_weight is None:
        return -epsilon * exponent.logsumexp(-1)
    live = log_weight != -math.inf  # -inf never enters the arithmetic: autograd would make NaN of it
    some = live.any(-1, keepdim=True)
    exponent = exponent + log_weight.to(exponent.dtype).masked_fill(~live, 0.0).unsqueeze(-2)
    sums = torch.where(some.unsqueeze(-1), exponent.masked_fill(~live.unsqueeze(-2), -math.inf), 0.0).logsumexp(-1)
    return torch.where(some, -epsilon * sums, math.inf)


# ---------------------------------------------------------------- registration
# x [batch, N, D], y [batch, M, D], h [batch, M] float64, scale = 1 / epsilon -> s [batch, N], c [batch, N] (empty unless need_mean)
lib.define("softmin(Tensor x, Tensor y, Tensor h, float scale, bool need_mean) -> (Tensor, Tensor)")
lib.define(
    "softmin_backward(Tensor grad_s, Tensor? grad_c, Tensor x, Tensor y, Tensor h, Tensor s, Tensor c, float scale, "
    "bool need_x, bool need_y, bool need_h) -> (Tensor, Tensor, Tensor)"
)


def _outputs(x: Tensor, need_mean: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2]
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape if need_mean else 0, dtype=torch.float64)


def _gradients(x: Tensor, y: Tensor, h: Tensor, *needs: bool) -> list[Tensor]:
    return [t.new_empty(t.shape if need else 0) for t, need in zip((x, y, h), needs)]


@torch.library.register_fake("kdfast::softmin")
def _(x, y, h, scale, need_mean):
    return _outputs(x, need_mean)


@torch.library.register_fake("kdfast::softmin_backward")
def _(grad_s, grad_c, x, y, h, s, c, scale, need_x, need_y, need_h):
    return tuple(_gradients(x, y, h, need_x, need_y, need_h))


def row_terms(grad_s: Tensor, grad_c: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor | None]:
    """(p, q) of t_ij = w_ij (p_i + q_i C_ij), equation (3)."""
    return (grad_s if grad_c is None else grad_s - grad_c * c), grad_c


def _cost_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their costs [batch, rows, M]): a block at a time."""
    for start, stop in row_blocks(x.shape[1], x.shape[0] * y.shape[1], itemsize=8):
        yield slice(start, stop), _pairwise_cost_cpu(x[:, start:stop], y, 2)


def _weights(exponent: Tensor, s: Tensor) -> Tensor:
    """exp(exponent - s) [batch, rows, M]; 0 where nothing is in the sum."""
    return (exponent - s.masked_fill(s == -math.inf, 0.0).unsqueeze(-1)).exp()


@torch.library.impl(lib, "softmin", "CPU")
def _softmin_cpu(x, y, h, scale, need_mean):
    s, c = _outputs(x, need_mean)
    for rows, cost in _cost_blocks(x, y):
        exponent = h.unsqueeze(1) - scale * cost  # float64, as h
        s[:, rows] = exponent.logsumexp(-1)
        if need_mean:
            c[:, rows] = (_weights(exponent, s[:, rows]) * cost).sum(-1)
    return s, c


@torch.library.impl(lib, "softmin_backward", "CPU")
def _softmin_backward_cpu(grad_s, grad_c, x, y, h, s, c, scale, need_x, need_y, need_h):
    p, q = row_terms(grad_s, grad_c, c)
    wide = y.to(compute_dtype(x, y))  # what the blocks' gradients are added in
    grad_x, grad_y, grad_h = _gradients(x, wide, h, need_x, need_y, need_h)
    grad_y.zero_()
    grad_h.zero_()
    for rows, cost in _cost_blocks(x, y):
        weights = _weights(h.unsqueeze(1) - scale * cost, s[:, rows])
        moved = p[:, rows, None] if q is None else p[:, rows, None] + q[:, rows, None] * cost
        moved = weights * moved
        grad_cost = -scale * moved if q is None else weights * q[:, rows, None] - scale * moved
        if need_h:
            grad_h += moved.sum(1)
        if need_x:
            grad_x[:, rows] = _pairwise_cost_backward_cpu(grad_cost, x[:, rows], y, 2)
        if need_y:
            grad_y += _pairwise_cost_backward_cpu(grad_cost.mT, wide, x[:, rows], 2)
    return grad_x, grad_y.to(y.dtype), grad_h


register("softmin", "softmin", "softmin")
register("softmin_backward", "softmin", "softmin_backward")
_op = direct(torch.ops.kdfast.softmin.default, _softmin_cpu)
_backward_op = direct(torch.ops.kdfast.softmin_backward.default, _softmin_backward_cpu)


# ---------------------------------------------------------------- autograd
class _Softmin(torch.autograd.Function):
    @staticmethod
    def forward(x, y, h, scale, need_mean):
        return _op(x, y, h, scale, need_mean)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.need_mean = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_s, grad_c):
        if grad_s is None and grad_c is None:
            return (None,) * 5
        x, y, h, s, c = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grad_s = torch.zeros_like(s) if grad_s is None else grad_s
        grads = _backward_op(grad_s, grad_c if ctx.need_mean else None, x, y, h, s, c, ctx.scale, *needs)
        return *(grad if need else None for grad, need in zip(grads, needs)), None, None


# (x [batch, N, D], y [batch, M, D], h [batch, M] float64, 1 / epsilon, need_mean) -> s, c of equations (1), (2), float64
softmin = applied(_Softmin)


# ---------------------------------------------------------------- public
def pairwise_softmin(
    x: Tensor, y: Tensor, log_weight: Tensor | None = None, *, epsilon: float, backend: str | None = None
) -> Tensor:
    """Soft minimum over j of the squared distances |x_i - y_j|^2, which it tends to as epsilon goes to 0:

        -epsilon log sum_j exp(log_weight_j - |x_i - y_j|^2 / epsilon)

    Args:
        x: [..., N, D]. y: [..., M, D], M >= 1, the same leading shape; float16, bfloat16, float32 or float64.
        log_weight: [..., M], log of what each y_j counts; None is 0. -inf leaves y_j out.
        epsilon: > 0, in units of the squared distance.
        backend: "cpu", "triton", "reference" or None for the best that can run.
    Returns:
        [..., N] float32 (float64 for float64 points); +inf where every y_j is left out. NaN in gives NaN out.
    Differentiable in x, y and log_weight, once; `backend="reference"` gives every derivative. At no time is an [N, M] table
    kept, in the backward neither. Triton's distances come from products of points less y_0, in float32 for float32: good to
    some 1e-7 of the largest squared distance from y_0.
    Raises:
        ValueError: unequal D or leading shapes, no y, epsilon <= 0.
    Source: the softmin of Feydy et al., AISTATS 2019.

    >>> distance = pairwise_softmin(torch.randn(100, 3), torch.randn(80, 3), epsilon=0.01)
    """
    _check_points(x, y)
    check_number("epsilon", epsilon, low=0.0, open_low=True)
    if y.shape[-2] == 0:
        raise ValueError(f"y: expected at least one point, got shape {tuple(y.shape)}")
    if log_weight is not None:
        check_float_tensor("log_weight", log_weight)
        if log_weight.shape != y.shape[:-1] or log_weight.device != y.device:
            raise ValueError(
                f"log_weight: expected one number per point of y, {tuple(y.shape[:-1])} on {y.device}, "
                f"got {tuple(log_weight.shape)} on {log_weight.device}"
            )
    if _choose("pairwise_softmin", x, y, backend) == "reference":
        return pairwise_softmin_reference(x, y, log_weight, epsilon=epsilon)
    h = y.new_zeros(y.shape[:-1], dtype=torch.float64) if log_weight is None else log_weight.double()
    s, _ = softmin(flat(x), flat(y), flat(h, 1), 1.0 / epsilon, False)
    return (-epsilon * s).to(compute_dtype(x, y)).reshape(x.shape[:-1])


def flat(tensor: Tensor, inner: int = 2) -> Tensor:
    """Every axis but the inner ones as one batch axis."""
    lead = tensor.shape[: tensor.dim() - inner]
    return tensor.reshape(math.prod(lead), *tensor.shape[len(lead) :])
