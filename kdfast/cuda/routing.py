"""`kdfast.ops.routing` and the plan of `routing_plan` by csrc/cuda/routing.cu: each op one launch, whatever the sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._library import address, contiguous
from kdfast.cuda import call, core
from kdfast.ops.routing import _call
from kdfast.ops.routing_plan import _int32, _plan_tensors


def scores(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, validate: bool, k: int, *options: str | float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kdfast::routing_scores: ids, weights, counts, mean_probs, lse, alive. `validate` reads values: `kdfast.debug` does that."""
    rows, experts = logits.shape

    def new(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=logits.device)

    ids, weights = new(rows, k, dtype=torch.int32), new(rows, k)
    lse, alive = new(rows), new(rows, dtype=torch.int32)
    counts, mean_probs = new(experts, dtype=torch.int32), new(experts)
    blocks = core().cuda_routing_score_blocks(rows)
    partial_counts, partial_probs = new(blocks, experts + 1, dtype=torch.int32), new(blocks, experts)
    bias, mask = contiguous(bias, torch.float32), contiguous(mask, torch.bool)
    call(
        core().cuda_routing_scores, logits, *_call(logits, ids, lse, alive, k, *options), address(bias), address(mask),
        address(weights), address(counts), address(mean_probs), address(partial_counts), address(partial_probs),
    )  # fmt: skip
    return ids, weights, counts, mean_probs, lse, alive


def scores_backward(
    grad_weights: Tensor | None, grad_mean_probs: Tensor | None, grad_lse: Tensor | None, logits: Tensor, ids: Tensor, lse: Tensor,
    alive: Tensor, *options: str | float,
) -> Tensor:  # fmt: skip
    """kdfast::routing_scores_backward: dz from the gradients of the weights, the column means and the log-sum-exps."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grads = [contiguous(g, torch.float32) for g in (grad_weights, grad_mean_probs, grad_lse)]
    kept = (ids[:, 0] >= 0).sum() if grad_mean_probs is not None else None
    call(
        core().cuda_routing_scores_backward, logits, *_call(logits, ids, lse, alive, *options),
        *(address(g) for g in grads), address(kept), address(grad),
    )  # fmt: skip
    return grad


def plan(
    ids: Tensor, keep: Tensor | None, num_experts: int, block: int, capacity: int, choice: bool, validate: bool
) -> tuple[Tensor, ...]:
    """kdfast::routing_plan: order, inverse, counts, offsets, position, row_slot, block_expert, padded_offsets."""
    ids, keep = _int32(ids).contiguous(), contiguous(keep, torch.bool)
    out = _plan_tensors(ids, num_experts, block)
    order, inverse, counts, offsets, position, row_slot, block_expert, padded_offsets = out
    blocks = core().cuda_routing_plan_blocks(ids.numel())
    histogram = ids.new_empty((blocks + 1, num_experts))
    call(
        core().cuda_routing_plan, ids, address(ids), address(keep), *ids.shape, num_experts, block, capacity, choice,
        *(address(t) for t in (order, inverse, counts, offsets, position, row_slot)), row_slot.numel(), address(block_expert),
        block_expert.numel(), address(padded_offsets), address(histogram),
    )  # fmt: skip
    return tuple(out)
