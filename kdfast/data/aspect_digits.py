"""A hundred digits with the answers of small models to sixteen yes/no questions about each: what a vision-language model would give."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.data.aspects import fit_attributes
from kdfast.data.digits import CLASSES, digit_splits, narrow_mlp, not_among
from kdfast.data.task import Rows, Task

# The digits of which a question is true: a closed loop, a vertical stroke, ...
OF_CLASSES = ("0689", "147", "235", "038", "57", "27", "06", "49", "89", "3568")
ASPECTS = len(OF_CLASSES) + 6


def attributes(images: Tensor, labels: Tensor) -> Tensor:
    """The truth, [N, 16] bool: ten questions about the digit, six about its image [N, 1, 8, 8]."""
    of_class = torch.stack(
        [(labels.unsqueeze(1) == torch.tensor([int(c) for c in digits])).any(1) for digits in OF_CLASSES], 1
    )
    ink = images[:, 0]
    rows, columns = torch.arange(8.0).view(1, 8, 1), torch.arange(8.0).view(1, 1, 8)
    total = ink.sum((1, 2), keepdim=True).clamp_min(1e-6)
    row, column = (ink * rows).sum((1, 2), keepdim=True) / total, (ink * columns).sum((1, 2), keepdim=True) / total
    of_image = (
        ink[:, :4].sum((1, 2)) > ink[:, 4:].sum((1, 2)),
        ink[:, :, :4].sum((1, 2)) > ink[:, :, 4:].sum((1, 2)),
        (ink * (rows - row) * (columns - column)).sum((1, 2)) > 0,  # slanted
        ink.sum((1, 2)) > 19.5,
        ink[:, 3:5, 3:5].mean((1, 2)) > 0.5,
        (ink > 0.5).sum((1, 2)) > 21,
    )
    return torch.cat((of_class, torch.stack(of_image, 1)), 1)


def aspect_splits(seed: int) -> dict[str, Rows]:
    """ "student": 100 images with (labels, answers [16], answers of other images); the answering models are fitted on 400 others."""
    splits = digit_splits(seed, teacher=500, student=100, val=100)
    images, labels = splits["student"].tensors
    every, truth = splits["teacher"].tensors
    others = not_among(every, images)
    answer = fit_attributes(every[others].flatten(1), attributes(every[others], truth[others]))
    answers = answer(images.flatten(1))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return splits | {"student": Rows(images, labels, answers, answers[order])}


def aspect_digits_task() -> Task:
    """Student 64-32-10 on 100 labels. The teacher of the plain KD arm has 500."""
    return Task(
        name="aspect_digits",
        title="handwritten digits (scikit-learn), 100 labels with answers to 16 questions (plain kd: a teacher with 500 labels)",
        splits=aspect_splits,
        student=lambda: narrow_mlp(32),
        teacher=lambda: narrow_mlp(32),
        classes=CLASSES,
        hints={"aspects": ASPECTS},
        columns=("answers", "answers of others"),
        steps=400,
        teacher_steps=400,
        batch_size=25,
        threads=1,
    )
