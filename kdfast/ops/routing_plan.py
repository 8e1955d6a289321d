"""Routing plans: expert ids to a stable grouping by expert, and the two moves it allows, dispatch and combine.

N rows choose k experts each: M = N k slots, slot s = n k + j, expert id -1 = dropped.

    counts_e  = slots of expert e               offsets = exclusive prefix sum of counts, offsets_E = all kept slots
    order     = slots sorted by expert, ascending slot inside an expert (a stable counting sort)      grouped row -> slot
    inverse   = its inverse                                                                           slot -> grouped row
    position  = rank of a slot inside its expert; with a capacity C a slot is kept iff position < C

    dispatch:  rows_r = x[order_r // k]                           dx_n = sum_j drows[inverse_nj]
    combine:   y_n = sum_j w_nj rows[inverse_nj]                  dw_nj = <dy_n, rows[inverse_nj]>,  drows = w dy

Both sums run over the slots of a row in slot order with a float32 accumulator (float64 for float64): no atomics, the same
bits every time. Every output has a length known from the shapes alone; unused tails hold -1 (ids) or 0 (rows).
Grouped kernels with blocks of B rows read a padded layout: expert e owns ceil(counts_e / B) blocks, `row_slot` gives the
slot of each padded row (-1 on padding) and `block_expert` the expert of each block. Bounds: M + min(E, M)(B - 1) rows
and floor(M / B) + min(E, M) blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import _core
from kdfast._checks import check_choice, check_float_tensor, check_int, check_number
from kdfast._dispatch import choose, core_reason, debugging
from kdfast._library import (
    DTYPE_CODES,
    address,
    applied,
    compute_dtype,
    contiguous,
    direct,
    first_derivative_only,
    lib,
    new_empty,
    readable,
)
from kdfast.cuda import MOST_EXPERTS
from kdfast.cuda import reason as cuda_reason
from kdfast.triton import reason as triton_reason
from kdfast.triton import register

ORDERS = ("token", "choice")
INTEGERS = (torch.int32, torch.int64)


class Plan(NamedTuple):
    """A grouping of slots by expert; int32 tensors and the block size. Dropped: id -1, or past the capacity."""

    order: Tensor  # [M] grouped row -> slot, -1 past the last kept slot
    inverse: Tensor  # [N, k] slot -> grouped row, -1 if dropped
    counts: Tensor  # [E] kept slots per expert
    offsets: Tensor  # [E + 1] first grouped row of each expert
    position: Tensor  # [N, k] rank inside the expert before the capacity, -1 for id -1
    row_slot: Tensor  # [M + min(E, M)(B - 1)] padded row -> slot, -1 on padding and past the end
    block_expert: Tensor  # [M // B + min(E, M)] expert of each block, -1 past the last one
    padded_offsets: Tensor  # [E + 1] first padded row of each expert
    block: int  # B


def expert_capacity(
    capacity_factor: float | None, rows: int, k: int, num_experts: int, *, rounding: str = "ceil"
) -> int | None:
    """C = ceil(capacity_factor k N / E) slots per expert, in float64; None (dropless) for a factor of None or 0.

    rounding="floor" is MegaBlocks' choice. Raises ValueError for a negative factor.

    >>> expert_capacity(1.25, rows=10, k=2, num_experts=4)
    7
    """
    check_choice("rounding", rounding, ("ceil", "floor"))
    if capacity_factor is None or check_number("capacity_factor", capacity_factor, low=0.0) == 0:
        return None
    exact = capacity_factor * k * rows / num_experts
    return math.ceil(exact) if rounding == "ceil" else math.floor(exact)


def default_block(slots: int, num_experts: int) -> int:
    """64 rows a block, 16 where experts get fewer than 16 rows on average."""
    return 16 if slots < 16 * num_experts else 64


# ---------------------------------------------------------------- reference
def make_plan_reference(
    ids: Tensor, num_experts: int, *, block: int, capacity: int | None = None, order: str = "token", weights: Tensor | None = None
) -> Plan:  # fmt: skip
    """The definitions of this module in plain torch. `weights`: slots of weight exactly 0 count as dropped."""
    rows, k = ids.shape
    slots = rows * k
    valid = (ids >= 0) & (ids < num_experts)
    if weights is not None:
        valid = valid & (weights.detach() != 0)
    expert = torch.where(valid, ids, num_experts).long()  # [N, k], dropped slots sort last
    ranked = expert if order == "token" else expert.t()  # choice order: all first choices, then all second
    position = _ranks(ranked.flatten(), num_experts).view(ranked.shape)
    position = position if order == "token" else position.t()
    if capacity is not None:
        expert = torch.where(position < capacity, expert, num_experts)
    flat = expert.flatten()
    counts = _histogram(flat, num_experts)[:num_experts]
    offsets = _exclusive_scan(counts)
    sorted_slots = flat.sort(stable=True).indices  # [M] grouped row -> slot
    row = torch.arange(slots, device=ids.device)
    kept = row < offsets[-1]
    inverse = torch.empty_like(row).scatter(0, sorted_slots, torch.where(kept, row, -1))
    blocks = (counts + block - 1) // block
    padded_offsets = _exclusive_scan(blocks * block)
    row_slot = row.new_full((slots + min(num_experts, slots) * (block - 1) + 1,), -1)  # one spare for dropped slots
    target = torch.where(flat < num_experts, padded_offsets[flat] + inverse - offsets[flat], row_slot.shape[0] - 1)
    row_slot = row_slot.scatter(0, target, row)[:-1]
    block_row = torch.arange(slots // block + min(num_experts, slots), device=ids.device) * block
    block_expert = torch.searchsorted(padded_offsets[1:].contiguous(), block_row, right=True)
    block_expert = torch.where(block_row < padded_offsets[-1], block_expert, -1)
    order_, inverse, counts, offsets, position, row_slot, block_expert, padded_offsets = (
        t.to(torch.int32)
        for t in (
            torch.where(kept, sorted_slots, -1), inverse.view(rows, k), counts, offsets,
            torch.where(valid, position, -1), row_slot, block_expert, padded_offsets,
        )
    )  # fmt: skip
    return Plan(order_, inverse, counts, offsets, position, row_slot, block_expert, padded_offsets, block)


def _histogram(values: Tensor, num_experts: int) -> Tensor:
    bins = torch.zeros(num_experts + 1, dtype=torch.int64, device=values.device)
    return bins.index_add_(0, values, torch.ones_like(values))


def _exclusive_scan(counts: Tensor) -> Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _ranks(expert: Tensor, num_experts: int) -> Tensor:
    """Rank of each entry among the earlier entries of the same expert."""
    order = expert.sort(stable=True).indices
    first = _exclusive_scan(_histogram(expert, num_experts))
    ranks = torch.arange(expert.shape[0], device=expert.device) - first[expert[order]]
    return torch.empty_like(expert).scatter(0, order, ranks)


def dispatch_reference(x: Tensor, plan: Plan) -> Tensor:
    k = plan.inverse.shape[1]
    rows = x[(plan.order.clamp_min(0) // k).long()]  # [M, H]
    return torch.where((plan.order >= 0).unsqueeze(-1), rows, 0.0)


def combine_reference(rows: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    dtype = compute_dtype(rows)
    total = rows.new_zeros((plan.inverse.shape[0], rows.shape[1]), dtype=dtype)  # [N, H]
    if rows.shape[0] == 0:
        return total.to(rows.dtype)
    for j in range(plan.inverse.shape[1]):  # slot order
        index = plan.inverse[:, j].long()
        term = rows[index.clamp_min(0)].to(dtype)
        if weights is not None:
            term = term * torch.where(index >= 0, weights[:, j], 0.0).to(dtype).unsqueeze(-1)
        total = total + torch.where((index >= 0).unsqueeze(-1), term, 0.0)
    return total.to(rows.dtype)


# ---------------------------------------------------------------- registration
lib.define(
    "routing_plan(Tensor ids, Tensor? keep, int num_experts, int block, int capacity, bool choice, bool validate, "
    "bool cuda=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
lib.define("routing_gather(Tensor x, Tensor order, int k) -> Tensor")
lib.define("routing_combine(Tensor rows, Tensor? weights, Tensor inverse) -> Tensor")
lib.define(
    "routing_combine_backward(Tensor grad, Tensor rows, Tensor? weights, Tensor inverse, Tensor order, bool need_rows, "
    "bool need_weights) -> (Tensor, Tensor)"
)


def _plan_tensors(ids: Tensor, num_experts: int, block: int) -> list[Tensor]:
    """Empty tensors in the order of Plan."""
    rows, k = ids.shape
    slots, used = rows * k, min(num_experts, rows * k)
    shapes = (
        (slots,), (rows, k), (num_experts,), (num_experts + 1,), (rows, k), (slots + used * (block - 1),),
        (slots // block + used,), (num_experts + 1,),
    )  # fmt: skip
    return [ids.new_empty(shape, dtype=torch.int32) for shape in shapes]


@torch.library.register_fake("kdfast::routing_plan")
def _(ids, keep, num_experts, block, capacity, choice, validate, cuda=False):
    return tuple(_plan_tensors(ids, num_experts, block))


@torch.library.register_fake("kdfast::routing_gather")
def _(x, order, k):
    return x.new_empty((order.shape[0], x.shape[1]))


@torch.library.register_fake("kdfast::routing_combine")
def _(rows, weights, inverse):
    return rows.new_empty((inverse.shape[0], rows.shape[1]))


@torch.library.register_fake("kdfast::routing_combine_backward")
def _(grad, rows, weights, inverse, order, need_rows, need_weights):
    return _combine_gradients(rows, inverse, need_rows, need_weights)


def _combine_gradients(rows: Tensor, inverse: Tensor, need_rows: bool, need_weights: bool) -> tuple[Tensor, Tensor]:
    """Buffers: the rows' gradient in their dtype, the weights' in the compute dtype. An op cannot return None."""
    return (
        new_empty(rows, rows.shape if need_rows else (0,)),
        rows.new_empty(inverse.shape if need_weights else 0, dtype=compute_dtype(rows)),
    )


@torch.library.impl(lib, "routing_plan", "CPU")
def _routing_plan_cpu(ids, keep, num_experts, block, capacity, choice, validate):
    ids, keep = _int32(ids).contiguous(), contiguous(keep, torch.bool)
    out = _plan_tensors(ids, num_experts, block)
    order, inverse, counts, offsets, position, row_slot, block_expert, padded_offsets = out
    _core.core.routing_plan(
        address(ids), address(keep), *ids.shape, num_experts, block, capacity, choice, validate,
        *(address(t) for t in (order, inverse, counts, offsets, position, row_slot)), row_slot.numel(),
        address(block_expert), block_expert.numel(), address(padded_offsets),
    )  # fmt: skip
    return tuple(out)


def _int32(ids: Tensor) -> Tensor:
    """int64 ids outside int32 must stay bad ids."""
    return ids if ids.dtype == torch.int32 else ids.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def gather_rows(x: Tensor, order: Tensor, k: int, begin: int, end: int, out: Tensor) -> None:
    """out[r - begin] = x[order[r] // k] for rows [begin, end); zeros for a row of order -1. All contiguous, on the CPU."""
    assert _core.core is not None
    _core.core.routing_gather(
        address(x), DTYPE_CODES[x.dtype], x.shape[0], k, x.shape[1], address(order), begin, end, 0, address(out)
    )


@torch.library.impl(lib, "routing_gather", "CPU")
def _routing_gather_cpu(x, order, k):
    out = new_empty(x, (order.shape[0], x.shape[1]))
    gather_rows(x.contiguous(), order.contiguous(), k, 0, order.shape[0], out)
    return out


@torch.library.impl(lib, "routing_combine", "CPU")
def _routing_combine_cpu(rows, weights, inverse):
    rows, inverse, weights = rows.contiguous(), inverse.contiguous(), contiguous(weights, compute_dtype(rows))
    tokens, k = inverse.shape
    out = new_empty(rows, (tokens, rows.shape[1]))
    _core.core.routing_combine(
        address(rows),
        DTYPE_CODES[rows.dtype],
        tokens,
        k,
        rows.shape[1],
        address(inverse),
        address(weights),
        address(out),
    )
    return out


@torch.library.impl(lib, "routing_combine_backward", "CPU")
def _routing_combine_backward_cpu(grad, rows, weights, inverse, order, need_rows, need_weights):
    grad, inverse, order = grad.to(rows.dtype).contiguous(), inverse.contiguous(), order.contiguous()
    weights = contiguous(weights, compute_dtype(rows))
    rows = rows.contiguous() if need_weights else rows
    grad_rows, grad_weights = _combine_gradients(rows, inverse, need_rows, need_weights)
    _core.core.routing_combine_backward(
        address(grad), address(rows), DTYPE_CODES[rows.dtype], *inverse.shape, rows.shape[1], address(inverse),
        address(order), address(weights), address(grad_rows), address(grad_weights),
    )  # fmt: skip
    return grad_rows, grad_weights


register("routing_plan", "routing", "plan")
register("routing_gather", "routing", "gather")
register("routing_combine", "routing", "combine")
register("routing_combine_backward", "routing", "combine_backward")

# ---------------------------------------------------------------- autograd
_plan_op = direct(torch.ops.kdfast.routing_plan.default, _routing_plan_cpu)
_gather_op = direct(torch.ops.kdfast.routing_gather.default, _routing_gather_cpu)
_combine_op = direct(torch.ops.kdfast.routing_combine.default, _routing_combine_cpu)
_combine_backward_op = direct(torch.ops.kdfast.routing_combine_backward.default, _routing_combine_backward_cpu)


class _Dispatch(torch.autograd.Function):
    """The gradient of a gather is the unweighted combine."""

    @staticmethod
    def forward(x, order, inverse):
        return _gather_op(x, order, inverse.shape[1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_rows):
        (inverse,) = ctx.saved_tensors
        return _combine_op(grad_rows, None, inverse), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(rows, weights, inverse, order):
        return _combine_op(rows, weights, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        rows, weights, inverse, order = ctx.saved_tensors
        need_rows, need_weights = ctx.needs_input_grad[:2]
        grad_rows, grad_weights = _combine_backward_op(grad, rows, weights, inverse, order, need_rows, need_weights)
        return grad_rows if need_rows else None, grad_weights if need_weights else None, None, None


_apply_dispatch, _apply_combine = applied(_Dispatch), applied(_Combine)


def fused_backend(
    op: str,
    backend: str | None,
    *tensors: Tensor | None,
    also: Callable[[], str | None] = lambda: None,
    num_experts: int = 0,
) -> str:
    """The backend for floating tensors and the ids beside them: what every function of this family can run on.

    also: what else an op needs of a GPU, as a reason why not or None. num_experts: of the plan alone, which has a CUDA kernel.
    """

    def cpu() -> str | None:
        if (why := core_reason()) is not None:
            return why
        away = next((t.device for t in tensors if t is not None and t.device.type not in ("cpu", "meta")), None)
        return None if away is None else f"the tensors are on {away}"

    def triton() -> str | None:
        return triton_reason(op, *(t for t in tensors if t is not None)) or also()

    def cuda() -> str | None:
        if (why := cuda_reason(op, *(t for t in tensors if t is not None))) is not None:
            return why
        return f"it takes at most {MOST_EXPERTS} experts, got {num_experts}" if num_experts > MOST_EXPERTS else None

    return choose(op, backend, {"cpu": cpu, "cuda": cuda, "triton": triton}, tensors)


# ---------------------------------------------------------------- public
def make_plan(
    ids: Tensor,
    num_experts: int,
    *,
    block: int | None = None,
    capacity: int | None = None,
    order: str = "token",
    skip_zero: Tensor | None = None,
    validate: bool | None = None,
    backend: str | None = None,
) -> Plan:
    """Groups the slots of `ids` by expert; the definitions stand at the top of this module.

    Args:
        ids: [N, k] int32 or int64 expert ids in [0, E), -1 = dropped. A row may name an expert twice (a given plan).
        block: rows per block of the padded layout. Default 64, or 16 below 16 slots per expert on average.
        capacity: slots an expert takes; None or 0 is dropless. Slots past it are dropped; weights are NOT renormalised.
        order: who comes first when there is a capacity: "token" (slot order) or "choice" (all first choices, then all
            second ones: GShard).
        skip_zero: weights [N, k]; slots of weight exactly 0 are left out, so the router gets no gradient from them either.
        validate: read the ids: one outside [-1, E) raises. Default: on the CPU and under `kdfast.debug()`; without it
            such an id counts as dropped.
    Returns:
        Plan. Nothing in it is differentiable.
    Raises:
        ValueError: bad ids, negative capacity, 2^31 slots or more.

    >>> plan = make_plan(route_topk(torch.randn(6, 8), k=2).ids, num_experts=8)
    """
    _check_ids(ids, num_experts)
    capacity = None if capacity is None else check_int("capacity", capacity) or None
    check_choice("order", order, ORDERS)
    slots = ids.numel()
    block = default_block(slots, num_experts) if block is None else check_int("block", block, low=1)
    if slots + min(num_experts, slots) * (block - 1) >= 2**31:
        raise ValueError(f"ids: expected fewer than 2^31 padded rows, got {slots} slots with block={block}")
    if skip_zero is not None and (check_float_tensor("skip_zero", skip_zero).shape != ids.shape):
        raise ValueError(f"skip_zero: expected the shape of ids {tuple(ids.shape)}, got {tuple(skip_zero.shape)}")
    if validate is None:
        validate = ids.device.type == "cpu" or debugging()
    chosen = fused_backend("make_plan", backend, ids, num_experts=num_experts)
    if (
        chosen != "cpu"
        and validate
        and (readable(ids) or debugging())
        and bool(((ids < -1) | (ids >= num_experts)).any())
    ):
        raise ValueError(f"ids: expected -1 (dropped) or an expert in [0, {num_experts}), got one outside")
    if chosen == "reference":
        return make_plan_reference(ids, num_experts, block=block, capacity=capacity, order=order, weights=skip_zero)
    keep = None if skip_zero is None else skip_zero.detach() != 0
    cuda = (True,) if chosen == "cuda" else ()
    tensors = _plan_op(ids, keep, num_experts, block, capacity or 0, order == "choice", validate, *cuda)
    return Plan._make((*tensors, block))


def dispatch(x: Tensor, plan: Plan, *, backend: str | None = None) -> Tensor:
    """rows_r = x[order_r // k]: the rows of `x` [N, H] grouped by expert, [M, H]; zeros past the last kept slot.

    Differentiable in x, once; the gradient sums the slots of a row in slot order. Raises ValueError on a shape mismatch.

    >>> rows = dispatch(x, plan)
    """
    check_float_tensor("x", x)
    if x.dim() != 2 or x.shape[0] != plan.inverse.shape[0]:
        raise ValueError(f"x: expected [N, H] with the {plan.inverse.shape[0]} rows of the plan, got {tuple(x.shape)}")
    if fused_backend("dispatch", backend, x, plan.order) == "reference":
        return dispatch_reference(x, plan)
    return _apply_dispatch(x, plan.order, plan.inverse)


def combine(rows: Tensor, weights: Tensor | None, plan: Plan, *, backend: str | None = None) -> Tensor:
    """y_n = sum_j w_nj rows[inverse_nj] over the kept slots of a row, in slot order; [N, H] in the dtype of `rows`.

    Args:
        rows: [M, H] in grouped order, as `dispatch` makes them. weights: [N, k], None means 1.
    Differentiable in rows and weights, once: dw_nj = <dy_n, rows[inverse_nj]>; a dropped slot's weight gets 0.

    >>> y = combine(dispatch(x, plan), routing.weights, plan)
    """
    check_float_tensor("rows", rows)
    if rows.dim() != 2 or rows.shape[0] != plan.order.shape[0]:
        raise ValueError(
            f"rows: expected [M, H] with the {plan.order.shape[0]} slots of the plan, got {tuple(rows.shape)}"
        )
    check_slot_weights(weights, plan)
    if fused_backend("combine", backend, rows, weights, plan.order) == "reference":
        return combine_reference(rows, weights, plan)
    weights = None if weights is None else weights.to(compute_dtype(rows))
    return _apply_combine(rows, weights, plan.inverse, plan.order)


def check_slot_weights(weights: Tensor | None, plan: Plan) -> None:
    if weights is not None and check_float_tensor("weights", weights).shape != plan.inverse.shape:
        raise ValueError(
            f"weights: expected one per slot of the plan {tuple(plan.inverse.shape)}, got {tuple(weights.shape)}"
        )


def _check_ids(ids: object, num_experts: int) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected a Tensor of integers, got {type(ids).__name__}")
    if ids.dtype not in INTEGERS:
        raise TypeError(f"ids: expected int32 or int64, got {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"ids: expected [N, k], got {tuple(ids.shape)}")
    check_int("num_experts", num_experts, low=1)
