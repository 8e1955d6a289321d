"""Experts on grouped rows: one linear map, or a whole MLP, per expert.

With E the expert of a slot and the plan of `routing_plan`:

    grouped_linear:  out_r = W_E(r) rows_r + b_E(r)
    grouped_mlp:     h_s = act(W1_E x_n + b1_E) [* (W3_E x_n)]         hidden row of slot s = (n, j)
                     y_n = sum_j w_nj (W2_E h_nj + b2_E)               kept slots only

    dh_s = w_s W2_E^t dy_n            dw_s = <h_s, W2_E^t dy_n> + <b2_E, dy_n>          dW2_E = sum_s (w_s dy_n) h_s^t
    da_s = dh_s act'(a_s) [* W3 x]    dW1_E = sum_s da_s x_n^t                          dx_n = sum_j W1_E^t da_nj

dw needs no expert output, so none is kept. Experts without rows get zero gradients. The products are torch's own, one per
expert on contiguous rows; grouping and summing are the kernels of `routing_plan`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import check_choice, check_float_tensor
from kdfast.ops.routing_plan import Plan, check_slot_weights, combine_reference, dispatch_reference

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


# ---------------------------------------------------------------- public
def grouped_linear(
    rows: Tensor, plan: Plan, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """out_r = W_e rows_r + b_e with e the expert of grouped row r; [M, out], zeros past the last kept slot.

    Args:
        rows: [M, in] in grouped order (`dispatch`). weight: [E, out, in], as E nn.Linear; a transposed view of
            [E, in, out] is read in place. bias: [E, out] or None.
    Differentiable in rows, weight and bias. The reference splits rows by the counts, which a GPU must wait for.

    >>> rows = grouped_linear(dispatch(x, plan), plan, torch.randn(8, 32, 16))
    """
    check_float_tensor("rows", rows)
    if rows.dim() != 2 or rows.shape[0] != plan.order.shape[0]:
        raise ValueError(
            f"rows: expected [M, in] with the {plan.order.shape[0]} slots of the plan, got {tuple(rows.shape)}"
        )
    _check_experts("weight", weight, (plan.counts.shape[0], None, rows.shape[1]), rows)
    _check_experts("bias", bias, (plan.counts.shape[0], weight.shape[1]), rows)
    return grouped_linear_reference(rows, plan, weight, bias)


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
    return grouped_mlp_reference(x, plan, w1, b1, w2, b2, weights, activation=activation, w3=w3)


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
