"""LAD on canvases of digits: is a teacher that reads the labels strong, does the student gain from it, and what are two paths for?

Students are CNNs of width 16, 250 steps of 16 for all. Arms: labels alone (ce); channel-wise KD from an ordinary teacher of width 32
(cwd); LAD from the label teacher, which is the student's own network (lad). The label teacher learns with random numbers for the
classes and two paths; the ablation (one path) with fixed numbers and a single path. Both are scored on the test split with the label
channel in three ways: the fixed numbers, new random ones, zeros. The last epoch counts in every arm, since labels alone keep none.
The settings are the method's defaults, but for the scale of the label channel: 100 / 255, since the paper's 100 is for images of
-128 to 127 and these are of 0 to 1. The claims to look at: label teacher (with its labels) clearly above labels alone; lad not below labels
alone; with new random numbers the one-path teacher loses far more than the two-path one.

Tried for the label teacher on the validation split of seed 0 (mIoU with random numbers, with zeros): width 6, rate 0.01, scale 100: 8, 8,
at 0.4: 18, 18 and at 1: 17, 17 (labels alone: 40); width 6, rate 0.003, 0.4: 25, 25 (30); width 16, rate 0.003, 0.4: 75, 75, and without
the consistency term 82, 82; under noise of 0.5, width 12, rate 0.005, 0.4: 17, 17 (18); under noise of 0.25, 350 steps, scale 3: 11, 11,
scale 100: 9, 9. In none of them did 250 to 350 steps teach the network to use its label channel: zeros serve it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.experiments._common import measured, run_own
from kdfast.data import Task
from kdfast.experiment import Arm
from kdfast.metrics.comparison import sentence
from kdfast.nn import evaluating
from kdfast.train import Distiller

LAST: dict[str, Any] = {"keep": "last"}
TEACHER = Arm("label teacher", "lad", {"stage": "teacher", **LAST})
ARMS = (
    Arm("ce", None),
    Arm("cwd", "lad", {"assistance": False, **LAST}),
    TEACHER,
    Arm("one path", "lad", {"stage": "teacher", "paths": 1, "codes": "fixed", **LAST}),
    Arm("lad", "lad", LAST, teacher=TEACHER),
)
CLAIMS = (("lad", "ce"), ("lad", "cwd"), ("cwd", "ce"))
FIXED, RANDOM, ZERO = "mIoU with fixed codes", "mIoU with random codes", "mIoU with zeros"
CHANNELS = (FIXED, RANDOM, ZERO)


def run(
    out: Path, *, seeds: int = 5, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "canvas_cnns", "lad", CLAIMS, seeds=seeds, steps=steps, task=task, work=work, arms=ARMS, measure=measure, more=more
    )  # fmt: skip


@torch.no_grad()
def measure(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """Of a teacher that reads labels: test mIoU for each kind of label channel."""
    method = distiller.method
    if getattr(method, "stage", None) != "teacher":
        return {}
    torch.manual_seed(0)
    forms = {
        FIXED: method.encode,
        RANDOM: lambda images, labels: method.encode(images, labels, random=True),
        ZERO: lambda images, labels: images,
    }
    model, (score,) = distiller.student, distiller.metrics.values()
    found = {}
    with evaluating(model):
        for name, form in forms.items():
            pairs = [(model(form(images, labels)).argmax(1), labels) for images, labels in loaders["test"]]
            found[name] = score(*(torch.cat(column) for column in zip(*pairs)))
    return found


def more(results: dict[str, Any]) -> list[str]:
    arms = results["arms"]
    lines = [measured(results, name, scale=100.0) for name in CHANNELS]
    values = arms[TEACHER.name]["measures"]
    lines.append(sentence(f"{TEACHER.name} with its labels", values[FIXED], "ce", arms["ce"]["test"], score="mIoU"))
    lost = {
        name: [a - b for a, b in zip(arms[name]["measures"][FIXED], arms[name]["measures"][RANDOM])]
        for name in (TEACHER.name, "one path")
    }
    unit = "points of mIoU that new random codes cost"
    lines.append(
        sentence("one path", lost["one path"], TEACHER.name, lost[TEACHER.name], unit=unit, lower_is_better=True)
    )
    return lines
