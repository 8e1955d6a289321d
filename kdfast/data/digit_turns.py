"""Digits for learning without labels: 1300 images, few of them with a label."""

from __future__ import annotations

import torch

from kdfast.data.digits import CLASSES, digit_splits
from kdfast.data.task import NamedRows, Task


def turn_splits(seed: int, *, per_class: int = 20) -> dict[str, NamedRows]:
    """ "student": 1300 images, `per_class` of each class with their label, the others with -100; "val" 200, "test" the rest."""
    splits = digit_splits(seed, teacher=1300, student=10 * per_class, val=200)
    images, labels = splits["teacher"].tensors
    generator = torch.Generator().manual_seed(seed)
    known = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(CLASSES):
        rows = (labels == c).nonzero().flatten()
        known[rows[torch.randperm(len(rows), generator=generator)[:per_class]]] = True
    hidden = torch.where(known, labels, -100)
    held_out = {
        name: NamedRows(images=splits[name].tensors[0], labels=splits[name].tensors[1]) for name in ("val", "test")
    }
    return held_out | {"student": NamedRows(images=images, labels=hidden)}


def digit_turns_task() -> Task:
    """Ten classes, 200 labels; methods bring their own small CNN."""
    return Task(
        name="digit_turns",
        title="handwritten digits (scikit-learn), 1300 images of which 200 have a label",
        splits=turn_splits,
        sizes={"classes": CLASSES, "channels": 1, "pretext_steps": 300},
        classes=CLASSES,
        steps=500,
        eval_every=50,
    )
