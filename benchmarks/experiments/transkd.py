"""TransKD on canvases of digits: what stage maps, their fusion, patch embeddings and the two larger variants add to labels alone.

Student and teacher are transformers of three stages (widths 8, 16, 32 and 16, 32, 64), the teacher trained on the same 400
canvases; 400 steps of 16 for every student, none trained before. The students' rate, 0.01, was chosen beside 0.003 with labels alone,
on the validation split of seed 0 (51 and 14 mIoU), and 400 steps beside 300 (51 and 23). Arms: labels alone (ce); hcl on maps behind
a 1x1 convolution (projected); hcl behind CSF (csf); CSF and patch embeddings (base); with the global-local mixer (gl); with the
embedding assistant (ea). The settings are the method's defaults, weights of three embeddings the paper's last three; the last epoch
counts in every arm, since labels alone keep none. The claims to look at: base above labels alone, and not below projected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.experiments._common import run_own
from kdfast.data import Task
from kdfast.experiment import Arm

LAST: dict[str, Any] = {"keep": "last"}
ARMS = (
    Arm("ce", None),
    Arm("projected", "transkd", {"fusion": "projected", "variant": "none", **LAST}),
    Arm("csf", "transkd", {"variant": "none", **LAST}),
    Arm("base", "transkd", LAST),
    Arm("gl", "transkd", {"variant": "gl", **LAST}),
    Arm("ea", "transkd", {"variant": "ea", **LAST}),
)
CLAIMS = (
    ("base", "ce"),
    ("base", "projected"),
    ("projected", "ce"),
    ("csf", "projected"),
    ("base", "csf"),
    ("gl", "base"),
    ("ea", "base"),
)


def run(
    out: Path, *, seeds: int = 5, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "canvas_stages", "transkd", CLAIMS, seeds=seeds, steps=steps, task=task, work=work, arms=ARMS
    )  # fmt: skip
