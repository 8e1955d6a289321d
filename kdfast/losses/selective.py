"""Selective losses: two models trained together, where each learns only at the places where the other is more reliable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import check_choice, check_number, check_pair
from kdfast._library import compute_dtype
from kdfast.losses.module import LossModule, LossOutput
from kdfast.ops.selective import selective_kl, selective_total

DISTANCES = ("cosine", "mse")


def selective_kd_loss(
    logits_a: Tensor,
    logits_b: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    scale_t2: bool = True,
    ignore_index: int = 255,
    normalizer: str = "valid",
    reliability: str = "label",
    backend: str | None = None,
) -> LossOutput:
    """Pixel-wise selective distillation between two models: per pixel, the less reliable learns from the more reliable.

        loss = to_a + to_b,   to_a = T^2/Z sum_{pixels where b is more reliable} KL(softmax(b/T) || softmax(a/T)),  to_b mirrored

    (T^2 only with scale_t2.) The teaching side of each term is under stop-gradient, so one backward of `loss` trains both
    models, each by its own term. Reliability, direction and Z: `kdfast.ops.selective_kl`. No valid pixel: exact 0, zero gradients.

    Args:
        logits_a, logits_b: [B, K, ...], the same shape, at the resolution of the labels.
        labels: [B, ...] integers in [0, K) or `ignore_index`.
        temperature, normalizer, reliability, backend: as in `kdfast.ops.selective_kl`.
    Returns:
        LossOutput(loss, parts): to_a, to_b, and the pixel counts num_valid, num_to_a (b teaches a), num_to_b.

    >>> loss, parts = selective_kd_loss(cnn(x), vit(x), labels)
    """
    check_number("temperature", temperature, low=0.0, open_low=True)  # before it is squared
    out = selective_total(
        logits_a, logits_b, labels, temperature=temperature, ignore_index=ignore_index, normalizer=normalizer,
        reliability=reliability, factor=temperature**2 if scale_t2 else 1.0, backend=backend,
    )  # fmt: skip
    parts = {"to_a": out.loss_to_a.detach(), "to_b": out.loss_to_b.detach()}
    counts = {"num_valid": out.num_valid, "num_to_a": out.num_to_a, "num_to_b": out.num_to_b}
    return LossOutput(out.loss_to_a + out.loss_to_b, parts | counts)


class RegionSelection(NamedTuple):
    """What `region_selection` returns; maps are [B, Gh, Gw]."""

    loss_to_a: Tensor
    loss_to_b: Tensor
    direction: Tensor  # int8: +1 b teaches a, -1 a teaches b, 0 tie or no valid pixel
    reliability_a: Tensor  # mean over the region's valid pixels, 0 without one
    reliability_b: Tensor


def region_selective_loss(
    feat_a: Tensor,
    feat_b: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    labels: Tensor,
    *,
    grid: Sequence[int] = (4, 4),
    distance: str = "cosine",
    ignore_index: int = 255,
    reliability: str = "label",
    backend: str | None = None,
) -> LossOutput:
    """Region-wise selective distillation of features: per region, the less reliable model's features follow the other's.

        loss = to_a + to_b,   to_a = 1/R sum_{regions where b is more reliable} distance(sg(feat_b), feat_a),  to_b mirrored

    A region is one of Gh x Gw equal rectangles of the image, its reliability the mean of the pixels' (`kdfast.ops.selective_kl`)
    over its valid pixels; R is the number of regions in the batch with a valid pixel, at least 1. A region's features are one
    vector. No gradient reaches the logits.

    Args:
        feat_a, feat_b: [B, C, h, w], the same shape (project first). logits_a, logits_b: [B, K, H, W]. labels: [B, H, W].
        grid: (Gh, Gw), which must divide (h, w) and (H, W).
        distance: "cosine", 1 - cos of the two vectors, or "mse", the mean squared difference.
    Returns:
        LossOutput(loss, parts): to_a, to_b, and the region counts num_to_a, num_to_b.
    Raises:
        ValueError: shapes that differ, a grid that does not divide a size (named), and what `selective_kl` raises.

    >>> loss, parts = region_selective_loss(feat_cnn, feat_vit, cnn_logits, vit_logits, labels, grid=(2, 2))
    """
    with torch.no_grad():
        maps = selective_kl(
            logits_a, logits_b, labels, ignore_index=ignore_index, reliability=reliability, backend=backend
        )
    out = region_selection(
        feat_a, feat_b, maps.reliability_a, maps.reliability_b, maps.valid, grid=grid, distance=distance
    )
    parts = {"to_a": out.loss_to_a.detach(), "to_b": out.loss_to_b.detach()}
    counts = {"num_to_a": (out.direction == 1).sum(), "num_to_b": (out.direction == -1).sum()}
    return LossOutput(out.loss_to_a + out.loss_to_b, parts | counts)


def region_selection(
    feat_a: Tensor,
    feat_b: Tensor,
    reliability_a: Tensor,
    reliability_b: Tensor,
    valid: Tensor,
    *,
    grid: Sequence[int] = (4, 4),
    distance: str = "cosine",
) -> RegionSelection:
    """`region_selective_loss` from reliability maps that exist already, with both losses, the direction and the pooled maps.

    Args:
        feat_a, feat_b: [B, C, h, w]. reliability_a, reliability_b: [B, H, W], 0 where not valid. valid: [B, H, W] bool.
    """
    check_pair(feat_a, feat_b, ("feat_a", "feat_b"))
    if feat_a.dim() != 4 or feat_a.shape != feat_b.shape:
        raise ValueError(
            f"feat_b: expected the shape [B, C, h, w] of feat_a, got {tuple(feat_b.shape)} and {tuple(feat_a.shape)}"
        )
    if valid.dim() != 3 or valid.shape[0] != feat_a.shape[0]:
        raise ValueError(f"labels: expected shape [{feat_a.shape[0]}, H, W], got {tuple(valid.shape)}")
    check_choice("distance", distance, DISTANCES)
    gh, gw = _check_grid(grid, {"feat_a": feat_a.shape[2:], "labels": valid.shape[1:]})

    count = _regions(valid.unsqueeze(1), gh, gw).sum(-1)  # [B, Gh, Gw] valid pixels
    r_a, r_b = (_regions(r.unsqueeze(1), gh, gw).sum(-1) / count.clamp_min(1) for r in (reliability_a, reliability_b))
    to_a, to_b = r_b < r_a, r_a < r_b
    broken = torch.where(r_a.isnan() | r_b.isnan(), math.nan, 0.0)  # not hidden: see selective_kl
    regions = (count > 0).sum().clamp_min(1)
    dtype = compute_dtype(feat_a, feat_b)
    v_a, v_b = (_regions(f.to(dtype), gh, gw) for f in (feat_a, feat_b))  # [B, Gh, Gw, C h/Gh w/Gw]
    losses = [
        (torch.where(chosen, _distance(teacher.detach(), student, distance), 0.0) + broken).sum() / regions
        for student, teacher, chosen in ((v_a, v_b, to_a), (v_b, v_a, to_b))
    ]
    return RegionSelection(losses[0], losses[1], to_a.to(torch.int8) - to_b.to(torch.int8), r_a, r_b)


def _regions(maps: Tensor, gh: int, gw: int) -> Tensor:
    """[B, C, H, W] -> [B, Gh, Gw, C * H/Gh * W/Gw]: each region as one vector."""
    b, c, h, w = maps.shape
    return maps.reshape(b, c, gh, h // gh, gw, w // gw).permute(0, 2, 4, 1, 3, 5).flatten(3)


def _distance(teacher: Tensor, student: Tensor, kind: str) -> Tensor:
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    return 1 - F.cosine_similarity(student, teacher, dim=-1, eps=1e-8)


def _check_grid(grid: Sequence[int], sizes: dict[str, torch.Size]) -> tuple[int, int]:
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(type(g) is int and g >= 1 for g in grid):
        raise ValueError(f"grid: expected two ints >= 1, got {grid!r}")
    for name, size in sizes.items():
        for axis, cells, pixels in zip(("height", "width"), grid, size):
            if pixels % cells:
                raise ValueError(f"grid: {cells} regions do not divide the {axis} of {name}, {pixels}")
    return grid[0], grid[1]


class SelectiveKDLoss(LossModule, function=selective_kd_loss): ...


class RegionSelectiveLoss(LossModule, function=region_selective_loss): ...
