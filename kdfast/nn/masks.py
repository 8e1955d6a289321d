"""Masks of features: a small network that says, for each feature of a layer, how much of it passes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._checks import check_int
from kdfast.nn.capture import find_module


class FeatureMask(nn.Module):
    """m = sigmoid(Linear(MHA(h, h, h))) in [0, 1] for each of F features, h = F tokens of width d made by one Linear(F, F d).

    Vectors [B, F], or with `spatial` maps [B, F, H, W], which a depthwise 3x3 convolution of stride 2, a 1x1 convolution, batch norm, ReLU
    and the mean over the grid bring to vectors (a map of 1x1 is a vector). The mask is [B, F].

    Args: dim: F. heads, factor: d = floor(F / (factor heads)) heads. hidden: d itself, a multiple of heads.
    """

    def __init__(
        self, dim: int, *, heads: int = 3, factor: int = 2, spatial: bool = False, hidden: int | None = None
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("factor", factor)):
            check_int(name, value, low=1)
        d = dim // (factor * heads) * heads if hidden is None else hidden
        if d < 1 or d % heads:
            raise ValueError(
                f"hidden: expected a multiple of {heads} heads, got {d} (dim {dim} is too small for factor {factor} and {heads} heads)"
            )
        self.dim, self.hidden = dim, d
        self.reduce: nn.Module | None = None
        if spatial:
            depthwise = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim, bias=False)
            self.reduce = nn.Sequential(depthwise, nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
        self.embed, self.fc = nn.Linear(dim, dim * d), nn.Linear(d, 1)
        self.mha = nn.MultiheadAttention(d, heads, batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        """The mask [B, F] of features [B, F] or [B, F, H, W]."""
        if features.dim() not in (2, 4) or features.shape[1] != self.dim:
            raise ValueError(
                f"features: expected [B, {self.dim}] or [B, {self.dim}, H, W], got {tuple(features.shape)}"
            )
        if features.dim() == 4:
            if features.shape[2:] == (1, 1):
                features = features.flatten(1)
            elif self.reduce is None:
                raise ValueError("features: expected vectors, got maps; make the mask with spatial=True")
            else:
                features = self.reduce(features).mean((2, 3))
        h = self.embed(features).unflatten(1, (self.dim, self.hidden))  # [B, F, d]
        h, _ = self.mha(h, h, h, need_weights=False)  # without the weights no [B, heads, F, F] table is kept
        return torch.sigmoid(self.fc(h).squeeze(-1))

    def apply_to(self, features: Tensor) -> Tensor:
        """m f, over all places of a map."""
        mask = self(features)
        return features * (mask.unflatten(1, (-1, 1, 1)) if features.dim() == 4 else mask)


@contextmanager
def attach_mask(model: nn.Module, path: str, mask: FeatureMask) -> Iterator[None]:
    """Inside the block the submodule at a dotted path gives mask.apply_to(output), which all later layers see. ValueError: no such path.

    >>> with attach_mask(teacher, "layer3", mask):
    ...     logits = teacher(x)
    """

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return mask.apply_to(output)

    handle = find_module(model, path, "path").register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
