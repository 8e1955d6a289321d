"""Digits seen by two senses: the left four columns, and the right four with much noise; networks that read one of them, or both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast.data.digits import CLASSES, digit_splits
from kdfast.data.task import NamedRows, Task

NOISE = 0.5  # standard deviation on the right half, of pixels in [0, 1]


def two_view_splits(seed: int, *, noise: float = NOISE) -> dict[str, NamedRows]:
    """ "student" (900 images), "val", "test": the right four columns have noise that belongs to the image."""
    generator, parts = torch.Generator().manual_seed(seed), {}
    for name, rows in digit_splits(seed).items():
        images = rows.tensors[0].clone()
        images[..., 4:] += noise * torch.randn(images[..., 4:].shape, generator=generator)
        parts[name] = NamedRows(images=images, labels=rows.tensors[1])
    return {"student": parts["teacher"], "val": parts["val"], "test": parts["test"]}


class ColumnMLP(nn.Module):
    """8 (stop - start)-64-64-10 on columns start to stop of images [B, 1, 8, 8]; layers `first`, `second`, `head`."""

    def __init__(self, start: int, stop: int, width: int = 64) -> None:
        super().__init__()
        self.columns = slice(start, stop)
        self.first = nn.Sequential(nn.Linear(8 * (stop - start), width), nn.ReLU())
        self.second, self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU()), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images[..., self.columns].flatten(1))))


def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Student on the noisy right half, a teacher on both halves, a teacher on the left one."""
    return ColumnMLP(4, 8), ColumnMLP(0, 8), ColumnMLP(0, 4)


def two_view_digits_task() -> Task:
    """30 epochs together, 10 of the masks, 60 of the student, of 14 steps each."""
    return Task(
        name="two_view_digits",
        title="handwritten digits (scikit-learn): the student sees the right half with noise, its teachers the left half or both",
        splits=two_view_splits,
        sizes={"classes": CLASSES, "stage1_steps": 420, "stage2_steps": 140, "epochs": 60},
        classes=CLASSES,
        steps=1400,
        eval_every=140,
        batch_size=64,
        lr=1e-3,
        threads=1,
    )
