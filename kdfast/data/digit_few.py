"""Digits with five labels per class and many images without, and a teacher that is weak: the semi-supervised case."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from kdfast.data.digits import CLASSES, digit_mlp, digit_splits
from kdfast.data.task import Rows, Task

UNLABELLED = -100


class LabelledAndPool(Dataset):
    """Each batch is all labelled rows, then the asked-for rows of the pool with the label -100; one pass is one of the pool."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, pool: torch.Tensor) -> None:
        self.images, self.labels, self.pool = images, labels, pool

    def __len__(self) -> int:
        return len(self.pool)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.cat((self.labels, torch.full((len(indices),), UNLABELLED)))
        return torch.cat((self.images, self.pool[indices])), labels


def few_label_splits(seed: int, *, per_class: int = 5, noise: float = 0.8) -> dict[str, Dataset]:
    """ "teacher": 200 images with noise; "student": a pool of 500 others, the first `per_class` of each class labelled; 100 "val"; "test"."""
    splits = digit_splits(seed, teacher=700, student=200, val=100)
    images, labels = splits["teacher"].tensors
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    for_teacher, pool = order[:200], order[200:]
    noisy = images[for_teacher] + noise * torch.randn(images[for_teacher].shape, generator=generator)
    first = torch.cat([pool[labels[pool] == c][:per_class] for c in range(CLASSES)])
    return splits | {
        "teacher": Rows(noisy, labels[for_teacher]),
        "student": LabelledAndPool(images[first], labels[first], images[pool]),
    }


def digit_few_task() -> Task:
    """Ten classes; MLP 64-32-32 with one or two heads on 50 labels and 500 images; its teacher is right in about 3 of 4 cases."""
    return Task(
        name="digit_few",
        title="handwritten digits (scikit-learn), 5 labels per class and 500 images without, a weak teacher",
        splits=few_label_splits,
        student=lambda: digit_mlp(32),
        teacher=lambda: digit_mlp(64),
        classes=CLASSES,
        steps=800,
        eval_every=40,
        teacher_steps=300,
        batch_size=50,
        threads=1,
    )
