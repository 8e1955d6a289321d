"""Digits at 32 x 32 for networks that read an image as ImageNet's do: a stem, then four stages from a quarter of the resolution on."""

from __future__ import annotations

from kdfast.data.digit_stages import StageNet
from kdfast.data.digits import CLASSES, digit_splits
from kdfast.data.task import Rows, Task

SCALE, WIDTHS = 4, (16, 32, 64, 64)


def large_splits(seed: int) -> dict[str, Rows]:
    """As `digit_splits`, each pixel a square of 4 x 4, the student on all 900 training images of the teacher."""
    splits = {}
    for name, rows in digit_splits(seed).items():
        images, labels = rows.tensors
        splits[name] = Rows(images.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3), labels)
    return splits | {"student": splits["teacher"]}


def large_digits_task() -> Task:
    """Ten classes; teacher and student are the same CNN of four stages, at 8x8, 4x4, 2x2 and 1x1.

    The hints fit a method that puts a narrow latent between the first stage and the others.
    """
    stages = [f"stage{i + 1}" for i in range(len(WIDTHS))]
    return Task(
        name="large_digits",
        title="handwritten digits (scikit-learn) at 32x32, CNNs of four stages on 900 labels",
        splits=large_splits,
        student=lambda: StageNet(WIDTHS, stem=True),
        teacher=lambda: StageNet(WIDTHS, stem=True),
        layers={stage: (stage, stage) for stage in stages},
        widths={stage: (width, width) for stage, width in zip(stages, WIDTHS)},
        classes=CLASSES,
        hints={"in_channels": 1, "bottleneck_channels": 4, "quantiles": "solved", "init_scale": 1.0},
        steps=280,
        eval_every=40,
        teacher_steps=280,
        threads=1,
    )
