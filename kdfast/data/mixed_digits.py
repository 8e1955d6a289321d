"""Digits with a teacher that was trained on mixed images; the student has 400 images as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

from kdfast.data.digits import CLASSES, digit_mlp, digit_splits
from kdfast.data.mixing import MixedRows
from kdfast.data.task import Task


def mixed_splits(seed: int) -> dict[str, Any]:
    splits = digit_splits(seed, teacher=400, student=200)
    images, labels = splits["teacher"].tensors
    return splits | {"student": splits["teacher"], "teacher": MixedRows(images, labels, CLASSES)}


def mixed_digits_task() -> Task:
    """Teacher 64-256-64-10 on fully mixed images, student 64-6-64-10 on the same 400 unmixed ones."""
    return Task(
        name="mixed_digits",
        title="handwritten digits (scikit-learn), 400 labels, the teacher trained with mixup",
        splits=mixed_splits,
        student=partial(digit_mlp, 6, 64),
        teacher=partial(digit_mlp, 256, 64),
        classes=CLASSES,
        steps=250,
        teacher_steps=500,
        eval_every=50,
        threads=1,
    )
