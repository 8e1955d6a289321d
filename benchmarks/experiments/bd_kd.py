"""BD-KD on digits with a tenth of the training labels wrong: accuracy and calibration of the student beside other online losses.

Teacher 64-256-256-10 and student 64-12-10 learn together for 800 steps. Arms: labels alone (both independent), mutual learning
(forward KL both ways), reverse KL alone, the fixed sum of both (delta = 1), BD-KD with hard and with soft weights; T = 4 for all,
nothing tuned. The claims to look at: BD-KD not below mutual learning in accuracy, its calibration error below that of labels
alone and of mutual learning, delta = 1 not better calibrated than BD-KD.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.experiments._common import measure_sentence, measured, run_own
from kdfast.data import Task
from kdfast.experiment import Arm
from kdfast.metrics import expected_calibration_error
from kdfast.train import Distiller

ARMS = (
    Arm("ce", None),
    Arm("mutual", "mutual", {"temperature": 4.0}),
    Arm("reverse", "bd_kd", {"weighting": "fixed", "weights": (0.0, 1.0)}),
    Arm("delta_1", "bd_kd", {"delta": 1.0}),
    Arm("soft", "bd_kd", {"weighting": "soft", "delta": 1.0}),
    Arm("bd_kd", "bd_kd"),
)
CLAIMS = (("bd_kd", "ce"), ("bd_kd", "mutual"), ("bd_kd", "reverse"), ("bd_kd", "delta_1"), ("bd_kd", "soft"))


def run(
    out: Path, *, seeds: int = 10, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "noisy_digits", "bd_kd", CLAIMS, seeds=seeds, steps=steps, task=task, work=work, arms=ARMS, measure=calibration,
        more=more,
    )  # fmt: skip


def more(results: dict[str, Any]) -> list[str]:
    return [measured(results, "ECE", scale=100), *(measure_sentence(results, "ECE", *pair) for pair in CLAIMS)]


@torch.no_grad()
def calibration(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """Expected calibration error of the student on the test split, 15 bins."""
    found = [(distiller.student(images), labels) for images, labels in loaders["test"]]
    logits, labels = (torch.cat(column) for column in zip(*found))
    return {"ECE": expected_calibration_error(logits, labels)}
