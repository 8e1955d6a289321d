"""RotNet: a network that must say by how many quarter turns an image was rotated learns features without labels.

Paper: Unsupervised Representation Learning by Predicting Image Rotations. Gidaris, Singh, Komodakis; ICLR 2018;
https://arxiv.org/abs/1803.07728
Based on: the authors' code, github.com/gidariss/FeatureLearningRotNet at edafaba: dataloader.py, algorithms, architectures, config.
    No disagreement between paper and code is known; the published checkpoints differ slightly from those of the paper.
Differs from the code: images that are not square are refused with the way out (`kdfast.data.rotations.rotate_pairs`), where the
    code fails while stacking; the linear probe pools to 2 x 2 and standardises, the code's is for AlexNet's maps.
Symbols: x [B, Ch, S, S] images; R_k k quarter turns counter-clockwise; F blocks, global mean, Linear(width, 4).

    stage 1    loss = mean over the 4 B rows of CE(F(R_k(x_b)), k)             all four turns of each image in one batch
    stage 2    blocks frozen in evaluation mode, a classifier (the probe) on the map of a middle block, on labelled images

The last block is about turns: a middle one has the better features. Inference: probe on frozen features; the 4-way head is dropped.
Augmentation comes first (one draw for the four copies), normalisation before or after. The four-fold batch through the network
is the cost of a step; turning the images is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdfast._checks import check_choice, check_float_tensor, check_int
from kdfast.data.rotations import rotate4, rotation_labels
from kdfast.losses import LossOutput, cross_entropy_loss
from kdfast.methods._protocol import Context, Setup
from kdfast.methods._protocol import Method as MethodBase
from kdfast.nn import conv_block

PROBES = ("linear", "mlp", "conv")
# (epochs up to here, rate) of the CIFAR-10 recipe: 200 epochs for the turns, 100 for the probe, SGD 0.9, Nesterov, decay 5e-4
PRETEXT_RATES = ((60, 0.1), (120, 0.02), (160, 0.004), (200, 0.0008))
PROBE_RATES = ((35, 0.1), (70, 0.02), (85, 0.004), (100, 0.0008))


def rate_at(epoch: int, rates: Sequence[tuple[int, float]] = PRETEXT_RATES) -> float:
    """The learning rate of an epoch, counted from 0; after the last one it stays.

    >>> [rate_at(epoch) for epoch in (0, 59, 60, 500)]
    [0.1, 0.1, 0.02, 0.0008]
    """
    return next((rate for end, rate in rates if epoch < end), rates[-1][1])


def rotation_prediction_loss(logits: Tensor, *, labels: Tensor | None = None, layout: str = "image_major") -> Tensor:
    """Mean cross-entropy of logits [4 B, 4] with the turns of `kdfast.data.rotations.rotate4`.

    Args: labels: [4 B] in 0 to 3, where the rows are in another order. layout: of rows without labels.
    Raises:
        ValueError: not [4 B, 4] with B >= 1, a label outside 0 to 3.

    >>> images, turns = rotate4(x)
    >>> loss = rotation_prediction_loss(model(images))
    """
    check_float_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] != 4 or logits.shape[0] % 4 or not logits.shape[0]:
        raise ValueError(f"logits: expected [4 B, 4], at least one image, got shape {tuple(logits.shape)}")
    if labels is None:
        labels = rotation_labels(logits.shape[0] // 4, layout=layout, device=logits.device)
    return cross_entropy_loss(logits, labels, ignore_index=None)


# ---------------------------------------------------------------- networks
def probe_head(kind: str, channels: int, classes: int, *, width: int = 192, grid: int = 2) -> nn.Module:
    """A classifier of maps [N, channels, h, w].

    "linear": mean over a grid x grid of parts, standardised over the labelled images, Linear. "mlp": the same, three layers.
    "conv": 3x3, 1x1, 1x1 convolutions of `width` channels with batch norm and ReLU, global mean, Linear (the paper's).
    """
    check_choice("kind", kind, PROBES)
    if kind == "conv":
        sizes = ((channels, width, 3), (width, width, 1), (width, width, 1))
        return nn.Sequential(*(conv_block(a, b, kernel=k) for a, b, k in sizes), *_mean(), nn.Linear(width, classes))
    inputs = channels * grid * grid
    pooled = (nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.BatchNorm1d(inputs, affine=False))
    if kind == "linear":
        return nn.Sequential(*pooled, nn.Linear(inputs, classes))
    hidden = [nn.Sequential(nn.Linear(a, width), nn.BatchNorm1d(width), nn.ReLU()) for a in (inputs, width)]
    return nn.Sequential(*pooled, *hidden, nn.Linear(width, classes))


def _mean() -> tuple[nn.Module, nn.Module]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten()


class RotNet(nn.Module):
    """Blocks with two ends: turns [N, 4] of the last map while `probing` is False and it trains, else classes [N, C] by the probe.

    Args:
        blocks: modules, map to map. widths: their output channels. layer: the block the probe reads (1: the second).
        probe, width, grid: `probe_head`. freeze: in the probing stage the blocks stay in evaluation mode, without gradient; False
            trains them along (fine-tuning; from a fresh network, supervised training).
    Convolutions start at normal(0, sqrt(2 / (k k out))), as in the code.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], widths: Sequence[int], classes: int, *, layer: int = 1, probe: str = "linear",
        freeze: bool = True, width: int = 192, grid: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer = range(len(blocks))[layer]
        self.blocks, self.freeze, self.probing = nn.ModuleList(blocks), freeze, False
        self.turns = nn.Sequential(*_mean(), nn.Linear(widths[-1], 4))
        self.probe = probe_head(probe, widths[self.layer], classes, width=width, grid=grid)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, (2 / (module.weight[0, 0].numel() * module.out_channels)) ** 0.5)
        nn.init.zeros_(cast(nn.Linear, self.turns[-1]).bias)

    def probe_stage(self, on: bool = True) -> None:
        """Turns the second stage on (or off)."""
        self.probing = on
        self.train(self.training)

    def train(self, mode: bool = True) -> RotNet:
        super().train(mode)
        if self.probing and self.freeze:
            self.blocks.eval()
        return self

    def features(self, images: Tensor, layer: int) -> Tensor:
        """The map of block number `layer`."""
        for block in self.blocks[: layer + 1]:
            images = block(images)
        return images

    def forward(self, images: Tensor) -> Tensor:
        if self.training and not self.probing:
            return self.turns(self.features(images, len(self.blocks) - 1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            maps = self.features(images, self.layer)
        return self.probe(maps)


def network_in_network(channels: int = 3, stages: int = 4) -> tuple[list[nn.Module], list[int]]:
    """(blocks, widths) of the paper's CIFAR network: 192, 160, 96 channels in the first block, 192 in the others."""
    check_int("stages", stages, low=2)
    blocks: list[nn.Module] = []
    for stage in range(stages):
        sizes = (channels, 192, 160, 96) if stage == 0 else (96 if stage == 1 else 192, 192, 192, 192)
        kernel = 5 if stage < 2 else 3
        layers: list[nn.Module] = [conv_block(a, b, kernel=k) for a, b, k in zip(sizes, sizes[1:], (kernel, 1, 1))]
        # Pools open the next block, so that the map of a block is the one before them.
        pool = {1: nn.MaxPool2d(3, 2, 1), 2: nn.AvgPool2d(3, 2, 1)}.get(stage)
        blocks.append(nn.Sequential(*([pool] if pool else []), *layers))
    return blocks, [96] + [192] * (stages - 1)


def small_blocks(channels: int = 1) -> tuple[list[nn.Module], list[int]]:
    """(blocks, widths) for images of 8x8: 3x3 convolutions of 32, 64 and, after pooling, 64 channels."""
    third = nn.Sequential(nn.MaxPool2d(2), conv_block(64, 64))
    return [conv_block(channels, 32), conv_block(32, 64), third], [32, 64, 64]


# ---------------------------------------------------------------- by name
class Method(MethodBase):
    """Both stages in one run, on a `RotNet` and batches {"images": [B, Ch, S, S], "labels": [B]}; no teacher.

    The first `pretext_steps` optimizer steps turn each batch and use no label; then the blocks are frozen and the probe learns from the
    rows whose label is not `ignore_index`. Parts "rotation" with "accuracy" (of the turns), then "ce".
    """

    uses_teacher = False

    def __init__(self, *, pretext_steps: int = 300, ignore_index: int = -100) -> None:
        super().__init__()
        self.pretext_steps, self.ignore_index = check_int("pretext_steps", pretext_steps), ignore_index
        self.done = 0  # optimizer steps

    @staticmethod
    def students(
        *, classes: int, channels: int, pretext_steps: int
    ) -> dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]:
        """What to compare on small images: labels alone from scratch; frozen random blocks; turns first, then the probe."""

        def small(steps: int, **options: Any) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
            return lambda: RotNet(*small_blocks(channels), classes, **options), {"pretext_steps": steps}

        return {
            "supervised": small(0, layer=2, freeze=False, grid=1),
            "random": small(0),
            "rotnet": small(pretext_steps),
        }

    def start(self, setup: Setup) -> None:
        self.done = setup.step
        self._stage(setup.student)

    def after_step(self, student: nn.Module, teacher: nn.Module | None, step: int) -> None:
        self.done = step
        self._stage(student)

    def _stage(self, student: nn.Module) -> None:
        on = self.done >= self.pretext_steps
        if isinstance(student, RotNet) and student.probing != on:
            student.probe_stage(on)

    def prepare(self, batch: Any) -> Any:
        if self.done >= self.pretext_steps:
            return batch
        images, labels = rotate4(batch["images"])
        return batch | {"images": images, "labels": labels}

    def forward(self, context: Context) -> LossOutput:
        assert context.labels is not None
        if self.done < self.pretext_steps:
            loss = rotation_prediction_loss(context.student, labels=context.labels)
            right = (context.student.argmax(-1) == context.labels).float().mean()
            return LossOutput(loss, {"rotation": loss.detach(), "accuracy": right})
        loss = cross_entropy_loss(context.student, context.labels, ignore_index=self.ignore_index)
        return LossOutput(loss, {"ce": loss.detach()})
