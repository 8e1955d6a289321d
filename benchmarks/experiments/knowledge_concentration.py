"""Knowledge Concentration on digits under a label tree: specialists as teachers, layers per vertical, a pace per vertical.

Three specialists, MLPs 64-64-128, on their vertical's share of 1000 images, 620 Adam steps of 32 at 1e-3 (20 epochs); students with hidden
layers of 64 and 32 on 300 of the images, 560 steps of 32 at 3e-3 (60 epochs); 30 % of the training labels are wrong, for both. Score: average precision
of a class over 700 clean images, mean over a vertical's classes, mean over verticals. Arms: layout (a) fc-fc with the labels, then with
the distillation (+D); layout (b) fc-sc +D, and with the pace; the pace per class, a gamma that stays at sqrt(N_v), one that starts at
10; layouts (c) sc-sc and (d), half shared, +D. Not tuned. The claims to look at: (a)+D above (a); (b)+D not below (a)+D; (b)+D+pace
not below (b)+D.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.experiments._common import run_own
from kdfast.data import Task
from kdfast.experiment import Arm

SLUG = "knowledge_concentration"
ARMS = (
    Arm("a, labels", SLUG, {"layout": "fc-fc", "pace": None, "label_weight": 1.0}),
    Arm("a +D", SLUG, {"layout": "fc-fc", "pace": None}),
    Arm("b +D", SLUG, {"pace": None}),
    Arm("c +D", SLUG, {"layout": "sc-sc", "pace": None}),
    Arm("d +D", SLUG, {"pace": None, "shared_dim": 16}),
    Arm("b +D, pace of classes", SLUG, {"pace": "class"}),
    Arm("b +D, fixed pace", SLUG, {"gamma_fixed": True}),
    Arm("b +D, pace from 10", SLUG, {"gamma_init": 10.0}),
    Arm("b +D, pace", SLUG),
)
CLAIMS = (
    ("a +D", "a, labels"), ("b +D", "a +D"), ("b +D, pace", "b +D"), ("b +D, pace", "a, labels"), ("b +D, pace", "b +D, pace of classes"),
    ("b +D, pace", "b +D, fixed pace"), ("b +D, pace", "b +D, pace from 10"), ("c +D", "b +D"), ("d +D", "b +D"),
)  # fmt: skip


def run(
    out: Path, *, seeds: int = 10, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(out, "digit_tree", SLUG, CLAIMS, seeds=seeds, steps=steps, task=task, work=work, arms=ARMS)
