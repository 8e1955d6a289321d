"""One product of torch for the rows of all experts: what `routing_experts` runs on a GPU, where the counts stay on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._library import applied, first_derivative_only
from kdfast.ops.routing_plan import Plan

_grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped_reason(rows: Tensor, *weights: Tensor | None) -> str | None:
    """Why torch's grouped product cannot take rows and these weights, or None.

    What its kernels do not take it multiplies in a loop over the experts, which waits for the counts as the reference does.
    """
    if _grouped_mm is None:
        return f"torch {torch.__version__} has no grouped_mm"
    if rows.dtype != torch.bfloat16:
        return f"torch's grouped product takes bfloat16, got {rows.dtype}"
    for weight in weights:
        if weight is not None and any(size % 8 for size in weight.shape[1:]):
            return f"torch's grouped product needs widths that are multiples of 8 (16 bytes), got {tuple(weight.shape[1:])}"
        if weight is not None and not (weight.is_contiguous() or weight.mT.is_contiguous()):
            return f"torch's grouped product needs contiguous experts, got strides {weight.stride()}"
    if torch.version.hip is None and torch.cuda.get_device_capability(rows.device) < (8, 0):
        return "torch's grouped product needs compute capability 8.0"
    return None


class _Product(torch.autograd.Function):
    """out_r = W_E(r) rows_r. grouped_mm leaves rows past the last group unwritten: they are zeros here, and so are the gradients
    of experts without rows.
    """

    @staticmethod
    def forward(rows, offsets, weight):
        return _kept_rows(_grouped_mm(rows, weight.mT, offs=offsets[1:]), offsets)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        rows, offsets, weight = ctx.saved_tensors
        grad, grad_rows, grad_weight = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_rows = _kept_rows(_grouped_mm(grad, weight, offs=offsets[1:]), offsets)
        if ctx.needs_input_grad[2]:
            grad_weight = _grouped_mm(grad.mT, rows, offs=offsets[1:])
            grad_weight.masked_fill_((offsets[1:] == offsets[:-1])[:, None, None], 0)
        return grad_rows, None, grad_weight


_product = applied(_Product)


def _kept_rows(rows: Tensor, offsets: Tensor) -> Tensor:
    return torch.where((torch.arange(len(rows), device=rows.device) < offsets[-1])[:, None], rows, 0)


def grouped_linear_at_once(rows: Tensor, plan: Plan, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`grouped_linear_reference` without reading the counts."""
    out = _product(rows.contiguous(), plan.offsets, weight)
    if bias is None:
        return out
    expert = torch.searchsorted(plan.offsets[1:], torch.arange(len(rows), device=rows.device), right=True)
    return _kept_rows(out + bias[expert.clamp_max(len(bias) - 1)], plan.offsets)
