"""`kdfast.ops.routing` and `routing_plan` on a GPU: scores with top-k, plans, and the moves of rows, as functions on tensors.

Every length is known from the shapes, so nothing waits for the GPU. The grouped products of `routing_experts` are torch's
(kdfast/ops/routing_grouped.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast._library import compute_dtype, contiguous
from kdfast.triton import routing_kernels, routing_plan_kernels
from kdfast.triton.launch import DTYPES, MAX_32, launch, power_of_two, warps

SLOTS = 128  # of a plan, for one program: their ranks compare all pairs
COLUMNS = 1024  # of a model's row, for one program


def _tile(logits: Tensor) -> dict[str, Any]:
    """Rows and experts of a tile of scores: whole rows."""
    width = power_of_two(logits.shape[1])
    return {
        "R": max(2048 // width, 1), "E": width, "DTYPE": DTYPES[compute_dtype(logits)],
        "WIDE": abs(logits.stride(1)) * width > MAX_32,
    }  # fmt: skip


def _formula(logits: Tensor, k: int, score: str, norm: float, eps: float, route_scale: float) -> dict[str, Any]:
    norm = 1.0 if score == "softmax_after_topk" else norm
    return {
        "rows": logits.shape[0], "experts": logits.shape[1], "k": k, "row_stride": logits.stride(0),
        "expert_stride": logits.stride(1), "norm": norm, "eps": eps, "scale": 1.0 / k if score == "mean" else route_scale, "SCORE": score, "NORMED": norm != 0,
        **_tile(logits),
    }  # fmt: skip


def scores(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, validate: bool, k: int, score: str, norm: float, eps: float,
    route_scale: float, groups: int, topk_groups: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kdfast::routing_scores: ids, weights, counts, mean_probs, lse, alive. `validate` reads values: `kdfast.debug` does that."""
    (rows, experts), dtype, device = logits.shape, compute_dtype(logits), logits.device

    def new(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    ids, weights = new(rows, k, dtype=torch.int32), new(rows, k)
    lse, alive = new(rows), new(rows, dtype=torch.int32)
    counts, mean_probs = new(experts, dtype=torch.int32), new(experts)
    formula = _formula(logits, k, score, norm, eps, route_scale)
    programs = -(-rows // formula["R"])
    partial_counts, partial_probs = new(programs, experts, dtype=torch.int32), new(programs, experts)
    kept = torch.full((1,), rows, dtype=torch.int64, device=device) if mask is None else mask.sum().reshape(1)
    mask = None if mask is None else mask.contiguous().view(torch.int8)
    launch(
        routing_kernels.scores_kernel, programs, warps(formula["R"] * formula["E"]), device, logits=logits,
        bias=contiguous(bias, dtype), mask=mask, ids=ids, weights=weights, lse_out=lse, alive_out=alive,
        partial_counts=partial_counts, partial_probs=partial_probs, groups=groups, topk_groups=topk_groups, GROUPED=groups > 1,
        TWO=bias is not None and experts // groups > 1, G=power_of_two(groups), **formula,
    )  # fmt: skip
    launch(
        routing_kernels.add_kernel, -(-experts // 32), 4, device, partial_counts=partial_counts, partial_probs=partial_probs,
        kept=kept, counts=counts, mean_probs=mean_probs, n=programs, experts=experts, P=64, E=32,
    )  # fmt: skip
    return ids, weights, counts, mean_probs, lse, alive


def scores_backward(
    grad_weights: Tensor | None, grad_mean_probs: Tensor | None, grad_lse: Tensor | None, logits: Tensor, ids: Tensor, lse: Tensor,
    alive: Tensor, k: int, score: str, norm: float, eps: float, route_scale: float, groups: int, topk_groups: int,
) -> Tensor:  # fmt: skip
    """kdfast::routing_scores_backward: dz from the gradients of the weights, the column means and the log-sum-exps."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grads = [contiguous(g, lse.dtype) for g in (grad_weights, grad_mean_probs, grad_lse)]
    formula = _formula(logits, k, score, norm, eps, route_scale)
    kept = (ids[:, 0] >= 0).sum().reshape(1) if grad_mean_probs is not None else None
    # normalised without eps the sum over the chosen is 0: the other experts get nothing
    everyone = grad_weights is not None and score == "softmax" and (norm == 0 or eps != 0)
    launch(
        routing_kernels.scores_backward_kernel, -(-logits.shape[0] // formula["R"]), warps(formula["R"] * formula["E"]),
        logits.device, grad_weights=grads[0], grad_mean=grads[1], grad_lse=grads[2], logits=logits, ids=ids.contiguous(),
        lse_in=lse, alive_in=alive, kept=kept, grad_logits=grad, ALL=everyone, **formula,
    )  # fmt: skip
    return grad


def plan(
    ids: Tensor, keep: Tensor | None, num_experts: int, block: int, capacity: int, choice: bool, validate: bool
) -> tuple[Tensor, ...]:
    """kdfast::routing_plan: order, inverse, counts, offsets, position, row_slot, block_expert, padded_offsets."""
    rows, k = ids.shape
    slots, used, device = rows * k, min(num_experts, rows * k), ids.device

    def new(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    order = torch.full((slots,), -1, dtype=torch.int32, device=device)
    row_slot = torch.full((slots + used * (block - 1),), -1, dtype=torch.int32, device=device)
    inverse, position, block_expert = new(rows, k), new(rows, k), new(slots // block + used)
    counts, offsets, padded_offsets = new(num_experts), new(num_experts + 1), new(num_experts + 1)
    ids, keep = ids.contiguous(), None if keep is None else keep.to(torch.bool).contiguous().view(torch.int8)
    kept = new(rows, k, dtype=torch.int8) if choice else None
    size = {"rows": rows, "k": k, "slots": slots, "experts": num_experts}
    programs, width = -(-slots // SLOTS), power_of_two(num_experts + 1)
    before = new(programs, num_experts)
    limit = capacity or None

    def ranks(dropped: Tensor | None, in_choice_order: bool) -> Tensor:
        """Leaves in `before` how many slots of an expert the blocks before hold; the number in all blocks."""
        totals = new(num_experts)
        launch(routing_plan_kernels.histogram_kernel, programs, 4, device, ids=ids, keep=dropped, blocks=before,
             CHOICE=in_choice_order, B=SLOTS, E=width, **size)  # fmt: skip
        launch(routing_plan_kernels.scan_kernel, -(-num_experts // 32), 4, device, blocks=before, totals=totals, n=programs,
             experts=num_experts, P=64, E=32)  # fmt: skip
        return totals

    def place(**arguments: Any) -> None:
        launch(routing_plan_kernels.place_kernel, programs, 4, device, ids=ids, before=before, offsets=offsets,
             padded_offsets=padded_offsets, position=position, kept=kept, order=order, inverse=inverse, row_slot=row_slot,
             B=SLOTS, **size, **arguments)  # fmt: skip

    totals = ranks(keep, choice)
    if choice:  # the kept slots of an expert are no prefix in slot order: ranked again among themselves
        place(keep=keep, capacity=limit, CHOICE=True, POSITION=True, PLACE=False)
        totals, limit, keep = ranks(kept, False), None, kept
    launch(routing_plan_kernels.offsets_kernel, 1, 4, device, totals=totals, counts=counts, offsets=offsets,
         padded_offsets=padded_offsets, experts=num_experts, capacity=limit, block=block, E=width)  # fmt: skip
    place(keep=keep, capacity=limit, CHOICE=False, POSITION=not choice, PLACE=True)
    blocks = block_expert.numel()
    per_program = max(8192 // width, 1)
    launch(routing_plan_kernels.block_experts_kernel, -(-blocks // per_program), 4, device, padded_offsets=padded_offsets,
         block_expert=block_expert, n=blocks, block=block, experts=num_experts, B=per_program, E=width)  # fmt: skip
    return order, inverse, counts, offsets, position, row_slot, block_expert, padded_offsets


def _columns(width: int) -> tuple[int, int]:
    """(columns of a program, programs of a row)."""
    columns = min(power_of_two(width), COLUMNS)
    return columns, -(-width // columns)


def gather(x: Tensor, order: Tensor, k: int) -> Tensor:
    """kdfast::routing_gather: x[order // k], zero rows where order is -1."""
    x, order = x.contiguous(), order.contiguous()
    out = torch.empty((order.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    columns, tiles = _columns(x.shape[1])
    launch(routing_plan_kernels.gather_kernel, order.shape[0] * tiles, warps(columns), x.device, x=x, order=order, out=out, k=k,
         width=x.shape[1], tiles=tiles, B=columns)  # fmt: skip
    return out


def combine(rows: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    """kdfast::routing_combine: a gather of k rows for each row, in slot order."""
    rows, inverse, weights = rows.contiguous(), inverse.contiguous(), contiguous(weights, compute_dtype(rows))
    tokens, k = inverse.shape
    out = torch.empty((tokens, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    columns, tiles = _columns(rows.shape[1])
    launch(routing_plan_kernels.combine_kernel, tokens * tiles, warps(columns), rows.device, rows=rows, weights=weights,
         inverse=inverse, out=out, k=k, width=rows.shape[1], tiles=tiles, DTYPE=DTYPES[compute_dtype(rows)], B=columns)  # fmt: skip
    return out


def combine_backward(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    inverse: Tensor,
    order: Tensor,
    need_rows: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """kdfast::routing_combine_backward: (drows, dweights), each row of the model read once."""
    dtype = compute_dtype(rows)
    grad_rows = rows.new_empty(rows.shape if need_rows else (0,))
    grad_weights = rows.new_zeros(inverse.shape if need_weights else (0,), dtype=dtype)  # dropped slots stay 0
    columns, _ = _columns(rows.shape[1])
    launch(
        routing_plan_kernels.combine_backward_kernel, order.shape[0], warps(columns), rows.device,
        grad=grad.to(rows.dtype).contiguous(), rows=rows.contiguous(), weights=contiguous(weights, dtype),
        order=order.contiguous(), grad_rows=grad_rows if need_rows else None, grad_weights=grad_weights if need_weights else None,
        k=inverse.shape[1], width=rows.shape[1], DTYPE=DTYPES[dtype], B=columns,
    )  # fmt: skip
    return grad_rows, grad_weights
