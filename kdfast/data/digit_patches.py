"""Digits for a vision Transformer that teaches: 16x16 images, a teacher of two stages over patches, a small CNN with maps of the same grids."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.data.digit_stages import StageNet
from kdfast.data.digits import CLASSES, digit_splits
from kdfast.data.task import Rows, Task
from kdfast.nn.blocks import MapTransformer
from kdfast.nn.tokens import tokenize_feature_map

SIZE, PATCH = 16, 2
WIDTHS, TEACHER_WIDTHS = (8, 16, 32), (64, 128)


class PatchMerging(nn.Module):
    """2x2 neighbours as one token of another width: [B, D, h, w] -> [B, D', h/2, w/2], LayerNorm before the Linear."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4 * before), nn.Linear(4 * before, after, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = self.linear(self.norm(tokenize_feature_map(maps, 2)))
        return tokens.mT.unflatten(-1, (maps.shape[2] // 2, maps.shape[3] // 2))


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map [B, D, h, w]."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


class PatchViT(nn.Module):
    """Patches of 2x2 as 8x8 tokens of width 64, merged to 4x4 of width 128, a block each: logits [B, 10] of images [B, 1, 16, 16].

    `stage3` returns the map [B, 64, 8, 8], `stage4` (merging, blocks, final norm) [B, 128, 4, 4], of which the mean is classified.
    """

    def __init__(self, widths: tuple[int, int] = TEACHER_WIDTHS, depth: int = 1) -> None:
        super().__init__()
        first, second = widths
        side = SIZE // PATCH
        self.patches = nn.Conv2d(1, first, PATCH, PATCH)
        self.positions = nn.Parameter(0.2 * torch.randn(1, first, side, side))  # at 0.02 the first 100 steps are lost
        self.stage3 = MapTransformer(first, depth)
        self.stage4 = nn.Sequential(PatchMerging(first, second), MapTransformer(second, depth), MapNorm(second))
        self.head = nn.Linear(second, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stage4(self.stage3(self.patches(images) + self.positions))
        return self.head(maps.mean((2, 3)))


def patch_splits(seed: int) -> Mapping[str, Rows]:
    """As `digit_splits`, images of twice the size, bilinear."""
    return {
        name: Rows(F.interpolate(rows.tensors[0], (SIZE, SIZE), mode="bilinear", align_corners=False), rows.tensors[1])
        for name, rows in digit_splits(seed).items()
    }


def digit_patches_task() -> Task:
    """Ten classes; student CNN with 18k weights on 200 labels, its teacher a ViT with 205k on 900."""
    return Task(
        name="digit_patches",
        title="handwritten digits (scikit-learn) at 16x16, 200 labels, a CNN of three stages taught by a ViT of two",
        splits=patch_splits,
        student=lambda: StageNet(WIDTHS),
        teacher=PatchViT,
        layers={"stage3": ("stage2", "stage3"), "stage4": ("stage3", "stage4")},
        widths={"stage3": (WIDTHS[1], TEACHER_WIDTHS[0]), "stage4": (WIDTHS[2], TEACHER_WIDTHS[1])},
        classes=CLASSES,
        hints={
            "student_grids": ((8, 8), (4, 4)),
            "teacher_grids": ((8, 8), (4, 4)),
            "num_heads": (4, 8),
            "teacher_stage": ("stage4",),
        },
        steps=200,
        eval_every=40,
        teacher_steps=280,
        batch_size=32,
        lr=1e-3,
        threads=1,
    )
