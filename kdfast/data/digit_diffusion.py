"""Handwritten digits for a diffusion model: 8x8 images in [-1, 1], held-out images with fixed timesteps and noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdfast.data.digits import digit_images
from kdfast.data.task import NamedRows, Task
from kdfast.nn.diffusion import DiffusionSchedule

TIMESTEPS = 100


def diffusion_splits(seed: int) -> dict[str, Dataset]:
    """ "student": images and classes; "val", "test" (200, 300 images): noisy images, timesteps, classes, and the noise as labels."""
    images, classes = digit_images()
    images = 2 * images - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = {"val": order[:200], "test": order[200:500]}
    splits: dict[str, Dataset] = {"student": NamedRows(images=images[order[500:]], classes=classes[order[500:]])}
    return splits | {name: held_out(images[index], classes[index]) for name, index in parts.items()}


def held_out(images: Tensor, classes: Tensor, repeats: int = 4) -> NamedRows:
    """Each image at `repeats` timesteps, spread evenly over all of them, with noise from a fixed seed."""
    schedule, generator = DiffusionSchedule(TIMESTEPS), torch.Generator().manual_seed(0)
    images, classes = images.repeat(repeats, 1, 1, 1), classes.repeat(repeats)
    timesteps = torch.linspace(0, TIMESTEPS - 1, len(images)).round().long()
    timesteps = timesteps[torch.randperm(len(images), generator=generator)]
    noise = torch.randn(images.shape, generator=generator)
    return NamedRows(x=schedule.add_noise(images, timesteps, noise), timesteps=timesteps, classes=classes, labels=noise)


def explained(predictions: Tensor, noise: Tensor) -> float:
    """1 - mean squared error of the predicted noise, whose variance is 1: 0 for predicting nothing, 1 for all of it."""
    return 1 - float((predictions - noise).square().mean())


def digit_diffusion_task() -> Task:
    """Share of the noise explained on held-out digits."""
    return Task(
        name="digit_diffusion",
        title="noise on handwritten digits (8x8, 100 timesteps): how much of it is found?",
        splits=diffusion_splits,
        sizes={"image": 8, "channels": 1, "classes": 10, "num_timesteps": TIMESTEPS},
        predict=lambda output: output.prediction,
        metrics={"explained noise": explained},
        steps=1000,
        eval_every=100,
        lr=1e-3,
    )
