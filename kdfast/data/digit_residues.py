"""Digits modulo a number: few classes that hide ten, most of the student's images without a label."""

from __future__ import annotations

from functools import partial

import torch

from kdfast.data.digits import digit_mlp, digit_splits, narrow_mlp, not_among
from kdfast.data.task import Rows, Task


def residue_splits(seed: int, *, classes: int, labelled: int = 300) -> dict[str, Rows]:
    """Digits modulo `classes`: batches (images, residue, digit). The student has all 900 images, `labelled` of them with labels."""
    splits = digit_splits(seed, student=labelled)
    parts = {}
    for name, rows in splits.items():
        images, digits = rows.tensors
        parts[name] = (images, digits % classes, digits)
    images, known, digits = parts["student"]
    rest = not_among(parts["teacher"][0], images)  # [900]
    more = [tensor[rest] for tensor in parts["teacher"]]
    unknown = torch.full_like(more[1], -100)
    parts["student"] = (torch.cat((images, more[0])), torch.cat((known, unknown)), torch.cat((digits, more[2])))
    return {name: Rows(*tensors) for name, tensors in parts.items()}


def residue_task(classes: int = 2) -> Task:
    """Few classes that hide ten digits; teacher 64-256-64-C on 900 labels, student 64-8-C on 300 of them and 600 images without."""
    kind = {2: "even or odd", 10: "ten classes"}.get(classes, f"modulo {classes}")
    return Task(
        name="digit_parity" if classes == 2 else f"digit_residue_{classes}",
        title=f"handwritten digits (scikit-learn), {kind}; 300 labels for the student and 600 images without (plain kd reads only the 300)",
        splits=partial(residue_splits, classes=classes),
        student=partial(narrow_mlp, 8, classes),
        teacher=partial(digit_mlp, 256, 64, classes),
        layers={"embedding": ("hidden", "embedding")},
        widths={"embedding": (8, 64)},
        classes=classes,
        steps=600,
        teacher_steps=400,
        threads=1,
    )
