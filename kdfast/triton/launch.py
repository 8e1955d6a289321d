"""What the Triton ops share: how rows lie in memory, how large a tile is, and the launch itself.

A kernel sees logits as outer index o x rows i x classes c. Rows are every axis but the class axis; the innermost row axis is
cut into tiles, the up to three others make o. Any strides are read in place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
OUTER_AXES = 3
TILE = 4096  # elements of one model in a tile: 16 per thread; two rows of 32k at once would spill
MAX_32 = 2**31 - 1


@dataclass
class Layout:
    """Rows of logits: `outer` x `inner` of them; per operand the strides of o's three axes, of i and of the classes."""

    inner: int
    sizes: tuple[int, int, int]
    strides: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    @property
    def outer(self) -> int:
        return self.sizes[0] * self.sizes[1] * self.sizes[2]

    @property
    def rows(self) -> int:
        return self.outer * self.inner


def lay_out(tensors: Sequence[Tensor], dim: int) -> Layout:
    """Joins row axes that are one axis in every operand's memory. Empty tensors (no gradient wanted) get strides 0."""
    shape = tensors[0].shape
    present = [t for t in tensors if t.dim() == len(shape)]
    axes = [axis for axis in range(len(shape)) if axis != dim and shape[axis] != 1]
    joined: list[tuple[int, list[int]]] = []  # (size, stride per operand), outermost first
    for axis in axes:
        strides = [t.stride(axis) for t in present]
        if joined and all(before == now * shape[axis] for before, now in zip(joined[-1][1], strides)):
            joined[-1] = (joined[-1][0] * shape[axis], strides)
        else:
            joined.append((shape[axis], strides))
    if len(joined) > OUTER_AXES + 1:
        raise ValueError(f"logits: expected at most {OUTER_AXES + 1} separate row axes, got shape {tuple(shape)}")
    joined = [(1, [0] * len(present))] * (OUTER_AXES + 1 - len(joined)) + joined
    layout = Layout(joined[3][0], (joined[0][0], joined[1][0], joined[2][0]))
    at = 0
    for tensor in tensors:
        if tensor.dim() == len(shape):
            o0, o1, o2, i = (strides[at] for _, strides in joined)
            layout.strides.append((o0, o1, o2, i, tensor.stride(dim)))
            at += 1
        else:
            layout.strides.append((0, 0, 0, 0, 0))
    return layout


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def tile_shape(layout: Layout, classes: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(rows, classes) of a tile, powers of two, and its warps: whole rows while they fit; half as much in float64.

    Rows that lie side by side in memory (maps with the classes on axis 1) are read in runs of at least 16 of them, 32 where the
    classes take several tiles; a single row may double the tile.
    """
    wide = dtype == torch.float64
    tile, width = TILE // 2 if wide else TILE, power_of_two(classes)
    side_by_side = layout.strides[0][3] == 1 and layout.strides[0][4] != 1 and layout.inner > 1
    fewest = min(16, power_of_two(layout.inner)) if side_by_side else 1
    if width * fewest <= (tile if side_by_side else 2 * tile):
        rows = max(tile // width, fewest)
    else:
        rows = min(32, power_of_two(layout.inner)) if side_by_side else 1
        width = tile // rows
    rows = min(rows, 256, power_of_two(layout.inner))
    return rows, width, warps(rows * width * (2 if wide else 1))


def warps(elements: int) -> int:
    """16 elements of a tile for each thread, from 1 warp to 16."""
    return min(max(elements // 512, 1), 16)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Without a GPU (interpreter, ahead-of-time compilation): an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def splits(programs: int, tiles: int, device: torch.device, most: int = 32) -> int:
    """Over how many programs a row is split: 1 unless there are too few rows to fill the GPU."""
    wanted = 2 * multiprocessors(device)
    return 1 if programs >= wanted else max(min(-(-wanted // max(programs, 1)), tiles, most), 1)


# ---------------------------------------------------------------- launch
@dataclass
class Launch:
    """A launch that did not happen: what ahead-of-time compilation needs to know of it."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the block launches are noted, not made. Tensors may be on the meta device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, programs: int, num_warps: int, device: torch.device, **arguments: Any) -> None:
    """Runs `programs` programs, all on grid.x (y and z stop at 65535), on the current stream; nothing waits for it."""
    options = {"num_warps": num_warps, "num_stages": 2}
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, options))
    elif programs > 0:
        context = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with context:
            # enable_fp_fusion by name: its default is about to change
            kernel[(programs,)](**arguments, **options, enable_fp_fusion=True)
