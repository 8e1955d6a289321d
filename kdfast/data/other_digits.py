"""A teacher for digits 0 to 4, and students with few labels for something else: digits 5 to 9, or where on a canvas the larger digit is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.data.digits import digit_splits
from kdfast.data.task import Rows, Task

WIDTH, PATCH = 64, 2


class TokenViT(nn.Module):
    """A small ViT on 2x2 patches with a class token: logits [B, C] of images [B, 1, S, S] of any even S.

    `blocks.<i>` return tokens [B, 1 + N, D] of which the last go through `norm` and `head`. The positions of an 8x8 image are resized
    bilinearly for another grid.
    """

    def __init__(self, depth: int, classes: int, width: int = WIDTH, heads: int = 4, grid: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, grid, grid))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.patches(images)
        positions: Tensor = self.positions
        if positions.shape[2:] != maps.shape[2:]:
            positions = F.interpolate(positions, size=maps.shape[2:], mode="bilinear", align_corners=False)
        x = (maps + positions).flatten(2).mT
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def other_splits(seed: int, *, per_class: int = 10) -> dict[str, Rows]:
    """ "teacher": 0 to 4 of 900 images; "student": `per_class` of each of 5 to 9, labels 0 to 4; "val", "test" alike, and the teacher's own."""
    splits = digit_splits(seed)
    parts: dict[str, tuple[Tensor, ...]] = {}
    for name in ("teacher", "val", "test"):
        images, labels = splits[name].tensors
        low = labels < 5
        of_teacher = name if name == "teacher" else f"teacher_{name}"
        parts[of_teacher] = images[low], labels[low]
        parts["student" if name == "teacher" else name] = images[~low], labels[~low] - 5
    images, labels = parts["student"]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    chosen = torch.cat([order[labels[order] == c][:per_class] for c in range(5)])
    parts["student"] = images[chosen], labels[chosen]
    return {name: Rows(*tensors) for name, tensors in parts.items()}


def quadrant_splits(seed: int, *, train: int = 200, held_out: int = 200) -> dict[str, Rows]:
    """Canvases 16x16 with two different digits in two quadrants; the label is the quadrant of the larger. The teacher's as above."""
    digits, random = digit_splits(seed), np.random.default_rng(seed)
    parts: dict[str, Any] = {name: rows for name, rows in other_splits(seed).items() if "teacher" in name}
    for name, source, count in (
        ("student", "teacher", train),
        ("val", "val", held_out // 2),
        ("test", "test", held_out),
    ):
        images, labels = digits[source].tensors
        canvases, answers = torch.zeros(count, 1, 16, 16), torch.zeros(count, dtype=torch.long)
        for i in range(count):
            first, second = random.choice(len(labels), 2, replace=False)
            while labels[first] == labels[second]:
                second = random.integers(len(labels))
            places = random.choice(4, 2, replace=False)
            for index, place in zip((first, second), places.tolist()):
                top, left = 8 * (place // 2), 8 * (place % 2)
                canvases[i, 0, top : top + 8, left : left + 8] = images[index, 0]
            answers[i] = int(places[0] if labels[first] > labels[second] else places[1])
        parts[name] = Rows(canvases, answers)
    return parts


def other_digits_task() -> Task:
    """Teacher ViT of 4 blocks, student ViT of 2 blocks, both of width 64; five classes that are not the teacher's."""
    return Task(
        name="other_digits",
        title="digits 5 to 9 (scikit-learn) with 10 labels each, a teacher that knows 0 to 4 (plain kd takes its classes for these)",
        splits=other_splits,
        student=lambda: TokenViT(2, 5),
        teacher=lambda: TokenViT(4, 5),
        layers={
            "tokens": ("blocks.1", None),
            "first": (None, "blocks.1"),
            "second": (None, "blocks.2"),
            "third": (None, "blocks.3"),
        },
        widths={"tokens": (WIDTH, WIDTH), "first": (WIDTH, WIDTH), "second": (WIDTH, WIDTH), "third": (WIDTH, WIDTH)},
        classes=5,
        steps=300,
        teacher_steps=300,
        eval_every=50,
        batch_size=32,
        lr=1e-3,
        threads=1,
    )


def digit_quadrants_task() -> Task:
    """The second target: four classes on canvases of 64 patches, the same teacher."""
    return dataclasses.replace(
        other_digits_task(),
        name="digit_quadrants",
        title="the quadrant of the larger of two digits (200 canvases), a teacher that knows the digits 0 to 4",
        splits=quadrant_splits,
        student=lambda: TokenViT(2, 4),
        classes=4,
    )
