"""`kdfast.ops.selective` on a GPU. One read of both maps (selective_kernels.py says from where on more), and no wait for the GPU:

count    the labels in V, when the gradients are to be divided by |V| (8 bytes a pixel)
main     maps, losses and the final gradients; before it, for "selected", the same without gradients finds the two counts
totals   one program adds what the others found
repair   returns at once, unless a pixel of nothing but -inf made the count of labels wrong
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast._library import compute_dtype, contiguous, gradient_like
from kdfast.triton import selective_kernels as kernels
from kdfast.triton.launch import DTYPES, MAX_32, launch, lay_out, multiprocessors, tile_shape

COUNTERS = 256  # programs that count labels; every program of the main kernel adds their numbers


def selective_kl(
    logits_a: Tensor, logits_b: Tensor, labels: Tensor, temperature: float, ignore_index: int, normalizer: str, reliability: str,
    factor: float, need_a: bool, need_b: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kdfast::selective_kl: the ten outputs of the op, in its order."""
    dtype, device, shape = compute_dtype(logits_a, logits_b), logits_a.device, labels.shape

    def new(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    grad_a, grad_b = gradient_like(logits_a, need_a), gradient_like(logits_b, need_b)
    targets = contiguous(labels, torch.int64)
    layout = lay_out([logits_a, logits_b, grad_a if need_a else new(0), grad_b if need_b else new(0)], 1)
    classes, pixels = logits_a.shape[1], layout.rows
    rows, width, num_warps = tile_shape(layout, classes, dtype)
    tiles = -(-layout.inner // rows)
    blocks = layout.outer * tiles
    to_a, to_b, scale = new(), new(), new(2)
    direction, valid = new(*shape, dtype=torch.int8), new(*shape, dtype=torch.bool)
    reliability_a, reliability_b = new(*shape), new(*shape)
    counts, losses, block_counts = new(3, dtype=torch.int64), new(blocks, 2), new(blocks, 3, dtype=torch.int32)
    # The stored gradients are the final ones; float16 ones are final times `scale`. Nothing is stored: the scale is 1.
    half_a, half_b = need_a and grad_a.dtype == torch.float16, need_b and grad_b.dtype == torch.float16
    scaled_a, scaled_b = need_a and not half_a, need_b and not half_b
    counted = normalizer == "valid" and (scaled_a or scaled_b)
    guess = new(COUNTERS, dtype=torch.int64) if counted else None
    repair = new(2, dtype=torch.float64) if counted else None
    if counted:
        per_program = -(-pixels // COUNTERS)
        launch(kernels.count_kernel, COUNTERS, 4, device, labels=targets, found=guess, ignore_index=ignore_index, pixels=pixels,
            per_program=per_program, B=1024)  # fmt: skip
    shared: dict[str, Any] = {
        "pixels": pixels, "temperature": float(temperature), "factor": float(factor), "NORMALIZER": normalizer,
        "GUESSES": COUNTERS,
    }  # fmt: skip
    main: dict[str, Any] = shared | {
        "logits_a": logits_a, "logits_b": logits_b, "labels": targets, "direction": direction, "valid": valid.view(torch.int8),
        "reliability_a": reliability_a, "reliability_b": reliability_b, "losses": losses, "counts": block_counts,
        "ignore_index": ignore_index, "tiles": tiles, "n1": layout.sizes[1], "n2": layout.sizes[2], "inner": layout.inner,
        "classes": classes, **{f"{name}{i}": s for name, strides in zip(("a", "b", "ga", "gb"), layout.strides)
                               for i, s in enumerate(strides)},
        "DTYPE": DTYPES[dtype], "ENTROPY": reliability == "entropy", "UNIT": temperature == 1, "R": rows, "B": width,
        "SINGLE": width >= classes,
        "WIDE": any(abs(strides[4]) * (classes + width) > MAX_32 for strides in layout.strides),
    }  # fmt: skip
    totals: dict[str, Any] = shared | {
        "losses": losses, "block_counts": block_counts, "to_a": to_a, "to_b": to_b, "counts": counts, "scale": scale, "n": blocks,
        "SCALED_A": not half_a, "SCALED_B": not half_b, "B": 1024,
    }  # fmt: skip
    if normalizer == "selected" and (need_a or need_b):
        launch(kernels.selective_kernel, blocks, num_warps, device, **main, grad_a=None, grad_b=None, guess=None, GRAD_A=False,
            GRAD_B=False, SCALED_A=False, SCALED_B=False)  # fmt: skip
        launch(kernels.totals_kernel, 1, 4, device, **totals, guess=None, repair=None)
        guess = counts
    launch(kernels.selective_kernel, blocks, num_warps, device, **main, grad_a=grad_a if need_a else None,
        grad_b=grad_b if need_b else None, guess=guess, GRAD_A=need_a, GRAD_B=need_b, SCALED_A=scaled_a, SCALED_B=scaled_b)  # fmt: skip
    launch(kernels.totals_kernel, 1, 4, device, **totals, guess=guess, repair=repair)
    if repair is not None:
        for side, (gradient, stored) in enumerate(((grad_a, scaled_a), (grad_b, scaled_b))):
            if stored:
                _repair(gradient, repair, side)
    return to_a, to_b, direction, valid, reliability_a, reliability_b, counts, grad_a, grad_b, scale


def _repair(gradient: Tensor, repair: Tensor, side: int) -> None:
    """The gradient's memory from end to end: it is dense, so the order of its axes does not matter."""
    programs = 4 * multiprocessors(gradient.device)
    launch(kernels.repair_kernel, programs, 4, gradient.device, gradient=gradient, repair=repair, side=side, n=gradient.numel(),
        per_program=-(-gradient.numel() // programs), DTYPE=DTYPES[compute_dtype(gradient)], B=1024)  # fmt: skip
