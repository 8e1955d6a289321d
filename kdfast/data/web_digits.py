"""A pool as if from the web for a teacher of clean digits: some like its own, most changed in light, sharpness or noise, some no digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.data.digit_maps import MapNet
from kdfast.data.digits import CLASSES, digit_images
from kdfast.data.task import Rows, Task

CLEAN, SHIFTED, NO_DIGIT = range(3)


def web_splits(seed: int) -> dict[str, Rows]:
    """ "teacher": 700 clean digits; "student": a pool made of 700 others, (images, labels, index, kind); "val" 100, "test" 297, clean.

    Half of the pool is shifted, a quarter clean, a quarter no digits. Its labels are true, and random for what is no digit: KD^3 reads none.
    """
    images, labels = digit_images()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    parts = {"teacher": order[:700], "student": order[700:1400], "val": order[1400:1500], "test": order[1500:]}
    splits = {name: Rows(images[index], labels[index]) for name, index in parts.items()}
    pool, truth = splits["student"].tensors
    kind = torch.full((700,), SHIFTED)
    kind[:175], kind[175:350] = CLEAN, NO_DIGIT
    changed = torch.where((kind == SHIFTED).view(-1, 1, 1, 1), shifted_look(pool, generator), pool)
    changed = torch.where((kind == NO_DIGIT).view(-1, 1, 1, 1), no_digits(pool, generator), changed)
    random = torch.randint(CLASSES, (700,), generator=generator)
    truth = torch.where(kind == NO_DIGIT, random, truth)
    return splits | {"student": Rows(changed, truth, torch.arange(700), kind)}


def shifted_look(images: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast 0.4 to 1, brightness up to 0.3, half of them blurred, noise of deviation 0.1."""
    contrast, brightness, blurred = torch.rand(3, len(images), 1, 1, 1, generator=generator)
    blur = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), "replicate"), 3, 1)
    images = torch.where(blurred < 0.5, blur, images)
    images = (0.4 + 0.6 * contrast) * images + 0.3 * brightness
    return (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def no_digits(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels in another order for half of the images, the left half of one digit beside the right half of another for the rest."""
    orders = torch.rand(len(images), 64, generator=generator).argsort(1)
    scrambled = images.flatten(1).gather(1, orders).view_as(images)
    other = images[torch.randperm(len(images), generator=generator)]
    halves = torch.cat((images[..., :4], other[..., 4:]), -1)
    return torch.where((torch.arange(len(images)) % 2 == 0).view(-1, 1, 1, 1), scrambled, halves)


def web_digits_task() -> Task:
    """Teacher CNN of 16 and 32 channels, student of 4 and 8; 54 epochs over the pool."""
    return Task(
        name="web_digits",
        title="handwritten digits (scikit-learn): a pool of 700 images, half shifted, a quarter no digits, without labels for KD^3",
        splits=web_splits,
        student=lambda: MapNet((4, 8)),
        teacher=lambda: MapNet((16, 32)),
        layers={"tokens": ("body", "body")},
        widths={"tokens": (8, 32)},
        classes=CLASSES,
        hints={"epochs": 54, "max_epoch": 27, "scale": 36},
        columns=("index", "kind"),
        steps=600,
        teacher_steps=600,
        eval_every=60,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
        threads=1,
    )
