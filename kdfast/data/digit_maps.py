"""Digits for methods that read feature maps: small CNNs whose last map is a 4 x 4 grid of tokens; balanced and long-tailed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from kdfast.data.digit_tail import tail_counts
from kdfast.data.digits import CLASSES, digit_splits
from kdfast.data.task import Rows, Task

TAIL = 0.05  # the rarest class keeps this share of the most frequent one's images


class MapNet(nn.Module):
    """3x3 convolutions (the first at 8x8, the others at 4x4), mean over the grid, one linear layer: logits [B, 10].

    `body` returns the last map [B, widths[-1], 4, 4].
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[tuple[str, nn.Module]] = []
        for i, (before, after) in enumerate(zip((1, *widths), widths)):
            layers += [(f"conv{i}", nn.Conv2d(before, after, 3, padding=1)), (f"relu{i}", nn.ReLU())]
            if i == 0:
                layers.append(("pool", nn.MaxPool2d(2)))
        self.body = nn.Sequential(OrderedDict(layers))
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def long_tailed(labels: torch.Tensor, tail: float = TAIL) -> torch.Tensor:
    """Positions kept of `labels`: class c keeps its first round(n_max tail^(c/9)) images, at least one; n_max is the rarest class's count.

    >>> long_tailed(torch.arange(10).repeat(100)).numel()
    341
    """
    most = int(labels.bincount(minlength=CLASSES).min())
    counts = enumerate(tail_counts(most, tail))
    return torch.cat([(labels == c).nonzero().flatten()[: max(1, count)] for c, count in counts])


def map_splits(seed: int, *, tail: float | None = None) -> dict[str, Rows]:
    """As `digit_splits`, the student on all 900 training images of the teacher or on a long-tailed part of them."""
    splits = digit_splits(seed)
    images, labels = splits["teacher"].tensors
    if tail is None:
        return splits | {"student": splits["teacher"]}
    index = long_tailed(labels, tail)
    return splits | {"student": Rows(images[index], labels[index])}


def digit_maps_task(tail: float | None = None) -> Task:
    """Ten classes; teacher CNN with 220k weights on 900 balanced images, student CNN with 5k weights."""
    return Task(
        name="digit_maps" if tail is None else "digit_maps_tail",
        title="handwritten digits (scikit-learn), CNNs with a 4x4 map"
        + ("" if tail is None else f", long-tailed for the student (rarest class {tail:g} of the most frequent)"),
        splits=partial(map_splits, tail=tail),
        student=lambda: MapNet((16, 32)),
        teacher=lambda: MapNet((64, 128, 128)),
        layers={"tokens": ("body", "body"), "embedding": ("body", "body")},
        widths={"tokens": (32, 128), "embedding": (32, 128)},
        classes=CLASSES,
        steps=280,
        teacher_steps=280,
        eval_every=40,
    )


def digit_maps_tail_task() -> Task:
    return digit_maps_task(TAIL)
