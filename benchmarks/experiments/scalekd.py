"""ScaleKD on digits of 16x16: what a ViT's features and its own last stage add to its logits for a small CNN with 200 labels.

Teacher: two stages of patches (8x8 of width 64, 4x4 of width 128) on 900 labels; student: CNN with 18k weights, maps of the same grids.
Arms: labels alone; the logit term alone (kd, at ScaleKD's weights and temperature); the whole method; the whole without the
alternating view, without the teacher's last stage (no_tpp), with 1x1 convolutions as projectors (no_cap). The settings are the method's
defaults, nothing is tuned per arm; the teacher's depth, rate and initial positions were chosen by its own validation score on seed 0 (one or
two blocks per stage, rates from 0.0003 to 0.002, positions of 0.02 or 0.2). The claims to look at: whole not below kd, kd not below labels; each of the three that leave
something out not above the whole by more than one standard error.

As it came out, the teacher is no better on the test split than the CNN that learned from its 200 labels alone, so there is little to
take over, and no comparison is decided. Not tried: a teacher trained for longer or on more images, other weights of the views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments._common import run_own
from kdfast.data import Task
from kdfast.experiment import Arm
from kdfast.metrics.comparison import summary

ARMS = (
    Arm("ce", None),
    Arm("kd", "kd", {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5}),
    Arm("no_alternating", "scalekd", {"alpha_alternating": 0.0}),
    Arm("no_tpp", "scalekd", {"tpp": False}),
    Arm("no_cap", "scalekd", {"projector": "conv"}),
    Arm("scalekd", "scalekd"),
)
PARTS = ("no_alternating", "no_tpp", "no_cap")
CLAIMS = (("kd", "ce"), ("scalekd", "ce"), ("scalekd", "kd"), *(("scalekd", part) for part in PARTS))


def run(
    out: Path, *, seeds: int = 10, steps: int | None = None, task: Task | None = None, work: Path | None = None
) -> dict[str, Any]:
    return run_own(
        out, "digit_patches", "scalekd", CLAIMS, seeds=seeds, steps=steps, task=task, work=work, arms=ARMS, more=more
    )  # fmt: skip


def more(results: Mapping[str, Any]) -> list[str]:
    whole = results["arms"]["scalekd"]["test"]
    return [above(part, results["arms"][part]["test"], whole) for part in PARTS]


def above(part: str, scores: Sequence[float], whole: Sequence[float]) -> str:
    """Whether the mean of `part` is above that of the whole by more than one standard error of the paired difference."""
    found = summary([a - b for a, b in zip(scores, whole)])
    mean, error = 100 * found["mean"], found["standard_error"]
    if error is None:
        return f"{part} - scalekd: {mean:+.2f} points (n = 1): one seed decides nothing"
    verdict = "above" if mean > 100 * error else "not above"
    return f"{part} - scalekd: {mean:+.2f} ± {100 * error:.2f} points (n = {found['n']}): {verdict} the whole by more than one standard error"
