"""Experts on grouped rows: one linear map, or a whole MLP, per expert.

With E the expert of a slot and the plan of `routing_plan`:

    grouped_linear:  out_r = W_E(r) rows_r + b_E(r)
    grouped_mlp:     h_s = act(W1_E x_n + b1_E) [* (W3_E x_n)]         hidden row of slot s = (n, j)
                     y_n = sum_j w_nj (W2_E h_nj + b2_E)               kept slots only

    dh_s = w_s W2_E^t dy_n            dw_s = <h_s, W2_E^t dy_n> + <b2_E, dy_n>          dW2_E = sum_s (w_s dy_n) h_s^t
    da_s = dh_s act'(a_s) [* W3 x]    dW1_E = sum_s da_s x_n^t                          dx_n = sum_j W1_E^t da_nj

dw needs no expert output, so none is kept. Experts without rows get zero gradients. The products are torch's own, one per
expert on contiguous rows; grouping and summing are the kernels of `routing_plan`. On a GPU one grouped product of torch takes
all experts, where it can (`grouped_reason`): the counts stay on the device. The reference reads them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import check_choice, check_float_tensor
from kdfast._library import applied, compute_dtype, direct, first_derivative_only, lib, new_empty
from kdfast.ops.routing_grouped import grouped_linear_at_once, grouped_reason
from kdfast.ops.routing_plan import (
    Plan,
    check_slot_weights,
    combine,
    combine_reference,
    dispatch,
    dispatch_reference,
    fused_backend,
    gather_rows,
)  # fmt: skip

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda a: a,
}


# ---------------------------------------------------------------- reference
def grouped_linear_reference(rows: Tensor, plan: Plan, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    offsets = plan.offsets.tolist()
    parts = [
        F.linear(rows[offsets[e] : offsets[e + 1]], weight[e], None if bias is None else bias[e])
        for e in range(weight.shape[0])
    ]
    parts.append(rows.new_zeros(rows.shape[0] - offsets[-1], weight.shape[1]))  # dropped slots
    return torch.cat(parts)


def grouped_mlp_reference(
    x: Tensor, plan: Plan, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, weights: Tensor | None,
    *, activation: str = "relu", w3: Tensor | None = None,
) -> Tensor:  # fmt: skip
    rows = dispatch_reference(x, plan)  # [M, H]
    hidden = ACTIVATIONS[activation](grouped_linear_reference(rows, plan, w1, b1))  # [M, F]
    if w3 is not None:
        hidden = hidden * grouped_linear_reference(rows, plan, w3)
    return combine_reference(grouped_linear_reference(hidden, plan, w2, b2), weights, plan)


# ---------------------------------------------------------------- registration
lib.define("routing_linear(Tensor rows, Tensor offsets, Tensor weight, Tensor? bias) -> Tensor")
lib.define(
    "routing_linear_backward(Tensor grad, Tensor rows, Tensor offsets, Tensor weight, bool need_rows, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)"
)
_MLP_INPUTS = "Tensor x, Tensor order, Tensor inverse, Tensor offsets, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w3, Tensor? weights"
lib.define(f"routing_mlp({_MLP_INPUTS}, str activation) -> (Tensor, Tensor, Tensor)")
lib.define(
    f"routing_mlp_backward(Tensor grad, Tensor saved, Tensor saved_gate, {_MLP_INPUTS}, str activation, bool[7] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _like(tensor: Tensor, needed: bool) -> Tensor:
    """A contiguous gradient buffer; an op cannot return None."""
    return new_empty(tensor, tensor.shape if needed else (0,))


@torch.library.register_fake("kdfast::routing_linear")
def _(rows, offsets, weight, bias):
    return rows.new_empty((rows.shape[0], weight.shape[1]))


@torch.library.register_fake("kdfast::routing_linear_backward")
def _(grad, rows, offsets, weight, need_rows, need_weight, need_bias):
    return _like(rows, need_rows), _like(weight, need_weight), weight.new_empty(weight.shape[:2] if need_bias else 0)


@torch.library.register_fake("kdfast::routing_mlp")
def _(x, order, inverse, offsets, w1, b1, w2, b2, w3, weights, activation):
    hidden = order.shape[0], w1.shape[1]
    return x.new_empty((x.shape[0], w2.shape[1])), x.new_empty(hidden), x.new_empty(0 if w3 is None else hidden)


@torch.library.register_fake("kdfast::routing_mlp_backward")
def _(grad, saved, saved_gate, x, order, inverse, offsets, w1, b1, w2, b2, w3, weights, activation, needs):
    return _mlp_gradients(x, w1, b1, w2, b2, w3, weights, needs)


def _mlp_gradients(x, w1, b1, w2, b2, w3, weights, needs):
    inputs = x, w1, b1, w2, b2, w3, weights
    return tuple(x.new_empty(0) if t is None else _like(t, need) for t, need in zip(inputs, needs))


def _segments(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    ends = offsets.tolist()
    return [(e, ends[e], ends[e + 1]) for e in range(len(ends) - 1) if ends[e + 1] > ends[e]]


def _zero_unused(grads: tuple[Tensor, ...] | list[Tensor], offsets: Tensor) -> None:
    """Experts without rows: their slice of a gradient is written here and nowhere else."""
    ends = offsets.tolist()
    unused = [e for e in range(len(ends) - 1) if ends[e + 1] == ends[e]]
    for grad in grads:
        if grad.numel():
            for e in unused:
                grad[e].zero_()


@torch.library.impl(lib, "routing_linear", "CPU")
def _routing_linear_cpu(rows, offsets, weight, bias):
    out = new_empty(rows, (rows.shape[0], weight.shape[1]))
    end = 0
    for e, begin, end in _segments(offsets):
        torch.mm(rows[begin:end], weight[e].t(), out=out[begin:end])
        if bias is not None:
            out[begin:end] += bias[e]
    out[end:] = 0
    return out


@torch.library.impl(lib, "routing_linear_backward", "CPU")
def _routing_linear_backward_cpu(grad, rows, offsets, weight, need_rows, need_weight, need_bias):
    grad_rows, grad_weight = _like(rows, need_rows), _like(weight, need_weight)
    grad_bias = weight.new_empty(weight.shape[:2] if need_bias else 0)
    end = 0
    for e, begin, end in _segments(offsets):
        g = grad[begin:end]
        if need_rows:
            torch.mm(g, weight[e], out=grad_rows[begin:end])
        if need_weight:
            torch.mm(g.t(), rows[begin:end], out=grad_weight[e])
        if need_bias:
            torch.sum(g, 0, out=grad_bias[e])
    _zero_unused((grad_weight, grad_bias), offsets)
    if need_rows:
        grad_rows[end:] = 0
    return grad_rows, grad_weight, grad_bias


@torch.library.impl(lib, "routing_mlp", "CPU")
def _routing_mlp_cpu(x, order, inverse, offsets, w1, b1, w2, b2, w3, weights, activation):
    """Expert by expert, so that a block's rows and hidden rows stay in cache between its products."""
    x, k = x.contiguous(), inverse.shape[1]
    slots, hidden, width = order.shape[0], w1.shape[1], w2.shape[1]
    saved = new_empty(x, (slots, hidden))  # pre-activation (relu: the activation, which says the same)
    saved_gate = new_empty(x, (slots, hidden) if w3 is not None else (0,))
    out = new_empty(x, (slots, width))
    segments = _segments(offsets)
    scratch = x.new_empty((max((end - begin for _, begin, end in segments), default=0), x.shape[1]))
    for e, begin, end in segments:
        rows, h = scratch[: end - begin], saved[begin:end]
        gather_rows(x, order, k, begin, end, rows)
        _affine(rows, w1[e], None if b1 is None else b1[e], h)
        if activation == "relu":
            h.relu_()
        if w3 is not None:
            torch.mm(rows, w3[e].t(), out=saved_gate[begin:end])
        active = _active(h, saved_gate[begin:end] if w3 is not None else None, activation)
        _affine(active, w2[e], None if b2 is None else b2[e], out[begin:end])
    total = segments[-1][2] if segments else 0
    saved[total:] = 0
    if w3 is not None:
        saved_gate[total:] = 0
    return _combine_op(out, weights, inverse), saved, saved_gate


def _affine(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _active(saved: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """act(a) [* gate] from what the forward kept."""
    active = saved if activation == "relu" else ACTIVATIONS[activation](saved)
    return active if gate is None else active * gate


@torch.library.impl(lib, "routing_mlp_backward", "CPU")
def _routing_mlp_backward_cpu(
    grad, saved, saved_gate, x, order, inverse, offsets, w1, b1, w2, b2, w3, weights, activation, needs
):
    grads = _mlp_gradients(x, w1, b1, w2, b2, w3, weights, needs)
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_weights = grads
    need_x, need_w1, need_b1, need_w2, need_b2, need_w3, need_weights = needs
    x, grad, k = x.contiguous(), grad.to(x.dtype).contiguous(), inverse.shape[1]
    segments = _segments(offsets)
    longest = max((end - begin for _, begin, end in segments), default=0)
    rows_of_x, rows_of_dy = x.new_empty((longest, x.shape[1])), x.new_empty((longest, grad.shape[1]))
    buffer = x.new_empty((longest, w1.shape[1]))
    grad_rows = new_empty(x, (order.shape[0], x.shape[1]) if need_x else (0,))
    slots = order.long()
    grouped = None if weights is None else weights.flatten()[slots.clamp_min(0)]  # [M] weight of each grouped row
    grouped_dw = None if not need_weights else weights.new_zeros(order.shape[0])
    inner = any((need_x, need_w1, need_b1, need_w3))
    for e, begin, end in segments:
        xs, dy, dh = rows_of_x[: end - begin], rows_of_dy[: end - begin], buffer[: end - begin]
        h, gate = saved[begin:end], saved_gate[begin:end] if w3 is not None else None
        w = None if grouped is None else grouped[begin:end].unsqueeze(1)
        gather_rows(grad, order, k, begin, end, dy)
        active = _active(h, gate, activation)
        if inner or need_weights:
            torch.mm(dy, w2[e], out=dh)  # W2^t dy
        if need_weights:
            dot = (active * dh).sum(1, dtype=weights.dtype)
            grouped_dw[begin:end] = dot if b2 is None else dot + (dy @ b2[e]).to(weights.dtype)
        if w is not None:
            dy.mul_(w.to(dy.dtype))
        if need_w2:
            torch.mm(dy.t(), active, out=grad_w2[e])
        if need_b2:
            torch.sum(dy, 0, out=grad_b2[e])
        if not inner:
            continue
        if w is not None:
            dh.mul_(w.to(dh.dtype))
        gather_rows(x, order, k, begin, end, xs)
        if gate is not None:
            dgate = dh * _active(h, None, activation)
            dh.mul_(gate)
            if need_w3:
                torch.mm(dgate.t(), xs, out=grad_w3[e])
        _activation_backward(dh, h, activation)
        if need_w1:
            torch.mm(dh.t(), xs, out=grad_w1[e])
        if need_b1:
            torch.sum(dh, 0, out=grad_b1[e])
        if need_x:
            torch.mm(dh, w1[e], out=grad_rows[begin:end])
            if gate is not None:
                grad_rows[begin:end].addmm_(dgate, w3[e])
    _zero_unused([grad_w1, grad_b1, grad_w2, grad_b2, grad_w3], offsets)
    if need_weights:
        grad_weights.zero_().flatten()[slots[slots >= 0]] = grouped_dw[slots >= 0]
    if need_x:
        grad_x = _combine_op(grad_rows, None, inverse)
    return grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_weights


def _activation_backward(grad: Tensor, saved: Tensor, activation: str) -> None:
    """grad *= act'(a), in place; relu: from its result, 0 at 0 as torch has it."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad, saved, 0, grad_input=grad)
    elif activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, saved, grad_input=grad)
    elif activation != "identity":
        form = "tanh" if activation == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(grad, saved, approximate=form, grad_input=grad)


# ---------------------------------------------------------------- autograd
_linear_op = direct(torch.ops.kdfast.routing_linear.default, _routing_linear_cpu)
_linear_backward_op = direct(torch.ops.kdfast.routing_linear_backward.default, _routing_linear_backward_cpu)
_mlp_op = direct(torch.ops.kdfast.routing_mlp.default, _routing_mlp_cpu)
_mlp_backward_op = direct(torch.ops.kdfast.routing_mlp_backward.default, _routing_mlp_backward_cpu)
_combine_op = torch.ops.kdfast.routing_combine.default


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(rows, offsets, weight, bias):
        return _linear_op(rows, offsets, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        grad_rows, grad_weight, grad_bias = _linear_backward_op(grad, *ctx.saved_tensors, *needs)
        return (
            grad_rows if needs[0] else None,
            None,
            grad_weight if needs[1] else None,
            grad_bias if needs[2] else None,
        )


class _MLP(torch.autograd.Function):
    """Keeps one hidden tensor (two when gated), neither the gathered rows nor the experts' outputs."""

    @staticmethod
    def forward(x, order, inverse, offsets, w1, b1, w2, b2, w3, weights, activation):
        return _mlp_op(x, order, inverse, offsets, w1, b1, w2, b2, w3, weights, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, saved, saved_gate = output
        ctx.save_for_backward(saved, saved_gate, *inputs[:10])
        ctx.activation = inputs[10]
        ctx.mark_non_differentiable(saved, saved_gate)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad, _saved, _saved_gate):
        order = (0, 4, 5, 6, 7, 8, 9)  # x, w1, b1, w2, b2, w3, weights
        needs = [ctx.needs_input_grad[i] for i in order]
        grads = _mlp_backward_op(grad, *ctx.saved_tensors, ctx.activation, needs)
        out: list[Tensor | None] = [None] * 11
        for place, grad_, need in zip(order, grads, needs):
            out[place] = grad_ if need else None
        return tuple(out)


_apply_linear, _apply_mlp = applied(_Linear), applied(_MLP)


# ---------------------------------------------------------------- all experts at once, on a GPU
def grouped_mlp_at_once(
    x: Tensor, plan: Plan, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, weights: Tensor | None,
    *, activation: str, w3: Tensor | None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`grouped_mlp_reference` without reading the counts; `backend` moves the rows."""
    rows = dispatch(x, plan, backend=backend)
    hidden = ACTIVATIONS[activation](grouped_linear_at_once(rows, plan, w1, b1))
    if w3 is not None:
        hidden = hidden * grouped_linear_at_once(rows, plan, w3)
    return combine(grouped_linear_at_once(hidden, plan, w2, b2), weights, plan, backend=backend)


# ---------------------------------------------------------------- public
def grouped_linear(
    rows: Tensor, plan: Plan, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """out_r = W_e rows_r + b_e with e the expert of grouped row r; [M, out], zeros past the last kept slot.

    Args:
        rows: [M, in] in grouped order (`dispatch`). weight: [E, out, in], as E nn.Linear; a transposed view of
            [E, in, out] is read in place. bias: [E, out] or None.
        backend: on a GPU "triton" is torch's grouped product (bfloat16, widths that are multiples of 8) beside kernels that move
            the rows; what it cannot take runs the reference, which splits rows by the counts, and waits for the GPU to have them.
    Differentiable in rows, weight and bias.

    >>> rows = grouped_linear(dispatch(x, plan), plan, torch.randn(8, 32, 16))
    """
    check_float_tensor("rows", rows)
    if rows.dim() != 2 or rows.shape[0] != plan.order.shape[0]:
        raise ValueError(
            f"rows: expected [M, in] with the {plan.order.shape[0]} slots of the plan, got {tuple(rows.shape)}"
        )
    _check_experts("weight", weight, (plan.counts.shape[0], None, rows.shape[1]), rows)
    _check_experts("bias", bias, (plan.counts.shape[0], weight.shape[1]), rows)
    chosen = fused_backend(
        "grouped_linear", backend, rows, weight, bias, plan.order, also=lambda: grouped_reason(rows, weight)
    )
    if chosen == "reference":
        return grouped_linear_reference(rows, plan, weight, bias)
    if chosen == "triton":
        return grouped_linear_at_once(rows, plan, weight, bias)
    return _apply_linear(rows, plan.offsets, weight, bias)


def grouped_mlp(
    x: Tensor,
    plan: Plan,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    weights: Tensor | None,
    *,
    activation: str = "relu",
    w3: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A mixture of two-layer experts in one call: gather, first product, activation, weight, second product, combine.

    Args:
        x: [N, H]. w1: [E, F, H], b1: [E, F] or None; w2: [E, H, F], b2: [E, H] or None: layouts of E nn.Linear pairs.
        weights: [N, k] float32 or wider, one per slot; None means 1.
        activation: one of ACTIVATIONS. w3: [E, F, H], the gated form act(W1 x) * (W3 x) of SwiGLU experts.
    Returns:
        y [N, H] in the dtype of x; a row whose slots are all dropped is 0 (a residual outside carries it).
    Differentiable in x, weights and every parameter, once; `backend="reference"` gives every derivative.

    >>> y = grouped_mlp(x, plan, w1, b1, w2, b2, routing.weights, activation="silu")
    """
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_float_tensor("x", x)
    rows, width = plan.inverse.shape[0], x.shape[-1]
    if x.dim() != 2 or x.shape[0] != rows:
        raise ValueError(f"x: expected [N, H] with the {rows} rows of the plan, got {tuple(x.shape)}")
    experts = plan.counts.shape[0]
    _check_experts("w1", w1, (experts, None, width), x)
    hidden = w1.shape[1]
    _check_experts("b1", b1, (experts, hidden), x)
    _check_experts("w2", w2, (experts, None, hidden), x)
    _check_experts("b2", b2, (experts, w2.shape[1]), x)
    _check_experts("w3", w3, (experts, hidden, width), x)
    check_slot_weights(weights, plan)
    chosen = fused_backend(
        "grouped_mlp", backend, x, w1, w2, weights, plan.order, also=lambda: grouped_reason(x, w1, w2, w3)
    )
    if chosen == "reference":
        return grouped_mlp_reference(x, plan, w1, b1, w2, b2, weights, activation=activation, w3=w3)
    if chosen == "triton":
        return grouped_mlp_at_once(x, plan, w1, b1, w2, b2, weights, activation=activation, w3=w3, backend=backend)
    weights = None if weights is None else weights.to(compute_dtype(x))
    return _apply_mlp(x, plan.order, plan.inverse, plan.offsets, w1, b1, w2, b2, w3, weights, activation)[0]


def _check_experts(name: str, tensor: Tensor | None, shape: tuple[int | None, ...], like: Tensor) -> None:
    if tensor is None:
        return
    check_float_tensor(name, tensor)
    fits = tensor.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected [{wanted}], got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(f"{name}: expected {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}")
