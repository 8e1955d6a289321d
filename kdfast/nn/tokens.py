"""Tokens of a vision model: from a CNN's feature map or a ViT's sequence, on the same grid in both models."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import check_int


def tokenize_feature_map(x: Tensor, patch: int = 1) -> Tensor:
    """A feature map cut into non-overlapping patches: [B, C, h, w] -> [B, (h/p)(w/p), C p p].

    Tokens in row-major order of the patches; inside a token the channel varies slowest, then the patch's rows.

    >>> tokenize_feature_map(torch.randn(8, 64, 4, 4), patch=2).shape
    torch.Size([8, 4, 256])
    """
    check_int("patch", patch, low=1)
    if x.dim() != 4 or x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(f"x: expected [B, C, h, w] with h and w divisible by patch={patch}, got {tuple(x.shape)}")
    b, c, h, w = x.shape
    cut = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def tokens_to_map(tokens: Tensor, class_tokens: int = 1) -> Tensor:
    """A ViT's sequence as a map: [B, class_tokens + g g, D] -> [B, D, g, g]; the leading class tokens are dropped.

    >>> tokens_to_map(torch.randn(8, 197, 192)).shape
    torch.Size([8, 192, 14, 14])
    """
    check_int("class_tokens", class_tokens)
    side = math.isqrt(max(tokens.shape[1] - class_tokens, 0)) if tokens.dim() == 3 else 0
    if side == 0 or side * side != tokens.shape[1] - class_tokens:
        raise ValueError(
            f"tokens: expected [B, {class_tokens} + g^2, D] for a g x g grid, got {tuple(tokens.shape)}; set class_tokens"
        )
    return tokens[:, class_tokens:].mT.reshape(tokens.shape[0], tokens.shape[2], side, side)


def align_maps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, C, h, w] on one grid: the larger is average-pooled (adaptively) to the smaller height and width."""
    if a.dim() != 4 or b.dim() != 4 or a.shape[0] != b.shape[0]:
        raise ValueError(f"b: expected maps [B, C, h, w] of one batch size, got {tuple(a.shape)} and {tuple(b.shape)}")
    size = tuple(min(pair) for pair in zip(a.shape[2:], b.shape[2:]))
    pooled = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))  # type: ignore[arg-type]
    return tuple(pooled)  # type: ignore[return-value]
