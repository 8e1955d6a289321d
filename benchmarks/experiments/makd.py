"""MaKD on digits: do the answers to questions about an image help a classifier, and is it the answers, not the extra outputs?

100 images; the student, an MLP 64-32-(10+16), learns 16 answers per image from logistic models fitted on 400 other images, which are soft and
err; 400 AdamW steps of 25. Arms: labels alone, with the same 26 outputs; with the answers, at alpha 4 and 1; with the answers of other
images (shuffled). The claims to look at: the answers above labels alone, and above shuffled ones. The gain is small: differences are paired
by seed. Nothing is tuned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.experiments._common import run_own
from kdfast.data import Task
from kdfast.experiment import Arm

ARMS = (
    Arm("labels", "makd", {"alpha": 0.0}),
    Arm("shuffled", "makd", {"alpha": 4.0, "column": 3}),
    Arm("answers 1", "makd", {"alpha": 1.0}),
    Arm("answers", "makd", {"alpha": 4.0}),
)
CLAIMS = (("answers", "labels"), ("answers", "shuffled"), ("answers 1", "labels"), ("shuffled", "labels"))


def run(
    out: Path, *, seeds: int = 20, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "aspect_digits", "makd", CLAIMS, seeds=seeds, steps=steps, task=task, work=work, arms=ARMS
    )  # fmt: skip
