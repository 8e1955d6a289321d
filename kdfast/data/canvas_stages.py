"""Canvases of digits for methods that read a hierarchical transformer stage by stage: three stages, at 16x16, 8x8 and 4x4."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from kdfast.data.canvases import CLASSES, IGNORE, rise_and_fall, taught_canvas_splits
from kdfast.data.task import Task
from kdfast.metrics import mean_iou
from kdfast.nn.blocks import conv_block
from kdfast.nn.patches import OverlapPatchEmbedding, Pyramid

WIDTHS, TEACHER_WIDTHS = (8, 16, 32), (16, 32, 64)
STUDENT_LR = 1e-2  # chosen beside 3e-3 with labels alone, on the validation split of seed 0
PATCHES = ((3, 2), (3, 2), (3, 2))  # kernel and stride of the patch embeddings
REDUCTIONS = (4, 2, 1)  # of keys and values, by stage: each query sees 16 of them


class MixBlock(nn.Module):
    """Attention over reduced keys, then a feed-forward with a 3x3 depthwise convolution, which is also what tells positions apart."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.reduce = nn.AvgPool2d(reduction)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.first, self.last = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.before(tokens)
        keys = self.reduce(_to_map(x, size)).flatten(2).mT
        tokens = tokens + self.attention(x, keys, keys, need_weights=False)[0]
        maps = self.depthwise(self.first(_to_map(self.between(tokens), size)))
        return tokens + self.last(F.gelu(maps)).flatten(2).mT


def _to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return tokens.mT.unflatten(2, size)


class PyramidEncoder(nn.Module):
    """Image -> `Pyramid`: for each stage a patch embedding, blocks and a norm."""

    def __init__(self, widths: Sequence[int], depth: int, channels: int = 1) -> None:
        super().__init__()
        pairs = zip((channels, *widths), widths, PATCHES)
        self.patches = nn.ModuleList(OverlapPatchEmbedding(a, b, kernel=k, stride=s) for a, b, (k, s) in pairs)
        self.blocks = nn.ModuleList(
            nn.ModuleList(MixBlock(width, max(1, width // 16), r) for _ in range(depth))
            for width, r in zip(widths, REDUCTIONS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, x: Tensor) -> Pyramid:
        found = Pyramid([], [])
        for patches, blocks, norm in zip(self.patches, self.blocks, self.norms):
            tokens, size = patches(x)
            found.embeddings.append(tokens)
            for block in blocks:  # type: ignore[attr-defined]
                tokens = block(tokens, size)
            x = _to_map(norm(tokens), size)
            found.maps.append(x)
        return found


class SegmentationPyramid(nn.Module):
    """SegFormer's form, small: all maps brought to one width and to the first one's size, then the classes of 2x2 pixels at once.

    [B, 1, 32, 32] -> [B, 11, 32, 32]. `encoder` returns a `Pyramid`.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, depth: int = 1, width: int = 32) -> None:
        super().__init__()
        self.encoder = PyramidEncoder(widths, depth)
        self.project = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths)
        self.fuse = conv_block(len(widths) * width, width, kernel=1)
        self.head = nn.Sequential(nn.Conv2d(width, 4 * CLASSES, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        maps = [project(one) for project, one in zip(self.project, self.encoder(x).maps)]
        size = maps[0].shape[2:]
        same = [maps[0]] + [F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps[1:]]
        return self.head(self.fuse(torch.cat(same, 1)))


def canvas_stages_task() -> Task:
    """Eleven classes per pixel; a student transformer of half the teacher's widths and depth, both of three stages."""
    return Task(
        name="canvas_stages",
        title="handwritten digits (scikit-learn) on 32x32 canvases, a class per pixel, transformers of three stages",
        splits=taught_canvas_splits,
        student=SegmentationPyramid,
        teacher=partial(SegmentationPyramid, TEACHER_WIDTHS, 2, 64),
        layers={"pyramid": ("encoder", "encoder")},
        widths={"pyramid": (WIDTHS, TEACHER_WIDTHS)},
        classes=CLASSES,
        dim=1,
        ignore_index=IGNORE,
        hints={"patches": PATCHES, "image_channels": 1, "embedding_weights": (0.1, 0.5, 1.0)},
        metrics={"mIoU": partial(mean_iou, num_classes=CLASSES, ignore_index=IGNORE)},
        steps=400,
        eval_every=50,
        teacher_steps=400,
        batch_size=16,
        lr=3e-3,  # of the teacher
        optimizer=partial(AdamW, lr=STUDENT_LR),
        scheduler=rise_and_fall,
        threads=1,
    )
