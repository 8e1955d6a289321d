"""Digits for methods that read a network stage by stage: a small CNN of three stages, at 8x8, 4x4 and 2x2."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from kdfast.data.digits import CLASSES, digit_splits
from kdfast.data.task import Task
from kdfast.nn.blocks import conv_block

WIDTHS, TEACHER_WIDTHS = (8, 16, 32), (32, 64, 128)


def _stage(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*conv_block(before, after, stride), *conv_block(after, after))


class StageNet(nn.Sequential):
    """`stage1`, `stage2`, ... return maps [B, widths[i], S, S], [.., S/2, S/2], ...; then the mean and `head`: logits [B, 10].

    S is the image's size, or with `stem`, a convolution of stride 2 that comes first, a quarter of it.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, *, stem: bool = False) -> None:
        first = [("stem", conv_block(1, widths[0], 2))] if stem else []
        pairs = zip((widths[0] if stem else 1, *widths), widths)
        stages = [(f"stage{i + 1}", _stage(a, b, 1 if i == 0 and not stem else 2)) for i, (a, b) in enumerate(pairs)]
        super().__init__(OrderedDict([*first, *stages, ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())]))
        self.head = nn.Linear(widths[-1], CLASSES)


def digit_stages_task() -> Task:
    """Ten classes; student CNN with 18k weights on 200 labels, a teacher four times as wide on 900 for methods that want one."""
    pairs = list(zip(WIDTHS, TEACHER_WIDTHS))
    names = {
        "stage1": ("stage1", 0),
        "stage2": ("stage2", 1),
        "stage3": ("stage3", 2),
        "tokens": ("stage2", 1),
        "embedding": ("stage3", 2),
    }
    return Task(
        name="digit_stages",
        title="handwritten digits (scikit-learn), 200 labels, CNNs of three stages",
        splits=digit_splits,
        student=StageNet,
        teacher=lambda: StageNet(TEACHER_WIDTHS),
        layers={name: (path, path) for name, (path, _) in names.items()},
        widths={name: pairs[stage] for name, (_, stage) in names.items()},
        classes=CLASSES,
        steps=200,
        eval_every=40,
        teacher_steps=200,
        threads=1,
    )  # fmt: skip
