"""MIX-KD on digits: is each row's own deviation a better temperature than a fixed one, and is partial mixup better than full?

400 images, teacher 64-256-64-10 trained with full mixup, student 64-6-64-10, 250 AdamW steps of 64, labels 0.1 and distillation
0.9. The student's images are fully mixed, half unmixed or 0.9 unmixed; the loss is that of the method, or KD at T = 4, at T = 1, or
at the teacher's mean deviation (part of a gain may be the size of the gradient). The claims to look at: the method above T = 4
and above T = 1 at the same mixing; T = 1 above T = 4 with partial mixup; partial mixup not below full. Also measured: the
calibration error of the student's logits, and of its logits over their deviation. Nothing is tuned.
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
from kdfast.methods.mix_kd import std_scaled
from kdfast.metrics import expected_calibration_error
from kdfast.train import Distiller

UNMIXED = {"full": 0.0, "half": 0.5, "partial": 0.9}
TEMPERATURES: dict[str, Any] = {"T4": 4.0, "T1": 1.0, "Tsd": "teacher", "sd": None}
ARMS = (
    Arm("ce", None),
    Arm("kd", "mix_kd", {"mixup": False, "temperature": 4.0}),
    *(
        Arm(f"{mixing}_{name}", "mix_kd", {"unmixed_fraction": share, "temperature": temperature})
        for mixing, share in UNMIXED.items()
        for name, temperature in TEMPERATURES.items()
    ),
)
CLAIMS = (
    *((f"{mixing}_{a}", f"{mixing}_{b}") for mixing in UNMIXED for a, b in (("sd", "T4"), ("sd", "T1"), ("sd", "Tsd"))),
    *((f"{mixing}_T1", f"{mixing}_T4") for mixing in ("half", "partial")),
    *((f"partial_{name}", f"full_{name}") for name in ("sd", "T4", "T1")),
    ("partial_sd", "ce"),
    ("partial_sd", "kd"),
)


def run(
    out: Path, *, seeds: int = 12, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "mixed_digits", "mix_kd", CLAIMS, seeds=seeds, steps=steps, task=task, work=work, arms=ARMS,
        measure=calibration, more=lambda results: [measured(results, name) for name in ("ECE of s", "ECE of s/sd(s)")],
    )  # fmt: skip


@torch.no_grad()
def calibration(distiller: Distiller, loaders: Mapping[str, DataLoader]) -> dict[str, float]:
    """Expected calibration error on the test split."""
    distiller.student.eval()
    rows = [(distiller.student(images), labels) for images, labels in loaders["test"]]
    logits, labels = (torch.cat(column) for column in zip(*rows))
    return {
        "ECE of s": expected_calibration_error(logits, labels),
        "ECE of s/sd(s)": expected_calibration_error(std_scaled(logits), labels),
    }
