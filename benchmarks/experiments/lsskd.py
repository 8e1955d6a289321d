"""LSSKD on digits with 200 and with 1000 labels: what the network's own earlier predictions, the branches, and the transfer between them add.

CNN of three stages (8, 16, 32 channels), SGD with momentum and a cosine, 30 epochs in batches of 64 before rotation. Arms: labels alone
and with label smoothing, both for four times the steps (the branches see four turned copies, so all see as many images); the
self-distillation of the last classifier alone, likewise; branches with L_LS alone; the whole loss. Not tuned. The claims to look at:
the whole above labels alone at 200 labels; whole not below branches alone, branches not below labels.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments._common import run_tasks, sentences
from kdfast.data import Rows, Task, load_task
from kdfast.data.digits import digit_splits
from kdfast.experiment import Arm

ARMS = (
    Arm("ce", None, rounds=4),
    Arm("smoothing", None, {"label_smoothing": 0.1}, rounds=4),
    Arm("self_kd", "lsskd", {"branches": False}, rounds=4),
    Arm("branches", "lsskd", {"kl_weight": 0.0, "feature_weight": 0.0}),
    Arm("lsskd", "lsskd"),
)
CLAIMS = (("lsskd", "ce"), ("lsskd", "smoothing"), ("lsskd", "self_kd"), ("lsskd", "branches"), ("branches", "ce"))
LABELS = {200: 10, 1000: 5}  # seeds of each size


def splits(seed: int, labels: int) -> dict[str, Rows]:
    found = digit_splits(seed, teacher=max(labels, 300), student=min(labels, 200), val=200)
    return found | ({"student": found["teacher"]} if labels > 300 else {})


def staged_digits(labels: int) -> Task:
    return dataclasses.replace(
        load_task("digit_stages"),
        name=f"digit_stages_{labels}",
        title=f"handwritten digits (scikit-learn), {labels} labels, a CNN of three stages without a teacher",
        splits=partial(splits, labels=labels),
        steps=30 * labels // 64,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
        scheduler=lambda optimizer, total: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total),
    )


def run(
    out: Path, *, seeds: int | None = None, steps: int | None = None, tasks: list[Task] | None = None, work: Path | None = None
) -> dict[str, Any]:  # fmt: skip
    """All sizes of LABELS (seeds=None: as many as stand there)."""
    tasks = tasks or [staged_digits(labels) for labels in LABELS]
    numbers = {task.name: seeds or LABELS[int(task.name.rpartition("_")[2])] for task in tasks}
    return run_tasks(
        out, "lsskd", tasks, partial(sentences, claims=CLAIMS), seeds=numbers, steps=steps, work=work, arms=ARMS
    )
