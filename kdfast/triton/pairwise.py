"""`kdfast.ops.pairwise` on a GPU: costs of all pairs by kernels of their own, InfoNCE by products on blocks of rows.

The InfoNCE gradient is a second product with what the first one made, of any width: one kernel would make every score again for
each part of the width. So the products are torch's, of a block of rows that stays in the L2 cache until contrast_kernel has
turned it into rows and gradients. They are float32 products unless the program allowed torch less
(`torch.set_float32_matmul_precision`). Nothing here waits for the GPU or allocates all pairs times the width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast._library import compute_dtype
from kdfast.ops import pairwise as op
from kdfast.triton import pairwise_kernels as kernels
from kdfast.triton import relation_kernels
from kdfast.triton.launch import DTYPES, MAX_32, launch, multiprocessors, power_of_two, splits, warps

BLOCK_BYTES = 32 << 20  # of scores: they stay in the L2 cache of a data-centre GPU (40 to 50 MB)
LEAST_ROWS = 128  # of a block all the same: products of fewer leave the GPU idle and read the other set once more
COST_TILE = 8192  # sums of a program, pairs x lanes: 64 for each of 128 threads
GRADIENT_TILE = 4096  # rows x columns: 16 for each of 256 threads
OTHERS = 64  # fewer rows of the other set are not worth a part of their own


def _shared(x: Tensor, y: Tensor, p: int, tile: int) -> dict[str, Any]:
    """What both launches of a cost need."""
    batches, n, width = x.shape
    strides = {f"{name}{i}": stride for name, t in (("x", x), ("y", y)) for i, stride in enumerate(t.stride())}
    wide = any(abs(t.stride(2)) * (width + tile) > MAX_32 for t in (x, y))
    return {
        "x": x, "y": y, "batches": batches, "n": n, "m": y.shape[1], "width": width, **strides, "P": p,
        "DTYPE": DTYPES[compute_dtype(x, y)], "WIDE": wide,
    }  # fmt: skip


def _cut(size: int, step: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """(how much of `size` a program takes, a multiple of step; over how many programs that is)."""
    steps = -(-size // step)
    per_split = -(-steps // splits(tiles, steps, device)) * step
    return per_split, -(-size // per_split)


def _run(kernel: Any, programs: int, num_warps: int, n_splits: int, out: Tensor, name: str, dtype: torch.dtype, **arguments: Any) -> Tensor:  # fmt: skip
    """Launches into `out`, or into one part per split, which are then added."""
    parts = out if n_splits == 1 else torch.empty((n_splits, *out.shape), dtype=dtype, device=out.device)
    launch(kernel, programs, num_warps, out.device, **{name: parts}, n_splits=n_splits, **arguments)
    if n_splits > 1:
        size = out.numel()
        arguments = {"parts": parts, "out": out, "size": size, "n_splits": n_splits, "B": 1024}
        launch(kernels.add_kernel, -(-size // 1024), 4, out.device, **arguments)
    return out


def cost(x: Tensor, y: Tensor, p: int) -> Tensor:
    """kdfast::pairwise_cost, [batches, n, m]."""
    (batches, n, width), m, dtype = x.shape, y.shape[1], compute_dtype(x, y)
    out = torch.empty((batches, n, m), dtype=dtype, device=x.device)
    if 0 in (batches, n, m, width):
        return out.zero_()
    tile = COST_TILE // (2 if dtype == torch.float64 else 1)
    lanes = min(power_of_two(width), 32)
    pairs = tile // lanes
    others = min(power_of_two(m), 1 << pairs.bit_length() // 2)
    rows = min(power_of_two(n), pairs // others)
    row_tiles, other_tiles = -(-n // rows), -(-m // others)
    tiles = batches * row_tiles * other_tiles
    per_split, n_splits = _cut(width, lanes, tiles, x.device)
    return _run(
        kernels.cost_kernel, tiles * n_splits, warps(rows * others * lanes * COST_TILE // tile // 4), n_splits, out, "cost", dtype,
        row_tiles=row_tiles, other_tiles=other_tiles, per_split=per_split, R=rows, S=others, B=lanes, **_shared(x, y, p, tile),
    )  # fmt: skip


def cost_backward(grad: Tensor, x: Tensor, y: Tensor, p: int) -> Tensor:
    """kdfast::pairwise_cost_backward: the gradient of the first operand, the other set's rows added in order."""
    (batches, n, width), m, dtype = x.shape, y.shape[1], compute_dtype(x, y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if 0 in (batches, n, m, width):
        return out.zero_()
    tile = GRADIENT_TILE // (2 if dtype == torch.float64 else 1)
    lanes = min(power_of_two(width), 256)
    column_tiles = -(-width // lanes)
    rows = min(power_of_two(n), tile // lanes)
    while (
        rows * lanes > tile // 8 and rows > 1 and batches * column_tiles * -(-n // rows) < 2 * multiprocessors(x.device)
    ):
        rows //= 2
    tiles = batches * column_tiles * -(-n // rows)
    per_split, n_splits = _cut(m, OTHERS, tiles, x.device)
    return _run(
        kernels.cost_gradient_kernel, tiles * n_splits, warps(rows * lanes * GRADIENT_TILE // tile), n_splits, out, "grad_x", dtype,
        grad=grad, row_tiles=-(-n // rows), column_tiles=column_tiles, per_split=per_split, R=rows, B=lanes,
        **{f"g{i}": stride for i, stride in enumerate(grad.stride())}, **_shared(x, y, p, tile),
    )  # fmt: skip


# ---------------------------------------------------------------- InfoNCE
def _contrast(scores: Tensor, first_row: int, scale: float, positive: Tensor, exclude_self: bool, lse: Tensor,
              rows: Tensor | None = None, unit: bool = False, grad_rows: Tensor | None = None) -> None:  # fmt: skip
    """What `_core.core.contrast_rows` does to a block of scores."""
    count, columns = scores.shape
    tile = score_tile(count, columns, scores.dtype)
    launch(
        relation_kernels.contrast_kernel, -(-count // tile["R"]), tile.pop("num_warps"), scores.device, scores=scores,
        positive=positive, rows=rows, lse=lse, grad_rows=grad_rows, count=count, columns=columns, first_row=first_row,
        row_stride=scores.stride(0), scale=float(scale), EXCLUDE=exclude_self, UNIT=unit or grad_rows is not None, **tile,
    )  # fmt: skip


def score_tile(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """R x B of a block of scores: whole rows while they fit."""
    size = 1024 if dtype == torch.float64 else 2048
    width = min(power_of_two(columns), size)
    height = min(size // width, power_of_two(rows), 64)
    return {"R": height, "B": width, "DTYPE": DTYPES[dtype], "num_warps": warps(height * width * 4096 // size)}


def _block_bytes(y: Tensor) -> int:
    return max(BLOCK_BYTES, LEAST_ROWS * len(y) * y.element_size())


def infonce_rows(
    x: Tensor, y: Tensor, positive: Tensor, scale: float, exclude_self: bool, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """kdfast::infonce_rows: rows, log-sum-exps and dl_i/dx_i, with the scores of a block of rows at a time."""
    return op.rows_by_blocks(_contrast, _block_bytes(y), x, y, positive, scale, exclude_self, need_x)


def infonce_rows_backward(
    grad_rows: Tensor, x: Tensor, y: Tensor, positive: Tensor, lse: Tensor, scale: float, exclude_self: bool
) -> Tensor:
    """kdfast::infonce_rows_backward: dl/dy, blocks of rows added in order."""
    return op.backward_by_blocks(_contrast, _block_bytes(y), grad_rows, x, y, positive, lse, scale, exclude_self)
