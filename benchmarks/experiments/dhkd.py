"""DHKD on digits: does a second head for the logit loss help against one head, and what does gradient alignment do?

900 training images for teacher and student, student 64-32-32-10, SGD with momentum, 1800 steps. Arms: labels alone; plain KD; both
losses on one head; a linear second head; a non-linear one; the whole method. The settings are the method's defaults, nothing is
tuned. The collapse of the classifier that the paper reports did not show on ten classes in a trial, so the claim to look at is only:
the non-linear second head with alignment is best or equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.experiments._common import measured, run_own
from kdfast.data import Task, load_task
from kdfast.data.digit_maps import map_splits
from kdfast.data.digits import digit_mlp
from kdfast.experiment import Arm
from kdfast.train import Distiller

ARMS = (
    Arm("ce", None),
    Arm("kd", "kd"),
    Arm("one_head", "dhkd", {"aux": "none", "align": False}),
    Arm("linear_head", "dhkd", {"aux": "linear", "align": False}),
    Arm("nonlinear_head", "dhkd", {"align": False}),
    Arm("dhkd", "dhkd"),
)
CLAIMS = (
    ("dhkd", "ce"), ("dhkd", "kd"), ("dhkd", "one_head"), ("dhkd", "linear_head"), ("dhkd", "nonlinear_head"), ("one_head", "ce"),
)  # fmt: skip


def many_digits() -> Task:
    """Digits, the student on all of its teacher's 900 images."""
    return dataclasses.replace(
        load_task("digits"),
        name="many_digits",
        title="handwritten digits (scikit-learn), 900 labels for the student too, 64-32-32-10",
        splits=map_splits,
        student=partial(digit_mlp, 32),
        steps=1800,
        eval_every=180,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
    )


def run(
    out: Path, *, seeds: int = 5, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "", "dhkd", CLAIMS, seeds=seeds, steps=steps, task=task or many_digits(), work=work, arms=ARMS, measure=conflicts,
        more=lambda results: [measured(results, "share of steps with opposed gradients")],
    )  # fmt: skip


def conflicts(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """Share of the steps in which the two gradients opposed each other, where they were compared."""
    found = [row["conflict"] for row in distiller.history.rows if "conflict" in row]
    return {"share of steps with opposed gradients": sum(found) / len(found)} if found else {}
