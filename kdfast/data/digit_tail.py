"""Long-tailed digits in two views: the most frequent class has 150 training images, the rarest 3; the test split is balanced."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.data.digits import CLASSES, digit_images
from kdfast.data.task import NamedRows, Task

MOST, TAIL, HELD_OUT = 150, 0.02, 25


class TwoViews(Dataset):
    """Batches {"images": [2B, ...], "labels": [B]}: weak views of B images, then strong views of the same, drawn anew each time.

    Args: images: [N, C, H, W]. labels: [N]. weak, strong: images -> images, random.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, weak: Callable[[Tensor], Tensor], strong: Callable[[Tensor], Tensor]
    ) -> None:
        self.images, self.labels, self.weak, self.strong = images, labels, weak, strong

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        images = self.images[indices]
        return {"images": torch.cat((self.weak(images), self.strong(images))), "labels": self.labels[indices]}


def shift_each(images: Tensor) -> Tensor:
    """Each image [C, H, W] moved by -1, 0 or 1 pixels in height and width, zeros moving in."""
    _, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    top, left = torch.randint(0, 3, (2, len(images), 1))
    rows = (top + torch.arange(height)).view(-1, 1, height, 1).expand(-1, images.shape[1], -1, width + 2)
    columns = (left + torch.arange(width)).view(-1, 1, 1, width).expand(-1, images.shape[1], height, -1)
    return padded.gather(2, rows).gather(3, columns)


def strong_view(images: Tensor, *, noise: float = 0.1, patch: int = 3) -> Tensor:
    """Moved, with noise of this standard deviation and a square of patch x patch pixels set to 0, another one in each image."""
    images = shift_each(images)
    images = images + noise * torch.randn_like(images)
    places = [torch.randint(0, size - patch + 1, (len(images), 1)) for size in images.shape[2:]]
    inside = [
        (torch.arange(size) >= place) & (torch.arange(size) < place + patch)
        for size, place in zip(images.shape[2:], places)
    ]
    hidden = inside[0].view(len(images), 1, -1, 1) & inside[1].view(len(images), 1, 1, -1)
    return torch.where(hidden, 0.0, images)


def tail_counts(most: int = MOST, tail: float = TAIL) -> list[int]:
    """round(most tail^(c / 9)) training images of class c.

    >>> tail_counts()
    [150, 97, 63, 41, 26, 17, 11, 7, 5, 3]
    """
    return [round(most * tail ** (c / (CLASSES - 1))) for c in range(CLASSES)]


def tail_splits(seed: int) -> dict[str, Dataset]:
    """ "student" in two views, "val" and "test" as they are: 25 images of every class to test, up to 25 others to validate."""
    images, labels = digit_images()
    random = np.random.default_rng(seed)
    chosen: dict[str, list[np.ndarray]] = {"student": [], "val": [], "test": []}
    for c, count in enumerate(tail_counts()):
        rows = random.permutation(np.flatnonzero(labels.numpy() == c))
        test, student, rest = np.split(rows, [HELD_OUT, HELD_OUT + count])
        for name, part in (("test", test), ("student", student), ("val", rest[:HELD_OUT])):
            chosen[name].append(part)
    index = {name: np.concatenate(parts) for name, parts in chosen.items()}
    splits: dict[str, Dataset] = {
        name: NamedRows(images=images[index[name]], labels=labels[index[name]]) for name in ("val", "test")
    }
    train = index["student"]
    return splits | {"student": TwoViews(images[train], labels[train], shift_each, strong_view)}


def digit_tail_task() -> Task:
    """Ten classes, 420 training images; methods bring their own small CNN."""
    return Task(
        name="digit_tail",
        title=f"handwritten digits (scikit-learn), long-tailed ({MOST} training images of the first class, 3 of the last), balanced test",
        splits=tail_splits,
        sizes={"classes": CLASSES, "channels": 1, "epochs": 90},
        classes=CLASSES,
        steps=600,
        eval_every=60,
        lr=3e-3,
        threads=1,
    )
