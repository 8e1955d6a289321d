"""Segmentation of handwritten digits: 32x32 canvases with four to six of them, a small CNN and a small ViT that label each pixel.

Classes: 0 to 9, and 10 for the background. The faint edge of a digit belongs to neither and is ignored (255), as the borders of
objects are in the segmentation benchmarks.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kdfast.data.digits import digit_splits
from kdfast.data.task import Rows, Task
from kdfast.metrics import mean_iou
from kdfast.nn.blocks import MapTransformer, conv_block

SIZE, DIGIT = 32, 8
BACKGROUND, IGNORE = 10, 255
CLASSES = BACKGROUND + 1
FAINT = 0.25  # ink up to this is the edge of a digit
TEACHER_WIDTH = 32  # of the CNN that teaches another
COUNTS = {"student": 400, "val": 100, "test": 200}


# ---------------------------------------------------------------- data
def canvas_splits(seed: int) -> dict[str, Rows]:
    """ "student", "val", "test": 400, 100, 200 canvases [N, 1, 32, 32] with labels [N, 32, 32]; no digit image is in two of them."""
    digits = digit_splits(seed)
    sources = {"student": "teacher", "val": "val", "test": "test"}  # the largest part for training
    random = np.random.default_rng(seed)
    splits = {}
    for name, count in COUNTS.items():
        images, labels = digits[sources[name]].tensors
        splits[name] = Rows(*canvases(images, labels, count, random))
    return splits


def taught_canvas_splits(seed: int) -> dict[str, Rows]:
    """`canvas_splits` with a "teacher" who learns from the canvases that the student learns from."""
    splits = canvas_splits(seed)
    return splits | {"teacher": splits["student"]}


def canvases(images: Tensor, labels: Tensor, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`count` canvases, each with 4 to 6 of `images` [N, 1, 8, 8] at random places where none covers another.

    >>> inputs, targets = canvases(*digit_images(), 16, np.random.default_rng(0))
    """
    inputs = torch.zeros(count, 1, SIZE, SIZE)
    targets = torch.full((count, SIZE, SIZE), BACKGROUND)
    for canvas, target in zip(inputs, targets):
        places = _places(int(random.integers(4, 7)), random)
        for (top, left), index in zip(places, random.integers(len(images), size=len(places))):
            box = slice(top, top + DIGIT), slice(left, left + DIGIT)
            image = images[index, 0]
            canvas[0][box] = image
            target[box] = torch.where(image > FAINT, labels[index], torch.where(image > 0, IGNORE, BACKGROUND))
    return inputs, targets


def _places(number: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Top left corners of boxes that do not overlap; begun anew when the free space is cut up too much for another one."""
    while True:
        places: list[tuple[int, int]] = []
        for top, left in random.integers(SIZE - DIGIT + 1, size=(20 * number, 2)).tolist():
            if all(max(abs(top - y), abs(left - x)) >= DIGIT for y, x in places):
                places.append((top, left))
            if len(places) == number:
                return places


# ---------------------------------------------------------------- students
class SegmentationCNN(nn.Module):
    """Encoder and decoder with skips, 63k weights at width 16: [B, 1, 32, 32] -> [B, 11, 32, 32].

    `low` returns the first map after the stem [B, 2 width, 16, 16], `high` the encoder's last one [B, 3 width, 8, 8].
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        one, two, three, middle = width, 2 * width, 3 * width, 3 * width // 2
        self.stem = conv_block(1, one)
        self.low = nn.Sequential(nn.MaxPool2d(2), conv_block(one, two))
        self.high = nn.Sequential(nn.MaxPool2d(2), conv_block(two, three), conv_block(three, three))
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.middle, self.last = conv_block(three + two, middle), conv_block(middle + one, one)
        self.head = nn.Conv2d(one, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        low = self.low(stem)
        middle = self.middle(torch.cat((self.up(self.high(low)), low), 1))
        return self.head(self.last(torch.cat((self.up(middle), stem), 1)))


class SegmentationViT(nn.Module):
    """Four Transformer blocks over 4x4 patches and a convolutional decoder, 177k weights: [B, 1, 32, 32] -> [B, 11, 32, 32].

    Patches are embedded by a convolutional stem (Xiao et al. 2021, https://arxiv.org/abs/2106.14881): the grid of patches cuts a
    digit in sixteen ways, and with a linear embedding the network learns the ink but hardly which digit it is, not in 1200 steps
    either. The decoder is a sub-pixel convolution (Shi et al. 2016, https://arxiv.org/abs/1609.05158), all pixels of a patch at
    once; two transposed convolutions of 32 and 16 channels kept it from learning the classes, on digits placed on the grid too.
    `low` returns the map of the first block [B, 64, 8, 8], `high` that of the last one, of the same shape.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            conv_block(1, 16), conv_block(16, 32, 2), conv_block(32, 64, 2), nn.Conv2d(64, width, 1)
        )
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, SIZE // 4, SIZE // 4))
        self.low, self.high = MapTransformer(width, 1), MapTransformer(width, 3)
        self.decoder = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, 16 * CLASSES, 1), nn.PixelShuffle(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.high(self.low(self.patches(x) + self.positions)))


def rise_and_fall(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Rate: up over the first 20 steps, then constant, in the last 30 % linearly to 0, so that batch norms settle before the test."""

    def share(step: int) -> float:
        return min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))

    return LambdaLR(optimizer, share)


def canvases_task() -> Task:
    """Eleven classes per pixel; two students, a CNN with 63k and a ViT with 177k weights, in epochs of 25 steps."""
    return Task(
        name="canvases",
        title="handwritten digits (scikit-learn) on 32x32 canvases, a class per pixel, a CNN and a ViT trained together",
        splits=canvas_splits,
        student=SegmentationCNN,
        teacher=SegmentationViT,
        peers=True,
        layers={"low": ("low", "low"), "high": ("high", "high")},
        widths={"low": (32, 64), "high": (48, 64)},
        classes=CLASSES,
        dim=1,
        ignore_index=IGNORE,
        metrics={"mIoU": partial(mean_iou, num_classes=CLASSES, ignore_index=IGNORE)},
        steps=250,
        eval_every=25,
        batch_size=16,
        lr=3e-3,
        scheduler=rise_and_fall,
        threads=1,
    )


def canvas_cnns_task() -> Task:
    """Eleven classes per pixel; a CNN of width 16 with 63k weights, for teachers that are trained one of width 32 with 250k."""
    return dataclasses.replace(
        canvases_task(),
        name="canvas_cnns",
        title="handwritten digits (scikit-learn) on 32x32 canvases, a class per pixel, CNNs of two widths",
        splits=taught_canvas_splits,
        teacher=partial(SegmentationCNN, TEACHER_WIDTH),
        peers=False,
        widths={"low": (32, 2 * TEACHER_WIDTH), "high": (48, 3 * TEACHER_WIDTH)},
        hints={"image_channels": 1, "label_scale": 100 / 255},  # images of 0 to 1
        teacher_steps=250,
    )
