"""`kdfast.ops.relation` on a GPU: torch's products of a block of rows, compared in the L2 cache by relation_kernel or by the
divergence kernels, and two products more for the gradients. At no time is an [N, N] table allocated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops.relation_blocks import relation_by_blocks
from kdfast.triton import relation_kernels as kernels
from kdfast.triton.launch import launch
from kdfast.triton.pairwise import BLOCK_BYTES, score_tile


def _compare(
    compare: str, tables: list[Tensor], scales: tuple[float, float], mask: Tensor | None, diagonal: bool, first_row: int,
    weight: Tensor | None, needs: tuple[bool, bool], out: Tensor,
) -> None:  # fmt: skip
    """What `_core.core.relation_rows` does to a block of both score tables."""
    sets, rows, columns = tables[0].shape
    tile = score_tile(sets * rows, columns, tables[0].dtype)
    launch(
        kernels.relation_kernel, -(-sets * rows // tile["R"]), tile.pop("num_warps"), out.device, student=tables[0], teacher=tables[1],
        mask=None if mask is None else mask.view(torch.int8), weight=weight, out=out, count=sets * rows, rows=rows, columns=columns, first_row=first_row,
        weight_stride=0 if weight is None else weight.stride(0), out_stride=out.stride(0), student_scale=scales[0],
        teacher_scale=scales[1], SOFTMAX=compare == "softmax", DIAGONAL=diagonal, GRAD_S=needs[0], GRAD_T=needs[1], **tile,
    )  # fmt: skip


def relation(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """kdfast::relation: rows, and of weighted rows the gradients."""
    return relation_by_blocks(_compare, BLOCK_BYTES, *arguments)
