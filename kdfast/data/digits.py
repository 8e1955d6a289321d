"""scikit-learn's handwritten digits (1797 images of 8x8, in the package: nothing is downloaded), and small networks for them."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from kdfast.data.task import Rows, Task

CLASSES = 10


def digit_images() -> tuple[torch.Tensor, torch.Tensor]:
    """All images [1797, 1, 8, 8] with pixels in [0, 1], and their labels [1797] int64."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32) / 16.0).unsqueeze(1)
    return images, torch.from_numpy(data.target.astype(np.int64))


def digit_splits(seed: int = 0, *, teacher: int = 900, student: int = 200, val: int = 300) -> dict[str, Rows]:
    """Disjoint, class-balanced splits of a seed: "teacher", "val", "test" (the rest); "student" is a part of "teacher".

    The student sees few labels and the teacher many: the case that distillation is for.
    """
    from sklearn.model_selection import train_test_split

    images, labels = digit_images()
    classes = labels.numpy()
    for_teacher, rest = train_test_split(
        np.arange(len(classes)), train_size=teacher, stratify=classes, random_state=seed
    )
    for_student, _ = train_test_split(for_teacher, train_size=student, stratify=classes[for_teacher], random_state=seed)
    for_val, for_test = train_test_split(rest, train_size=val, stratify=classes[rest], random_state=seed)
    chosen = {"teacher": for_teacher, "student": for_student, "val": for_val, "test": for_test}
    return {name: Rows(images[index], labels[index]) for name, index in chosen.items()}


def shifted(batch: tuple[torch.Tensor, ...], reach: int = 1) -> tuple[torch.Tensor, ...]:
    """The images of (images, labels, ...) moved by up to `reach` pixels, the same random shift for the whole batch; zeros move in.

    >>> images, labels = shifted((torch.ones(4, 1, 8, 8), torch.zeros(4)))
    """
    images, *rest = batch
    padded = nn.functional.pad(images, (reach,) * 4)
    down, right = torch.randint(2 * reach + 1, (2,)).tolist()
    return padded[..., down : down + images.shape[-2], right : right + images.shape[-1]], *rest


def digit_mlp(
    width: int, embedding: int | None = None, classes: int = CLASSES, *, pixels: int = 64
) -> nn.Sequential:  # fmt: skip
    """pixels-width-embedding-classes, with named layers: logits [B, classes] of images [B, 1, 8, 8]; embedding=None is width."""
    embedding = embedding or width
    return nn.Sequential(
        OrderedDict(
            flat=nn.Flatten(),
            hidden=nn.Sequential(nn.Linear(pixels, width), nn.ReLU()),
            embedding=nn.Sequential(nn.Linear(width, embedding), nn.ReLU()),
            head=nn.Linear(embedding, classes),
        )
    )


def narrow_mlp(width: int, classes: int = CLASSES) -> nn.Sequential:
    """64-width-classes, with the layers `flat`, `hidden` and `head`."""
    hidden = nn.Sequential(nn.Linear(64, width), nn.ReLU())
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), hidden=hidden, head=nn.Linear(width, classes)))


def not_among(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[N] bool: which of `images` [N, ...] are none of `others` [M, ...], pixel for pixel."""
    return ~(images.flatten(1).unsqueeze(1) == others.flatten(1)).all(-1).any(1)


def digits_task() -> Task:
    """Ten classes; teacher 64-256-256-10 on 900 labels, student 64-16-16-10 on 200 of them."""
    return Task(
        name="digits",
        title="handwritten digits (scikit-learn), 200 labels for the student, 900 for its teacher",
        splits=digit_splits,
        student=lambda: digit_mlp(16),
        teacher=lambda: digit_mlp(256),
        layers={"hidden": ("hidden", "hidden"), "embedding": ("embedding", "embedding")},
        widths={"hidden": (16, 256), "embedding": (16, 256)},
        classes=CLASSES,
        threads=1,
    )


def noisy_splits(seed: int, *, noise: float = 0.1) -> dict[str, Rows]:
    """As `digit_splits`, the student on all 900 training images; a share `noise` of their labels is drawn anew among the other classes."""
    splits = digit_splits(seed)
    images, labels = splits["teacher"].tensors
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(noise * len(labels))]
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, CLASSES, wrong.shape, generator=generator)) % CLASSES
    return splits | {"student": Rows(images, labels)}


def noisy_digits_task() -> Task:
    """Ten classes, a tenth of the training labels wrong; 64-12-10 and 64-256-256-10 learn together, the small one is scored."""
    return Task(
        name="noisy_digits",
        title="handwritten digits (scikit-learn) with 10 % wrong training labels, two networks trained together",
        splits=noisy_splits,
        student=lambda: narrow_mlp(12),
        teacher=lambda: digit_mlp(256),
        peers=True,
        score_both=False,
        classes=CLASSES,
        threads=1,
    )
