"""`kdfast.ops.sinkhorn` on a GPU: forward and exact reverse as functions on tensors.

Problems of up to SMALL entries (padded to powers of two) are solved in one launch, several to a program when they are tiny; larger
ones by two launches an iteration, and as many in the reverse. columns_first is rows_first of the problem turned round. Nothing
here waits for the GPU: `tol` freezes problems on the device, the launches of a frozen problem read no cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast._library import compute_dtype, contiguous
from kdfast.ops.sinkhorn import _gradients, _outputs
from kdfast.triton import sinkhorn_kernels, sinkhorn_passes
from kdfast.triton.launch import DTYPES, MAX_32, OUTER_AXES, launch, multiprocessors, power_of_two, warps

SMALL = 16384  # entries of a problem that one program holds, a quarter in float64; 8 of them a thread up to half of it
LONGEST = 1024  # points of a side of such a problem
SHARED = (256, 32)  # entries of the problems, and points of one side, that share a program: else the potentials spill
TILE = 2048  # entries of a tile of a pass, 8 of them a thread; half as many in float64


def _strides(tensor: Tensor, turned: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(sizes of the batch, as three axes; their strides, then those of i and j)."""
    if tensor.dim() > OUTER_AXES + 2:  # contiguous, by kdfast.triton.reason
        tensor = tensor.reshape(-1, *tensor.shape[-2:])
    missing = OUTER_AXES + 2 - tensor.dim()
    batch, sides = tensor.stride()[:-2], tensor.stride()[-2:]
    return (1,) * missing + tuple(tensor.shape[:-2]), (0,) * missing + batch + (sides[::-1] if turned else sides)


@dataclass
class _Side:
    """One side of the problems: the points that move in one of the two half-steps."""

    size: int
    weight: Tensor | None
    lam: float
    offset: int  # in a row of `saved`
    axis: int  # its stride's place behind the batch's
    grad: Tensor | None = None  # of its potentials


class _Call:
    """What the launches of a call have in common; rows are the side that moves first."""

    def __init__(self, cost: Tensor, a: Tensor | None, b: Tensor | None, epsilon: float, iters: int, rows_first: bool,
                 lam_a: float, lam_b: float) -> None:  # fmt: skip
        self.cost, self.device, self.epsilon = cost, cost.device, float(epsilon)
        self.iters, self.turned = iters, not rows_first
        self.dtype = compute_dtype(cost, *(w for w in (a, b) if w is not None))
        self.batch = math.prod(cost.shape[:-2])
        weights, sizes, lams = (contiguous(a, self.dtype), contiguous(b, self.dtype)), cost.shape[-2:], (lam_a, lam_b)
        first, second = (1, 0) if self.turned else (0, 1)
        n, m = sizes[first], sizes[second]
        self.rows = _Side(n, weights[first], float(lams[first]), 0, 0)
        self.columns = _Side(m, weights[second], float(lams[second]), n, 1)
        self.axes, self.strides = _strides(cost, self.turned)
        self.dense = (1, n) if self.turned else (m, 1)  # of i and j in a plan [batch, N, M]
        self.double = self.dtype == torch.float64
        entries = SMALL // 4 if self.double else SMALL
        self.small = power_of_two(n) * power_of_two(m) <= entries and max(n, m) <= LONGEST

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def where(self, tensor: Tensor, prefix: str) -> dict[str, int]:
        names = (f"{prefix}0", f"{prefix}1", f"{prefix}2", f"{prefix}i", f"{prefix}j")
        return dict(zip(names, _strides(tensor, self.turned)[1]))

    def reaches_far(self, tensor: Tensor) -> bool:
        """Whether an offset along j may pass 32 bits."""
        return any(abs(s) * 2 * power_of_two(size) > MAX_32 for s, size in zip(tensor.stride()[-2:], tensor.shape[-2:]))

    def shared(self, *others: Tensor) -> dict[str, Any]:
        return {
            "cost": self.cost, "n1": self.axes[1], "n2": self.axes[2], **self.where(self.cost, "c"), "epsilon": self.epsilon,
            "DTYPE": DTYPES[self.dtype], "WIDE": any(self.reaches_far(t) for t in (self.cost, *others)),
        }  # fmt: skip

    def whole(self, kernel: Any, *others: Tensor, **arguments: Any) -> None:
        """A launch of a kernel that holds whole problems."""
        n, m = self.rows.size, self.columns.size
        width, height = power_of_two(n), power_of_two(m)
        room = (most // size for most, size in zip(SHARED, (width * height, max(width, height))))
        together = min(max(min(room), 1), power_of_two(self.batch))
        launch(
            kernel, -(-self.batch // together), warps(2 * together * width * height), self.device,
            a=self.rows.weight, b=self.columns.weight, batch=self.batch, n=n, m=m, iters=self.iters, pi=self.dense[0],
            pj=self.dense[1], lam_a=self.rows.lam, lam_b=self.columns.lam, P=together, N=width, M=height,
            **self.shared(*others), **arguments,
        )  # fmt: skip

    def tile(self, own: _Side, other: _Side) -> tuple[int, int]:
        """(own points, others at a time) of a pass: runs of at least 16 in memory, and programs for the whole GPU."""
        step, across = self.strides[3 + own.axis], self.strides[3 + other.axis]
        most, least = (64, 16) if abs(step) < abs(across) else (16, 2)
        while most > least and self.batch * -(-own.size // most) < 2 * multiprocessors(self.device):
            most //= 2
        own_points = min(most, power_of_two(own.size))
        return own_points, min((TILE // 2 if self.double else TILE) // own_points, power_of_two(other.size))

    def pass_over(self, kernel: Any, own: _Side, other: _Side, **arguments: Any) -> None:
        """A launch for the points of `own`, with the strides seen from that side."""
        R, B = self.tile(own, other)
        shared = self.shared()
        if own is self.columns:
            shared["ci"], shared["cj"] = shared["cj"], shared["ci"]
        launch(
            kernel, self.batch * -(-own.size // R), warps(2 * R * B), self.device, n=own.size, m=other.size,
            blocks=-(-own.size // R), R=R, B=B, **shared, **arguments,
        )  # fmt: skip


def _sides(call: _Call) -> tuple[tuple[_Side, _Side], tuple[_Side, _Side]]:
    return (call.rows, call.columns), (call.columns, call.rows)


# ---------------------------------------------------------------- forward
def solve(
    cost: Tensor, a: Tensor | None, b: Tensor | None, epsilon: float, n_iters: int, rows_first: bool, lam_a: float, lam_b: float,
    tol: float, need_plan: bool, need_saved: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kdfast::sinkhorn: value, plan, f, g, iterations, saved."""
    call = _Call(cost, a, b, epsilon, n_iters, rows_first, lam_a, lam_b)
    value, plan, f, g, iterations, saved = _outputs(cost, a, b, n_iters, need_plan, need_saved)
    first, second = (g, f) if call.turned else (f, g)
    out: dict[str, Any] = {
        "plan": plan if need_plan else None, "iterations": iterations, "saved": saved if need_saved else None,
    }  # fmt: skip
    if call.small:
        call.whole(sinkhorn_kernels.solve_kernel, value=value, f_out=first, g_out=second, tol=float(tol), **out)
    else:
        _iterate(call, value, first, second, float(tol), **out)
    return value, plan, f, g, iterations, saved


def _iterate(call: _Call, value: Tensor, f: Tensor, g: Tensor, tol: float, plan: Tensor | None, iterations: Tensor, saved: Tensor | None) -> None:  # fmt: skip
    wide: dict[str, Any] = {"dtype": torch.float64, "device": call.device}
    potentials = [torch.zeros(call.batch, side.size, **wide) for side in (call.rows, call.columns)]
    if call.columns.weight is not None:  # what has no weight takes no part in the first half-step
        potentials[1].masked_fill_(call.columns.weight.reshape(call.batch, -1) == 0, -math.inf)
    blocks = -(-call.rows.size // call.tile(call.rows, call.columns)[0])
    changes = torch.full((call.batch, 2, blocks), math.inf, **wide) if tol >= 0 else None
    for k in range(call.iters):
        for own, other in _sides(call):
            first = own is call.rows
            call.pass_over(
                sinkhorn_passes.half_step_kernel, own, other, weight=own.weight, own_potential=potentials[own.axis],
                other_potential=potentials[other.axis], saved=saved, changes=changes, iterations=iterations, k=k, iters=call.iters,
                offset=own.offset, first_blocks=blocks, lam=own.lam, tol=tol, FIRST=first,
            )  # fmt: skip
    partial = torch.empty(call.batch, blocks, **wide) if plan is None else None
    call.pass_over(
        sinkhorn_passes.plan_kernel, call.rows, call.columns, own_potential=potentials[0], other_potential=potentials[1], plan=plan, partial=partial,
        pi=call.dense[0], pj=call.dense[1],
    )  # fmt: skip
    if plan is None:
        launch(
            sinkhorn_passes.value_kernel, call.batch, 1, call.device, partial=partial, value=value, blocks=blocks, S=128
        )
    else:
        for out, potential in zip((f, g), potentials):
            out.copy_((potential * call.epsilon).view(out.shape))


# ---------------------------------------------------------------- reverse
def backward(
    cost: Tensor, a: Tensor | None, b: Tensor | None, iterations: Tensor, saved: Tensor, grad_value: Tensor | None,
    grad_plan: Tensor | None, grad_f: Tensor | None, grad_g: Tensor | None, epsilon: float, n_iters: int, rows_first: bool,
    lam_a: float, lam_b: float, envelope: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """kdfast::sinkhorn_backward: the gradients of cost, a and b."""
    call = _Call(cost, a, b, epsilon, n_iters, rows_first, lam_a, lam_b)
    grad_cost, grad_a, grad_b = _gradients(cost, a, b)
    grad_value, grad_plan, grad_f, grad_g = (contiguous(t, call.dtype) for t in (grad_value, grad_plan, grad_f, grad_g))
    call.rows.grad, call.columns.grad = (grad_g, grad_f) if call.turned else (grad_f, grad_g)
    weights = (grad_b if b is not None else None, grad_a if a is not None else None)
    first, second = weights if call.turned else weights[::-1]
    given = {"iterations": iterations, "saved": saved, "grad_value": grad_value, "grad_plan": grad_plan}
    if call.small:
        call.whole(
            sinkhorn_kernels.reverse_kernel, grad_cost, grad_f=call.rows.grad, grad_g=call.columns.grad, grad_cost=grad_cost,
            grad_a=first, grad_b=second, ENVELOPE=envelope, **call.where(grad_cost, "g"), **given,
        )  # fmt: skip
    else:
        _reverse(call, grad_cost, (first, second), envelope, given)
    return grad_cost, grad_a, grad_b


def _reverse(call: _Call, grad_cost: Tensor, weights: tuple[Tensor | None, Tensor | None], envelope: bool, given: dict[str, Any]) -> None:  # fmt: skip
    rows, columns = call.rows, call.columns
    # what arrives at the half-steps: [batch, iters, n] and [batch, iters, m]
    arriving = [call.new(call.batch, call.iters, side.size) if not envelope else None for side in (rows, columns)]
    given = given | {"iters": call.iters}
    state = {key: given[key] for key in ("iterations", "saved", "iters")}
    plan_strides = {"pi": call.dense[0], "pj": call.dense[1]}
    if not envelope:
        for own, other in _sides(call):
            turned = {"pi": call.dense[1], "pj": call.dense[0]} if own is columns else plan_strides
            call.pass_over(
                sinkhorn_passes.start_kernel, own, other, grad_own=own.grad, arriving=arriving[own.axis], own_offset=own.offset,
                other_offset=other.offset, **given, **turned,
            )  # fmt: skip
        for k in range(call.iters, 0, -1):
            for own, other in _sides(call):
                own_k = k if own is rows else k - 1
                if own_k > 0:
                    call.pass_over(
                        sinkhorn_passes.reverse_step_kernel, own, other, weight=other.weight, moved=arriving[other.axis],
                        arriving=arriving[own.axis], k=k, own_k=own_k, own_offset=own.offset, other_offset=other.offset,
                        lam=other.lam, **state,
                    )  # fmt: skip
    R, B = (32, 32) if call.double else (32, 64)
    tiles = -(-rows.size // R), -(-columns.size // B)
    launch(
        sinkhorn_passes.gradient_kernel, call.batch * tiles[0] * tiles[1], warps(2 * R * B), call.device, a=rows.weight, b=columns.weight,
        at_rows=arriving[0], at_columns=arriving[1], grad_cost=grad_cost, n=rows.size, m=columns.size, tiles_i=tiles[0],
        tiles_j=tiles[1], lam_a=rows.lam, lam_b=columns.lam, ENVELOPE=envelope, R=R, B=B, **plan_strides,
        **call.where(grad_cost, "g"), **given, **call.shared(grad_cost),
    )  # fmt: skip
    if envelope:
        return
    for side, grad in zip((rows, columns), weights):
        if grad is not None:
            blocks = -(-side.size // 64)
            launch(
                sinkhorn_passes.weight_gradient_kernel, call.batch * blocks, 2, call.device, weight=side.weight,
                arriving=arriving[side.axis], grad=grad, n=side.size, size=rows.size + columns.size, offset=side.offset,
                blocks=blocks, factor=side.lam * call.epsilon, R=64, **state,
            )  # fmt: skip
