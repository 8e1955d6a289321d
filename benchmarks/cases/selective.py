"""Selective pixel distillation of two models on one batch of segmentation logits: both receive a gradient."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines.selective import selective_kd
from benchmarks.case import Case, Inputs, table_targets
from kdfast import losses


def maps(batch: int, classes: int, height: int, width: int) -> Inputs:
    """Two models that each know half of the pixels better; 5 % of the pixels has no label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (batch, height, width), generator=generator)
    right = torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).float() * 2
    shape = (batch, classes, height, width)
    logits_a = torch.randn(shape, generator=generator) + right
    logits_b = torch.randn(shape, generator=generator) + right
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = 255
    return {"logits_a": logits_a.requires_grad_(), "logits_b": logits_b.requires_grad_(), "labels": labels}


def ours(logits_a: Tensor, logits_b: Tensor, labels: Tensor, backend: str | None = None) -> Tensor:
    return losses.selective_kd_loss(logits_a, logits_b, labels, backend=backend).loss


CASES = (
    Case(
        name="selective_kd_loss_2x19x512x1024_fp32", op="selective", title="selective_kd_loss", shape="2x19x512x1024", dtype="float32",
        inputs=partial(maps, 2, 19, 512, 1024), ours=ours, plain=selective_kd,
        # Both maps read, both gradients written, labels (8 bytes) read.
        traffic=2 * 512 * 1024 * (19 * 4 * 4 + 8), leaves=("logits_a", "logits_b"),
        targets=table_targets(default=(15, 6), tuned=(8, 4)),
    ),
)  # fmt: skip
