"""Patch embeddings of vision transformers: an image or a map to tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from kdfast._checks import check_int


class OverlapPatchEmbedding(nn.Module):
    """LayerNorm of a convolution whose patches overlap, flattened: [B, C, H, W] -> tokens [B, N, dim], (h, w), N = h w, row-major.

    From SegFormer (Xie et al. 2021, https://arxiv.org/abs/2105.15203), where stage 1 has kernel 7, stride 4 and the others 3, 2.

    Args: padding: default kernel // 2.

    >>> tokens, (h, w) = OverlapPatchEmbedding(3, 32, kernel=7, stride=4)(torch.randn(2, 3, 64, 128))
    """

    def __init__(
        self, channels: int, dim: int, *, kernel: int = 3, stride: int = 2, padding: int | None = None
    ) -> None:
        super().__init__()
        check_int("kernel", kernel, low=1)
        check_int("stride", stride, low=1)
        self.project = nn.Conv2d(channels, dim, kernel, stride, padding=kernel // 2 if padding is None else padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        maps = self.project(x)
        return self.norm(maps.flatten(2).mT), (maps.shape[2], maps.shape[3])


class Pyramid(NamedTuple):
    """What a hierarchical network makes of an image, stage by stage: maps F_i [B, C_i, h_i, w_i], patch embeddings E_i [B, h_i w_i, C_i]."""

    maps: list[Tensor]
    embeddings: list[Tensor]
