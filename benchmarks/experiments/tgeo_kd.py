"""TGeo-KD on digits with a teacher that is wrong on purpose: does the small network notice where?

300 training images, student 64-16-10; the teacher 64-128-10 learned half of the digits 0, 1, 2 as the next digit. Arms: labels alone; KD
with a fixed weight of 0.3, 0.5, 0.9 for the teacher; TGeo-KD with the learning rate as virtual step, and with 0.1; Adam at 2e-3, 60
epochs, tau 2. The claims to look at: TGeo-KD not below the fixed weight 0.5, and its mean weight on training samples where the
teacher is wrong below that where it is right. With such a teacher it is not expected to beat the labels alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.experiments._common import best_on_val, measured, run_own, sentences
from kdfast.data import Rows, Task, load_task
from kdfast.data.digits import digit_splits, narrow_mlp
from kdfast.experiment import Arm
from kdfast.methods import Context
from kdfast.metrics.comparison import compare
from kdfast.train import Distiller

WRONG = 3  # digits below this one
FIXED = (0.3, 0.5, 0.9)
ARMS = (
    Arm("ce", None),
    *(Arm(f"fixed_{a:g}", "kd", {"ce_weight": round(1 - a, 2), "kd_weight": a, "temperature": 2.0}) for a in FIXED),
    Arm("tgeo_eta_0.1", "tgeo_kd", {"temperature": 2.0, "eta": 0.1}),
    Arm("tgeo_kd", "tgeo_kd", {"temperature": 2.0}),
)
CLAIMS = (("tgeo_kd", "fixed_0.5"), ("tgeo_kd", "ce"), ("tgeo_kd", "tgeo_eta_0.1"))


def splits(seed: int) -> dict[str, Rows]:
    """300 images for both; half of the teacher's labels of the digits 0, 1, 2 are moved on by one."""
    found = digit_splits(seed, teacher=300, student=200, val=100)
    images, labels = found["teacher"].tensors
    generator = torch.Generator().manual_seed(seed)
    moved = (labels < WRONG) & (torch.rand(len(labels), generator=generator) < 0.5)
    return found | {"teacher": Rows(images, labels + moved.long()), "student": Rows(images, labels)}


def misled_digits() -> Task:
    return dataclasses.replace(
        load_task("digits"),
        name="misled_digits",
        title="handwritten digits (scikit-learn), 300 labels, a teacher misled about the digits 0, 1, 2",
        splits=splits,
        student=lambda: narrow_mlp(16),
        teacher=lambda: narrow_mlp(128),
        layers={},
        widths={},
        steps=300,
        teacher_steps=300,
        eval_every=50,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
    )


def run(
    out: Path, *, seeds: int = 10, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "", "tgeo_kd", CLAIMS, seeds=seeds, steps=steps, task=task or misled_digits(), work=work, arms=ARMS, measure=trust,
        more=more,
    )  # fmt: skip


def more(results: dict[str, Any]) -> list[str]:
    best, line = best_on_val(results, [f"fixed_{a:g}" for a in FIXED])
    return [
        line,
        *sentences(results, [("tgeo_kd", best)]),
        *(measured(results, name) for name in ("alpha, teacher right", "alpha, teacher wrong")),
        *(noticed(results, name) for name in ("tgeo_kd", "tgeo_eta_0.1")),
    ]


@torch.no_grad()
def trust(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """The mean weight of the teacher on training samples, where it is right and where it is wrong."""
    if not hasattr(distiller.method, "fusion_ratio"):
        return {}
    assert distiller.teacher is not None
    distiller.student.eval()
    rows = []
    for images, labels in loaders["student"]:
        teacher = distiller.teacher(images)
        alpha = distiller.method.fusion_ratio(Context(distiller.student(images), teacher, labels))
        rows.append((alpha, teacher.argmax(-1) == labels))
    alpha, right = (torch.cat(column) for column in zip(*rows))
    found = {"alpha, teacher right": alpha[right], "alpha, teacher wrong": alpha[~right]}
    return {name: float(values.mean()) for name, values in found.items()}


def noticed(results: Mapping[str, Any], name: str) -> str:
    """From the numbers: whether the weight is lower where the teacher is wrong, paired by seed."""
    measures = results["arms"][name]["measures"]
    found = compare(measures["alpha, teacher wrong"], measures["alpha, teacher right"])
    verdict = {"gain": "higher", "loss": "lower"}.get(found["verdict"], found["verdict"])
    interval = "" if found["low"] is None else f", 95 % interval {found['low']:+.3f} to {found['high']:+.3f}"
    return (
        f"{name}: the weight where the teacher is wrong against where it is right (n = {found['n']}): {verdict}; "
        f"the difference is {found['mean']:+.3f}{interval}."
    )
