"""Digits of which a fifth has a label drawn at random: what to keep of them?"""

from __future__ import annotations

import numpy as np
import torch

from kdfast.data.digits import CLASSES, digit_mlp, digit_splits, narrow_mlp
from kdfast.data.task import Rows, Task


def relabelled_splits(seed: int, *, share: float = 0.2) -> dict[str, Rows]:
    """900 images for teacher and student; of a share the labels are drawn anew from all ten classes. Validation and test are clean."""
    splits = digit_splits(seed)
    images, labels = splits["teacher"].tensors
    # not torch's generator: a random part drawn from the same seed would be just these images
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(labels))[: round(share * len(labels))]
    labels = labels.clone()
    labels[chosen] = torch.from_numpy(random.integers(CLASSES, size=len(chosen)))
    rows = Rows(images, labels)
    return splits | {"teacher": rows, "student": rows}


def relabelled_digits_task() -> Task:
    """Teacher 64-256-256-10 and student 64-32-10 on the same 900 images."""
    return Task(
        name="relabelled_digits",
        title="handwritten digits (scikit-learn), 900 images, 20 % of their labels random (ce and kd learn from all of them)",
        splits=relabelled_splits,
        student=lambda: narrow_mlp(32),
        teacher=lambda: digit_mlp(256),
        classes=CLASSES,
        steps=300,
        teacher_steps=300,
        eval_every=30,
        threads=1,
    )
