"""Digits with a small label tree: sixteen classes, ten digits and six nodes above them, in three verticals that a specialist each knows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from kdfast.data.digits import digit_splits
from kdfast.data.task import NamedRows, Task
from kdfast.losses import multi_label_loss
from kdfast.metrics import average_precision

# (digits of a vertical, {node: the digits under it})
TREE: tuple[tuple[tuple[int, ...], dict[str, tuple[int, ...]]], ...] = (
    ((0, 6, 8, 9), {"loop": (0, 6, 8, 9), "even": (0, 6, 8)}),
    ((1, 7), {"stroke": (1, 7)}),
    ((2, 3, 4, 5), {"no loop": (2, 3, 4, 5), "even": (2, 4), "odd": (3, 5)}),
)
SIZES = tuple(len(digits) + len(nodes) for digits, nodes in TREE)
FAR = -1e4  # a logit whose sigmoid is exactly 0


def tree_labels(digits: Tensor) -> tuple[Tensor, Tensor]:
    """(vertical [B], multi-hot labels [B, 16]) of digits [B]: a digit is its own class and those of the nodes above it."""
    columns, verticals = [], torch.zeros_like(digits)
    for v, (own, nodes) in enumerate(TREE):
        verticals[torch.isin(digits, torch.tensor(own))] = v
        columns += [torch.isin(digits, torch.tensor(under)) for under in (*((d,) for d in own), *nodes.values())]
    return verticals, torch.stack(columns, 1).float()


def tree_splits(seed: int, *, noise: float = 0.3, student: int = 300) -> dict[str, NamedRows]:
    """ "teacher": 1000 images of which a share `noise` has the label of another digit of its vertical; "student": 300 of them, with the
    same labels; "val" (97) and "test" (700) are clean.
    """
    splits = digit_splits(seed, teacher=1000, student=student, val=97)
    generator = torch.Generator().manual_seed(seed)
    images, digits = splits["teacher"].tensors
    digits = digits.clone()
    vertical = tree_labels(digits)[0]
    for i in torch.randperm(len(digits), generator=generator)[: round(noise * len(digits))].tolist():
        others = [d for d in TREE[int(vertical[i])][0] if d != int(digits[i])]
        digits[i] = others[int(torch.randint(len(others), (), generator=generator))]
    chosen = torch.randperm(len(digits), generator=generator)[:student]
    parts = {"teacher": (images, digits), "student": (images[chosen], digits[chosen])}
    for name in ("val", "test"):
        images, digits = splits[name].tensors
        parts[name] = images, digits
    return {name: named(images, digits) for name, (images, digits) in parts.items()}


def named(images: Tensor, digits: Tensor) -> NamedRows:
    vertical, labels = tree_labels(digits)
    return NamedRows(images=images.flatten(1), vertical=vertical, labels=labels)


class Base(nn.Sequential):
    """What all students share, here the pixels themselves, and a linear layer: logits [B, 16]. `vertical` is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, sum(SIZES))

    def forward(self, images: Tensor, vertical: Tensor | None = None) -> Tensor:
        return super().forward(images)


class Specialists(nn.Module):
    """An MLP 64-64-128 for each vertical; each image goes through that of its own. Logits [B, 16], far below 0 outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, size))
            for size in SIZES
        )

    def forward(self, images: Tensor, vertical: Tensor) -> Tensor:
        logits, start = images.new_full((len(images), sum(SIZES)), FAR), 0
        for v, (one, size) in enumerate(zip(self.each, SIZES)):
            rows = (vertical == v).nonzero().flatten()
            logits[rows, start : start + size] = one(images[rows]).to(logits)
            start += size
        return logits


def tree_precision(scores: Tensor, labels: Tensor) -> float:
    """Average precision of each class over all images, mean over the classes of a vertical, mean over the verticals."""
    each = average_precision(scores, labels)
    return float(torch.stack([one.mean() for one in each.split(SIZES)]).mean())


def digit_tree_task() -> Task:
    """Sixteen classes, multi-hot labels of which 30 % belong to another digit; the specialists see 1000 images, the student 300."""
    return Task(
        name="digit_tree",
        title="handwritten digits (scikit-learn) under a label tree, 30 % wrong labels, three specialists on 1000 images, 300 for the student",
        splits=tree_splits,
        student=Base,
        teacher=Specialists,
        columns=("vertical",),
        hints={"vertical_sizes": SIZES, "first": 64, "hidden": 32},
        metrics={"mean average precision": tree_precision},
        predict=lambda logits: logits,
        loss=multi_label_loss,
        steps=560,
        eval_every=140,
        teacher_steps=620,
        batch_size=32,
        lr=1e-3,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        threads=1,
    )
